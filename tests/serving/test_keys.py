import json
import os
import pickle
import re
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from cluster.errors import UserError
from retrieval.filters import parse_filter
from serving.api_errors import ApiError
from serving.config import ServeConfig, TenantConfig
from serving.interfaces import ANYBODY
from serving.keys import (
    ApiKey,
    ApiKeys,
    KeyFile,
    access_warnings,
    digest_of,
    new_secret,
    open_keys,
    read_environment,
    read_tenants,
)
from serving.keys_cli import keys_app

TENANTS = {
    "acme": TenantConfig(groups=("staff",), filter={"owner": "acme"}, strategies=("rag",)),
    "zeta": TenantConfig(),
}


def stored(path, tenant="acme", **fields):
    """A new key in the file; returns the key itself."""
    secret = new_secret()
    KeyFile(path).add(ApiKey(tenant=tenant, sha256=digest_of(secret), **fields))
    return secret


def ring(path=None, environment="", tenants=TENANTS):
    return ApiKeys(read_tenants(tenants), KeyFile(path) if path else None, read_environment(environment))


def refused(keys, header):
    with pytest.raises(ApiError) as raised:
        keys.caller(header)
    return raised.value


def test_caller_is_what_the_recipe_says_of_the_keys_tenant(tmp_path):
    secret = stored(tmp_path / "keys.json")
    caller = ring(tmp_path / "keys.json").caller(f"Bearer {secret}")
    assert (caller.tenant, caller.groups, caller.strategies) == ("acme", {"staff"}, ("rag",))
    assert caller.filter == parse_filter({"owner": "acme"})
    assert caller.key_id.startswith("k-") and caller.key_id[2:] in digest_of(secret)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer rk-",
        "Bearer \udcff",
        "Bearer " + "x" * 10_000,
    ],
)
def test_no_key_or_another_is_401_with_openais_error_and_the_challenge(tmp_path, header):
    secret = stored(tmp_path / "keys.json")
    error = refused(ring(tmp_path / "keys.json"), header and header.replace("{key}", secret))
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert error.headers()["WWW-Authenticate"] == "Bearer"
    assert secret not in str(error)


def test_scheme_is_read_in_any_case_and_keys_are_not(tmp_path):
    secret = stored(tmp_path / "keys.json")
    keys = ring(tmp_path / "keys.json")
    assert keys.caller(f"bearer  {secret} ").tenant == "acme"
    assert refused(keys, f"Bearer {secret.swapcase()}").status == 401


def test_without_keys_everybody_is_anybody():
    keys = ring(tenants={})
    assert keys.caller(None) is ANYBODY and keys.caller("Bearer sk-anything") is ANYBODY
    assert not keys.required


def test_a_file_without_keys_lets_nobody_in(tmp_path):
    path = tmp_path / "keys.json"
    secret = stored(path)
    KeyFile(path).revoke(KeyFile(path).read()[0].id)
    assert refused(ring(path), f"Bearer {secret}").status == 401


def test_revoked_and_new_keys_count_from_the_next_request_on(tmp_path):
    path = tmp_path / "keys.json"
    first = stored(path)
    keys = ring(path)
    key_id = keys.caller(f"Bearer {first}").key_id
    second = stored(path, "zeta")
    assert keys.caller(f"Bearer {second}").tenant == "zeta"
    KeyFile(path).revoke(key_id)
    assert refused(keys, f"Bearer {first}").status == 401
    assert keys.caller(f"Bearer {second}").tenant == "zeta"


def test_the_file_is_read_once_while_it_stays_the_same(tmp_path, monkeypatch):
    path = tmp_path / "keys.json"
    secret = stored(path)
    keys = ring(path)
    keys.caller(f"Bearer {secret}")
    monkeypatch.setattr(KeyFile, "read", lambda self: pytest.fail("read again"))
    assert keys.caller(f"Bearer {secret}").tenant == "acme"


