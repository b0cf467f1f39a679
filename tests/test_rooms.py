"""Imports go one way only, and what the command line needs to answer `--help` imports nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("cluster", "retrieval", "training", "serving", "evaluation")
HEAVY = ("torch", "ray", "faiss", "transformers", "sentence_transformers", "peft", "deepspeed", "pyarrow", "matplotlib")


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from importlinter.cli import lint_imports;"
        f"sys.exit(lint_imports(config_filename={str(directory / 'pyproject.toml')!r}, no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_rooms_import_only_to_their_left():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_to_the_right_is_found(tmp_path):
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "rayft.py").write_text("import evaluation\n")
    for package in (*ROOMS, "recipes"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    assert lint_imports(tmp_path).returncode == 0
    helper = tmp_path / "cluster" / "helper.py"
    (tmp_path / "retrieval" / "records.py").write_text("")
    for statement in ("from retrieval import records", "import rayft"):
        helper.write_text(f"def f():\n    {statement}\n")
        result = lint_imports(tmp_path)
        assert result.returncode != 0
        assert "cluster.helper" in result.stdout


def light_modules() -> list[str]:
    names = [f"{room}.{part}" for room in ROOMS for part in ("config", "records", "cli")]
    light = ["rayft", "cluster.recipe", "cluster.errors", "cluster.progress"]
    return light + [name for name in names if (ROOT / (name.replace(".", "/") + ".py")).is_file()]


@pytest.mark.parametrize("module", light_modules())
def test_what_help_needs_imports_nothing_heavy(module):
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
