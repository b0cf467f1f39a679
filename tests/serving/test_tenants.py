"""Two tenants over one catalog, from the HTTP request to the index and back: neither ever meets the other's words.

Everything but the generator is real: keys, API, conversation, retriever replica, index, feedback desk. The generator
is the worst there could be: it repeats every document that it is shown, as quotes.
"""

import json
import re

import pytest
from fastapi.testclient import TestClient

from cluster.store import Store
from retrieval.collections import build_collections
from retrieval.config import CollectionConfig, CorpusConfig, SearchConfig
from serving.admission import Limits
from serving.api import ApiParts, make_api
from serving.asking import Doors
from serving.config import ServingRecipe, TenantConfig
from serving.conversation import Conversation
from serving.engine import Completion
from serving.feedback import DeskSettings, FeedbackDesk, desk_of, open_door
from serving.interfaces import Pins
from serving.keys import ApiKey, ApiKeys, KeyFile, digest_of, new_secret, read_tenants
from serving.retriever_replica import RetrieverReplica, StoreRetrievers
from serving.router import Router
from serving.router_config import RouterConfig
from tests.serving.fakes import served_release

WORDS = {"acme": "tungsten", "zeta": "palladium", "everybody": "copper", "board": "osmium", "untagged": "cadmium"}
TENANTS = {
    "acme": TenantConfig(groups=("board",), filter={"owner": {"in": ["acme", "everybody"]}}),
    "zeta": TenantConfig(filter={"owner": {"in": ["zeta", "everybody"]}}),
}
SEES = {"acme": {"tungsten", "osmium", "copper"}, "zeta": {"palladium", "copper"}}
QUESTION = "Which alloy does the plant melt: tungsten, palladium, copper, osmium or cadmium?"
TRICKS = [
    None,
    {},
    {"or": [{"owner": "acme"}, {"owner": "zeta"}, {"not": {"owner": "nobody"}}]},
    {"or": [{"and": []}, {"owner": {"exists": False}}]},
    {"not": {"owner": "nobody"}},
    {"not": {"and": [{"owner": "acme"}, {"owner": "zeta"}]}},
    {"owner": {"ne": "nobody"}},
    {"owner": {"in": ["acme", "zeta", "everybody"]}},
    {"owner": {"exists": True}},
    {"owner": {"gte": ""}},
    {"collection": {"in": ["plants", "secret"]}},
    {"collection": "secret"},
]


def corpus(folder, name, owners):
    rows = []
    for owner in owners:
        metadata = {} if owner == "untagged" else {"owner": "acme" if owner == "board" else owner}
        text = f"The plant melts an alloy of {WORDS[owner]} for {owner}."
        rows.append({"_id": f"{owner}-report", "title": f"Report {WORDS[owner]}", "text": text, "metadata": metadata})
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CorpusConfig(path=str(file))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory, ray_module):
    folder = tmp_path_factory.mktemp("tenants")
    plants = corpus(folder, "plants", ["acme", "zeta", "everybody", "untagged"])
    recipe = ServingRecipe.model_validate(
        {
            "name": "tenants",
            "store": {"uri": str(folder / "store")},
            "collections": {
                "plants": CollectionConfig(corpus=plants),
                "secret": CollectionConfig(corpus=corpus(folder, "secret", ["board"]), access=("board",)),
            },
            "search": SearchConfig(mode="lexical"),
            "feedback": {"url": f"sqlite:///{folder}/feedback.db"},
        }
    )
    return recipe, str(build_collections(recipe, Store(recipe.store.uri)).ref)


class Parrot:
    """Quotes every document that stands in its prompt."""

    def __init__(self):
        self.shown = []

    def _say(self, request):
        prompt = request.messages[-1]["content"]
        self.shown.append(prompt)
        documents = re.findall(r"<document title=[^\n]*\n(.*?)\n</document>", prompt, re.S)
        quotes = "".join(f"##begin_quote##{document}##end_quote##" for document in documents)
        return Completion(request.request_id, f"{quotes}\n<ANSWER>: {' '.join(documents)}", "stop", 11, 7)

    async def generate(self, request, pins):
        return self._say(request)

    async def stream(self, request, pins):
        completion = self._say(request)
        yield completion.text
        yield completion


class Site:
    """The served catalog, and a client with a key of each tenant."""

    def __init__(self, client, secrets, parrot):
        self._client, self._secrets, self.parrot = client, secrets, parrot

    def post(self, tenant, path, **body):
        headers = {"Authorization": f"Bearer {self._secrets[tenant]}"} if tenant else {}
        return self._client.post(path, json=body, headers=headers)

    def search(self, tenant, wanted, k=20):
        return self.post(tenant, "/v1/search", query=QUESTION, k=k, **({} if wanted is None else {"filter": wanted}))

    def chat(self, tenant, wanted=None, **body):
        own = {} if wanted is None else {"rayft": {"filter": wanted}}
        body = {"model": "rayft-rag", "messages": [{"role": "user", "content": QUESTION}], **own, **body}
        return self.post(tenant, "/v1/chat/completions", **body)


