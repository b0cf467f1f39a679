import json

import pytest

from cluster.errors import ArtifactError
from cluster.manifest import ArtifactRef
from cluster.releases import (
    CONTENT,
    FORMAT,
    KIND,
    history,
    open_release,
    promote,
    publish_release,
    read_release,
    rollback,
)
from cluster.stage import Outcome, Plan, run_stage
from cluster.store import Store
from tests.cluster.stores import build, object_store, write_files


@pytest.fixture(params=["local", "object"])
def store(request, tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    return Store(str(tmp_path / "store")) if request.param == "local" else object_store()


def adapter(store: Store, role: str = "raft", base_digest: str = "base-a", prompt_format: int = 1) -> ArtifactRef:
    def write(attempt):
        write_files(attempt)
        return Outcome()

    config = {"base_digest": base_digest, "prompt_format": prompt_format}
    return run_stage(store, Plan("adapter", f"x-{role}", config), write).ref


def publish(store: Store, number: int) -> str:
    index = build(store, number).ref
    return publish_release(store, "x", index=index, base_digest="base-a", prompt_format=1).version


def test_a_release_pins_what_it_was_given(store):
    index, samples = build(store, 1).ref, build(store, 1, kind="samples").ref
    adapters = {"raft": adapter(store), "finetuned": adapter(store, "finetuned")}
    ref = publish_release(
        store, "x", index=index, samples=samples, adapters=adapters, base_digest="base-a", prompt_format=1
    )
    release = open_release(store, "x", ref.version)
    assert (release.index, release.samples, release.adapters) == (index, samples, dict(sorted(adapters.items())))
    assert (release.base_digest, release.prompt_format, release.ref) == ("base-a", 1, ref)
    again = publish_release(
        store, "x", index=index, samples=samples, adapters=adapters, base_digest="base-a", prompt_format=1
    )
    assert again == ref
    assert publish_release(store, "x", index=index, base_digest="base-a", prompt_format=1) != ref


def test_a_release_without_an_index_pins_its_adapter_and_a_router(store):
    adapters, router = {"finetuned": adapter(store, "finetuned")}, build(store, 1, kind="router").ref
    ref = publish_release(
        store, "x", index=None, adapters=adapters, router=router, base_digest="base-a", prompt_format=1
    )
    release = open_release(store, "x", ref.version)
    assert (release.index, release.samples, release.router, release.adapters) == (None, None, router, adapters)
    assert release.pins() == {"router": router, **adapters}
    assert ref != publish_release(store, "x", index=None, adapters=adapters, base_digest="base-a", prompt_format=1)


def test_a_release_of_format_1_is_read_and_one_of_a_later_format_refused(store):
    index = build(store, 1).ref
    written = {"index": str(index), "samples": None, "adapters": {}, "base_digest": "", "prompt_format": 0}

    def publish_as(number):
        plan = Plan(KIND, "x", {"number": number}, parents={"index": index}, format=number)
        with store.attempt(plan.ref) as attempt:
            (attempt.directory / CONTENT).write_text(json.dumps(written))
            attempt.publish(plan)
        return plan.ref.version

    release = open_release(store, "x", publish_as(1))
    assert (release.index, release.router) == (index, None)
    with pytest.raises(ArtifactError, match=rf"release of format {FORMAT + 1}, this rayft reads up to {FORMAT}"):
        open_release(store, "x", publish_as(FORMAT + 1))


def test_a_release_is_served_only_once_promoted(store):
    with pytest.raises(ArtifactError, match=r"no release of `x` is promoted .*rayft demo RECIPE"):
        open_release(store, "x")
    version = publish(store, 1)
    with pytest.raises(ArtifactError, match=f"rayft promote RECIPE {version}"):
        open_release(store, "x")
    promote(store, "x", version)
    assert open_release(store, "x").version == version


def test_rollback_returns_to_the_one_before_and_promoting_again_forgets_the_way_forward(store):
    one, two, three = (publish(store, number) for number in (1, 2, 3))
    with pytest.raises(ArtifactError, match="no release of `x` was promoted before"):
        rollback(store, "x")
    promote(store, "x", one)
    promote(store, "x", two)
    promote(store, "x", two)
    assert history(store, "x") == [one, two]
    assert rollback(store, "x").version == one
    with pytest.raises(ArtifactError, match="no release of `x` was promoted before"):
        rollback(store, "x")
    promote(store, "x", three)
    assert history(store, "x") == [one, three]
    assert rollback(store, "x").version == one
    assert open_release(store, "x").version == one


def test_a_crash_between_history_and_current_costs_nothing(store, monkeypatch):
    one, two = publish(store, 1), publish(store, 2)
    promote(store, "x", one)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "set_current", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            promote(store, "x", two)
    assert open_release(store, "x").version == one
    with pytest.raises(ArtifactError, match="before the current one"):
        rollback(store, "x")
    promote(store, "x", two)
    assert rollback(store, "x").version == one


@pytest.mark.parametrize(
    ("trained", "found", "served"),
    [
        ({"base_digest": "base-b"}, "base_digest base-b", "base_digest base-a"),
        ({"prompt_format": 2}, "prompt_format 2", "prompt_format 1"),
    ],
)
def test_what_does_not_belong_together_is_refused_with_both_names(store, trained, found, served):
    index, foreign = build(store, 1).ref, adapter(store, **trained)
    with pytest.raises(ArtifactError, match=rf"adapter raft \({foreign}\) .*{found}.* {served}"):
        publish_release(store, "x", index=index, adapters={"raft": foreign}, base_digest="base-a", prompt_format=1)
    assert store.versions("release", "x") == []


def test_a_release_whose_pin_is_gone_is_neither_promoted_nor_opened(store):
    one, two = publish(store, 1), publish(store, 2)
    promote(store, "x", one)
    index = read_release(store, "x", two).index
    store.storage.delete(str(index))
    with pytest.raises(ArtifactError, match=rf"release/x/{two}: its index {index} is not in"):
        promote(store, "x", two)
    assert open_release(store, "x").version == one
    with pytest.raises(ArtifactError, match="rayft release RECIPE"):
        promote(store, "x", "f" * 16)
    with pytest.raises(ArtifactError, match="not an artifact's version"):
        promote(store, "x", "latest")


def test_a_damaged_history_is_named(store):
    promote(store, "x", publish(store, 1))
    store.storage.replace("release/x/history.json", json.dumps([{"version": "nonsense"}]).encode())
    with pytest.raises(ArtifactError, match=r"history\.json: damaged"):
        rollback(store, "x")
