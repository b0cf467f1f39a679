import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.recipe import load_recipe
from retrieval.cli import explain_no_hits, index_app
from retrieval.config import RetrievalRecipe
from retrieval.filters import Kind, parse_filter
from tests.retrieval.tiny import tiny_recipe


def test_index_build_and_search_print_rank_heading_text_and_place(
    tmp_path: Path, corpus_path: Path, encoder_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    sections = tiny_recipe(tmp_path, corpus_path, encoder_path).model_dump(mode="json")
    recipe.write_text(yaml.safe_dump(sections), encoding="utf-8")
    app = typer.Typer()
    app.add_typer(index_app(lambda path, overrides: load_recipe(path, overrides, RetrievalRecipe)), name="index")
    runner = CliRunner()
    override = ["--set", "search.mode=lexical"]
    built = runner.invoke(app, ["index", "build", str(recipe), *override], catch_exceptions=False)
    assert built.exit_code == 0
    found = runner.invoke(app, ["index", "search", str(recipe), "cheese of Denmark", "-k", "2"], catch_exceptions=False)
    lines = found.stdout.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("1. ")
    assert lines[0].endswith("Denmark | Economy > Exports")
    assert "cheese" in lines[1]
    assert lines[2].strip().startswith("denmark [")
    command = ["index", "search", str(recipe), "cheese of Denmark", "-k", "1", "--mode", "lexical"]
    filtered = runner.invoke(app, [*command, "--filter", '{"place": 6}'], catch_exceptions=False)
    assert "Ghana" in filtered.stdout
    assert "Denmark" not in filtered.stdout
    with pytest.raises(UserError, match=r"^--filter: not JSON"):
        runner.invoke(app, [*command, "--filter", "place=6"], catch_exceptions=False)
    with pytest.raises(UserError, match="the query is empty"):
        runner.invoke(app, ["index", "search", str(recipe), "  "], catch_exceptions=False)
    nothing = runner.invoke(app, [*command, "--filter", '{"plcae": 6}'], catch_exceptions=False)
    assert nothing.stdout == ""
    assert "no document has 'plcae', did you mean place?" in nothing.stderr


def test_index_search_without_k_prints_what_a_small_index_has(tmp_path: Path, encoder_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "only.txt").write_text("copper and roses in summer", encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tmp_path, folder, encoder_path).model_dump(mode="json")))
    app = typer.Typer()
    app.add_typer(index_app(lambda path, overrides: load_recipe(path, overrides, RetrievalRecipe)), name="index")
    override = ["--set", "search.mode=lexical"]
    CliRunner().invoke(app, ["index", "build", str(recipe), *override], catch_exceptions=False)
    found = CliRunner().invoke(app, ["index", "search", str(recipe), "copper", *override], catch_exceptions=False)
    assert len(found.stdout.splitlines()) == 3


def test_no_hits_are_explained_by_keys_kinds_and_collections() -> None:
    known: dict[str, set[Kind]] = {"year": {"number"}, "lang": {"text"}, "collection": {"text"}}

    def explain(wanted: object, collections: tuple[str, ...] = ()) -> str:
        return explain_no_hits(parse_filter(wanted), known, collections)

    assert explain({"year": {"gte": 3000}}) == "no passage matches"
    assert explain({"not": {"zzz": 1}}).endswith("no document has 'zzz'; keys are collection, lang, year")
    assert explain({"lang": "en", "year": {"gte": "2020"}}).endswith("year holds numbers, the filter asks for text")
    assert explain({"collection": "b"}) == "no passage matches"
    assert explain({"collection": "b"}, ("a",)).endswith("the collections are a")


def test_index_build_strict_stops_at_what_the_plain_build_lists(
    tmp_path: Path, encoder_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "good.txt").write_text("copper and roses in summer", encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "old.doc").write_text("not read", encoding="utf-8")
    for number in range(11):
        (folder / f"zero{number}.md").write_text("", encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tmp_path, folder, encoder_path).model_dump(mode="json")))
    app = typer.Typer()
    app.add_typer(index_app(lambda path, overrides: load_recipe(path, overrides, RetrievalRecipe)), name="index")
    with pytest.raises(UserError, match=r"^corpus\.path: .*empty\.txt.*\(corpus\.strict\)"):
        CliRunner().invoke(app, ["index", "build", str(recipe), "--strict"], catch_exceptions=False)
    built = CliRunner().invoke(app, ["index", "build", str(recipe)], catch_exceptions=False)
    assert built.exit_code == 0
    assert "12 of the corpus's documents were rejected" in built.stdout
    lines = built.stdout.splitlines()
    assert "  empty.txt: is empty" in lines and "  zero3.md: is empty" in lines and "  and 2 more" in lines
    assert "index: 1 files of other formats are not read: .doc" in lines


def test_index_cli_import_needs_no_heavy_library() -> None:
    script = (
        "import sys, retrieval.cli; heavy = {'torch', 'ray', 'faiss', 'transformers', 'pyarrow', 'numpy'} "
        "& set(sys.modules); sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
