import os

import pytest

from cluster.errors import ArtifactError
from cluster.gc import collect
from cluster.releases import open_release, promote, publish_release, rollback
from cluster.store import Attempt, Store
from tests.cluster.stores import build, content_of, object_store, plan, write_files

NOW = -1.0  # an age that everything has reached


def keys(removals) -> set[str]:
    return {removal.key for removal in removals}


def orphan(store: Store, number: int) -> str:
    """An attempt as a killed process leaves it."""
    attempt = Attempt(store, plan(number).ref)
    write_files(attempt)
    if attempt._lock is not None:
        os.close(attempt._lock)
    else:
        store.storage.replace(f"{attempt.ref}/{attempt.id}/part", b"x")
    return f"{attempt.ref}/{attempt.id}"


@pytest.fixture(params=["local", "object"])
def store(request, tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    return Store(str(tmp_path / "store")) if request.param == "local" else object_store()


def test_current_versions_their_parents_and_released_ones_stay(store):
    old, pinned, parent, new = (build(store, number).ref for number in range(4))
    samples = build(store, 0, kind="samples", parents={"index": parent}).ref
    promote(store, "x", publish_release(store, "x", index=pinned).version)
    assert store.current("index", "x") == new.version
    assert keys(collect(store, min_age_s=NOW, dry_run=True)) == {str(old)}
    assert store.exists(old)
    removed = collect(store, min_age_s=NOW)
    assert keys(removed) == {str(old)}
    assert removed[0].size > 0
    assert not store.exists(old)
    assert store.storage.files(str(old)) == []
    for ref in (pinned, parent, new, samples):
        content_of(store.open_ref(ref))
    assert open_release(store, "x").index == pinned
    assert collect(store, min_age_s=NOW) == []


def test_only_the_last_promoted_releases_keep_their_pins_and_rollback_still_works(store):
    for number in range(5):
        promote(store, "x", publish_release(store, "x", index=build(store, number).ref).version)
    collect(store, keep=2, min_age_s=NOW)
    assert [store.exists(plan(number).ref) for number in range(5)] == [False, False, False, True, True]
    assert rollback(store, "x").index == plan(3).ref
    collect(store, keep=0, min_age_s=NOW)
    assert open_release(store, "x").index == plan(3).ref


def test_a_release_that_was_never_promoted_goes(store):
    ref = publish_release(store, "x", index=build(store, 1).ref)
    build(store, 2)
    assert keys(collect(store, min_age_s=NOW)) == {str(ref), str(plan(1).ref)}


def test_attempts_without_a_manifest_go_when_they_are_old(store):
    build(store, 1)
    left = orphan(store, 2)
    assert collect(store) == []
    assert left in keys(collect(store, min_age_s=NOW))
    assert store.storage.folders(str(plan(2).ref)) == []


def test_what_is_young_stays(store):
    build(store, 1)
    build(store, 2)
    assert collect(store) == []
    assert store.exists(plan(1).ref)


def test_a_live_build_stays_however_old(tmp_path):
    store = Store(str(tmp_path / "store"))
    work = store.work_directory(plan(2).ref)
    with store.attempt(plan(1).ref) as attempt:
        write_files(attempt)
        for path in [*store.storage.root.rglob("*"), work]:
            os.utime(path, (0, 0))
        assert collect(store) == []
        attempt.publish(plan(1))
    content_of(store.open_ref(plan(1).ref))
    assert work.is_dir()


def test_forgotten_work_of_an_unpublished_version_goes_after_a_week(tmp_path):
    store = Store(str(tmp_path / "store"))
    work = store.storage.root / str(plan(1).ref) / ".work"
    (work / "deep").mkdir(parents=True)
    (work / "deep" / "step").write_text("1234")
    assert collect(store, min_age_s=NOW) == []
    for path in (work, work / "deep", work / "deep" / "step"):
        os.utime(path, (0, 0))
    assert [(r.key, r.size) for r in collect(store)] == [(f"{plan(1).ref}/.work", 4)]
    assert not work.exists()


def test_shared_work_of_an_object_store_goes_with_its_version_or_when_it_was_published(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    store = object_store()
    build(store, 1)
    left = f"{plan(1).ref}/.work/checkpoints/1"
    store.storage.replace(left, b"state")  # by a second builder of the same version
    unpublished = f"{plan(2).ref}/.work/checkpoints/1"
    store.storage.replace(unpublished, b"state")
    assert keys(collect(store, min_age_s=NOW)) == {f"{plan(1).ref}/.work"}
    assert store.storage.read(unpublished) == b"state"


def test_nothing_is_removed_while_a_kept_manifest_is_damaged(store):
    old = build(store, 1).ref
    new = build(store, 2).ref
    store.storage.replace(f"{new}/manifest.json", b"{}")
    with pytest.raises(ArtifactError, match="damaged manifest"):
        collect(store, min_age_s=NOW)
    assert store.exists(old)


def test_a_damaged_manifest_that_nothing_needs_is_left_for_a_person(store, capsys):
    old = build(store, 1).ref
    build(store, 2)
    store.storage.replace(f"{old}/manifest.json", b"{}")
    assert collect(store, min_age_s=NOW) == []
    assert f"gc: left alone: {store.uri}/{old}/manifest.json" in capsys.readouterr().out


def test_a_foreign_file_in_the_store_is_not_ours_to_remove(tmp_path):
    store = Store(str(tmp_path / "store"))
    build(store, 1)
    foreign = [store.storage.root / "notes.txt", store.storage.root / "index" / "x" / "keep" / "me"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        os.utime(path, (0, 0))
    collect(store, min_age_s=NOW)
    assert all(path.exists() for path in foreign)
