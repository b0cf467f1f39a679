"""The serving room's command: `rayft serve`.

In: a loader of recipes. Out: a Typer app to mount at the top level. Only Typer is imported here, so that `--help`
answers at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Annotated

import typer

from cluster.cli import RecipeArgument, SetOption
from serving.config import ServingRecipe

Load = Callable[[str, list[str]], ServingRecipe]
ReleaseOption = Annotated[str, typer.Option("--release", help="Version of the release; none takes the promoted one.")]


def serving_app(load: Load) -> typer.Typer:
    """The command; mount with `app.add_typer(serving_app(load))`, without a name."""
    app = typer.Typer(no_args_is_help=True)

    @app.command()
    def serve(recipe: RecipeArgument, overrides: SetOption = None, release: ReleaseOption = "") -> None:
        """Serve a release on the OpenAI chat-completions API until Ctrl-C."""
        from cluster.releases import open_release
        from cluster.store import Store
        from serving.service import running_service

        config = load(recipe, overrides or [])
        store = Store(config.store.uri)
        opened = open_release(store, config.name, release or None)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: _interrupt(stop))
        try:
            with running_service(config, store, opened) as base_url:
                stay_up(base_url, str(opened.ref), stop)
        except KeyboardInterrupt:
            if not stop.is_set():
                raise
        _say("serve: stopped")

    return app


def stay_up(base_url: str, release: str, stop: threading.Event | None = None) -> None:
    """Says where the service is, and returns when `stop` is set or on Ctrl-C or SIGTERM."""
    from serving.client import curl_line

    _say(f"serve: {release} on {base_url}/v1 (Ctrl-C stops it). Try:")
    _say(curl_line(base_url, "What is the capital of Greece?"))
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
