"""Fixtures that every room's tests share."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any test imports torch or faiss

from cluster.config import RayConfig
from cluster.session import ray_session
from cluster.store import Store

# Two shared cores: time limits on single examples say nothing about the code.
hypothesis.settings.register_profile("rayft", deadline=None, max_examples=60)
hypothesis.settings.load_profile("rayft")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def ray_module() -> Iterator[None]:
    """One small local Ray for all tests of a module."""
    with ray_session(RayConfig(num_cpus=2)):
        yield


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder."""
    from tests.retrieval.tiny import tiny_encoder

    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus."""
    from tests.retrieval.tiny import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")
