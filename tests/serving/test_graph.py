import pytest
from ray import serve

from cluster.errors import ArtifactError, UserError
from cluster.releases import Release
from cluster.stage import Outcome, Plan, run_stage
from cluster.store import ArtifactRef
from serving.config import DeploymentConfig, FeedbackConfig, ServingRecipe
from serving.feedback import DeskSettings
from serving.graph import SIDE_CPUS, _check_gpus, claims, scaling
from serving.opened_release import pins_of, served_release
from tests.serving.fakes_graph import app_of, recipe_of


@pytest.fixture(scope="module")
def handle():
    """The ingress of the graph, all of it in this process."""
    return serve.run(app_of(recipe_of()), _local_testing_mode=True)


def test_graph_drains_and_counts_through_ingress(handle):
    assert handle.drain.remote().result() == 0


def deployments_of(app):
    ingress = app._bound_deployment
    found = {"ingress": ingress}
    for bound in ingress.init_args[1:]:
        if bound is not None:
            found[bound._bound_deployment.name] = bound._bound_deployment
    return found


def test_graph_admits_at_ingress_and_claims_what_the_recipe_says():
    recipe = recipe_of(
        max_queued_requests=10,
        request_timeout_s=45,
        ingress={"min_replicas": 2, "max_replicas": 2, "cpus": 0.3},
        generator={"cpus": 0.75, "gpus": 0.5, "accelerator": "H100", "min_replicas": 3, "max_replicas": 3},
        retriever={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 5, "upscale_delay_s": 8},
    )
    found = deployments_of(app_of(recipe))
    ingress, generator, retriever = found["ingress"], found["generator"], found["retriever"]
    assert ingress.num_replicas == 2 and ingress.ray_actor_options["num_cpus"] == 0.3
    assert generator.num_replicas == 3 and generator.ray_actor_options["num_cpus"] == 0.75
    assert generator.ray_actor_options["num_gpus"] == 0.5
    assert generator.ray_actor_options["accelerator_type"] == "H100"
    assert ingress.max_ongoing_requests > 10 and generator.max_ongoing_requests >= 2 * 2 * 10
    assert generator._deployment_config.graceful_shutdown_timeout_s >= 45, "scaling away must not cut an answer"
    scaled = retriever._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas, scaled.target_ongoing_requests) == (1, 4, 5)


def test_graph_admits_by_default_what_its_engines_batch_twice_over():
    def admitted(rows, replicas, **serve):
        generator = {"max_replicas": replicas}
        recipe = {"name": "a", "generation": {"batch_rows": rows}, "serve": {"generator": generator, **serve}}
        return ServingRecipe.model_validate(recipe).max_in_flight

    assert ServingRecipe(name="a").max_in_flight == 2 * ServingRecipe(name="a").generation.batch_rows
    assert (admitted(16, 3), admitted(2, 1), admitted(16, 3, max_queued_requests=5)) == (96, 8, 5)
    found = deployments_of(app_of(recipe_of(generator={"max_replicas": 40})))
    assert found["ingress"].max_ongoing_requests == 4 * 2 * 16 * 40, "ingress sees what it refuses"
    assert found["generator"].max_ongoing_requests > 2 * 2 * 16 * 40, "`hybrid` asks twice"


def test_scaling_is_a_fixed_number_or_follows_the_load_within_its_delays():
    assert scaling(DeploymentConfig(min_replicas=2, max_replicas=2)) == {"num_replicas": 2}
    for upscale_s in (0, 1, 10, 600):
        config = DeploymentConfig(max_replicas=3, upscale_delay_s=upscale_s, downscale_delay_s=7)
        found = scaling(config)["autoscaling_config"]
        assert (found.upscale_delay_s, found.downscale_delay_s) == (upscale_s, 7)
        assert found.look_back_period_s <= max(1, upscale_s) and found.metrics_interval_s < found.look_back_period_s


def test_graph_without_an_index_has_no_retriever_and_one_without_quotas_no_ledger():
    assert set(deployments_of(app_of(recipe_of(), index=False))) == {"ingress", "generator"}
    assert set(deployments_of(app_of(recipe_of()))) == {"ingress", "generator", "retriever"}
    tenants = {"acme": {"requests_per_minute": 5}}
    one = recipe_of(tenants=tenants)
    several = recipe_of(tenants=tenants, ingress={"min_replicas": 2, "max_replicas": 2})
    assert "quotas" not in deployments_of(app_of(one)) and "quotas" in deployments_of(app_of(several))


