import json
import random

import numpy as np
import pytest

from cluster.errors import ArtifactError, UserError
from training.config import TrainingRecipe
from training.intent_model import DESCRIPTION, WEIGHTS, load_intent_model
from training.ngrams import count_ngrams, learn_vocabulary, weigh
from training.router import train_router
from training.router_fit import (
    choose_temperature,
    expected_calibration_error,
    fit_intents,
    share_with_interval,
)
from training.utterances import divide, read_utterances

SUBJECTS = {"balance": "balance account money", "transfer": "send transfer payment", "card": "card lost stolen"}


def utterances(per_intent=20, outside=20):
    """Rows of distinct texts: two words of the intent, and two that say nothing."""
    draw = random.Random(1)
    fillers = [f"{first}{last}" for first in "bdfgk" for last in ("ame", "olu", "iri", "esta")]
    rows = []
    for intent, words in SUBJECTS.items():
        for number in range(per_intent):
            mixed = [*draw.sample(words.split(), 2), *draw.sample(fillers, 2)]
            rows.append({"text": f"{' '.join(draw.sample(mixed, 4))} {number}", "intent": intent})
    for number in range(outside):
        rows.append({"text": f"{' '.join(draw.sample(fillers, 4))} {number}", "intent": "oos"})
    draw.shuffle(rows)
    return rows


