"""The command line: help at once, one line for a mistake, every recipe readable, and the whole demo once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer.testing
import yaml

import rayft
from cluster.errors import NotBetterError, UserError
from cluster.recipe import load_recipe
from cluster.releases import open_release
from cluster.stage import Outcome, Plan, run_stage
from cluster.store import Store
from retrieval.records import Question
from training.config import TrainingRecipe
from training.intent_model import IntentModel

ROOT = Path(rayft.__file__).parent
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))
COMMANDS = (
    [],
    *([name] for name in ("demo", "ask", "evaluate", "batch", "serve", "submit", "release", "promote", "rollback")),
    ["gc"],
    ["doctor"],
    ["index", "build"],
    ["index", "search"],
    ["index", "update"],
    ["index", "purge"],
    ["index", "evaluate"],
    ["questions", "generate"],
    ["samples", "build"],
    ["samples", "show"],
    ["train", "lora"],
    ["train", "retriever"],
    ["train", "router"],
    ["serve-config"],
    ["keys", "new"],
    ["feedback", "review"],
    ["feedback", "export"],
    ["feedback", "improve"],
)


def run(*words: str, cwd: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, "-m", "rayft", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "rayft")
def test_help_of_each_command_describes_it_without_heavy_imports(words, tmp_path):
    code = (
        "import sys, rayft\n"
        f"sys.argv = ['rayft', *{words!r}, '--help']\n"
        "try:\n    rayft.main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'ray', 'faiss', 'transformers', 'deepspeed', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_committed_recipe_is_read_by_file_and_by_name(name):
    by_file = load_recipe(str(ROOT / "recipes" / name), [], rayft.Recipe)
    assert load_recipe(name.removesuffix(".yaml"), [], rayft.Recipe) == by_file


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["index", "build", "factbook", "--set", "corpus.pth=x"], "did you mean `corpus.path`"),
        (["index", "build", "factbook", "--set", "chunking.max_tokens=many"], "chunking.max_tokens"),
        (["index", "build", "nowhere.yaml"], "nowhere.yaml"),
        (["index", "build", "own_documents"], "corpus.path is empty"),
        (["index", "build", "own_documents", "--set", "corpus.path=missing"], "corpus.path: missing does not exist"),
        (["index", "build", "own_documents", "--set", "corpus.path=empty"], "corpus.path: empty"),
        (
            ["index", "build", "own_documents", "--set", "corpus.path=docs", "--set", "store.uri=file/store"],
            "store.uri",
        ),
        (["evaluate", "factbook", "--set", "evaluate.strategies=[rga]"], "evaluate.strategies"),
        (["demo", "factbook", "--region", "mars"], "source.region: no region 'mars'"),
        (["demo", "factbook", "--set", "corpus.path=docs"], "questions.path is empty"),
        (["samples", "build", "own_documents", "--set", "corpus.path=docs"], "questions.path is empty"),
        (["serve", "factbook"], "no release"),
        (["evaluate", "factbook"], "no release"),
        (["ask", "missing", "why?"], "corpus.path"),
        (["ask", "docs #1", "why?"], "docs #1 does not exist"),
        (["ask", "docs", " "], "the question is empty"),
        (["submit", "factbook", "--", "index", "bild"], "no command `index bild`"),
    ],
)
def test_mistake_ends_in_one_line_and_status_2(words, told, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "kettle.txt").write_text("The kettle holds 1.7 litres.", encoding="utf-8")
    (tmp_path / "file").write_text("not a directory", encoding="utf-8")
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("rayft: ")
    assert told in lines[0]
    assert not list((tmp_path / ".rayft" / "store").glob("*/*/*/manifest.json"))


@pytest.mark.parametrize(("error", "status"), [(NotBetterError("train raft: worse"), 1), (UserError("bad key"), 2)])
def test_worse_adapter_ends_in_one_line_and_status_1(error, status, monkeypatch, capsys):
    def fail() -> None:
        raise error

    monkeypatch.setattr(rayft, "app", fail)
    with pytest.raises(SystemExit) as caught:
        rayft.main()
    assert caught.value.code == status
    assert capsys.readouterr().err == f"rayft: {error}\n"


def test_more_passages_than_the_corpus_has_are_refused_by_name(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "kettle.txt").write_text("The kettle holds 1.7 litres.", encoding="utf-8")
    settings = ("own_documents", "--set", "corpus.path=docs", "--set", "search.mode=lexical")
    assert run("index", "build", *settings, cwd=tmp_path).returncode == 0
    found = run("index", "search", "own_documents", "kettle", "-k", "9", *settings[1:], cwd=tmp_path)
    assert found.returncode == 2
    assert "the index has 1 chunks" in found.stderr
    (tmp_path / "questions.jsonl").write_text(
        '{"_id": "q", "text": "How much?", "answers": ["1.7"], "golden": ["kettle.txt"]}'
    )
    demo = run("demo", *settings, "--set", "questions.path=questions.jsonl", cwd=tmp_path)
    assert demo.returncode == 2
    assert demo.stderr.strip().startswith("rayft: generation.passages is 3 but the index has 1 chunks")


def test_ask_keeps_the_indexes_of_folders_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [
        rayft.name_of_folder(path) for path in ("docs", "old/docs", "docs/", "My Docs #1", "文档", "s3://bucket/docs")
    ]
    assert names[0] == names[2] and len(set(names)) == 5
    assert names[0].startswith("docs-") and names[3].startswith("my-docs-1-") and names[4].startswith("documents-")
    for name in names:
        assert load_recipe("own_documents", [f"name={name}"], rayft.Recipe).name == name


def test_source_with_files_of_ones_own_leaves_them_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("factbook", ["corpus.path=c.jsonl", "questions.path=q.jsonl"], rayft.Recipe)
    assert rayft.with_source(recipe) == recipe
    assert not list(tmp_path.iterdir())


def test_source_that_cannot_be_written_names_its_key(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    recipe = load_recipe("factbook", [f"source.directory={tmp_path}/file/data"], rayft.Recipe)
    with pytest.raises(UserError, match=r"source\.directory"):
        rayft.with_source(recipe)


def test_repeated_sentences_are_told_once_and_numbers_stay_whole():
    assert rayft.without_repeats("It holds 1.7 litres. It holds 1.7 litres. Yes.") == "It holds 1.7 litres. Yes."
    assert rayft.without_repeats("保修三年。保修三年。") == "保修三年。"


def test_expected_answer_is_told_of_questions_without_one_too():
    unanswerable = Question("u", "Who?", metadata={"kind": "unanswerable"})
    assert rayft.describe_expected(unanswerable) == "no answer in the documents"
    assert rayft.describe_expected(Question("q", "Who?", ("Ann", "Anna"))) == "Ann"
    assert rayft.describe_expected(Question("b", "Who?")) == "the questions file gives no answer"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A recipe with utterances whose router reads n-grams, on a tiny base model."""
    from tests.serving.tiny import make_base

    monkeypatch.chdir(tmp_path)
    recipe = {
        "extends": str(ROOT / "recipes" / "customer_service.yaml"),
        "name": "shop",
        "model": {"base": str(make_base(tmp_path / "base"))},
        "router": {"features": "ngrams"},
    }
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return Store(str(tmp_path / ".rayft" / "store"))


