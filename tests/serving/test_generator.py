import asyncio
import dataclasses

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.errors import ArtifactError
from cluster.stage import Outcome, Plan, run_stage
from serving.config import GenerationConfig
from serving.generator import Generator, StoreEngines
from serving.interfaces import Pins
from serving.telemetry import Telemetry
from serving.tracing import Tracer
from tests.serving.fakes import base_request, wait_until
from tests.serving.fakes_graph import NamingEngines, pins_of
from training.config import ModelConfig


def generator_of(tmp_path, *pins, keep_s=60.0, **source):
    log = tmp_path / "log"
    log.touch()
    engines = NamingEngines(log=log, **source)
    return Generator(engines, lambda: list(pins or [pins_of("v0")]), keep_s), log


def asked(pins, role="raft", question="Capital?"):
    return dataclasses.replace(base_request(question), adapter=pins.adapters[role])


def test_generator_generates_and_streams(tmp_path):
    generator, _ = generator_of(tmp_path)
    pins = pins_of("v0")

    async def both():
        request = asked(pins)
        return await generator.generate(request, pins), [event async for event in generator.stream(request, pins)]

    whole, events = asyncio.run(both())
    assert whole.text == "<ANSWER>: adapter/raft/v0 over nothing end" == "".join(events[:-1]) == events[-1].text


def test_generator_pieces_that_wait_are_sent_together(tmp_path):
    generator, _ = generator_of(tmp_path)

    async def slow_reader():
        events = []
        async for event in generator.stream(asked(pins_of("v0")), pins_of("v0")):
            events.append(event)
            await asyncio.sleep(0.05)
        return events

    *pieces, completion = asyncio.run(slow_reader())
    assert "".join(pieces) == completion.text and len(pieces) < len(completion.text) / 2


def test_generator_loads_an_adapter_that_a_request_pins_into_the_running_engine(tmp_path):
    generator, log = generator_of(tmp_path)

    async def next_release():
        pins = pins_of("v1")
        return await asyncio.gather(*(generator.generate(asked(pins), pins) for _ in range(3)))

    assert {done.text for done in asyncio.run(next_release())} == {"<ANSWER>: adapter/raft/v1 over nothing end"}
    assert [line.split()[1:] for line in log.read_text().splitlines()] == [["load", "adapter/raft/v1"]]


def test_generator_another_base_model_gets_an_engine_of_its_own(tmp_path):
    generator, log = generator_of(tmp_path, keep_s=0.1)
    old, new = pins_of("v0"), pins_of("v1", base="c" * 64)

    async def both():
        first = await generator.generate(asked(old), old)
        second = await generator.generate(asked(new), new)
        await asyncio.sleep(0.4)
        generator.check_health()
        return first.text, second.text, await generator.generate(asked(new), new)

    first, second, third = asyncio.run(both())
    assert "raft/v0" in first and "raft/v1" in second and third.finish_reason == "stop"
    assert "close" in log.read_text(), "the old engine is closed when nothing has used it for a while"


def test_generator_drops_adapters_of_an_old_release_but_not_those_that_serve(tmp_path):
    generator, log = generator_of(tmp_path, keep_s=0.1)
    old, new = pins_of("v0"), pins_of("v1")

    async def move_on():
        await generator.generate(asked(old), old)
        await generator.prepare(new)
        await generator.generate(asked(new), new)
        await asyncio.sleep(0.5)
        return log.read_text(), await generator.generate(asked(old), old)

    lines, again = asyncio.run(move_on())
    assert "unload adapter/raft/v0" in lines and "unload adapter/finetuned/v0" in lines
    assert "/v1" in lines and "unload adapter/raft/v1" not in lines and "unload adapter/finetuned/v1" not in lines
    assert "raft/v0" in again.text, "whoever still holds the old release is served"


def test_generator_prepare_of_what_does_not_load_raises_and_changes_nothing(tmp_path):
    generator, _ = generator_of(tmp_path)

    async def prepare():
        with pytest.raises(ArtifactError, match="adapter/raft/broken is damaged"):
            await generator.prepare(pins_of("broken"))
        return await generator.generate(asked(pins_of("v0")), pins_of("v0"))

    assert asyncio.run(prepare()).finish_reason == "stop"