def write(folder, rows, name="examples.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def recipe(folder, file, **router):
    corpus = folder / "corpus.jsonl"
    corpus.write_text('{"_id": "a", "text": "b"}\n')
    return TrainingRecipe.model_validate(
        {
            "name": "tiny",
            "store": {"uri": str(folder / "store")},
            "corpus": {"path": str(corpus)},
            "router": {"examples": str(file), "features": "ngrams", **router},
        }
    )


def bag(texts):
    """Embeddings that know the intents' words, and nothing else."""
    words = sorted({word for words in SUBJECTS.values() for word in words.split()})
    rows = np.array([[text.split().count(word) for word in words] + [0.1] for text in texts], dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_train_router_on_ngrams_recognises_intents_and_what_belongs_to_none(tmp_path, store, capsys):
    artifact = train_router(recipe(tmp_path, write(tmp_path, utterances())), store)
    measured, counts = artifact.manifest.measured, artifact.manifest.counts
    assert (counts["intents"], counts["fitted"], counts["held_out"]) == (3, 64, 16)
    assert measured["accuracy_in_scope"]["value"] >= 0.9 and measured["out_of_scope_recall"]["value"] >= 0.75
    assert measured["out_of_scope_recall"]["low"] < measured["out_of_scope_recall"]["value"]
    assert {entry.path for entry in artifact.manifest.files} == {DESCRIPTION, WEIGHTS}
    told = capsys.readouterr()
    assert "accuracy in scope" in told.err + told.out and "expected calibration error" in told.err + told.out
    model = load_intent_model(artifact.directory(), "x")
    best = model.best(["send payment now please", "dame folu giri kesta"])
    assert best.labels[0] == "transfer" and best.known.tolist() == [True, False]


def test_train_router_runs_again_only_when_something_changed(tmp_path, store, capsys):
    file = write(tmp_path, utterances())
    first = train_router(recipe(tmp_path, file), store)
    capsys.readouterr()
    assert train_router(recipe(tmp_path, file), store).ref == first.ref
    told = capsys.readouterr()
    assert "up to date" in told.out + told.err
    write(tmp_path, utterances(per_intent=21))
    assert train_router(recipe(tmp_path, file), store).ref != first.ref
    assert store.current("router", "tiny") != first.ref.version


def test_train_router_is_the_same_for_the_same_seed(tmp_path):
    from cluster.store import Store

    file = write(tmp_path, utterances())
    weights = []
    for name in ("one", "two"):
        artifact = train_router(recipe(tmp_path, file), Store(str(tmp_path / name)))
        weights.append(load_intent_model(artifact.directory(), "x").weights)
    assert np.array_equal(*weights)


def test_train_router_on_embeddings_names_its_encoder(tmp_path, store, monkeypatch):
    from retrieval.encoder import EncoderSource

    monkeypatch.setattr("training.router.encoder_digest", lambda config: "base")
    monkeypatch.setattr("training.router.encoder_tokenizer", lambda directory: None)
    monkeypatch.setattr("training.router.unknown_share", lambda tokenizer, texts: 0.01)
    monkeypatch.setattr(EncoderSource, "directory", lambda self: None)
    monkeypatch.setattr(EncoderSource, "digest", lambda self: "d" * 64)
    monkeypatch.setattr("training.router.encoder_source", lambda recipe, store: EncoderSource(recipe.encoder))
    file = write(tmp_path, utterances())
    artifact = train_router(recipe(tmp_path, file, features="auto"), store, embed=lambda source, texts: bag(texts))
    model = load_intent_model(artifact.directory(), "x")
    assert (model.features, model.encoder, model.encoder_digest) == (
        "embedding",
        "embedded:all-MiniLM-L6-v2",
        "d" * 64,
    )
    assert artifact.manifest.inputs["encoder.model"] == "base"
    best = model.best(["", ""], bag(["lost card", "nothing here"]))
    assert best.labels[0] == "card" and best.known.tolist() == [True, False]


def test_train_router_takes_ngrams_where_the_encoder_does_not_know_the_language(tmp_path, store, monkeypatch):
    from retrieval.encoder import EncoderSource

    monkeypatch.setattr("training.router.encoder_tokenizer", lambda directory: None)
    monkeypatch.setattr("training.router.unknown_share", lambda tokenizer, texts: 0.6)
    monkeypatch.setattr(EncoderSource, "directory", lambda self: None)
    monkeypatch.setattr("training.router.encoder_source", lambda recipe, store: EncoderSource(recipe.encoder))
    questions = {
        "product": [
            "这款手机多少钱",
            "价格是多少",
            "有什么颜色",
            "手机的价格贵吗",
            "这款产品有货吗",
            "产品的颜色和价格",
        ],
        "policy": ["怎么退货", "退货政策是什么", "可以退款吗", "退款要几天", "七天内能退货吗", "退款政策说明"],
    }
    rows = [{"text": text, "intent": intent} for intent, texts in questions.items() for text in texts]
    artifact = train_router(recipe(tmp_path, write(tmp_path, rows), features="auto"), store)
    model = load_intent_model(artifact.directory(), "x")
    assert model.features == "ngrams" and not model.out_of_scope
    assert model.best(["我想退货退款", "产品价格"]).labels == ("policy", "product")
    assert "out_of_scope_recall" not in artifact.manifest.measured


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "has no utterance"),
        ([{"text": "a"}], "has no intent in its column 'intent'"),
        ([{"question": "a", "intent": "b"}], "its columns are 'question', 'intent'"),
        ([{"text": "a", "intent": ["b"]}], "has an intent that is no text"),
        ([{"text": f"a{n}", "intent": "one"} for n in range(5)], "has the intent one: two at least"),
        (
            [{"text": f"{i}{n}", "intent": i} for i in "ab" for n in range(4)] + [{"text": "x", "intent": "single"}],
            "every intent needs at least 3 utterances; 'single' has 1",
        ),
        (
            [{"text": "Same  text", "intent": "a"}, {"text": "same text", "intent": "b"}],
            r":2 has the intent 'b', but the same text:1 has 'a'",
        ),
    ],
)
def test_read_utterances_refuses_what_cannot_be_learned_in_one_line(tmp_path, rows, problem):
    with pytest.raises(UserError, match=problem) as caught:
        read_utterances(recipe(tmp_path, write(tmp_path, rows)).router)
    assert "router.examples" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("examples", "problem"),
    [("", "router.examples is empty"), ("nowhere.jsonl", "no such file"), ("x.txt", "no such file")],
)
def test_read_utterances_without_a_file_is_refused(tmp_path, examples, problem):
    settings = recipe(tmp_path, tmp_path / examples if examples else "").router
    with pytest.raises(UserError, match=problem):
        read_utterances(settings)


