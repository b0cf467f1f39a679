import errno
import json
import multiprocessing
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import manifest as manifest_module
from cluster import verification
from cluster.errors import ArtifactError, UserError
from cluster.manifest import ArtifactRef
from cluster.storage import LocalStorage, ObjectStorage
from cluster.store import Store
from tests.cluster.stores import FILES, build, content_of, expected_content, object_store, plan, write_files


@pytest.fixture(params=["local", "object"])
def any_store(request, tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    return Store(str(tmp_path / "store")) if request.param == "local" else object_store()


def test_a_published_artifact_is_found_and_read_back(any_store):
    artifact = build(any_store, 7)
    assert any_store.exists(artifact.ref)
    assert any_store.current("index", "x") == artifact.ref.version
    opened = any_store.open("index", "x")
    assert content_of(opened) == expected_content(7)
    assert opened.path("deep/inner.txt").read_bytes() == b"inner7"
    assert opened.manifest == artifact.manifest
    assert opened.manifest.counts == {"files": len(FILES)}
    assert opened.manifest.config == {"number": 7}
    assert opened.manifest.packages["ray"]
    assert any_store.versions("index", "x") == [artifact.ref.version]


def test_layout_on_disk_is_the_documented_one(store):
    artifact = build(store)
    root = store.storage.root
    version = root / "index" / "x" / artifact.ref.version
    assert sorted(p.name for p in version.iterdir()) == [artifact.manifest.attempt, "manifest.json"]
    assert (root / "index" / "x" / "current").read_text() == artifact.ref.version + "\n"
    assert json.loads((version / "manifest.json").read_text())["files"][0]["path"] == "data.bin"
    assert sorted(p.name for p in root.iterdir()) == ["index"]


def test_nothing_is_there_without_a_manifest(any_store):
    with pytest.raises(ArtifactError, match=r"no index named `x` in .*; run `rayft index build RECIPE` first"):
        any_store.open("index", "x")
    with pytest.raises(RuntimeError, match="stop"), any_store.attempt(plan().ref) as attempt:
        write_files(attempt)
        raise RuntimeError("stop")
    assert not any_store.exists(plan().ref)
    with pytest.raises(ArtifactError, match="no manifest, no artifact"):
        any_store.open_ref(plan().ref)
    with pytest.raises(ArtifactError, match="not published"):
        any_store.set_current(plan().ref)
    assert any_store.storage.files("index") == []
    assert any_store.current("index", "x") is None


def test_the_first_of_two_manifests_wins_and_the_second_attempt_goes(any_store):
    with any_store.attempt(plan().ref) as first, any_store.attempt(plan().ref) as second:
        write_files(first, 1)
        write_files(second, 2)
        winner = first.publish(plan())
        loser = second.publish(plan())
    assert loser.manifest.attempt == winner.manifest.attempt == first.id
    assert content_of(loser) == expected_content(1)
    left = any_store.storage.files(str(plan().ref))
    assert {file.path.split("/")[0] for file in left} == {"manifest.json", first.id}


def publish_in_process(uri: str, number: int, gate, results) -> None:
    store = Store(uri)
    with store.attempt(plan().ref) as attempt:
        write_files(attempt, number)
        gate.wait()
        results.put((attempt.id, attempt.publish(plan()).manifest.attempt))


def test_of_racing_processes_one_wins_and_all_get_its_artifact(store):
    spawn = multiprocessing.get_context("fork")
    gate, results = spawn.Barrier(4), spawn.Queue()
    racers = [spawn.Process(target=publish_in_process, args=(store.uri, n, gate, results)) for n in range(4)]
    for racer in racers:
        racer.start()
    outcomes = [results.get(timeout=30) for _ in racers]
    for racer in racers:
        racer.join()
    winners = {winner for _, winner in outcomes}
    assert len(winners) == 1
    assert winners < {own for own, _ in outcomes}
    assert store.storage.folders(str(plan().ref)) == sorted(winners)


def test_workers_may_write_files_beside_the_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("cluster.store.PART_BYTES", 4)
    store = object_store()
    with store.attempt(plan().ref) as attempt:
        write_files(attempt)
        assert attempt.uri == f"s3://bucket/prefix/{plan().ref}/{attempt.id}"
        store.storage.replace(f"{plan().ref}/{attempt.id}/part-0.parquet", b"from a worker")
        artifact = attempt.publish(plan())
    entry = next(entry for entry in artifact.manifest.files if entry.path == "part-0.parquet")
    whole = tmp_path / "whole"
    whole.write_bytes(b"from a worker")
    assert (entry.size, entry.sha256) == (13, manifest_module.digest_parts(whole, 4))
    assert len(entry.sha256) == 4
    assert content_of(artifact) == {**expected_content(0), "part-0.parquet": b"from a worker"}


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_every_flipped_bit_of_a_file_is_refused(store, name):
    artifact = build(store)
    path = store.storage.root / str(artifact.ref) / artifact.manifest.attempt / name
    good = path.read_bytes()
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(bytes(flipped))
        with pytest.raises(ArtifactError, match=rf"{name}: damaged.*remove .*{artifact.ref} and run the stage again"):
            store.open("index", "x").directory()
    path.write_bytes(good)
    assert content_of(store.open("index", "x")) == expected_content(0)


def test_a_change_with_old_time_stamps_is_refused_in_a_process_that_read_the_file_before(store):
    artifact = build(store)
    path = artifact.path("data.bin")
    before = path.stat()
    path.write_bytes(b"?" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match=r"data\.bin: damaged"):
        artifact.directory()


def test_an_unchanged_artifact_is_read_once(store, monkeypatch):
    artifact = build(store)
    artifact.directory()
    monkeypatch.setattr(verification, "digest_part", lambda *_: pytest.fail("read again"))
    store.open("index", "x").directory()


@pytest.mark.parametrize("damage", ["missing", "shorter", "extra", "linked", "linked folder"])
def test_a_file_missing_cut_added_or_linked_is_refused(store, tmp_path, damage):
    artifact = build(store)
    directory = store.storage.root / str(artifact.ref) / artifact.manifest.attempt
    target = directory / "data.bin"
    if damage == "missing":
        target.unlink()
    elif damage == "shorter":
        target.write_bytes(target.read_bytes()[:-1])
    elif damage == "extra":
        (directory / "deep" / "part-1.parquet").write_bytes(b"from another builder")
    elif damage == "linked":
        shutil.copy(target, tmp_path / "same")
        target.unlink()
        target.symlink_to(tmp_path / "same")
    else:
        (directory / "deep").rename(tmp_path / "deep")
        (directory / "deep").symlink_to(tmp_path / "deep")
    with pytest.raises(ArtifactError, match=r"missing|bytes, expected|not in the manifest|is a link"):
        store.open("index", "x").directory()


def test_a_flipped_bit_of_manifest_or_current_is_refused(store):
    artifact = build(store)
    for path in (store.storage.root / str(artifact.ref) / "manifest.json", store.storage.root / "index/x/current"):
        good = path.read_bytes()
        for position in range(0, len(good), 1 if len(good) < 100 else 7):  # test_manifest.py flips all the others
            flipped = bytearray(good)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(bytes(flipped))
            with pytest.raises(ArtifactError):
                store.open("index", "x")
        path.write_bytes(good)
    assert store.open("index", "x").manifest == artifact.manifest


def test_a_remote_artifact_is_verified_and_a_damaged_local_copy_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    store = object_store(tmp_path / "objects")
    artifact = build(store, 3)
    copy = artifact.directory()
    assert copy.is_relative_to(tmp_path / "cache")
    (copy / "data.bin").write_bytes(b"rotten")
    assert content_of(store.open("index", "x")) == expected_content(3)
    shutil.rmtree(tmp_path / "cache")
    remote = tmp_path / "objects" / str(artifact.ref) / artifact.manifest.attempt / "data.bin"
    remote.write_bytes(remote.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match=r"data\.bin: damaged"):
        store.open("index", "x").directory()
    remote.unlink()
    with pytest.raises(ArtifactError, match=r"data\.bin is missing"):
        store.open("index", "x").directory()


@pytest.mark.parametrize("damaged", [False, True])
def test_readers_of_one_node_fetch_a_remote_artifact_once(tmp_path, monkeypatch, damaged):
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    store = object_store(tmp_path / "objects")
    artifact = build(store, 3)
    if damaged:
        (artifact.directory() / "data.bin").write_bytes(b"rotten")
    fetched, download = [], ObjectStorage.download

    def slow(self, key: str, path: Path) -> None:
        fetched.append(key)
        time.sleep(0.05)
        download(self, key, path)

    monkeypatch.setattr(ObjectStorage, "download", slow)
    readers = [store.open("index", "x") for _ in range(4)]
    with ThreadPoolExecutor(len(readers)) as pool:
        assert list(pool.map(content_of, readers)) == [expected_content(3)] * len(readers)
    assert len(fetched) == len(artifact.manifest.files)
    assert [path.name for path in artifact.cached_copy().parent.iterdir()] == [artifact.cached_copy().name]


@pytest.mark.parametrize("uri", ["http://somewhere", "", "hdfs://x"])
def test_an_address_that_is_no_store_is_refused(uri):
    with pytest.raises(UserError, match=r"store\.uri: "):
        Store(uri)


def test_a_store_that_cannot_be_written_names_its_key(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match=r"store\.uri: cannot write to .*Not a directory.*--set store\.uri=") as caught:
        store.check_writable()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"store\.uri"):
        build(store)
    assert not store.exists(plan().ref)


