"""The serving room's commands: `rayft serve` and `rayft serve-config`.

In: a loader of recipes. Out: a Typer app to mount at the top level. Only Typer is imported here, so that `--help`
answers at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import RecipeArgument, SetOption
from cluster.errors import UserError
from cluster.progress import complain
from serving.config import ServingRecipe

Load = Callable[[str, list[str]], ServingRecipe]
ReleaseOption = Annotated[str, typer.Option("--release", help="Version of the release; none takes the promoted one.")]


def serving_app(load: Load, path_keys: Sequence[str] = ()) -> typer.Typer:
    """The commands; mount with `app.add_typer(serving_app(load))`, without a name. `path_keys` are recipe keys that may
    hold a local path although their name does not say so."""
    app = typer.Typer(no_args_is_help=True)

    @app.command()
    def serve(recipe: RecipeArgument, overrides: SetOption = None, release: ReleaseOption = "") -> None:
        """Serve a release on OpenAI's API until Ctrl-C; without --release, whatever is promoted meanwhile as well."""
        from cluster.releases import open_release
        from cluster.store import Store
        from serving.keys import asks_for_keys
        from serving.service import running_service

        config = load(recipe, overrides or [])
        store = Store(config.store.uri)
        opened = open_release(store, config.name, release or None)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: _interrupt(stop))
        try:
            with running_service(config, store, opened, follow=not release) as base_url:
                stay_up(base_url, str(opened.ref), stop, with_key=asks_for_keys(config.serve))
        except KeyboardInterrupt:
            if not stop.is_set():
                raise
        _say("serve: stopped")

    @app.command("serve-config")
    def write_config(
        recipe: RecipeArgument,
        out: Annotated[str, typer.Option("--out", help="File to write; none prints it.")] = "",
        working_dir: Annotated[
            str, typer.Option("--working-dir", help="`s3://` or `https://` zip of rayft, where the image lacks it.")
        ] = "",
        overrides: SetOption = None,
        release: ReleaseOption = "",
    ) -> None:
        """Write the Serve config with which `serve deploy` serves a recipe on a cluster."""
        from serving.serve_app import config_text, local_paths, serve_config

        loaded = load(recipe, overrides or [])
        text = config_text(serve_config(loaded, release, working_dir, path_keys), recipe)
        if local := local_paths(loaded, path_keys):
            complain(f"serve-config: on this machine's disk, so each node must mount it: {', '.join(local)}")
        if not out:
            typer.echo(text, nl=False)
            return
        try:
            Path(out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out: cannot write {out}: {error.strerror}") from error
        _say(f"serve-config: wrote {out}; deploy it with `serve deploy {out}`")

    return app


def stay_up(base_url: str, release: str, stop: threading.Event | None = None, *, with_key: bool = False) -> None:
    """Says where the service is (`with_key`: and that it wants one), and returns when `stop` is set or on Ctrl-C or
    SIGTERM."""
    from serving.client import curl_line

    _say(f"serve: {release} on {base_url}/v1 (Ctrl-C stops it). Try:")
    _say(curl_line(base_url, "What is the capital of Greece?", with_key=with_key))
    ended = stop or threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: ended.set())
    try:
        while not ended.wait(0.5):  # short waits, because signals are handled between them
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _say("serve: stopping")


def _interrupt(stop: threading.Event) -> None:
    """Ends what the main thread is doing: the service may still be starting."""
    stop.set()
    raise KeyboardInterrupt


def _say(text: str) -> None:
    from cluster.progress import say

    say(text)