def stub(store, kind, name):
    def write(attempt):
        (attempt.directory / "content").write_text(f"{kind} {name}\n", encoding="utf-8")
        return Outcome(counts={"chunks": 100})

    return run_stage(store, Plan(kind, name), write)


def test_release_without_index_pins_the_closed_book_adapter_and_the_router(shop):
    def call(*words):
        return typer.testing.CliRunner().invoke(rayft.app, list(words))

    refused = call("release", "shop.yaml", "--without-index")
    assert isinstance(refused.exception, UserError)
    assert "no finetuned adapter of shop; run `rayft train lora RECIPE --objective dsf`" in str(refused.exception)
    adapters = {role: stub(shop, "adapter", f"shop-{role}").ref for role in ("finetuned", "raft")}
    assert "with finetuned is promoted" in call("release", "shop.yaml", "--without-index").stdout
    assert open_release(shop, "shop").router is None
    assert call("train", "router", "shop.yaml").exit_code == 0
    assert "with router, finetuned is promoted" in call("release", "shop.yaml", "--without-index").stdout
    closed = open_release(shop, "shop")
    assert closed.pins() == {"router": shop.open("router", "shop").ref, "finetuned": adapters["finetuned"]}
    assert closed.index is None and closed.base_digest

    index = stub(shop, "index", "shop").ref
    published = call("release", "shop.yaml", "--no-promote").stdout
    assert "keeps the adapters" in published and "with index, router, finetuned is published" in published
    assert open_release(shop, "shop") == closed
    newest = next(
        version for version in shop.versions("release", "shop") if version in published.split("with index")[0]
    )
    assert open_release(shop, "shop", newest).pins() == {"index": index, **closed.pins()}


