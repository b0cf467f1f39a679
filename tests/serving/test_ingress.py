import asyncio

from serving.api import NoKeys
from serving.config import ServingRecipe
from serving.ingress import Ingress, IngressSettings
from serving.interfaces import Caller
from serving.telemetry import SilentObserver
from serving.token_use import TokenUse
from tests.serving.fakes_graph import NoParts, release_of


class Handle:
    def options(self, **_):
        return self


def test_ingress_that_stops_writes_its_token_counts_and_sends_its_spans(tmp_path, monkeypatch):
    closed = []

    class Observer(SilentObserver):
        def close(self):
            closed.append("spans")

    monkeypatch.setattr("serving.ingress.make_observer", lambda _: Observer())
    url = f"sqlite:///{tmp_path}/feedback.db"
    recipe = ServingRecipe.model_validate(
        {"name": "test", "feedback": {"url": url}, "serve": {"tenants": {"acme": {"tokens_per_day": 100}}}}
    )

    async def story():
        ingress = Ingress(IngressSettings(recipe, release_of("v0"), NoParts(), NoKeys()), Handle())
        ingress._quotas.spend(Caller(tenant="acme", key_id="k-1"), 60)
        await asyncio.sleep(0)  # the answer is there, and the ledger writes in some seconds
        day = ingress._quotas._ledger._day
        ingress.__del__()  # as Serve does when the replica stops
        return day

    day = asyncio.run(story())
    assert TokenUse(url, "test").load(day) == {"k-1": 60} and closed[0] == "spans"
