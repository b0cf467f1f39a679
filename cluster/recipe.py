"""Loading a recipe: YAML, `extends`, `--set` overrides, and errors that a person can act on.

In: a path (or the bare name of a packaged recipe), overrides such as `index.kind=hnsw`, and the typed schema.
Out: a validated, frozen recipe; or one `UserError` line that names the key, what was found and what was expected.
A value that begins with `recipe:` names a file beside the recipe that states it (`recipe:shop/products.jsonl`), from
whatever directory a command is run; everything else that names a file is taken from the working directory.
Not covered: the sections themselves (each room's `config.py`). Recipes are data: nothing in one is executed.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pydantic
import yaml

from cluster.errors import UserError

R = TypeVar("R", bound=pydantic.BaseModel)

PACKAGED = Path(__file__).resolve().parent.parent / "recipes"
ERRORS_SHOWN = 3
BESIDE = "recipe:"
"""Begins a path that is taken from the recipe's own folder."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path, overrides: Sequence[str], schema: type[R]) -> R:
    """The recipe at `path` with `overrides` (`dotted.key=value`, value in YAML) applied, validated by `schema`.

    A path that is no file is also looked for among the packaged recipes (`factbook`, `recipes/factbook.yaml`).

    Raises:
        UserError: one line naming the file or the override, the key, what was found and what was expected.
    """
    return load_values(read_recipe(path, overrides), overrides, schema, str(path))


def load_values(values: dict[str, Any], overrides: Sequence[str], schema: type[R], origin: str) -> R:
    """The recipe that `values` are, validated; `overrides` are in them already, and tell errors in the user's words.

    Raises:
        UserError: as `load_recipe`; `origin` is named where no override is to blame.
    """
    texts = {key: text for key, _, text in map(parse_override, overrides)}
    try:
        recipe = _validate(values, texts, schema)
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, origin, texts, schema)) from None
    for key, value in _booleans_taken_for_numbers(values, recipe):
        raise UserError(f"{_origin(key, origin, texts)}: `{key}`: expected a number, found {value}")
    return recipe


def find_recipe(path: str | Path) -> Path:
    """The recipe file that `path` means: itself, or a packaged recipe of that name."""
    given = Path(path)
    if given.is_file():
        return given
    if given.is_dir():
        raise UserError(f"{path}: this is a folder; a recipe is a YAML file")
    if given.parent in (Path(), Path("recipes")):
        packaged = PACKAGED / (given.name if given.suffix else f"{given.name}.yaml")
        if packaged.is_file():
            return packaged
    known = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.yaml"))) or "none"
    raise UserError(f"{path}: no such recipe file; packaged recipes: {known}")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The raw mapping in a recipe file, with what it `extends` and `overrides` merged in; not yet validated."""
    file = find_recipe(path)
    values = _read_chain(file, str(path), ())
    for override in overrides:
        key, value, _ = parse_override(override)
        _assign(values, key, _resolved(value, file.parent, "--set", key))
    return values


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with overrides merged in."""
    merged = dict(values)
    for override in overrides:
        key, value, _ = parse_override(override)
        _assign(merged, key, value)
    return merged


def _read_chain(file: Path, shown: str, above: tuple[Path, ...]) -> dict[str, Any]:
    resolved = file.resolve()
    if resolved in above:
        raise UserError(f"{shown}: `extends` goes round in a circle")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # _Loader is a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{shown}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{shown}: a recipe is a mapping of keys to values, found {type(values).__name__}")
    base = values.pop("extends", None)
    values = {key: _resolved(value, file.parent, shown, key) for key, value in values.items()}
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{shown}: `extends`: expected the path of another recipe, found {base!r}")
    beside = file.parent / base
    found = beside if beside.is_file() else find_recipe(base)
    return _merge(_read_chain(found, base, (*above, resolved)), values)


