import json

import pytest
import typer
from typer.testing import CliRunner

from cluster.errors import ArtifactError, UserError
from cluster.store import Store
from retrieval.collections import build_collections, check_collections, member_recipe, publish_catalog, read_catalog
from retrieval.config import CollectionConfig, CorpusConfig, EncoderConfig, SearchConfig
from retrieval.encoder import encoder_digest
from retrieval.filters import parse_filter
from retrieval.index import build_index
from retrieval.retriever import Retriever
from retrieval.update import update_collections
from retrieval.update_cli import register_update
from tests.retrieval.test_index import publish_encoder
from tests.retrieval.tiny import COUNTRIES, country_text, tiny_encoder, tiny_recipe

SHARES = {"north": (3, 4, 5), "south": (2, 6), "secret": (0, 1, 7)}
QUERIES = ["exports of cocoa", "climate of Finland", "roses"]


def _write(folder, name, places):
    file = folder / f"{name}.jsonl"
    rows = (
        {"_id": COUNTRIES[p].lower(), "title": COUNTRIES[p], "text": country_text(p), "metadata": {"place": p}}
        for p in places
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CorpusConfig(path=str(file))


def _recipe(folder, encoder, **changes):
    collections = {
        name: CollectionConfig(corpus=_write(folder, name, places), access=("board",) if name == "secret" else ())
        for name, places in SHARES.items()
    }
    recipe = tiny_recipe(folder, folder / "none", encoder)
    return recipe.model_copy(update={"corpus": CorpusConfig(), "collections": collections, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory, encoder_path):
    folder = tmp_path_factory.mktemp("collections")
    recipe = _recipe(folder, encoder_path)
    store = Store(recipe.store.uri)
    catalog = build_collections(recipe, store)
    corpus = _write(folder, "all", [place for places in SHARES.values() for place in places])
    single = recipe.model_copy(update={"name": "single", "corpus": corpus, "collections": {}})
    return (
        recipe,
        store,
        catalog,
        Retriever.open(catalog, recipe.encoder),
        Retriever.open(build_index(single, store), recipe.encoder),
    )


def _found(hits):
    return [(hit.passage.chunk_id, round(hit.score, 5)) for hit in hits]


def test_dense_search_over_collections_is_that_of_one_index(made):
    *_, retriever, single = made
    assert len(retriever) == len(single)
    for over, one in zip(retriever.search(QUERIES, 9), single.search(QUERIES, 9), strict=True):
        assert _found(over) == _found(one)
        for hit in over:
            assert COUNTRIES.index(hit.passage.title) in SHARES[hit.collection]


def test_caller_sees_open_collections_and_those_of_their_groups(made):
    *_, retriever, _ = made
    for mode in ("dense", "lexical", "hybrid"):
        for groups, seen in (
            (frozenset(), {"north", "south"}),
            (frozenset({"board", "x"}), set(SHARES)),
            (None, set(SHARES)),
        ):
            rows = sum(
                chunk.metadata["place"] in {p for name in seen for p in SHARES[name]} for chunk in retriever.chunks()
            )
            hits = retriever.search(["roses of Austria"], rows, mode=mode, groups=groups)[0]
            assert {hit.collection for hit in hits} == seen and len(hits) == rows
            with pytest.raises(UserError, match=f"has {rows} chunks"):
                retriever.search(["roses"], rows + 1, mode=mode, groups=groups)


def test_filter_may_name_the_collection_but_does_not_open_it(made):
    *_, retriever, _ = made
    wanted = parse_filter({"or": [{"collection": "secret"}, {"collection": "south", "place": 6}]})
    assert {hit.passage.title for hit in retriever.search(QUERIES, 40, filter=wanted)[0]} == {
        *(COUNTRIES[place] for place in SHARES["secret"]),
        COUNTRIES[6],
    }
    hidden = retriever.search(QUERIES, 20, filter=wanted, groups=frozenset())
    assert {hit.passage.title for hit in hidden[0]} == {COUNTRIES[6]}
    assert retriever.search(QUERIES, 3, filter=parse_filter({"collection": "none"})) == [[], [], []]


def test_caller_who_may_see_nothing_gets_no_hits(made, tmp_path, encoder_path):
    recipe, store, *_ = made
    closed = {name: c.model_copy(update={"access": ("board",)}) for name, c in recipe.collections.items()}
    recipe = recipe.model_copy(update={"collections": closed})
    retriever = Retriever.open(build_collections(recipe, store), recipe.encoder)
    assert retriever.search(QUERIES, 1000, groups=frozenset({"others"})) == [[], [], []]
    build_collections(made[0], store)


def test_collections_of_different_encoders_are_merged_by_rank(made, tmp_path):
    other = EncoderConfig(model=str(tiny_encoder(tmp_path / "other", seed=9)), precision="float32")
    recipe = _recipe(tmp_path, made[0].encoder.model)
    mixed = {**recipe.collections, "south": recipe.collections["south"].model_copy(update={"encoder": other})}
    recipe = recipe.model_copy(update={"collections": mixed})
    retriever = Retriever.open(build_collections(recipe, Store(recipe.store.uri)), recipe.encoder)
    (hits,) = retriever.search(["roses"], 6)
    assert [hit.score for hit in hits] == pytest.approx([1 / 61] * 3 + [1 / 62] * 3)
    assert {hit.collection for hit in hits[:3]} == {hit.collection for hit in hits[3:]} == set(SHARES)


def test_catalog_is_kept_while_nothing_changed_and_renewed_with_a_member(made, tmp_path, encoder_path):
    recipe = _recipe(tmp_path, encoder_path)
    store = Store(recipe.store.uri)
    first = build_collections(recipe, store)
    assert first.manifest.counts["chunks"] == first.manifest.counts["public_chunks"] + len(
        Retriever.open(store.open("index", "tiny-secret"), recipe.encoder)
    )
    assert build_collections(recipe, store).ref == first.ref
    _write(tmp_path, "south", (2,))
    changed = build_index(member_recipe(recipe, "south"), store)
    members = {entry.name: store.open_ref(entry.ref) for entry in read_catalog(first)} | {"south": changed}
    second = publish_catalog(recipe, store, members)
    assert second.ref != first.ref and store.current("index", "tiny") == second.ref.version
    titles = {chunk.title for chunk in Retriever.open(second, recipe.encoder).chunks()}
    assert COUNTRIES[6] not in titles and COUNTRIES[2] in titles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": CorpusConfig(path="x")}, r"^corpus\.path is x and there are collections"),
        ({"collections": {"No": CollectionConfig(corpus=CorpusConfig(path="x"))}}, r"^collections: 'No' is not a name"),
        ({"collections": {"a": CollectionConfig(corpus=CorpusConfig())}}, r"^collections\.a\.corpus\.path is empty"),
        (
            {"collections": {"a": CollectionConfig(corpus=CorpusConfig(path="x"), access=("",))}},
            r"^collections\.a\.access",
        ),
    ],
)
def test_collections_that_cannot_be_are_refused_by_key(tmp_path, encoder_path, change, message):
    with pytest.raises(UserError, match=message):
        check_collections(_recipe(tmp_path, encoder_path, **change))


