import asyncio
import threading
import time

import pytest
from ray import serve

from cluster.errors import ArtifactError
from cluster.stage import Outcome, Plan, run_stage
from serving import graph
from serving.config import DeploymentConfig, ServeConfig, ServingRecipe
from serving.graph import Generator, Loaders, RetrieverReplica, assemble
from serving.router_config import RouterConfig
from tests.serving.fakes import FakeEngine, FakeRetriever, base_request, served_release


def test_generator_generates_and_streams():
    generator = Generator(FakeEngine)
    request = base_request("Capital?")

    async def both():
        return await generator.generate(request), [event async for event in generator.stream(request)]

    whole, events = asyncio.run(both())
    assert whole.text == "Athens of old" == "".join(events[:-1]) == events[-1].text


def test_generator_without_its_engine_is_unhealthy():
    engine = FakeEngine()
    generator = Generator(lambda: engine)
    generator.check_health()
    engine.close()
    with pytest.raises(RuntimeError):
        generator.check_health()


class SlowRetriever(FakeRetriever):
    """Notes the threads it is called from; fails for a query `bad`."""

    def __init__(self):
        super().__init__()
        self.threads = set()

    def search(self, queries, k):
        self.threads.add(threading.current_thread())
        time.sleep(0.05)
        if "bad" in queries:
            raise OSError("the index is gone")
        return super().search(queries, k)


def search_at_once(retriever, *asked):
    replica = RetrieverReplica(lambda: retriever)

    async def all_of_them():
        return await asyncio.gather(*(replica.search(query, k) for query, k in asked), return_exceptions=True)

    return asyncio.run(all_of_them())


def test_retriever_searches_together_what_arrives_during_a_search():
    retriever = SlowRetriever()
    replica = RetrieverReplica(lambda: retriever)

    async def one_then_three():
        first = asyncio.create_task(replica.search("a", 1))
        await asyncio.sleep(0.01)
        return await asyncio.gather(first, replica.search("b", 2), replica.search("c", 1), replica.search("d", 1))

    assert [len(hits) for hits in asyncio.run(one_then_three())] == [1, 2, 1, 1]
    assert retriever.batches == [["a"], ["b", "c", "d"]]
    assert threading.main_thread() not in retriever.threads


def test_retriever_failure_reaches_every_caller_of_that_batch_and_not_the_next():
    retriever = SlowRetriever()
    assert [type(found) for found in search_at_once(retriever, ("x", 1), ("bad", 1))] == [OSError, OSError]
    assert [len(found) for found in search_at_once(retriever, ("x", 1), ("y", 2))] == [1, 2]


def test_retriever_batches_are_bounded():
    retriever = SlowRetriever()
    search_at_once(retriever, *[(str(number), 1) for number in range(70)])
    assert [len(batch) for batch in retriever.batches] == [32, 32, 6]


@pytest.fixture
def handle():
    """The ingress of the graph, all of it in this process."""
    loaders = Loaders(FakeEngine, FakeRetriever)
    app = assemble(served_release(), RouterConfig(), ServeConfig(), loaders)
    return serve.run(app, _local_testing_mode=True)


def test_graph_searches_through_ingress(handle):
    hits = handle.options(method_name="_search").remote("Greece", 1).result()
    assert [hit.passage.doc_id for hit in hits] == ["greece"]


def test_graph_generates_and_streams_through_ingress(handle):
    request = base_request("Capital?")
    whole = handle.options(method_name="_generate").remote(request).result()
    events = list(handle.options(method_name="_stream", stream=True).remote(request))
    assert whole.text == "Athens of old" == "".join(events[:-1]) == events[-1].text
    handle.options(method_name="_check_ready").remote().result()


def test_assembled_graph_admits_at_ingress_and_claims_what_the_recipe_says():
    config = ServeConfig(
        max_queued_requests=10, generator=DeploymentConfig(cpus=0.75, gpus=0.5, min_replicas=3, max_replicas=3)
    )
    app = assemble(served_release(), RouterConfig(), config, Loaders(FakeEngine, FakeRetriever))
    ingress = app._bound_deployment
    generator, retriever = (bound._bound_deployment for bound in ingress.init_args[-2:])
    assert ingress.max_ongoing_requests > generator.max_ongoing_requests >= 20
    assert retriever.max_ongoing_requests >= 10
    assert generator.num_replicas == 3
    assert generator.ray_actor_options["num_cpus"] == 0.75 and generator.ray_actor_options["num_gpus"] == 0.5


def test_open_engine_other_base_model_is_refused_with_both_names(tiny_models, store):
    model = {"base": str(tiny_models.base), "precision": "float32"}
    with pytest.raises(ArtifactError, match=r"digest aaaaaaaaaaaa.*has [0-9a-f]{12}"):
        graph.open_engine(model, {"threads": 1}, store.uri, {}, "a" * 64)


def test_open_engine_loads_adapters_from_the_store(tiny_models, store):
    from cluster.model_source import model_digest

    refs = {name: str(publish_adapter(store, name, path).ref) for name, path in tiny_models.adapters.items()}
    model = {"base": str(tiny_models.base), "precision": "float32"}
    engine = graph.open_engine(model, {"threads": 1}, store.uri, refs, model_digest(tiny_models.base))
    assert engine.adapters == ("raft", "finetuned")
    engine.close()


def test_open_engine_damaged_adapter_is_refused_before_it_is_parsed(tiny_models, store):
    artifact = publish_adapter(store, "raft", tiny_models.adapters["raft"])
    path = artifact.path("adapter_model.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-10] ^= 1
    path.chmod(0o644)
    path.write_bytes(damaged)
    model = {"base": str(tiny_models.base), "precision": "float32"}
    fresh = type(store)(store.uri)
    with pytest.raises(ArtifactError):
        graph.open_engine(model, {"threads": 1}, fresh.uri, {"raft": str(artifact.ref)}, "")


def publish_adapter(store, name, path):
    plan = Plan(kind="adapter", name=f"tiny-{name}", config={}, inputs={}, parents={}, format=1, seed=0)

    def copy(attempt):
        for file in path.iterdir():
            (attempt.directory / file.name).write_bytes(file.read_bytes())
        return Outcome({}, {})

    return run_stage(store, plan, copy)


def test_served_release_of_another_prompt_format_is_refused(store):
    from cluster.releases import Release
    from cluster.store import ArtifactRef

    index = ArtifactRef("index", "tiny", "0" * 16)
    adapters = {"raft": ArtifactRef("adapter", "tiny", "1" * 16)}
    release = Release("tiny", "2" * 16, index, None, adapters, "", prompt_format=99)
    with pytest.raises(ArtifactError, match=r"prompt format 99.*format 1"):
        graph.served_release(ServingRecipe(name="tiny"), store, release)
