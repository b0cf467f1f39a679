import importlib.metadata

import pytest

from cluster import doctor
from cluster.config import BaseRecipe, RayConfig, StoreConfig
from cluster.doctor import Check, Status, examine, report


def by_subject(recipe=None) -> dict[str, list[Check]]:
    found: dict[str, list[Check]] = {}
    for check in examine(recipe):
        found.setdefault(check.subject, []).append(check)
    return found


def test_this_machine_is_examined_without_a_recipe(capsys):
    checks = by_subject()
    assert {"python", "packages", "faiss", "cuda", "bfloat16", "memory", "disk (cache)", "embedded model"} <= set(
        checks
    )
    assert "store" not in checks
    assert checks["python"][0].status is Status.OK
    assert [check.status for check in checks["packages"]] == [Status.OK]


def test_a_recipe_adds_its_store_and_its_cluster(tmp_path):
    (tmp_path / "file").write_text("")
    bad = BaseRecipe(
        name="x", store=StoreConfig(uri=str(tmp_path / "file" / "store")), ray=RayConfig(address="127.0.0.1:1")
    )
    checks = by_subject(bad)
    assert checks["store"][0].status is Status.FAIL
    assert "store.uri" in checks["store"][0].found
    assert checks["ray"][0].status is Status.FAIL
    lines: list[str] = []
    assert report(bad, lines.append) is False
    assert lines[-1].startswith("Mend what failed, then start with `rayft demo recipes/")
    good = BaseRecipe(name="x", store=StoreConfig(uri=str(tmp_path / "store")))
    assert by_subject(good)["store"][0].status is Status.OK


def test_a_package_of_another_version_fails_with_the_command_that_mends_it(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "torch" else real(name))
    (check,) = by_subject()["packages"]
    assert str(check) == "fail packages: torch 1.0, expected ==2.13.0; pip install 'torch==2.13.0'"


def missing(*absent):
    real = importlib.metadata.version

    def version(name):
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.15.1" if name.startswith("faiss") else real(name)

    return version


@pytest.mark.parametrize(
    ("absent", "status", "words"),
    [
        (("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs"), Status.FAIL, "missing"),
        (("faiss-gpu-cuvs",), Status.FAIL, "faiss-cpu and faiss-gpu overwrite each other"),
        (("faiss-gpu", "faiss-gpu-cuvs"), Status.OK, "faiss-cpu 1.15.1"),
    ],
)
def test_exactly_one_build_of_faiss_is_wanted(monkeypatch, absent, status, words):
    monkeypatch.setattr(importlib.metadata, "version", missing(*absent))
    monkeypatch.setattr(doctor, "_cuda_devices", lambda: [])
    (check,) = by_subject()["faiss"]
    assert check.status is status
    assert words in check.found


def test_the_recipe_to_start_with_follows_the_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_cuda_devices", lambda: [])
    assert doctor.recommend_recipe() == "recipes/factbook.yaml"
    monkeypatch.setattr(doctor, "_cuda_devices", lambda: ["Some GPU (80 GB)"])
    assert doctor.recommend_recipe() == "recipes/gpu.yaml"


def test_little_memory_or_disk_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: 2_000_000_000)
    assert by_subject()["memory"][0].status is Status.WARN
    monkeypatch.setattr(doctor, "available_memory", lambda: 1_000_000_000)
    check = by_subject()["memory"][0]
    assert check.status is Status.FAIL
    assert "free at least 4.0 GB" in str(check)
