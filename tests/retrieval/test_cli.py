import subprocess
import sys
from pathlib import Path

import typer
import yaml
from typer.testing import CliRunner

from cluster.recipe import load_recipe
from retrieval.cli import index_app
from retrieval.config import RetrievalRecipe
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


def test_index_cli_import_needs_no_heavy_library() -> None:
    script = (
        "import sys, retrieval.cli; heavy = {'torch', 'ray', 'faiss', 'transformers', 'pyarrow', 'numpy'} "
        "& set(sys.modules); sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
