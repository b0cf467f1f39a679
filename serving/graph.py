"""The graph as Ray Serve deployments: ingress (API and router) → retriever → generator, and feedback beside them.

In: a recipe, the store, a release. Out: a Serve application that starts with that release and follows promotions. The
deployments are thin (serving/ingress.py, retriever_replica.py, generator.py); each loads and verifies what it serves in
its constructor, so a replica that does not fit its release never becomes ready. The first token is two hops away.
Not covered: bringing the application up and down (serving/service.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from cluster.errors import UserError
from cluster.releases import Release
from cluster.store import Store
from serving.config import DeploymentConfig, ServingRecipe
from serving.feedback import DeskSettings, FeedbackDesk, check_feedback
from serving.generator import EngineSource, Generator, StoreEngines
from serving.ingress import Ingress, IngressSettings
from serving.interfaces import Observer
from serving.keys import open_keys
from serving.live_releases import StoreReleases, first_pins
from serving.opened_release import StoreParts, served_release
from serving.quotas import QuotaReplica, has_quotas
from serving.retriever_replica import RetrieverReplica, RetrieverSource, StoreRetrievers
from serving.telemetry import make_observer

CONSTRUCTOR_TRIES = 1  # what fails to load is damaged or does not fit, and will not fit the next time
HEALTH_PERIOD_S = 2.0  # how soon a dead replica is replaced; Serve's own 10 s is the longer part of a retry
WAIT_LOOP_S = 0.5  # how often a stopping replica looks whether its requests have ended
SIDE_CPUS = 0.05
"""Claimed by each of the small deployments `feedback` and `quotas`."""


@dataclass(frozen=True)
class Sources:
    """How replicas open what they serve; both pickle. No retriever: a graph without an index."""

    engines: EngineSource
    retrievers: RetrieverSource | None


def assemble(settings: IngressSettings, sources: Sources, desk: DeskSettings | None = None) -> serve.Application:
    """The application; queues are bounded at ingress, so the deployments behind it take what ingress lets in."""
    if desk is not None:  # a replica has another working directory, where a relative path names another database
        kept = settings.recipe.feedback.model_copy(update={"url": desk.url})
        settings = dataclasses.replace(settings, recipe=settings.recipe.model_copy(update={"feedback": kept}))
    config = settings.recipe.serve
    in_flight = settings.recipe.max_in_flight
    behind = (2 * in_flight + 8) * config.ingress.max_replicas  # `hybrid` asks twice
    first = functools.partial(first_pins, settings.releases, settings.served.pins)
    keep_s = max(30.0, config.request_timeout_s)
    generator = _deployment(Generator, "generator", config.generator, settings, behind).bind(
        sources.engines, first, keep_s, _spans(settings, "generator")
    )
    retriever = feedback = quotas = None
    if sources.retrievers is not None and settings.served.pins.index:
        retriever = _deployment(RetrieverReplica, "retriever", config.retriever, settings, behind).bind(
            sources.retrievers, first, keep_s, _spans(settings, "retriever")
        )
    side = DeploymentConfig(cpus=SIDE_CPUS)
    if desk is not None:
        feedback = _deployment(FeedbackDesk, "feedback", side, settings, behind).bind(desk)
    if has_quotas(config.tenants) and config.ingress.max_replicas > 1:
        quotas = _deployment(QuotaReplica, "quotas", side, settings, behind).bind(
            settings.recipe.feedback.url, settings.recipe.name
        )
    # Ingress must see the requests that it refuses, hence far more at once than it admits.
    return _deployment(serve.ingress()(Ingress), "ingress", config.ingress, settings, max(1000, 4 * in_flight)).bind(
        settings, generator, retriever, feedback, quotas
    )


def _spans(settings: IngressSettings, deployment: str) -> Callable[[], Observer]:
    """Makes the observer of a replica behind ingress: spans alone, since ingress measures every hop."""
    config = settings.recipe.telemetry.model_copy(update={"metrics": False})
    return functools.partial(make_observer, config, deployment)


def _deployment(
    kind: type, name: str, config: DeploymentConfig, settings: IngressSettings, ongoing: int
) -> serve.Deployment:
    actor: dict[str, Any] = {"num_cpus": config.cpus, "num_gpus": config.gpus}
    if config.accelerator:
        actor["accelerator_type"] = config.accelerator
    serving = settings.recipe.serve
    return serve.deployment(
        kind,
        name=name,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        max_ongoing_requests=ongoing,
        ray_actor_options=actor,
        # A replica that is scaled away ends its requests first, however long they may take.
        graceful_shutdown_timeout_s=max(serving.drain_s, serving.request_timeout_s),
        graceful_shutdown_wait_loop_s=WAIT_LOOP_S,
        health_check_period_s=HEALTH_PERIOD_S,
        **scaling(config),
    )


def scaling(config: DeploymentConfig) -> dict[str, Any]:
    """Serve's options for the replicas of a deployment: a fixed number, or how it scales with the load.

    The load is averaged over no longer than it must last: Serve's own 30 s would hide a delay of 10.
    """
    if config.min_replicas == config.max_replicas:
        return {"num_replicas": config.min_replicas}
    look_back_s = min(30.0, max(1.0, config.upscale_delay_s))
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            look_back_period_s=look_back_s,
            metrics_interval_s=look_back_s / 4,
        )
    }


def claims(app: serve.Application) -> dict[str, float]:
    """CPUs and GPUs that an application of `assemble` claims when it starts: those of the deployments that it has."""
    ingress = app._bound_deployment
    behind = [one._bound_deployment for one in ingress.init_args if isinstance(one, serve.Application)]
    claimed = {"CPU": 0.0, "GPU": 0.0}
    for one in (ingress, *behind):
        scaled = one._deployment_config.autoscaling_config
        replicas = one.num_replicas if scaled is None else scaled.min_replicas
        for kind in claimed:
            claimed[kind] += replicas * one.ray_actor_options[f"num_{kind.lower()}s"]
    return claimed


def build_app(recipe: ServingRecipe, store: Store, release: Release, *, follow: bool = True) -> serve.Application:
    """The application that serves `release`, and with `follow` whatever is promoted later.

    Raises:
        ArtifactError: The release does not fit this program, or lacks an artifact.
        UserError: API keys, tenants, the feedback database or the GPUs are not as the recipe says.
    """
    _check_gpus(recipe)
    settings = IngressSettings(
        recipe=recipe,
        served=served_release(recipe, store, release),
        parts=StoreParts(recipe),
        keys=open_keys(recipe.serve),
        releases=StoreReleases(recipe) if follow and recipe.serve.follow_releases_s > 0 else None,
    )
    engines = StoreEngines(recipe.model, recipe.generation, store.uri)
    retrievers = StoreRetrievers(recipe.encoder, recipe.search, store.uri)
    return assemble(settings, Sources(engines, retrievers), DeskSettings.of(recipe) if check_feedback(recipe) else None)


def _check_gpus(recipe: ServingRecipe) -> None:
    wanted = recipe.generation.vllm.tensor_parallel_size
    if recipe.generation.engine == "vllm" and wanted > 1 and recipe.serve.generator.gpus < wanted:
        raise UserError(
            f"serve.generator.gpus is {recipe.serve.generator.gpus:g}, generation.vllm.tensor_parallel_size is "
            f"{wanted}: set serve.generator.gpus to {wanted}"
        )