def test_generator_that_starts_while_a_broken_release_is_promoted_takes_the_other(tmp_path):
    generator, _ = generator_of(tmp_path, pins_of("broken"), pins_of("v0"))
    done = asyncio.run(generator.generate(asked(pins_of("v0")), pins_of("v0")))
    assert done.finish_reason == "stop"
    with pytest.raises(ArtifactError):
        generator_of(tmp_path, pins_of("broken"))


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_generator_frees_the_slot_of_a_caller_that_goes_away(tmp_path, method):
    generator, log = generator_of(tmp_path)
    request = asked(pins_of("v0"), question="long")

    async def leave():
        async def listen():
            if method == "generate":
                await generator.generate(request, pins_of("v0"))
            else:
                async for _ in generator.stream(request, pins_of("v0")):
                    pass

        task = asyncio.create_task(listen())
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert wait_until(lambda: "cancelled" in log.read_text(), 2)


def test_generator_without_its_engine_is_unhealthy(tmp_path):
    generator, _ = generator_of(tmp_path)
    generator.check_health()
    for loaded in generator._engines.things():
        loaded.engine.close()
    with pytest.raises(RuntimeError):
        generator.check_health()


def engines_of(base, store):
    return StoreEngines(ModelConfig(base=str(base), precision="float32"), GenerationConfig(threads=1), store.uri)


def test_store_engines_other_base_model_is_refused_with_both_names(tiny_models, store):
    with pytest.raises(ArtifactError, match=r"digest aaaaaaaaaaaa.*has [0-9a-f]{12}"):
        engines_of(tiny_models.base, store).open(Pins("release/tiny/0", base_digest="a" * 64))


def test_store_engines_name_adapters_by_their_artifacts(tiny_models, store):
    from cluster.model_source import model_digest

    refs = {name: str(publish_adapter(store, name, path).ref) for name, path in tiny_models.adapters.items()}
    source, digest = engines_of(tiny_models.base, store), model_digest(tiny_models.base)
    engine = source.open(Pins("release/tiny/0", adapters=refs, base_digest=digest))
    assert set(engine.adapters) == set(refs.values())
    assert source.base(Pins("release/tiny/0")) == digest, "pins without a digest mean the recipe's model"
    engine.close()


def test_store_engines_damaged_adapter_is_refused_before_it_is_parsed(tiny_models, store):
    artifact = publish_adapter(store, "raft", tiny_models.adapters["raft"])
    path = artifact.path("adapter_model.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-10] ^= 1
    path.chmod(0o644)
    path.write_bytes(damaged)
    fresh = type(store)(store.uri)
    with pytest.raises(ArtifactError):
        engines_of(tiny_models.base, fresh).open(Pins("release/tiny/0", adapters={"raft": str(artifact.ref)}))


def publish_adapter(store, name, path):
    plan = Plan(kind="adapter", name=f"tiny-{name}", config={}, inputs={}, parents={}, format=1, seed=0)

    def copy(attempt):
        for file in path.iterdir():
            (attempt.directory / file.name).write_bytes(file.read_bytes())
        return Outcome({}, {})

    return run_stage(store, plan, copy)


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_generator_says_what_it_did_in_a_span_below_the_callers(tmp_path, method):
    spans = InMemorySpanExporter()
    observer = Telemetry(tracer=Tracer(SimpleSpanProcessor(spans), "generator"))
    pins = pins_of("v0")
    generator = Generator(NamingEngines(), lambda: [pins], observe=lambda: observer)
    request = dataclasses.replace(asked(pins), traceparent=f"00-{'4' * 32}-{'5' * 16}-01")

    async def ask():
        if method == "generate":
            await generator.generate(request, pins)
        else:
            assert [event async for event in generator.stream(request, pins)]

    asyncio.run(ask())
    [span] = spans.get_finished_spans()
    assert (span.name, f"{span.parent.span_id:x}", f"{span.context.trace_id:x}") == ("engine", "5" * 16, "4" * 32)
    told = {name.removeprefix("rayft."): value for name, value in span.attributes.items()}
    assert (told["adapter"], told["finish_reason"], told["completion_tokens"]) == ("adapter/raft/v0", "stop", 7)
    generator.__del__()  # as Serve does when the replica stops
    assert spans._stopped, "nothing is left unsent"
