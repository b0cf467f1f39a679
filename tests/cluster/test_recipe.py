import re
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import recipe as recipe_module
from cluster.config import BaseRecipe, Section
from cluster.errors import UserError
from cluster.recipe import known_keys, load_recipe, parse_override, read_recipe


class Corpus(Section):
    path: str = ""
    limit: int | None = None


class Rule(Section):
    strategy: str
    words: tuple[str, ...] = ()


class Shape(Section):
    rank: int = pydantic.Field(default=16, ge=1)
    rate: float = 1e-3
    quick: bool = False


class Recipe(BaseRecipe):
    corpus: Corpus = Corpus()
    shape: Shape = Shape()
    rules: tuple[Rule, ...] = ()
    parts: dict[str, Corpus] = pydantic.Field(default_factory=dict)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Recipe:
    Path("r.yaml").write_text(text)
    return load_recipe("r.yaml", overrides, Recipe)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_is_read_with_overrides_typed_by_the_schema():
    recipe = load(
        "name: a\nshape: {rank: 8}\n",
        "shape.rank=4",
        "shape.rate=1e-4",
        "corpus.path=2024",
        "corpus.limit=null",
        "rules=[{strategy: rag, words: [x]}]",
        "store.uri=s3://bucket/a=b",
    )
    assert recipe.shape.rank == 4
    assert recipe.shape.rate == 1e-4
    assert recipe.corpus == Corpus(path="2024", limit=None)
    assert recipe.rules == (Rule(strategy="rag", words=("x",)),)
    assert recipe.store.uri == "s3://bucket/a=b"