def test_a_relative_store_is_taken_from_where_it_was_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("here")
    build(store)
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(store)).exists(plan().ref)
    assert Store(f"file://{tmp_path}/here").exists(plan().ref)


def test_an_unknown_file_of_an_artifact_is_named(store):
    with pytest.raises(ArtifactError, match="has no file 'vectors'"):
        build(store).path("vectors")


def test_a_work_directory_survives_until_publish(any_store):
    ref = plan().ref
    work = any_store.work_directory(ref)
    (work / "step-1").write_text("done")
    assert any_store.work_directory(ref) == work
    assert not any_store.exists(ref)
    build(any_store)
    assert not work.exists()


def test_the_work_that_every_node_reaches_lies_in_the_store_and_goes_at_publish(any_store):
    ref = plan().ref
    work = any_store.work_uri(ref)
    assert work == f"{any_store.uri}/{ref}/.work"
    any_store.storage.replace(f"{ref}/.work/checkpoints/1", b"state")
    assert any_store.work_uri(ref) == work
    assert not any_store.exists(ref)
    build(any_store)
    assert any_store.storage.files(f"{ref}/.work") == []


def test_work_of_a_version_that_will_not_be_published_is_discarded_everywhere(any_store):
    ref = plan().ref
    any_store.work_uri(ref)
    any_store.storage.replace(f"{ref}/.work/checkpoints/1", b"state")
    any_store.discard_work(ref)
    assert any_store.storage.files(str(ref)) == []