def test_replicas_find_the_feedback_database_whatever_their_working_directory(tmp_path, monkeypatch):
    """Quotas keep their counts in it, too."""
    monkeypatch.chdir(tmp_path)
    several = recipe_of(tenants={"acme": {"tokens_per_day": 5}}, ingress={"min_replicas": 2, "max_replicas": 2})
    for recipe in (several, recipe_of(tenants={"acme": {"tokens_per_day": 5}})):
        recipe = recipe.model_copy(update={"feedback": FeedbackConfig(url="sqlite:///.rayft/feedback.db")})
        found = deployments_of(app_of(recipe, desk=DeskSettings.of(recipe)))
        url = f"sqlite:///{tmp_path}/.rayft/feedback.db"
        assert found["ingress"].init_args[0].recipe.feedback.url == found["feedback"].init_args[0].url == url
        assert "quotas" not in found or found["quotas"].init_args[0] == url


def test_graph_claims_what_its_own_deployments_need_and_no_more():
    parts = {
        "ingress": {"cpus": 0.3, "min_replicas": 2, "max_replicas": 2},
        "generator": {"cpus": 0.5, "gpus": 1, "min_replicas": 2, "max_replicas": 5},
        "retriever": {"cpus": 0.25, "gpus": 0.5},
    }
    recipe = recipe_of(**parts, tenants={"acme": {"requests_per_minute": 5}})
    assert claims(app_of(recipe)) == pytest.approx({"CPU": 0.6 + 1 + 0.25 + SIDE_CPUS, "GPU": 2.5})
    closed_book = app_of(recipe_of(**parts), index=False)
    assert claims(closed_book) == pytest.approx({"CPU": 0.6 + 1, "GPU": 2}), "it has no retriever"


def test_graph_without_enough_gpus_for_vllm_is_refused_by_its_key():
    vllm = {"name": "tiny", "generation": {"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}}
    with pytest.raises(UserError, match=r"serve\.generator\.gpus is 1, .* set serve\.generator\.gpus to 2"):
        _check_gpus(ServingRecipe.model_validate({**vllm, "serve": {"generator": {"gpus": 1}}}))
    _check_gpus(ServingRecipe.model_validate({**vllm, "serve": {"generator": {"gpus": 2}}}))


def release(**fields):
    return Release("tiny", "2" * 16, **fields)


def test_served_release_of_another_prompt_format_is_refused(store):
    adapters = {"raft": ArtifactRef("adapter", "tiny", "1" * 16)}
    other = release(index=None, adapters=adapters, prompt_format=99)
    with pytest.raises(ArtifactError, match=r"prompt format 99.*format \d"):
        served_release(ServingRecipe(name="tiny"), store, other)


def test_served_release_without_an_index_offers_what_answers_without_documents(store):
    from training.format import FORMAT_VERSION

    adapters = {"finetuned": ArtifactRef("adapter", "tiny", "1" * 16)}
    served = served_release(
        ServingRecipe(name="tiny"), store, release(index=None, adapters=adapters, prompt_format=FORMAT_VERSION)
    )
    assert served.available == ("base", "finetuned", "auto")
    assert served.pins.index == "" and served.pins.adapters == {"finetuned": f"adapter/tiny/{'1' * 16}"}


def test_pins_name_every_part_of_a_release():
    index, router = (ArtifactRef(kind, "tiny", "0" * 16) for kind in ("index", "router"))
    pins = pins_of(release(index=index, router=router, base_digest="b" * 64))
    assert (pins.release, pins.index) == (f"release/tiny/{'2' * 16}", str(index))
    assert (pins.router, pins.base_digest, pins.adapters) == (str(router), "b" * 64, {})


@pytest.mark.parametrize("measured, embeds", [({"encoder": "mini", "encoder_digest": "e" * 64}, True), ({}, False)])
def test_served_release_embeds_where_its_index_has_an_encoder(store, measured, embeds):
    def build(attempt):
        (attempt.directory / "rows").write_text("3\n")
        return Outcome(counts={"chunks": 3}, measured=measured)

    index = run_stage(store, Plan(kind="index", name="tiny", config=measured), build)
    served = served_release(ServingRecipe(name="tiny"), store, release(index=index.ref))
    assert served.embeds == embeds and served.passages == 3
