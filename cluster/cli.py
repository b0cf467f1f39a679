"""The cluster room's commands: submit, promote, rollback, gc, doctor.

In: a loader of recipes (`rayft.py` knows the whole schema). Out: a Typer app to mount at the top level. Only Typer is
imported here, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from cluster.config import BaseRecipe
from cluster.errors import UserError

Load = Callable[[str, list[str]], BaseRecipe]

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a packaged one.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, such as index.kind=hnsw; repeatable."),
]


def cluster_app(load: Load, path_keys: Sequence[str] = ()) -> typer.Typer:
    """The commands; mount with `app.add_typer(cluster_app(load))`, without a name.

    Args:
        load: Recipe path and overrides to the whole recipe.
        path_keys: Recipe keys that may hold a local path although their name does not say so (`model.base`).
    """
    app = typer.Typer(no_args_is_help=True)
    _add_submit(app, load, path_keys)
    _add_releases(app, load)
    _add_gc(app, load)
    _add_doctor(app, load)
    return app


def split_words(root: object, words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words that name a command under the root group, and what follows it.

    Raises:
        UserError: there is no such command.
    """
    taken: list[str] = []
    node: object = root
    while (commands := getattr(node, "commands", None)) is not None:
        rest = words[len(taken) :]
        if not rest or rest[0] not in commands:
            known = ", ".join(sorted(commands))
            shown = " ".join([*taken, *rest[:1]]) or "nothing"
            raise UserError(f"submit: no command `{shown}`; after {' '.join(['rayft', *taken])} comes one of {known}")
        taken.append(rest[0])
        node = commands[rest[0]]
    if taken == ["submit"]:
        raise UserError("submit: a job cannot submit itself; name a stage, such as `index build`")
    return tuple(taken), tuple(words[len(taken) :])


def lift_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--set` and its values out of the words after `--`, and the other words: overrides, remaining words."""
    overrides: list[str] = []
    others: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word == "--set" and waiting:
            overrides.append(waiting.pop(0))
        elif word.startswith("--set="):
            overrides.append(word.removeprefix("--set="))
        else:
            others.append(word)
    return overrides, others


def _add_submit(app: typer.Typer, load: Load, path_keys: Sequence[str]) -> None:
    @app.command(name="submit")
    def submit_command(
        context: typer.Context,
        recipe: RecipeArgument,
        words: Annotated[
            list[str], typer.Argument(metavar="-- STAGE…", help="The command to run, such as: index build")
        ],
        overrides: SetOption = None,
        address: Annotated[
            str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Address of the cluster's job API.")
        ] = "http://127.0.0.1:8265",
        follow: Annotated[bool, typer.Option("--follow/--detach", help="Follow the log and wait for the end.")] = True,
    ) -> None:
        """Run a stage as a Ray job: rayft submit RECIPE -- index build"""
        from cluster.submit import Job, submit

        lifted, others = lift_overrides(words)
        settings = [*(overrides or []), *lifted]
        command, arguments = split_words(context.find_root().command, others)
        loaded = load(recipe, settings)
        job = Job(recipe, tuple(settings), command, arguments, address)
        raise typer.Exit(submit(job, loaded, path_keys, follow=follow))


def _add_releases(app: typer.Typer, load: Load) -> None:
    @app.command(name="promote")
    def promote_command(
        recipe: RecipeArgument,
        version: Annotated[str, typer.Argument(help="Version of the release.")],
        overrides: SetOption = None,
    ) -> None:
        """Make a release the one that is served."""
        from cluster.progress import say
        from cluster.releases import promote
        from cluster.store import Store

        loaded = load(recipe, list(overrides or []))
        say(f"release: {promote(Store(loaded.store.uri), loaded.name, version).ref} is promoted")

    @app.command(name="rollback")
    def rollback_command(recipe: RecipeArgument, overrides: SetOption = None) -> None:
        """Return to the release that was promoted before the current one."""
        from cluster.progress import say
        from cluster.releases import rollback
        from cluster.store import Store

        loaded = load(recipe, list(overrides or []))
        say(f"release: back to {rollback(Store(loaded.store.uri), loaded.name).ref}")


def _add_gc(app: typer.Typer, load: Load) -> None:
    @app.command(name="gc")
    def gc_command(
        recipe: RecipeArgument,
        overrides: SetOption = None,
        keep: Annotated[int, typer.Option(min=0, help="Promoted releases whose artifacts stay.")] = 3,
        min_age_hours: Annotated[
            float | None,
            typer.Option(min=0, help="Leave what is younger; 1 on a local disk, 24 on an object store."),
        ] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    ) -> None:
        """Remove from the store what is neither current, nor released, nor a parent of such."""
        from cluster.gc import collect
        from cluster.progress import describe_bytes, say
        from cluster.store import Store

        loaded = load(recipe, list(overrides or []))
        store = Store(loaded.store.uri)
        age_s = None if min_age_hours is None else min_age_hours * 3600
        removals = collect(store, keep=keep, min_age_s=age_s, dry_run=dry_run)
        verb = "would remove" if dry_run else "removed"
        for removal in removals:
            say(f"gc: {verb} {removal.key} ({describe_bytes(removal.size)}): {removal.reason}")
        total = describe_bytes(sum(removal.size for removal in removals))
        say(f"gc: {verb} {len(removals)} things, {total}, in {store.uri}")


def _add_doctor(app: typer.Typer, load: Load) -> None:
    @app.command(name="doctor")
    def doctor_command(
        recipe: Annotated[
            str | None, typer.Argument(metavar="[RECIPE]", help="Also check its store and Ray address.")
        ] = None,
        overrides: SetOption = None,
    ) -> None:
        """Check this machine, and name the recipe to start with."""
        from cluster.doctor import report
        from cluster.progress import say

        loaded = load(recipe, list(overrides or [])) if recipe is not None else None
        raise typer.Exit(0 if report(loaded, say) else 1)