def claim_in_process(uri: str, ready, leave) -> None:
    work = Store(uri).work_directory(plan().ref)
    (work / "mine").write_text("")
    ready.put(str(work))
    leave.wait()
    os._exit(1)  # as if killed: nothing is cleaned up


def test_two_processes_never_share_a_work_directory_but_a_dead_ones_is_taken_over(store):
    fork = multiprocessing.get_context("fork")
    ready, leave = fork.Queue(), fork.Event()
    other = fork.Process(target=claim_in_process, args=(store.uri, ready, leave))
    other.start()
    theirs = ready.get(timeout=30)
    third = fork.Process(target=claim_in_process, args=(store.uri, ready, leave))
    third.start()
    assert ready.get(timeout=30) != theirs
    leave.set()
    other.join()
    third.join()
    mine = store.work_directory(plan().ref)
    assert str(mine) == theirs
    assert (mine / "mine").exists()


@pytest.mark.parametrize("medium", ["local", "object"])
def test_create_and_replace(medium, tmp_path):
    storage = LocalStorage(tmp_path) if medium == "local" else object_store().storage
    assert storage.create("a/b", b"1")
    assert not storage.create("a/b", b"2")
    assert storage.read("a/b") == b"1"
    storage.replace("a/b", b"3")
    assert storage.read("a/b") == b"3"
    assert storage.folders("") == ["a"]
    assert [(file.path, file.size) for file in storage.files("a")] == [("b", 1)]
    storage.delete("a")
    storage.delete("a")
    with pytest.raises(FileNotFoundError):
        storage.read("a/b")


def test_a_reference_cannot_leave_the_store():
    with pytest.raises(ArtifactError):
        ArtifactRef("..", "x", "0" * 16)


def test_replace_if_swaps_only_what_the_caller_read(any_store):
    storage = any_store.storage
    assert not storage.replace_if("a/b", b"1", b"0")
    assert storage.replace_if("a/b", b"1", None)
    assert not storage.replace_if("a/b", b"2", None)
    assert not storage.replace_if("a/b", b"2", b"0")
    assert storage.read("a/b") == b"1"
    assert storage.replace_if("a/b", b"2", b"1")
    assert storage.read("a/b") == b"2"
    assert [file.path for file in storage.files("a")] == ["b"]


def count_in_process(uri: str, rounds: int) -> None:
    storage = Store(uri).storage
    for _ in range(rounds):
        while True:
            found = storage.read("n")
            if storage.replace_if("n", str(int(found) + 1).encode(), found):
                break


