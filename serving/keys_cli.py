"""The commands of API keys: `rayft keys new`, `list`, `revoke`.

In: a file of keys and what to do. Out: the key, once, on standard output, so that `KEY=$(rayft keys new acme)` holds
it; everything else that is said about it on standard error. Not covered: the file (serving/keys.py). Only Typer is
imported here, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

FileOption = Annotated[str, typer.Option("--file", metavar="FILE", help="File of hashed keys, made if missing.")]
DEFAULT_FILE = ".rayft/keys.json"


def keys_app() -> typer.Typer:
    """The commands; mount under the name `keys`."""
    app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")

    @app.command()
    def new(
        tenant: Annotated[str, typer.Argument(help="Tenant of the recipe (`serve.tenants`) that the key belongs to.")],
        file: FileOption = DEFAULT_FILE,
        name: Annotated[str, typer.Option(help="What the key is for.")] = "",
        days: Annotated[float | None, typer.Option(min=0.001, help="Days until it expires; none: never.")] = None,
        no_file: Annotated[
            bool, typer.Option("--no-file", help="Store it nowhere; print its entry of RAYFT_API_KEYS instead.")
        ] = False,
    ) -> None:
        """Make a key and print it, once: only its hash is stored."""
        _new(tenant, file, name, days, no_file)

    @app.command("list")
    def list_keys(file: FileOption = DEFAULT_FILE) -> None:
        """List the keys by id, tenant and name."""
        _list(file)

    @app.command()
    def revoke(
        key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key, as `list` shows it.")],
        file: FileOption = DEFAULT_FILE,
    ) -> None:
        """Remove a key; a running server refuses it from its next request on."""
        from cluster.progress import say
        from serving.keys import KeyFile

        key = KeyFile(file).revoke(key_id)
        say(f"keys: {key.id} of {key.tenant} is revoked")

    return app


def _new(tenant: str, file: str, name: str, days: float | None, no_file: bool) -> None:
    from datetime import UTC, datetime, timedelta

    from cluster.errors import UserError
    from cluster.progress import complain
    from serving.keys import VARIABLE, ApiKey, KeyFile, check_tenant, digest_of, new_secret

    if no_file and (name or days):
        raise UserError(f"--no-file: {VARIABLE} holds neither a name nor an expiry; leave --name and --days out")
    now = datetime.now(UTC).replace(microsecond=0)
    try:
        expires = None if days is None else now + timedelta(days=days)
    except OverflowError:
        raise UserError(f"--days {days:g}: too far away; leave it out for a key that does not expire") from None
    secret = new_secret()
    key = ApiKey(tenant=check_tenant(tenant), name=name, created=now, expires=expires, sha256=digest_of(secret))
    if no_file:
        complain(f"keys: {key.id} of {tenant}, shown this once; add to {VARIABLE} (entries are joined by commas):")
        complain(f"{tenant}:{key.sha256}")
    else:
        KeyFile(file).add(key)
        complain(f"keys: {key.id} of {tenant} is in {file}, the key itself is shown this once; serve with")
        complain(f"  --set serve.keys={file}, and serve.tenants naming {tenant}")
    typer.echo(secret)


def _list(file: str) -> None:
    from datetime import UTC, datetime

    from cluster.progress import say
    from cluster.text_table import render_table
    from serving.keys import KeyFile

    now = datetime.now(UTC)
    rows = [
        (
            key.id,
            key.tenant,
            key.name,
            key.created.isoformat() if key.created else "",
            "never" if key.expires is None else f"{key.expires.isoformat()}{' (past)' if key.expired(now) else ''}",
        )
        for key in KeyFile(file).read()
    ]
    headers = ("id", "tenant", "name", "created", "expires")
    say(render_table(f"API keys in {file}", headers, rows) if rows else f"keys: {file} has none")