@pytest.mark.parametrize("harm", ["gone", "cut", "not_json", "foreign", "unknown_field", "writable"])
def test_a_harmed_file_refuses_everybody_and_comes_back(tmp_path, harm, caplog):
    path = tmp_path / "keys.json"
    secret = stored(path)
    in_environment = new_secret()
    keys = ring(path, f"zeta:{digest_of(in_environment)}")
    whole = path.read_bytes()
    assert keys.caller(f"Bearer {secret}").tenant == "acme"
    harms = {
        "cut": whole[:-20],
        "not_json": b"acme: yes",
        "foreign": b"[]",
        "unknown_field": whole.replace(b"tenant", b"tenent"),
    }
    if harm == "gone":
        path.unlink()
    elif harm == "writable":
        path.chmod(0o666)
    else:
        path.write_bytes(harms[harm])
    for header in (f"Bearer {secret}", f"Bearer {in_environment}", None):
        error = refused(keys, header)
        assert (error.status, error.code) == (503, "keys_unavailable")
    assert len([record for record in caplog.records if "nobody is let in" in record.message]) == 1, (
        "once, not per request"
    )
    assert secret not in caplog.text
    path.write_bytes(whole)
    path.chmod(0o600)
    assert keys.caller(f"Bearer {secret}").tenant == "acme"


def test_an_expired_key_is_refused(tmp_path):
    path = tmp_path / "keys.json"
    past, future = (datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (-1, 60))
    old, young = stored(path, expires=past), stored(path, expires=future)
    assert "expired" in str(refused(ring(path), f"Bearer {old}"))
    assert ring(path).caller(f"Bearer {young}").tenant == "acme"


def test_a_key_of_a_tenant_that_the_recipe_does_not_name_is_refused(tmp_path):
    secret = stored(tmp_path / "keys.json", "nobody")
    error = refused(ring(tmp_path / "keys.json"), f"Bearer {secret}")
    assert (error.status, error.code) == (403, "unknown_tenant")


def test_keys_of_the_environment_work_beside_the_files(tmp_path):
    one, other = new_secret(), stored(tmp_path / "keys.json")
    keys = ring(tmp_path / "keys.json", f" zeta:{digest_of(one).upper()} ,")
    assert [keys.caller(f"Bearer {secret}").tenant for secret in (one, other)] == ["zeta", "acme"]


@pytest.mark.parametrize("entry", ["zeta:rk-plain-secret", "rk-plain-secret", ":" + "0" * 64, "ze ta:" + "0" * 64])
def test_an_entry_of_the_environment_that_is_none_is_named_but_not_shown(entry):
    with pytest.raises(UserError) as raised:
        read_environment(f"acme:{'1' * 64},{entry}")
    assert "secret" not in str(raised.value)


def test_keys_travel_to_the_replica_that_uses_them(tmp_path):
    secret = stored(tmp_path / "keys.json")
    keys = pickle.loads(pickle.dumps(ring(tmp_path / "keys.json")))
    assert keys.caller(f"Bearer {secret}").filter == parse_filter({"owner": "acme"})


