import os

import obstore.store
import pytest

from cluster.errors import UserError
from cluster.model_source import cache_directory, local_model_directory, model_digest
from cluster.storage import ObjectStorage


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def test_a_local_directory_is_taken_as_it_is(model, tmp_path, monkeypatch):
    assert local_model_directory(str(model), None) == model
    monkeypatch.chdir(tmp_path)
    assert local_model_directory("model", None) == model
    assert local_model_directory("./model", None) == model


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "what is this?", "a/b/c"])
def test_a_path_that_is_not_there_names_the_key(name):
    with pytest.raises(UserError, match=r"^encoder\.model: no such model directory"):
        local_model_directory(name, None, key="encoder.model")


def test_a_file_is_not_a_model_directory(model):
    with pytest.raises(UserError, match="is a file; name the directory"):
        local_model_directory(str(model / "config.json"), None)


def test_a_hub_model_without_a_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"^model\.base: model `no-one/nothing` .*local directory") as caught:
        local_model_directory("no-one/nothing", None)
    assert "\n" not in str(caught.value)


def test_a_model_in_an_object_store_is_fetched_once(tmp_path, model, monkeypatch, cache):
    (model / "notes.bin").write_bytes(b"not part of a model")
    objects = obstore.store.LocalStore(model)
    monkeypatch.setattr("cluster.model_source.storage_at", lambda uri: ObjectStorage(uri, objects))
    fetched = local_model_directory("s3://bucket/model", None)
    assert fetched.is_relative_to(cache)
    assert sorted(path.name for path in fetched.iterdir()) == ["config.json", "model.safetensors"]
    assert model_digest(fetched) == model_digest(model)
    monkeypatch.setattr(ObjectStorage, "download", lambda *_: pytest.fail("fetched again"))
    assert local_model_directory("s3://bucket/model", None) == fetched
    monkeypatch.undo()
    monkeypatch.setattr("cluster.model_source.storage_at", lambda uri: ObjectStorage(uri, obstore.store.MemoryStore()))
    with pytest.raises(UserError, match=r"^model\.base: nothing under s3://bucket/model"):
        local_model_directory("s3://bucket/model", None)


def test_a_digest_sees_weights_configuration_and_names_only(model):
    digest = model_digest(model)
    (model / "optimizer.pt").write_bytes(b"x")
    (model / "README.md").write_text("x")
    assert model_digest(model) == digest
    (model / "model.safetensors").write_bytes(b"weightz")
    changed = model_digest(model)
    assert changed != digest
    (model / "config.json").rename(model / "other.json")
    assert model_digest(model) not in (digest, changed)


def test_an_unchanged_model_is_not_read_again_and_a_changed_one_is(model, monkeypatch):
    digest = model_digest(model)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
        assert model_digest(model) == digest
    before = (model / "model.safetensors").stat()
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(model / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert model_digest(model) != digest


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        model_digest(tmp_path)


def test_a_damaged_memory_of_digests_does_no_harm(model, cache):
    digest = model_digest(model)
    (file,) = (cache / "digests").iterdir()
    file.write_text("{ half")
    assert model_digest(model) == digest


def test_the_cache_is_where_the_environment_says(cache, monkeypatch):
    assert cache_directory() == cache
    monkeypatch.delenv("RAYFT_CACHE")
    assert cache_directory().parts[-2:] == (".cache", "rayft")
