"""A server without keys on loopback is not asked by pages of other sites, whatever their names lead to."""

import dataclasses

import pytest
from fastapi.testclient import TestClient

from serving.api import NoKeys
from serving.ingress import Ingress
from serving.loopback import is_local
from tests.serving.closed_book import Handle
from tests.serving.fakes_api import FakeKeys
from tests.serving.fakes_graph import app_of, recipe_of


@pytest.mark.parametrize(
    "host",
    ["", "localhost", "LocalHost:8000", "localhost.", "app.localhost:80", "127.0.0.1:8000", "[::1]:8000", "10.0.0.7"],
)
def test_own_names_and_addresses_are_local(host):
    assert is_local(host)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "xlocalhost", "[x"],
)
def test_names_of_others_are_not_local(host):
    assert not is_local(host)


@pytest.mark.parametrize(
    ("bound", "keys", "status"),
    [("127.0.0.1", NoKeys(), 403), ("127.0.0.1", FakeKeys({}), 200), ("0.0.0.0", NoKeys(), 200)],
)
@pytest.mark.parametrize("path", ["/", "/healthz"])
def test_another_sites_name_is_refused_where_nothing_else_keeps_its_page_out(bound, keys, status, path):
    [settings, *_] = app_of(recipe_of(host=bound))._bound_deployment.init_args
    api = Ingress(dataclasses.replace(settings, keys=keys), Handle(None)).__serve_build_asgi_app__()
    assert TestClient(api, base_url="http://localhost:8000").get(path).status_code == 200
    reply = TestClient(api, base_url="http://evil.example:8000").get(path)
    assert reply.status_code == status
    if status == 403:
        assert reply.json()["error"]["code"] == "host_not_allowed"