def test_the_file_holds_no_key_and_only_its_owner_reads_it(tmp_path):
    path = tmp_path / "deep" / "keys.json"
    previous = os.umask(0)
    try:
        secret = stored(path)
        stored(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in path.read_text() and secret[3:] not in path.read_text()
    assert sorted(file.name for file in path.parent.iterdir()) == ["keys.json"], "no draft and no lock is left"


def test_keys_made_at_once_are_all_kept(tmp_path):
    path = tmp_path / "keys.json"
    makers = [threading.Thread(target=stored, args=(path,)) for _ in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(KeyFile(path).read()) == 8


def test_a_killed_writers_draft_harms_nobody(tmp_path):
    path = tmp_path / "keys.json"
    secret = stored(path)
    (tmp_path / ".keys.json.new").write_text('{"format": 1, "keys": [')
    stored(path)
    assert ring(path).caller(f"Bearer {secret}").tenant == "acme"


def test_secrets_differ_and_hold_256_bits():
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(re.fullmatch(r"rk-[\w-]{43}", secret) for secret in secrets)


# What is checked before the graph starts.


def test_start_refuses_tenants_without_any_key(monkeypatch):
    monkeypatch.delenv("RAYFT_API_KEYS", raising=False)
    with pytest.raises(UserError, match=r"serve\.tenants .*nobody has a key"):
        open_keys(ServeConfig(tenants=TENANTS))


def test_start_refuses_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYFT_API_KEYS", raising=False)
    with pytest.raises(UserError, match=r"^serve\.keys: .*cannot be read.*rayft keys new"):
        open_keys(ServeConfig(keys=str(tmp_path / "none.json"), tenants=TENANTS))


def test_start_refuses_when_no_key_belongs_to_a_tenant(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYFT_API_KEYS", raising=False)
    stored(tmp_path / "keys.json", "nobody")
    with pytest.raises(UserError, match=r"^serve\.tenants: does not name .*'nobody'"):
        open_keys(ServeConfig(keys=str(tmp_path / "keys.json"), tenants=TENANTS))


def test_start_reads_the_environment_and_warns_of_strangers(monkeypatch):
    monkeypatch.setenv("RAYFT_API_KEYS", f"acme:{'1' * 64},nobody:{'2' * 64}")
    config = ServeConfig(tenants=TENANTS)
    keys = open_keys(config)
    assert keys.required
    (line,) = access_warnings(config, keys)
    assert "'nobody'" in line and "refused" in line


@pytest.mark.parametrize(
    ("host", "environment", "expected"),
    [
        ("127.0.0.1", "", []),
        ("0.0.0.0", "", ["WITHOUT API KEYS"]),
        ("0.0.0.0", f"acme:{'1' * 64}", ["need an API key"]),
    ],
)
def test_start_says_who_reaches_the_port(monkeypatch, host, environment, expected):
    monkeypatch.setenv("RAYFT_API_KEYS", environment)
    config = ServeConfig(host=host, tenants=TENANTS if environment else {})
    lines = access_warnings(config, open_keys(config))
    assert len(lines) == len(expected)
    assert all(part in line for part, line in zip(expected, lines, strict=True))


def test_a_tenants_filter_that_is_none_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^serve\.tenants\.acme\.filter at owner: unknown operator 'is'"):
        read_tenants({"acme": TenantConfig.model_construct(filter={"owner": {"is": 1}}, groups=(), strategies=())})


def test_a_recipe_with_a_filter_that_is_none_does_not_load(tmp_path):
    from cluster.recipe import load_recipe
    from serving.config import ServingRecipe

    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nserve: {tenants: {acme: {filter: {owner: {is: 1}}}}}\ncorpus: {path: x}\n")
    with pytest.raises(UserError, match=r"`serve\.tenants\.acme\.filter`: filter at owner: unknown operator"):
        load_recipe(recipe, [], ServingRecipe)


# The commands.


def run(*arguments):
    return CliRunner().invoke(keys_app(), list(arguments), catch_exceptions=True)


def test_new_prints_a_key_that_works_and_list_shows_it_without_it(tmp_path):
    path = str(tmp_path / "keys.json")
    made = run("new", "acme", "--file", path, "--name", "CI [bot]", "--days", "2")
    secret = made.stdout.strip()
    caller = ring(path).caller(f"Bearer {secret}")
    shown = run("list", "--file", path).stdout
    assert caller.key_id in shown and "CI [bot]" in shown and secret not in shown
    expires = KeyFile(path).read()[0].expires
    assert timedelta(days=1.9) < expires - datetime.now(UTC) < timedelta(days=2.1)
    assert run("revoke", caller.key_id, "--file", path).exit_code == 0
    assert refused(ring(path), f"Bearer {secret}").status == 401


def test_new_without_a_file_prints_what_the_environment_takes(tmp_path):
    made = run("new", "acme", "--no-file")
    entry = next(line for line in made.stderr.splitlines() if line.startswith("acme:"))
    assert ring(environment=entry).caller(f"Bearer {made.stdout.strip()}").tenant == "acme"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("new", "a,b"), "tenant"),
        (("new", "acme", "--days", "1e9"), "too far away"),
        (("new", "acme", "--no-file", "--days", "1"), "--no-file"),
        (("revoke", "k-0"), "no key k-0"),
    ],
)
def test_commands_refuse_with_one_line_and_change_nothing(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    stored(tmp_path / ".rayft" / "keys.json")
    before = (tmp_path / ".rayft" / "keys.json").read_bytes()
    result = run(*arguments)
    assert isinstance(result.exception, UserError) and reason in str(result.exception)
    assert (tmp_path / ".rayft" / "keys.json").read_bytes() == before


def test_revoking_what_is_not_there_makes_no_file(tmp_path):
    result = run("revoke", "k-0", "--file", str(tmp_path / "none.json"))
    assert isinstance(result.exception, UserError)
    assert not (tmp_path / "none.json").exists()


def test_stored_form_is_stable(tmp_path):
    """Other programs (a secret's template) write this file, too."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"format": 1, "keys": [{"tenant": "acme", "sha256": digest_of("rk-x")}]}))
    assert ring(path).caller("Bearer rk-x").tenant == "acme"
