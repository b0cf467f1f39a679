"""Tiny models, made once per session."""

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.serving.engine_conformance")  # so that a failure shows what differed

from tests.serving.tiny import make_adapter, make_base  # noqa: E402 - after the rewriting is asked for


@dataclass(frozen=True)
class TinyModels:
    base: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    base = make_base(directory / "base")
    adapters = {
        "raft": make_adapter(base, directory / "raft", seed=1),
        "finetuned": make_adapter(base, directory / "finetuned", seed=2),
    }
    return TinyModels(base, adapters)
