import pytest
import typer
from typer.testing import CliRunner

from cluster.cli import cluster_app, lift_overrides, split_words
from cluster.config import BaseRecipe
from cluster.errors import UserError
from cluster.recipe import load_recipe
from cluster.releases import publish_release
from cluster.store import Store
from tests.cluster.stores import build


@pytest.fixture
def app(tmp_path, monkeypatch) -> typer.Typer:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("name: x\nstore: {uri: store}\n")
    app, index = typer.Typer(), typer.Typer()

    @index.command()
    def build(recipe: str) -> None: ...

    @index.command()
    def search(recipe: str) -> None: ...

    @app.command()
    def evaluate(recipe: str) -> None: ...

    app.add_typer(index, name="index")
    app.add_typer(cluster_app(lambda path, overrides: load_recipe(path, overrides, BaseRecipe)))
    return app


def run(app: typer.Typer, *words: str):
    return CliRunner().invoke(app, words)


def test_promote_rollback_and_gc_work_on_the_recipes_store(app):
    store = Store("store")
    versions = [publish_release(store, "x", index=build(store, number).ref).version for number in (1, 2)]
    for version in versions:
        assert run(app, "promote", "r.yaml", version).exit_code == 0
    assert store.current("release", "x") == versions[1]
    result = run(app, "rollback", "r.yaml")
    assert result.stdout == f"release: back to release/x/{versions[0]}\n"
    assert store.current("release", "x") == versions[0]
    build(store, 3)
    build(store, 4)
    old = run(app, "gc", "r.yaml", "--dry-run", "--min-age-hours", "0").stdout
    assert "gc: would remove 1 things" in old
    assert run(app, "gc", "r.yaml").stdout.startswith("gc: removed 0 things, 0 B")
    assert "gc: removed index/x/" in run(app, "gc", "r.yaml", "--min-age-hours", "0").stdout


def test_a_user_error_is_left_to_the_command_line(app):
    result = run(app, "rollback", "r.yaml", "--set", "store.url=x")
    assert isinstance(result.exception, UserError)
    assert "did you mean `store.uri`?" in str(result.exception)


def test_doctor_ends_with_the_recipe_to_start_with(app):
    result = run(app, "doctor", "r.yaml")
    assert result.exit_code == (1 if "\nfail " in f"\n{result.stdout}" else 0)
    assert "store can be written" in result.stdout
    assert "rayft demo recipes/" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "command", "arguments"),
    [
        (["index", "build"], ("index", "build"), ()),
        (["index", "search", "a question", "-k", "3"], ("index", "search"), ("a question", "-k", "3")),
        (["evaluate", "--quick"], ("evaluate",), ("--quick",)),
        (["doctor"], ("doctor",), ()),
    ],
)
def test_the_words_of_a_command_are_told_from_its_arguments(app, words, command, arguments):
    assert split_words(typer.main.get_command(app), words) == (command, arguments)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["index"], "no command `index`; after rayft index comes one of build, search"),
        (["indx", "build"], "no command `indx`; after rayft comes one of .*evaluate"),
        (["submit", "r.yaml"], "a job cannot submit itself"),
    ],
)
def test_an_unknown_command_is_refused_before_anything_is_sent(app, words, expected):
    with pytest.raises(UserError, match=expected):
        split_words(typer.main.get_command(app), words)


def test_overrides_may_stand_behind_the_stage_too():
    words = ["train", "lora", "--set", "a=1", "--objective", "raft", "--set=b=2"]
    assert lift_overrides(words) == (["a=1", "b=2"], ["train", "lora", "--objective", "raft"])


def test_submitting_to_nobody_is_one_line(app):
    result = run(app, "submit", "r.yaml", "--address", "http://127.0.0.1:1", "--", "index", "build")
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith("--address: no job API for us at http://127.0.0.1:1: ")
    assert "\n" not in str(result.exception)
    result = run(app, "submit", "r.yaml", "--address", "ray://x:1", "--", "index", "build")
    assert "expected the dashboard's http:// address, found 'ray://x:1'" in str(result.exception)