def test_release_does_not_pin_a_router_that_reads_what_nothing_here_embeds(shop):
    stub(shop, "adapter", "shop-finetuned")
    model = IntentModel(("a", "b"), "", "embedding", np.eye(2, dtype=np.float32), np.zeros(2, np.float32))

    def write(attempt):
        dataclasses.replace(model, encoder="mini", encoder_digest="e" * 64).save(attempt.directory)
        return Outcome()

    run_stage(shop, Plan("router", "shop"), write)
    refused = typer.testing.CliRunner().invoke(rayft.app, ["release", "shop.yaml", "--without-index"])
    assert "nothing here embeds" in str(refused.exception) and "router.features to ngrams" in str(refused.exception)
    assert shop.current("release", "shop") is None


def test_serve_config_asks_nodes_to_mount_what_serving_reads_and_nothing_else(shop):
    told = typer.testing.CliRunner().invoke(rayft.app, ["serve-config", "shop.yaml"]).stderr
    assert "so each node must mount it: store.uri, model.base, feedback.url\n" in " ".join(told.split()) + "\n"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_demo_on_a_small_region_builds_measures_and_serves_and_skips_the_second_time(tmp_path, free_port):
    recipe = {
        "extends": str(ROOT / "recipes" / "factbook.yaml"),
        "name": "small",
        "source": {"name": "factbook", "region": "central-asia"},
        "samples": {"raft_rows": 24, "dsf_rows": 16},
        "train": {"dsf_epochs": 1},
        "generation": {"max_new_tokens": 24},
        "evaluate": {"new_documents": 4, "new_questions": 2, "latency_rows": 1},
        "serve": {"port": free_port},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    first = run("demo", "small.yaml", cwd=tmp_path, timeout_s=1200)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    for part in (
        "a first answer",
        "hallucination",
        "route: raft",
        "expected:",
        "curl -s http://127.0.0.1",
        "demo: done",
    ):
        assert part in first.stdout

    store = Store(str(tmp_path / ".rayft" / "store"))
    report = json.loads(store.open("report", "small").path("report.json").read_text(encoding="utf-8"))
    assert set(report["strategies"]) == {"base", "rag", "rag_fewshot", "finetuned", "finetuned_rag", "raft"}
    for metrics in report["strategies"].values():
        assert {"value", "low", "high", "n"} <= metrics["exact_match"].keys()
        assert metrics["exact_match"]["n"] == 4
    adapter = store.open("adapter", "small-raft")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {file.path for file in adapter.manifest.files}
    assert adapter.manifest.counts["rows"] == 24

    second = run("demo", "small.yaml", cwd=tmp_path, timeout_s=600)
    assert second.returncode == 0, second.stderr[-3000:]
    for kind in ("index", "samples", "adapter", "report"):
        assert f"{kind}: up to date ({kind}/small" in second.stdout
    assert "building" not in second.stdout

    edited = run("samples", "build", "small.yaml", "--set", "samples.distractors=3", cwd=tmp_path, timeout_s=300)
    assert "index: up to date" in edited.stdout
    assert "samples.distractors changed from 2 to 3" in edited.stdout

    served = open_release(store, "small")
    moved = run("index", "update", "small.yaml", "--delete", "kz", cwd=tmp_path, timeout_s=300)
    assert moved.returncode == 0, moved.stderr[-3000:]
    released = run("release", "small.yaml", cwd=tmp_path, timeout_s=300)
    assert "keeps the adapters" in released.stdout
    after = open_release(store, "small")
    assert after.adapters == served.adapters and after.samples == served.samples
    assert after.index != served.index and after.index.version == store.current("index", "small")


def test_training_workers_read_their_part_of_every_recipe():
    for name in RECIPES:
        recipe = load_recipe(name.removesuffix(".yaml"), [], rayft.Recipe)
        part = TrainingRecipe.model_validate(recipe.training_values())
        assert (part.name, part.questions, part.samples, part.lora) == (
            recipe.name,
            recipe.questions,
            recipe.samples,
            recipe.lora,
        )
        assert part.router.out_of_scope == recipe.router.out_of_scope
