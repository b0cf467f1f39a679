import shutil

import obstore.store
import pytest

from cluster.errors import ArtifactError, UserError
from cluster.manifest import ArtifactRef
from cluster.stage import Outcome, Plan, digest_path, rebuild_reasons, run_stage
from cluster.storage import ObjectStorage
from tests.cluster.stores import build, content_of, expected_content, plan, write_files


def test_a_stage_builds_once_and_says_why(store, capsys):
    first = build(store, 1)
    ref = str(first.ref)
    told = capsys.readouterr().out
    assert f"index: building {ref}: not built yet" in told
    assert f"index: published {first.uri}" in told

    def never(_attempt):
        raise AssertionError("built again")

    assert run_stage(store, plan(1), never).manifest == first.manifest
    assert capsys.readouterr().out == f"index: up to date ({ref}): same number\n"
    build(store, 2)
    assert "number changed from 1 to 2" in capsys.readouterr().out
    assert run_stage(store, plan(1), never).manifest == first.manifest
    assert "made current again" in capsys.readouterr().out
    assert store.current("index", "x") == first.ref.version


def test_an_interrupted_build_leaves_the_old_version_current(store):
    build(store, 1)

    def interrupted(attempt):
        write_files(attempt, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(store, plan(2), interrupted)
    assert content_of(store.open("index", "x")) == expected_content(1)
    assert not store.exists(plan(2).ref)


def test_what_changed_is_named(store):
    parent, other = build(store, 1), build(store, 2)
    base = {"kind": "samples", "name": "y", "format": 1, "seed": 1}
    old = Plan(
        **base,
        config={"a": {"b": 1, "c": [1]}, "gone": 1},
        inputs={"questions": "1"},
        parents={"index": parent.ref},
    )

    def write(attempt):
        write_files(attempt)
        return Outcome()

    run_stage(store, old, write)
    new = Plan(
        **{**base, "seed": 2, "format": 3},
        config={"a": {"b": 2, "c": (1,)}, "fresh": {"d": 0}},
        inputs={"questions": "2"},
        parents={"index": other.ref},
    )
    reasons = "; ".join(rebuild_reasons(store, new))
    assert reasons == (
        f"content of questions changed; index is another ({other.ref}); a.b changed from 1 to 2; gone is gone; "
        "and 3 more changes"
    )
    assert rebuild_reasons(
        store, Plan(**{**base, "seed": 2}, config=old.config, inputs=old.inputs, parents=old.parents)
    ) == ["seed changed from 1 to 2"]


def test_a_missing_parent_is_named_before_anything_is_built(store):
    parent = ArtifactRef("index", "x", "a" * 16)
    with pytest.raises(ArtifactError, match=r"samples: its index index/x/a{16} is not in"):
        build(store, kind="samples", parents={"index": parent})


def test_the_outcome_and_the_time_are_in_the_manifest(store):
    measured = build(store, 4).manifest.measured
    assert measured["number"] == 4
    assert 0 <= measured["stage_seconds"] < 60


def test_a_damaged_current_version_is_no_obstacle_to_building_the_next(store, capsys):
    first = build(store, 1)
    (store.storage.root / str(first.ref) / "manifest.json").write_text("{}")
    build(store, 2)
    assert "the current version is missing or damaged" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match="damaged manifest"):
        build(store, 1)


def test_a_digest_sees_names_and_bytes_and_nothing_else(tmp_path):
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "deep" / "a.txt").write_text("a")
    digest = digest_path(str(folder))
    copy = tmp_path / "copy"
    (copy / "deep").mkdir(parents=True)
    (copy / "deep" / "a.txt").write_text("a")
    (copy / "b.txt").write_text("b")
    assert digest_path(str(copy)) == digest_path(f"{copy}/") == digest
    (copy / ".hidden").write_text("editor")
    (copy / "picture.png").write_text("p")
    assert digest_path(str(copy), suffixes=(".txt",)) == digest_path(str(folder), suffixes=(".txt",))
    assert digest_path(str(copy)) != digest
    (copy / "picture.png").unlink()
    assert digest_path(str(copy)) == digest
    (copy / "b.txt").rename(copy / "c.txt")
    assert digest_path(str(copy)) != digest
    shutil.copy(folder / "b.txt", tmp_path / "other-name")
    assert digest_path(str(folder / "b.txt")) == digest_path(str(tmp_path / "other-name"))
    (folder / "b.txt").write_text("B")
    assert digest_path(str(folder)) != digest


def test_a_digest_of_nothing_names_the_key(tmp_path):
    with pytest.raises(UserError, match=r"^corpus\.path: no such file or folder: .*nowhere$"):
        digest_path(str(tmp_path / "nowhere"), key="corpus.path")


def test_a_remote_folder_has_the_digest_of_its_local_copy(tmp_path, monkeypatch):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "deep" / "a.txt").write_text("a")
    (tmp_path / "docs" / "b.txt").write_text("b" * 100)
    objects = obstore.store.LocalStore(tmp_path)
    monkeypatch.setattr("cluster.stage.storage_at", lambda uri: ObjectStorage(uri, {"s3://bucket": objects}[uri]))
    assert digest_path("s3://bucket/docs") == digest_path(str(tmp_path / "docs"))
    assert digest_path("s3://bucket/docs/") == digest_path(str(tmp_path / "docs"))
    assert digest_path("s3://bucket") == digest_path(str(tmp_path))
    assert digest_path("s3://bucket/docs/b.txt") == digest_path(str(tmp_path / "docs" / "b.txt"))
    with pytest.raises(UserError, match="no such file or folder: s3://bucket/docs/c"):
        digest_path("s3://bucket/docs/c")
