"""The ingress deployment: API, router and the release that answers, in one replica.

In: what a graph serves, and handles of the other deployments. Out: the ASGI application that Serve mounts. Nothing here
answers a question: it makes the conversation of each release (serving/conversation.py) and gives it its doors.
Not covered: HTTP (serving/api.py), deployments and their sizes (serving/graph.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from serving.admission import Limits
from serving.api import ApiParts, NoQuotas, make_api
from serving.asking import Doors, ServedRelease
from serving.config import ServingRecipe
from serving.conversation import Conversation
from serving.draining import CountsUnderWay, Gate
from serving.feedback import desk_of_handle, open_door
from serving.hops import Hops
from serving.interfaces import KeyRing, Pins, Quotas
from serving.keys import LOOPBACK
from serving.live_releases import LiveReleases, ReleaseSource
from serving.loopback import LocalHostsOnly
from serving.page import mount_page
from serving.quotas import HandleLedger, KeyQuotas, has_quotas, open_ledger
from serving.router import Router
from serving.telemetry import make_observer

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

    from serving.context_budget import CountsTokens
    from serving.intents import IntentClassifier


class ReleaseParts(Protocol):
    """Opens what ingress needs beside a release's pins; pickles, and is called in threads."""

    def classifier(self, pins: Pins) -> IntentClassifier | None:
        """The pinned intent classifier, where one is pinned."""
        ...

    def tokens(self, pins: Pins) -> CountsTokens | None:
        """Counts prompts of the pinned base model; none trims nothing."""
        ...


@dataclass(frozen=True)
class IngressSettings:
    """What an ingress replica is made from; it pickles."""

    recipe: ServingRecipe
    served: ServedRelease
    """The release to start with."""
    parts: ReleaseParts
    keys: KeyRing
    releases: ReleaseSource | None = None
    """Where promoted releases are found; none stays with the first one."""


class Ingress:
    """Routes and answers; the HTTP API's home."""

    def __init__(
        self,
        settings: IngressSettings,
        generator: DeploymentHandle,
        retriever: DeploymentHandle | None = None,
        feedback: DeploymentHandle | None = None,
        quotas: DeploymentHandle | None = None,
    ) -> None:
        """Handles lead to the other deployments; what a graph does not have is None."""
        recipe = settings.recipe
        self._settings = settings
        self._observer = make_observer(recipe.telemetry)
        self._hops = Hops(generator, retriever, self._observer)
        self._door = open_door(desk_of_handle(feedback) if feedback is not None else None)
        self._quotas = self._open_quotas(quotas)
        self._gate = Gate()
        self._live = LiveReleases(
            self._converse(settings.served),
            settings.releases,
            self._converse,
            self._hops.prepare,
            self._observer,
            recipe.serve.follow_releases_s,
        )

    def _converse(self, served: ServedRelease) -> Conversation:
        """The conversation of a release."""
        parts, hops = self._settings.parts, self._hops
        router = Router(
            self._settings.recipe.router, served.available, parts.classifier(served.pins), self._settings.recipe.seed
        )
        doors = Doors(hops.search, hops.generate, hops.stream, hops.embed, self._door, self._observer)
        return Conversation(served, router, doors, parts.tokens(served.pins))

    def _open_quotas(self, handle: DeploymentHandle | None) -> Quotas:
        recipe = self._settings.recipe
        if not has_quotas(recipe.serve.tenants):
            return NoQuotas()
        ledger = open_ledger(recipe.feedback.url, recipe.name) if handle is None else HandleLedger(handle)
        return KeyQuotas(recipe.serve.tenants, ledger)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is constructed, on its event loop."""
        config = self._settings.recipe.serve
        parts = ApiParts(
            current=self._live.current,
            limits=Limits(self._settings.recipe.max_in_flight, config.request_timeout_s, config.max_body_bytes),
            check_ready=self._hops.ready,
            refused=lambda: self._live.refused,
            feedback=self._door,
            keys=self._settings.keys,
            quotas=self._quotas,
            observer=self._observer,
            draining=lambda: self._gate.draining,
            citation_shapes=config.citation_shapes,
            log_content=config.log_content,
            behind_serve=True,
        )
        api = make_api(parts)
        mount_page(api)
        if config.host in LOOPBACK and not self._settings.keys.required:
            api.add_middleware(LocalHostsOnly)
        api.add_middleware(CountsUnderWay, gate=self._gate)
        self._live.follow()
        return api

    async def drain(self, cut: bool = False) -> int:
        """Takes no new request from now on; returns how many are under way. With `cut` those are cancelled."""
        if cut:
            self._gate.cut()
        return self._gate.close()

    def __del__(self) -> None:
        """Called by Serve when the replica stops: without it up to 5 s of token counts and the last spans are lost."""
        for part in ("_quotas", "_observer"):  # a replica whose constructor failed lacks some
            if hasattr(self, part):
                getattr(self, part).close()