def test_read_utterances_from_csv_and_parquet_with_repeats_counted(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = utterances(4, 3)
    rows.append(rows[0])
    csv = tmp_path / "e.csv"
    csv.write_text("text,intent\n" + "".join(f"{row['text']},{row['intent']}\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    found = [read_utterances(recipe(tmp_path, file).router) for file in (csv, tmp_path / "e.parquet")]
    assert found[0] == found[1]
    assert (len(found[0].texts), found[0].repeated) == (15, 1)


def test_train_router_embeddings_without_an_index_of_embeddings_are_refused(tmp_path, store):
    wished = recipe(tmp_path, write(tmp_path, utterances()), features="embedding")
    lexical = wished.model_copy(update={"search": wished.search.model_copy(update={"mode": "lexical"})})
    with pytest.raises(UserError, match=r"router.features is embedding, but search.mode is lexical"):
        train_router(lexical, store)


def test_divide_holds_out_a_share_of_every_intent(store):
    intents = ("a",) * 10 + ("b",) * 3 + ("c",) * 50
    fitted, held_out = divide(intents, 0.2, 5)
    assert sorted([*fitted, *held_out]) == list(range(63))
    assert [sum(intents[row] == one for row in held_out) for one in "abc"] == [2, 1, 10]
    assert divide(intents, 0.2, 5)[1].tolist() == held_out.tolist() != divide(intents, 0.2, 6)[1].tolist()


def test_choose_temperature_finds_the_one_that_scores_were_scaled_by():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6000, 4)).astype(np.float32) * 2
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    wanted = np.array([rng.choice(4, p=row / row.sum()) for row in shares.astype(np.float64)])
    assert choose_temperature(scores * 3, wanted) == pytest.approx(3, rel=0.08)


def test_expected_calibration_error_and_interval_by_hand():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55], dtype=np.float32)
    right = np.array([True, True, True, False, True, False])
    assert expected_calibration_error(confidence, right) == pytest.approx(4 / 6 * 0.2 + 2 / 6 * 0.05, abs=1e-6)
    interval = share_with_interval(60, 100)
    assert (interval["low"], interval["high"]) == pytest.approx((0.5020, 0.6906), abs=1e-4)


def test_ngrams_match_scikit_learns_tf_idf():
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = ["send money", "money money lost", "退货政策", "send 退货"]
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
    theirs = vectorizer.fit_transform(texts)
    blank = vectorizer.vocabulary_[" "]
    counted = [count_ngrams(text) for text in texts]
    hashes, idf = learn_vocabulary(counted)
    for row, counts in enumerate(counted):
        expected = np.delete(theirs[row].toarray()[0], blank)
        expected = np.sort(expected[expected > 0]) / np.linalg.norm(expected)
        assert np.sort(weigh(counts, hashes, idf)[1]) == pytest.approx(expected, abs=1e-5)
    assert len(weigh(count_ngrams("zzz"), hashes, idf)[1]) == 0


def test_fit_intents_tells_two_intents_apart(tmp_path):
    from training.intent_model import IntentModel

    rng = np.random.default_rng(2)
    features = rng.normal(size=(40, 2)).astype(np.float32) * 0.1 + np.repeat([[1, 0], [0, 1]], 20, axis=0)
    nothing = np.zeros((0, 2), dtype=np.float32)
    template = IntentModel(("a", "b"), "", "embedding", nothing, np.zeros(2, dtype=np.float32))
    model, folds = fit_intents(features.astype(np.float32), ["a"] * 20 + ["b"] * 20, template, 1)
    assert folds == 5 and model.weights.shape == (2, 2)
    assert model.best(["", ""], np.eye(2, dtype=np.float32)).labels == ("a", "b")


def test_load_intent_model_refuses_what_it_cannot_read(tmp_path, store):
    artifact = train_router(recipe(tmp_path, write(tmp_path, utterances())), store)
    for name, content in ((DESCRIPTION, b"{}"), (DESCRIPTION, b'{"format": 9}'), (WEIGHTS, b"junk")):
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        for entry in (DESCRIPTION, WEIGHTS):
            (copy / entry).write_bytes((artifact.directory() / entry).read_bytes())
        (copy / name).write_bytes(content)
        with pytest.raises(
            ArtifactError, match="router/x is no router that this program reads: run `rayft train router"
        ):
            load_intent_model(copy, "router/x")
