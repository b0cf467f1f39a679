import pytest
import typer
from typer.testing import CliRunner

from training.cli import train_app

pytestmark = pytest.mark.usefixtures("local_ray")


def run(app: typer.Typer, *arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_train_lora_trains_what_is_asked(built, monkeypatch):
    trained = []
    monkeypatch.setattr(
        "training.lora.train_adapter", lambda recipe, store, samples, objective: trained.append(objective)
    )
    for objective in ("raft", "dsf", "both"):
        result = run(train_app(lambda *_: built.recipe), "lora", "mine.yaml", "--objective", objective)
        assert result.exit_code == 0, result.output
    assert trained == ["raft", "dsf", "raft", "dsf"]
    assert run(train_app(lambda *_: built.recipe), "lora", "mine.yaml", "--objective", "none").exit_code == 2