def test_an_empty_override_empties_a_text():
    assert load("name: a\ncorpus: {path: x}\n", "corpus.path=").corpus.path == ""


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("name: a\ncorpus: {pth: x}", (), "r.yaml: unknown key `corpus.pth`; did you mean `corpus.path`?"),
        ("name: a\nshap: {}", (), "r.yaml: unknown key `shap`; did you mean `shape`?"),
        ("name: a\nparts: {my: {pth: x}}", (), "unknown key `parts.my.pth`; did you mean `parts.my.path`?"),
        ("name: a\nrank: 3", (), "r.yaml: unknown key `rank`; did you mean `shape.rank`?"),
        ("name: a\nzzzzzz: 3", (), "r.yaml: unknown key `zzzzzz`"),
        ("name: a", ("corpus.pth=x",), "--set: unknown key `corpus.pth`; did you mean `corpus.path`?"),
        ("name: a", ("seed.x=1",), "--set: `seed`"),
        ("name: a\nshape: {rank: many}", (), r"r.yaml: `shape.rank`: expected a valid integer.*found 'many'"),
        ("name: a\nshape: {rank: 0}", (), "r.yaml: `shape.rank`: expected greater than or equal to 1, found 0"),
        ("name: a\nshape: {rank: yes}", (), "r.yaml: `shape.rank`: expected a number, found True"),
        ("name: a\nshape: 3", (), "r.yaml: `shape`: expected a valid dictionary.*found 3"),
        ("seed: 1", (), "r.yaml: key `name` is missing"),
        ("name: a\nname: b", (), r"r.yaml: not valid YAML: key `name` stands twice \(line 2"),
        ("name: a\nshape: {rank: 1, rank: 2}", (), "key `rank` stands twice"),
        ("name: [a", (), "r.yaml: not valid YAML"),
        ("- a", (), "r.yaml: a recipe is a mapping"),
        ("name: a\n1: 2", (), "key 1 is not text"),
        ("name: !!python/object/apply:os.getcwd []", (), "r.yaml: not valid YAML"),
        ("name: a", ("corpus.path",), "--set: expected dotted.key=value"),
        ("name: a", ("corpus..path=1",), "--set: expected dotted.key=value"),
        ("name: a", ("rules=[",), "--set rules: .*not valid YAML"),
        ("name: a\nrules: [{strategi: x}]", (), "unknown key `rules.0.strategi`"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(text, overrides, expected):
    assert re.search(expected, refusal(text, *overrides))


def test_a_glob_needs_no_quotes():
    assert load("name: a", "corpus.path=**/*.md").corpus.path == "**/*.md"


def test_a_long_value_is_cut_in_the_error():
    assert len(refusal("name: a\nshape: {rank: " + "x" * 5000 + "}")) < 300


def test_a_missing_file_names_the_packaged_recipes(tmp_path, monkeypatch):
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    (packaged / "little.yaml").write_text("name: little\n")
    monkeypatch.setattr(recipe_module, "PACKAGED", packaged)
    for path in ("little", "little.yaml", "recipes/little.yaml"):
        assert load_recipe(path, (), Recipe).name == "little"
    with pytest.raises(UserError, match=r"nothing\.yaml: no such recipe file; packaged recipes: little"):
        load_recipe("nothing.yaml", (), Recipe)
    with pytest.raises(UserError, match="elsewhere/little"):
        load_recipe("elsewhere/little.yaml", (), Recipe)
    with pytest.raises(UserError, match="this is a folder"):
        load_recipe(str(packaged), (), Recipe)


def test_extends_merges_sections_and_is_relative_to_the_recipe(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text("name: base\nshape: {rank: 2, rate: 0.5}\nrules: [{strategy: a}]\n")
    (tmp_path / "deep" / "over.yaml").write_text("extends: base.yaml\nname: over\nshape: {rank: 3}\nrules: []\n")
    recipe = load_recipe("deep/over.yaml", (), Recipe)
    assert (recipe.name, recipe.shape.rank, recipe.shape.rate, recipe.rules) == ("over", 3, 0.5, ())
    assert read_recipe("deep/over.yaml").keys() == {"name", "shape", "rules"}


def test_extends_in_a_circle_is_refused(tmp_path):
    (tmp_path / "one.yaml").write_text("extends: two.yaml\nname: a\n")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\n")
    with pytest.raises(UserError, match="circle"):
        load_recipe("one.yaml", (), Recipe)


def test_known_keys_reach_into_lists_of_sections():
    keys = set(known_keys(Recipe))
    assert {"corpus.path", "rules.strategy", "ray.address", "store.uri", "seed"} <= keys


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
def test_numbers_given_as_override_arrive_unchanged(seed, rate, quick):
    Path("n.yaml").write_text("name: a\n")
    overrides = [f"seed={seed}", f"shape.rate={rate!r}", f"shape.quick={str(quick).lower()}"]
    recipe = load_recipe("n.yaml", overrides, Recipe)
    assert (recipe.seed, recipe.shape.rate, recipe.shape.quick) == (seed, rate, quick)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_text_in_quotes_arrives_unchanged(text):
    quoted = "'" + text.replace("'", "''") + "'"
    assert parse_override(f"corpus.path={quoted}")[1] == text


def test_recipe_paths_are_taken_from_the_folder_of_the_recipe_that_states_them(tmp_path, monkeypatch):
    base, over, elsewhere = tmp_path / "base", tmp_path / "over", tmp_path / "elsewhere"
    for folder in (base, over, elsewhere):
        folder.mkdir()
    (base / "base.yaml").write_text("name: a\ncorpus: {path: 'recipe:docs/a.jsonl'}\nparts: {one: {path: plain}}\n")
    (over / "over.yaml").write_text("extends: ../base/base.yaml\nparts: {two: {path: 'recipe:b.jsonl'}}\n")
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe("../over/over.yaml", ["parts.three.path=recipe:c.jsonl"], Recipe)
    assert recipe.corpus.path == str(base / "docs" / "a.jsonl")
    assert {name: part.path for name, part in recipe.parts.items()} == {
        "one": "plain",
        "two": str(over / "b.jsonl"),
        "three": str(over / "c.jsonl"),
    }
    listed = load("name: a\nrules: [{strategy: x, words: ['recipe:w', y]}]\n")
    assert listed.rules[0].words == (str(elsewhere / "w"), "y")


@pytest.mark.parametrize("path", ["recipe:../x", "recipe:a/../../x", "recipe:/etc/x", "recipe:", "recipe:a\\..\\x"])
def test_recipe_paths_that_leave_the_folder_are_refused(path):
    assert f"r.yaml: `corpus.path`: recipe: names a file in the recipe's own folder or below it, found {path!r}" in (
        refusal(f"name: a\ncorpus: {{path: '{path}'}}\n")
    )
    assert "--set: `parts.one.path`: recipe:" in refusal("name: a\n", f"parts.one.path='{path}'")
