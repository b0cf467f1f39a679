import pytest
import typer
from typer.testing import CliRunner

from training.cli import train_app

pytestmark = pytest.mark.usefixtures("local_ray")


def run(app: typer.Typer, *arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_train_lora_trains_what_is_asked(built, monkeypatch):
    trained = []

    def train(recipe, store, samples, objective, *, force):
        trained.append((objective, force))
        return samples

    monkeypatch.setattr("training.lora.train_adapter", train)
    for objective in ("raft", "dsf", "both"):
        result = run(train_app(lambda *_: built.recipe), "lora", "mine.yaml", "--objective", objective)
        assert result.exit_code == 0, result.output
    assert trained == [("raft", False), ("dsf", False), ("raft", False), ("dsf", False)]
    assert run(train_app(lambda *_: built.recipe), "lora", "mine.yaml", "--force").exit_code == 0
    assert trained[4:] == [("raft", True), ("dsf", True)]
    assert run(train_app(lambda *_: built.recipe), "lora", "mine.yaml", "--objective", "none").exit_code == 2