@pytest.fixture
def site(catalog, tmp_path):
    recipe, index = catalog
    secrets = {tenant: new_secret() for tenant in TENANTS}
    file = KeyFile(tmp_path / "keys.json")
    for tenant, secret in secrets.items():
        file.add(ApiKey(tenant=tenant, sha256=digest_of(secret)))
    pins = Pins("release/tenants/1", index=index, adapters={"raft": "adapter/x/1", "finetuned": "adapter/y/1"})
    replica = RetrieverReplica(StoreRetrievers(recipe.encoder, recipe.search, recipe.store.uri), lambda: [pins])
    desk, parrot = open_door(desk_of(FeedbackDesk(DeskSettings.of(recipe)))), Parrot()
    served = served_release(passages=5)
    served = type(served)(**{**vars(served), "pins": pins, "generation": recipe.generation})
    doors = Doors(replica.search, parrot.generate, parrot.stream, replica.embed, desk)
    conversation = Conversation(served, Router(RouterConfig(), served.available), doors)
    parts = ApiParts(
        current=lambda: conversation,
        limits=Limits(8, 30.0, 1_000_000),
        feedback=desk,
        keys=ApiKeys(read_tenants(TENANTS), file),
    )
    with TestClient(make_api(parts)) as client:
        yield Site(client, secrets, parrot)


def words_in(text):
    """Whose documents speak in a text: the title, the id or the words of any."""
    found = {word for word in WORDS.values() if f"alloy of {word}" in text or f"Report {word}" in text}
    return found | {WORDS[owner] for owner in WORDS if f"{owner}-report" in text}


@pytest.mark.parametrize("tenant", TENANTS)
def test_search_returns_all_that_the_tenant_may_see(site, tenant):
    found = site.search(tenant, None)
    assert found.status_code == 200, found.text
    assert words_in(found.text) == SEES[tenant]


@pytest.mark.parametrize("tenant", TENANTS)
@pytest.mark.parametrize("wanted", TRICKS, ids=json.dumps)
def test_no_filter_of_a_request_opens_more_by_search_or_chat(site, tenant, wanted):
    for response in (site.search(tenant, wanted), site.chat(tenant, wanted), site.chat(tenant, wanted, stream=True)):
        assert response.status_code == 200, response.text
        assert words_in(response.text) <= SEES[tenant]
    assert words_in("".join(site.parrot.shown)) <= SEES[tenant], "nor does the model see it"


@pytest.mark.parametrize("model", ["rayft-rag", "rayft-raft", "rayft-hybrid", "rayft-auto", "rayft-finetuned_rag"])
@pytest.mark.parametrize("tenant", TENANTS)
def test_no_strategy_cites_or_lists_another_tenants_document(site, tenant, model):
    response = site.chat(tenant, model=model)
    assert response.status_code == 200, response.text
    details = response.json()["rayft"]
    assert details["hits"], "the tenant has documents that match"
    assert words_in(response.text) <= SEES[tenant]
    cited = {citation["doc_id"] for citation in details["citations"] if citation["verified"]}
    assert cited <= {hit["doc_id"] for hit in details["hits"]}


def test_the_filter_applies_before_the_best_are_taken(site):
    """With k 1 the best passage of all belongs to somebody else; the tenant's own must come instead of nothing."""
    for tenant, own in (("acme", "tungsten"), ("zeta", "palladium")):
        other = {"acme": "palladium", "zeta": "tungsten"}[tenant]
        found = site.post(tenant, "/v1/search", query=f"plant alloy {other} {other} for {other} Report", k=1)
        (hit,) = found.json()["data"]
        assert words_in(json.dumps(hit)) <= SEES[tenant], own


def test_another_tenants_answer_cannot_be_rated(site):
    answer = site.chat("acme").json()["id"]
    refused = site.post("zeta", "/v1/feedback", request_id=answer, rating="down", correction="no")
    assert refused.status_code == 404 and words_in(refused.text) == set()
    assert site.post("acme", "/v1/feedback", request_id=answer, rating="up").status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/search", "/v1/feedback", "/v1/completions"])
def test_nobody_without_a_key_gets_anything(site, path):
    response = site.post("", path, query=QUESTION, model="rayft-rag", messages=[])
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key" and words_in(response.text) == set()
    assert site.parrot.shown == []
