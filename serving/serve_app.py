"""The graph for Serve's own tools: an application builder for `serve deploy` and `serve run`, and the config that names
it.

In: `args` of a Serve config: `recipe` (its sections, or a recipe file), `set` (overrides), `release` (a version; none
takes the promoted one and follows promotions). Out: the application. `serve_config` writes such a config for a recipe.
The code must be importable where Serve runs: in the image, or through `runtime_env.working_dir`.
Not covered: `rayft serve`, which brings up a graph and takes it down again (serving/service.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from serving.config import ServingRecipe

if TYPE_CHECKING:
    from ray.serve import Application

IMPORT_PATH = "serving.serve_app:build"
APP_NAME = "rayft"
SERVED_SECTIONS = (
    *("name", "seed", "store", "language", "encoder", "search", "prompt", "model", "generation", "router"),
    *("serve", "feedback", "telemetry"),
)
"""What serving reads of a recipe; the other sections are of other stages."""
PATH_KEYS = ("serve.keys", "serve.follow_up_prompt")
"""Keys that hold a local path although their name does not say so."""


def build(args: Mapping[str, Any]) -> Application:
    """The application; Serve calls it with the config's `args`.

    Raises:
        UserError: `args` or the recipe are not as they should be, or the release does not fit.
    """
    from cluster.releases import open_release
    from cluster.store import Store
    from serving.graph import build_app

    recipe, version = read_args(args)
    store = Store(recipe.store.uri)
    return build_app(recipe, store, open_release(store, recipe.name, version or None), follow=not version)


def read_args(args: Mapping[str, Any]) -> tuple[ServingRecipe, str]:
    """The recipe and the release's version.

    Raises:
        UserError: An argument or a recipe key is unknown or wrong.
    """
    from cluster.recipe import load_values, read_recipe, with_overrides

    if unknown := sorted(set(args) - {"recipe", "set", "release"}):
        raise UserError(f"args: unknown {', '.join(unknown)}; {IMPORT_PATH} takes recipe, set and release")
    given, overrides, version = args.get("recipe"), args.get("set", []), args.get("release", "")
    if isinstance(overrides, str) or not isinstance(overrides, Sequence) or not isinstance(version, str):
        raise UserError("args: `set` is a list of dotted.key=value, `release` is a version")
    if isinstance(given, str):
        values, origin = read_recipe(given, overrides), given
    elif isinstance(given, Mapping):
        values, origin = with_overrides(given, overrides), "args.recipe"
    else:
        raise UserError("args: `recipe` is missing: a recipe file, or its sections")
    for key in values.keys() - set(SERVED_SECTIONS):
        if close := difflib.get_close_matches(key, SERVED_SECTIONS, n=1, cutoff=0.8):
            raise UserError(f"{origin}: unknown key `{key}`; did you mean `{close[0]}`?")
    served = {key: value for key, value in values.items() if key in SERVED_SECTIONS}
    return load_values(served, overrides, ServingRecipe, origin), version


def serve_config(
    recipe: ServingRecipe, release: str = "", working_dir: str = "", path_keys: Sequence[str] = ()
) -> dict[str, Any]:
    """A Serve config that deploys a recipe; local paths in it are absolute.

    Args:
        recipe: The recipe.
        release: Version to stay with; empty follows promotions.
        working_dir: `runtime_env.working_dir`, where the image does not hold rayft.
        path_keys: Further keys that may hold a local path.
    """
    sections = recipe.model_dump(mode="json", include=set(SERVED_SECTIONS), exclude_defaults=True)
    for key, path in local_paths(recipe, path_keys).items():
        section, _, rest = key.partition(".")
        sections.setdefault(section, {})[rest] = f"sqlite:///{path}" if key == "feedback.url" else path
    args: dict[str, Any] = {"recipe": sections, **({"release": release} if release else {})}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": recipe.serve.host, "port": recipe.serve.port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "runtime_env": {"working_dir": working_dir} if working_dir else {},
                "args": args,
            }
        ],
    }


def local_paths(recipe: ServingRecipe, path_keys: Sequence[str] = ()) -> dict[str, str]:
    """Dotted key to absolute path of what serving reads from this machine's disk."""
    from cluster.submit import absolute_paths
    from serving.feedback_schema import parse_url

    stated = recipe.model_dump(mode="json", include=set(SERVED_SECTIONS), exclude_defaults=True)
    found = absolute_paths(recipe, stated, path_keys)
    for key in PATH_KEYS:
        section, _, rest = key.partition(".")
        if path := getattr(getattr(recipe, section), rest):
            found[key] = str(Path(path).expanduser().absolute())
    if recipe.feedback.url and (url := parse_url(recipe.feedback.url)).get_backend_name() == "sqlite":
        found["feedback.url"] = str(url.database)
    return {key: path for key, path in found.items() if key.partition(".")[0] in SERVED_SECTIONS}


def config_text(config: Mapping[str, Any], recipe: str) -> str:
    """The config as YAML, with a line that says where it comes from."""
    import yaml

    comment = f"# Written by `rayft serve-config {recipe}`; deploy with `serve deploy FILE`.\n"
    return comment + yaml.safe_dump(dict(config), allow_unicode=True, sort_keys=False)
