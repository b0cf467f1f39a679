"""The recipes that bring documents, questions and utterances of their own: what they promise about these files, and the
routes that they promise."""

import json
from collections import Counter
from pathlib import Path

import pytest

import rayft
from cluster.recipe import PACKAGED, load_recipe
from cluster.store import Store
from retrieval.documents import read_documents
from retrieval.questions import read_questions
from serving.intents import open_classifier
from serving.router import RouteQuery, Router
from training.duplicates import drop_repeats, sift
from training.format import fold_text
from training.router import train_router
from training.splits import prepare_questions
from training.utterances import read_utterances

ROUTES = {
    "customer_service": {"product_info": "rag", "troubleshooting": "finetuned", "policy_question": "raft"},
    "medical": {"basics": "finetuned", "latest_research": "rag", "guideline": "raft"},
}
KINDS = {
    "customer_service": {
        "products": "product_info",
        "troubleshooting": "troubleshooting",
        "policies": "policy_question",
    },
    "medical": {"basics": "basics", "research": "latest_research", "guidelines": "guideline"},
}
FREQUENCIES = {
    "customer_service": {"products": "daily", "troubleshooting": "monthly", "policies": "yearly"},
    "medical": {"basics": "static", "research": "weekly", "guidelines": "yearly"},
}
LEAST_DOCUMENTS = {"customer_service": 45, "medical": 40}
LEAST_QUESTIONS = {"customer_service": 220, "medical": 200}