def _resolved(value: Any, folder: Path, shown: str, key: str) -> Any:
    """`value` with each `recipe:` path in it made absolute, taken from `folder`."""
    if isinstance(value, dict):
        return {name: _resolved(inner, folder, shown, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, folder, shown, f"{key}.{place}") for place, inner in enumerate(value)]
    if not isinstance(value, str) or not value.startswith(BESIDE):
        return value
    inner = value.removeprefix(BESIDE)
    parts = PurePosixPath(inner)
    if not inner.strip() or parts.is_absolute() or ".." in parts.parts or "\\" in inner:
        raise UserError(
            f"{shown}: `{key}`: {BESIDE} names a file in the recipe's own folder or below it, found {value!r}; "
            f"without {BESIDE}, a path is taken from the working directory"
        )
    return str(folder.resolve() / parts)


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def parse_override(override: str) -> tuple[str, Any, str]:
    """`dotted.key=value` as (key, value read as YAML, value as written)."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise UserError(f"--set: expected dotted.key=value, found {override!r}")
    if text.startswith("*"):  # YAML's alias, of which a lone value can have none; a glob is meant
        return key, text, text
    try:
        return key, yaml.load(text, Loader=_Loader), text  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: {text!r} is not valid YAML: {_one_line(error)}") from None


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = dict(inner) if isinstance(inner, dict) else {}
        values = values[section]
    values[last] = value


def _validate(values: dict[str, Any], texts: Mapping[str, str], schema: type[R]) -> R:
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        # `--set corpus.path=2024` reads as a number, but the field wants text: the text as typed is meant.
        wanted = [_dotted(e["loc"]) for e in error.errors() if e["type"] == "string_type"]
        typed = [key for key in wanted if key in texts]
        if not typed:
            raise
    for key in typed:
        _assign(values, key, texts[key])
    return schema.model_validate(values)


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc)


def _origin(key: str, path: str, texts: Mapping[str, str]) -> str:
    by_override = any(f"{key}.".startswith(f"{given}.") or given.startswith(f"{key}.") for given in texts)
    return "--set" if by_override else path


def _explain(error: pydantic.ValidationError, path: str, texts: Mapping[str, str], schema: type[R]) -> str:
    errors = error.errors(include_url=False)
    lines = []
    for found in errors[:ERRORS_SHOWN]:
        key = _dotted(found["loc"])
        lines.append(f"{_origin(key, path, texts)}: {_explain_one(key, found, schema)}")
    more = f" (and {len(errors) - ERRORS_SHOWN} more)" if len(errors) > ERRORS_SHOWN else ""
    return "; ".join(lines) + more


def _explain_one(key: str, found: Any, schema: type[pydantic.BaseModel]) -> str:
    if found["type"] == "extra_forbidden":
        nearest = nearest_key(key, schema)
        return f"unknown key `{key}`" + (f"; did you mean `{nearest}`?" if nearest else "")
    if found["type"] == "missing":
        return f"key `{key}` is missing"
    message = str(found["msg"]).replace("Input should be ", "expected ").removeprefix("Value error, ")
    value = repr(found["input"])
    shown = value if len(value) <= 80 else value[:77] + "…"
    return f"`{key}`: {message}, found {shown}" if key else message


def known_keys(schema: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that `schema` knows, sections before what they hold."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        for section in _sections(field.annotation):
            yield from known_keys(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _sections(inner)


def nearest_key(key: str, schema: type[pydantic.BaseModel]) -> str | None:
    """The known key most like `key`: among its siblings first, then by its last part anywhere."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    keys = list(known_keys(schema))
    parent, last = ".".join(parts[:-1]), parts[-1]
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == parent}
    if not siblings and len(parts) > 2:  # below a name of the user's own, such as `collections.NAME.access`
        names = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == ".".join(parts[:-2])]
        siblings = {name: f"{parent}.{name}" for name in names}
    for candidates, wanted in ((siblings, last), ({k: k for k in keys}, ".".join(parts))):
        close = difflib.get_close_matches(wanted, candidates, n=1, cutoff=0.6)
        if close:
            return candidates[close[0]]
    anywhere = {k.rpartition(".")[2]: k for k in keys}
    close = difflib.get_close_matches(last, anywhere, n=1, cutoff=0.75)
    return anywhere[close[0]] if close else None


def _booleans_taken_for_numbers(values: Mapping[str, Any], model: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """`epochs: yes` would pass as 1; a number was meant."""
    for name, value in values.items():
        taken = getattr(model, name, None)
        if isinstance(value, dict) and isinstance(taken, pydantic.BaseModel):
            yield from _booleans_taken_for_numbers(value, taken, f"{prefix}{name}.")
        elif isinstance(value, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
            yield f"{prefix}{name}", value