def test_unknown_collection_names_those_there_are(tmp_path, encoder_path):
    with pytest.raises(UserError, match="there is no east; the recipe has north, south, secret"):
        member_recipe(_recipe(tmp_path, encoder_path), "east")


def test_errors_of_one_collection_name_its_own_key(tmp_path, encoder_path):
    recipe = _recipe(tmp_path, encoder_path)
    gone = recipe.collections["north"].model_copy(update={"corpus": CorpusConfig(path=str(tmp_path / "gone"))})
    recipe = recipe.model_copy(update={"collections": {**recipe.collections, "north": gone}})
    for act in (build_collections, update_collections):
        with pytest.raises(UserError, match=r"^collections\.north\.corpus\.path: .*gone does not exist"):
            act(recipe, Store(recipe.store.uri))


def test_purge_of_a_collections_only_document_says_what_to_do_next(tmp_path, encoder_path):
    recipe = _recipe(tmp_path, encoder_path)
    lone = CollectionConfig(corpus=_write(tmp_path, "lone", (1,)))
    recipe = recipe.model_copy(update={"collections": {"north": recipe.collections["north"], "lone": lone}})
    store = Store(recipe.store.uri)
    build_collections(recipe, store)
    app = typer.Typer()
    register_update(app, lambda _path, _overrides: recipe)
    done = CliRunner().invoke(app, ["purge", "tiny", COUNTRIES[1].lower()], catch_exceptions=False)
    assert f"index/{recipe.name}-lone held nothing else" in done.output
    assert "leave the collection out of the recipe" in done.output
    with pytest.raises(UserError, match=r"^collections\.lone\.corpus\.path: .*; 1 documents are left out, being"):
        build_collections(recipe, store)
    without = recipe.model_copy(update={"collections": {"north": recipe.collections["north"]}})
    assert Retriever.open(build_collections(without, store), recipe.encoder).search(["cheese"], 1)[0]


def test_catalog_that_does_not_name_its_parents_is_refused(made):
    import dataclasses

    _, _, catalog, _, _ = made
    manifest = catalog.manifest.model_copy(update={"parents": {}})
    with pytest.raises(ArtifactError, match="parents"):
        read_catalog(dataclasses.replace(catalog, manifest=manifest))


def test_modes_that_differ_between_collections_are_merged_by_rank(made, tmp_path, encoder_path):
    recipe = _recipe(tmp_path, encoder_path)
    store = Store(recipe.store.uri)
    members = {name: build_index(member_recipe(recipe, name), store) for name in ("north", "secret")}
    words = member_recipe(recipe, "south").model_copy(update={"search": SearchConfig(mode="lexical")})
    retriever = Retriever.open(
        publish_catalog(recipe, store, {**members, "south": build_index(words, store)}), recipe.encoder
    )
    (hits,) = retriever.search(["cocoa"], 4)
    assert hits[0].score == pytest.approx(1 / 61) and "south" in {hit.collection for hit in hits[:2]}
    with pytest.raises(UserError, match=r"^search\.mode is dense"):
        retriever.search(["cocoa"], 4, mode="dense")


def test_a_collection_uses_what_the_recipe_of_its_name_trained(tmp_path, encoder_path):
    recipe = _recipe(tmp_path, encoder_path)
    store = Store(recipe.store.uri)
    build_collections(recipe, store)
    alone = recipe.model_copy(
        update={"name": f"{recipe.name}-north", "collections": {}, "corpus": recipe.collections["north"].corpus}
    )
    tuned = publish_encoder(store, alone.name, tiny_encoder(tmp_path / "tuned", seed=8), encoder_digest(recipe.encoder))
    built = build_index(alone, store)
    assert built.manifest.parents == {"encoder": str(tuned.ref)}
    catalog = build_collections(recipe, store)
    entries = {entry.name: entry.ref for entry in read_catalog(catalog)}
    assert entries["north"] == built.ref
    assert store.open_ref(entries["south"]).manifest.parents == {}
    retriever = Retriever.open(catalog, recipe.encoder, device="cpu")
    assert {hit.collection for hit in retriever.search(["roses"], 12)[0]} == set(SHARES)