@pytest.fixture(scope="module", params=ROUTES)
def named(request, tmp_path_factory):
    """A recipe, loaded by its name from a directory that has nothing in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield request.param, load_recipe(request.param, [], rayft.Recipe)


@pytest.fixture(scope="module")
def documents(named):
    """Document and collection, by id."""
    _, recipe = named
    found = [(document, name) for name, one in recipe.collections.items() for document in read_documents(one.corpus)]
    assert len({document.doc_id for document, _ in found}) == len(found)
    return {document.doc_id: (document, name) for document, name in found}


@pytest.fixture(scope="module")
def questions(named):
    _, recipe = named
    return read_questions(recipe.questions.path)


def test_files_are_package_data_and_collections_state_how_often_they_change(named):
    name, recipe = named
    assert {key: one.update_frequency for key, one in recipe.collections.items()} == FREQUENCIES[name]
    paths = [one.corpus.path for one in recipe.collections.values()]
    for path in (*paths, recipe.questions.path, recipe.router.examples):
        assert Path(path).parent == PACKAGED / name and Path(path).is_file()
    declared = (Path(rayft.__file__).parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{name}/*.jsonl"' in declared


def test_corpus_is_large_enough_and_each_document_says_that_it_is_made_up(named, documents):
    name, _ = named
    assert len(documents) >= LEAST_DOCUMENTS[name]
    notice = "no medical advice" if name == "medical" else "fictitious"
    for document, _ in documents.values():
        assert notice in document.metadata["notice"]
        assert document.title and ".example/" in document.uri
    header = (PACKAGED / f"{name}.yaml").read_text(encoding="utf-8")
    assert ("NO MEDICAL ADVICE" in header) == (name == "medical") and "fictitious" in header


def test_every_answer_stands_in_the_golden_span_of_its_document(named, documents, questions):
    name, _ = named
    assert len(questions) >= LEAST_QUESTIONS[name]
    for question in questions:
        if question.unanswerable:
            assert question.documents[0] in documents and not question.answers
            continue
        [answer], [golden] = question.answers, question.golden
        document, collection = documents[golden.doc_id]
        assert answer in document.text[golden.start : golden.end], question.question_id
        assert question.metadata["kind"] == KINDS[name][collection]
    assert sum(question.unanswerable for question in questions) >= 12
    asked = Counter(question.documents[0] for question in questions)
    assert set(asked) == set(documents) and min(asked.values()) >= 4


def test_no_question_repeats_another_and_no_documents_are_alike(documents, questions):
    tests = {question.question_id for question in questions[::2]}
    assert not drop_repeats(questions, tests, 0.9).dropped
    assert not sift(questions, (), 0.8).dropped
    words = {doc_id: set(fold_text(document.text).casefold().split()) for doc_id, (document, _) in documents.items()}
    ids = sorted(words)
    for place, one in enumerate(ids):
        for other in ids[place + 1 :]:
            shared = len(words[one] & words[other]) / len(words[one] | words[other])
            assert shared < 0.4, (one, other, shared)


def test_questions_split_into_training_and_both_kinds_of_test(named):
    _, recipe = named
    prepared = prepare_questions(recipe)
    counts = Counter(question.split for question in prepared.questions)
    assert not prepared.drops
    assert counts["train"] > recipe.samples.raft_rows and counts["test_new_documents"] >= 20
    assert counts["test_new_questions"] >= 12


def test_utterances_are_balanced_and_none_is_a_question_that_tests(named, questions):
    name, recipe = named
    utterances = read_utterances(recipe.router)
    counts = Counter(utterances.intents)
    assert counts.pop("oos") >= 40 and not utterances.repeated
    assert counts.keys() == ROUTES[name].keys()
    assert min(counts.values()) >= 25 and max(counts.values()) <= 1.2 * min(counts.values())
    asked = {" ".join(fold_text(question.text).casefold().strip("?").split()) for question in questions}
    assert not [text for text in utterances.texts if fold_text(text).casefold().strip("?") in asked]


KEYWORD_ROUTES = [
    ("customer_service", "How much does the kettle cost?", "product_info", "rag"),
    ("customer_service", "My lamp won't connect and blinks", "troubleshooting", "finetuned"),
    ("customer_service", "How long is the warranty?", "policy_question", "raft"),
    ("customer_service", "Who painted the Mona Lisa?", "", "hybrid"),
    ("medical", "What is the job of the kidneys?", "basics", "finetuned"),
    ("medical", "What did the latest trial find?", "latest_research", "rag"),
    ("medical", "What does the guideline recommend?", "guideline", "raft"),
    ("medical", "Tell me a joke", "", "hybrid"),
]


@pytest.mark.parametrize(("name", "question", "intent", "strategy"), KEYWORD_ROUTES)
def test_keywords_route_as_the_recipe_promises(name, question, intent, strategy):
    route = Router(load_recipe(name, [], rayft.Recipe).router).route(RouteQuery(question))
    assert (route.intent, route.strategy) == (intent, strategy)
    assert route.require_quote == (intent == "guideline")


def test_a_trained_router_knows_the_intents_that_the_rules_name(named, tmp_path):
    name, recipe = named
    store = Store(str(tmp_path / "store"))
    ngrams = recipe.model_copy(update={"router": recipe.router.model_copy(update={"features": "ngrams"})})
    router = Router(recipe.router, classifier=open_classifier(train_router(ngrams, store), None))
    utterances = read_utterances(recipe.router)
    expected = {**ROUTES[name], "oos": recipe.router.default}
    routed = [router.route(RouteQuery(text)).strategy for text in utterances.texts]
    right = Counter(
        intent for intent, strategy in zip(utterances.intents, routed, strict=True) if strategy == expected[intent]
    )
    shares = {intent: right[intent] / count for intent, count in Counter(utterances.intents).items()}
    assert min(shares.values()) >= 0.6, shares


def test_rules_decide_and_unknown_intents_take_hybrid(named):
    name, recipe = named
    assert {rule.intent: rule.strategy for rule in recipe.router.rules} == ROUTES[name]
    assert recipe.router.default == "hybrid"
    assert {rule.intent for rule in recipe.router.rules if rule.require_quote} == (
        {"guideline"} if name == "medical" else set()
    )


def test_file_of_questions_is_beir_with_answers(named):
    _, recipe = named
    rows = [json.loads(line) for line in Path(recipe.questions.path).read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"_id", "text", "answers", "golden", "metadata"} for row in rows)