def test_replace_if_loses_no_change_of_racing_processes(store):
    store.storage.replace("n", b"0")
    fork = multiprocessing.get_context("fork")
    racers = [fork.Process(target=count_in_process, args=(store.uri, 25)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert store.storage.read("n") == b"100"


def test_set_current_with_expected_refuses_what_another_published_meanwhile(any_store):
    first, second = build(any_store, 1).ref, build(any_store, 2).ref
    with pytest.raises(ArtifactError, match=rf"{second.version} became current while .* run the same command again"):
        any_store.set_current(first, expected=first.version)
    with pytest.raises(ArtifactError, match="became current"):
        any_store.set_current(first, expected=None)
    assert any_store.current("index", "x") == second.version
    any_store.set_current(first, expected=second.version)
    assert any_store.current("index", "x") == first.version
    any_store.set_current(first, expected=second.version)  # a twin that built the same was first: nothing to refuse
    assert any_store.current("index", "x") == first.version


def test_adopted_files_are_those_of_the_parent_and_outlive_it(any_store, monkeypatch):
    parent = build(any_store, 1)
    digested = []
    original = manifest_module.digest_parts
    monkeypatch.setattr(
        "cluster.store.digest_parts", lambda path, part: digested.append(path.name) or original(path, part)
    )
    with any_store.attempt(plan(2).ref) as attempt:
        (attempt.directory / "new").write_bytes(b"new")
        attempt.adopt(parent, {"data.bin": "old/data.bin", "deep/inner.txt": "deep/inner.txt"})
        artifact = attempt.publish(plan(2))
    assert digested == ["new"]
    parent_digest = next(entry.sha256 for entry in parent.manifest.files if entry.path == "data.bin")
    assert next(entry.sha256 for entry in artifact.manifest.files if entry.path == "old/data.bin") == parent_digest
    any_store.storage.delete(str(parent.ref))
    expected = expected_content(1)
    assert content_of(any_store.open_ref(artifact.ref)) == {
        "new": b"new",
        "old/data.bin": expected["data.bin"],
        "deep/inner.txt": expected["deep/inner.txt"],
    }


def test_adopting_links_on_a_local_disk_and_copies_where_it_cannot(store, monkeypatch):
    parent = build(store, 1)
    source = parent.path("data.bin")
    with store.attempt(plan(2).ref) as attempt:
        attempt.adopt(parent, {"data.bin": "linked"})
        assert (attempt.directory / "linked").stat().st_ino == source.stat().st_ino

        def refuse(*_args, **_options):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", refuse)
            attempt.adopt(parent, {"data.bin": "copied"})
        assert (attempt.directory / "copied").stat().st_ino != source.stat().st_ino
        artifact = attempt.publish(plan(2))
    assert content_of(artifact) == dict.fromkeys(("linked", "copied"), source.read_bytes())


def test_adopting_what_is_missing_or_damaged_is_refused(any_store):
    parent = build(any_store, 1)
    with any_store.attempt(plan(2).ref) as attempt:
        with pytest.raises(ArtifactError, match="has no file 'nothing'"):
            attempt.adopt(parent, {"nothing": "here"})
        key = f"{parent.ref}/{parent.manifest.attempt}/data.bin"
        whole = any_store.storage.read(key)
        any_store.storage.replace(key, whole[:-1] + b"?")
        attempt.adopt(parent, {"data.bin": "data.bin"})
        artifact = attempt.publish(plan(2))
        with pytest.raises(ArtifactError, match=r"data\.bin: damaged"):
            artifact.directory()
    any_store.storage.delete(key)
    with any_store.attempt(plan(3).ref) as attempt, pytest.raises(ArtifactError, match=r"data\.bin: missing"):
        attempt.adopt(parent, {"data.bin": "data.bin"})


def test_publish_purged_replaces_the_files_of_a_version_and_says_so(any_store):
    old = build(any_store, 1)
    stays = old.manifest.created_at
    old.directory()
    with any_store.attempt(old.ref) as attempt:
        (attempt.directory / "rest").write_bytes(b"rest")
        attempt.adopt(old, {"empty": "empty"})
        new = attempt.publish_purged(old, ["ab" * 32], {"files": 2}, {})
    assert content_of(any_store.open("index", "x")) == {"rest": b"rest", "empty": b""}
    assert new.manifest.purged == ("ab" * 32,)
    assert (new.manifest.counts, new.manifest.measured["number"], new.manifest.created_at) == ({"files": 2}, 1, stays)
    assert any_store.storage.folders(str(old.ref)) == [attempt.id]
    assert not old.cached_copy().exists()
    with pytest.raises(ArtifactError):
        old.directory()
    with any_store.attempt(old.ref) as late:
        (late.directory / "rest").write_bytes(b"late")
        with pytest.raises(ArtifactError, match="replaced meanwhile; run the same command again"):
            late.publish_purged(old, ["cd" * 32], {}, {})
    assert content_of(any_store.open("index", "x")) == {"rest": b"rest", "empty": b""}
    with any_store.attempt(new.ref) as again:
        again.adopt(new, {"rest": "rest"})
        assert again.publish_purged(new, ["cd" * 32], {}, {}).manifest.purged == ("ab" * 32, "cd" * 32)


def test_empty_objects_that_stand_for_folders_are_no_files_of_an_artifact():
    store = object_store()
    with store.attempt(plan().ref) as attempt:
        write_files(attempt)
        for folder in ("", "/deep"):
            store.storage.replace(f"{plan().ref}/{attempt.id}{folder}", b"")
        artifact = attempt.publish(plan())
    assert {entry.path for entry in artifact.manifest.files} == set(FILES)
