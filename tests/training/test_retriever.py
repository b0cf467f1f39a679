import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

import training.retriever
from cluster.errors import ArtifactError, NotBetterError, UserError
from cluster.store import Store
from retrieval.config import CollectionConfig, CorpusConfig
from retrieval.index import build_index
from retrieval.questions import write_questions
from retrieval.records import Golden, Passage, Question
from retrieval.retriever import Retriever
from tests.training.tiny import TEST_COUNTRIES, country_questions
from training.cli import train_app
from training.config import TrainingRecipe
from training.retriever import compare, divide_questions, encoder_plan, train_retriever, untuned_index
from training.retriever_checkpoint import Progress, load_checkpoint, save_checkpoint
from training.retriever_measure import Pool
from training.retriever_mining import HELD_OUT, TRAINING, VALIDATION, mine
from training.retriever_worker import RetrieverJob, train

pytestmark = pytest.mark.usefixtures("local_ray")

SETTINGS = {"epochs": 20, "learning_rate": 3e-3, "batch_questions": 8, "validations_per_epoch": 1, "patience": 20}


def changed(recipe, **sections):
    for name, values in sections.items():
        section = getattr(recipe, name)
        recipe = recipe.model_copy(update={name: section.model_validate(section.model_dump() | values)})
    return recipe


@pytest.fixture(scope="module")
def recipe(built, tmp_path_factory):
    """The tiny recipe with a store of its own that holds the untuned index."""
    store = tmp_path_factory.mktemp("store") / "store"
    shutil.copytree(built.recipe.store.uri, store)
    return changed(built.recipe, retriever=SETTINGS, store={"uri": str(store)})


@pytest.fixture(scope="module")
def store(recipe):
    return Store(recipe.store.uri)


@pytest.fixture(scope="module")
def tuned(recipe, store, tmp_path_factory, local_ray):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return train_retriever(recipe, store)


def test_train_retriever_wins_on_held_out_questions_and_says_by_how_much(recipe, tuned):
    measured, counts = tuned.manifest.measured, tuned.manifest.counts
    assert measured["gain"]["value"] > 0.1
    assert set(measured["splits"]) == {"test_new_questions", "test_new_documents"}
    new = measured["splits"]["test_new_documents"]
    assert new["after"]["recall@5"]["value"] > new["before"]["recall@5"]["value"]
    assert [measured["splits"][split]["before"]["recall@5"]["n"] for split in sorted(measured["splits"])] == [12, 6]
    assert counts["rows"] == counts["training_questions"]
    assert counts["training_questions"] + counts["validation_questions"] == 36
    assert counts["measured_passages"] == counts["indexed_passages"]
    assert len(measured["validations"]) == 20
    assert max(value for _, value in measured["validations"]) == dict(measured["validations"])[measured["best_step"]]
    assert tuned.manifest.inputs["encoder.model"]
    assert tuned.manifest.parents == {"index": str(untuned_index(recipe, tuned.store).ref)}


def test_train_retriever_publishes_a_safetensors_directory_that_sentence_transformers_loads(recipe, tuned):
    names = {entry.path for entry in tuned.manifest.files}
    assert {"modules.json", "model.safetensors", "tokenizer.json"} <= names
    assert all(name.endswith((".json", ".safetensors", ".txt")) for name in names)
    loaded = SentenceTransformer(str(tuned.directory()), device="cpu")
    base = SentenceTransformer(recipe.encoder.model, device="cpu")
    assert loaded.max_seq_length == base.max_seq_length
    texts = ["Austria", "cold winters"]
    assert abs(loaded.encode(texts) - base.encode(texts)).max() > 0.01


def test_train_retriever_again_is_up_to_date(recipe, store, tuned, monkeypatch):
    monkeypatch.setattr(training.retriever, "_fit", lambda *_: pytest.fail("trained again"))
    more = changed(recipe, train={"workers": 2, "threads_per_worker": 2}, retriever={"cached_texts": 3})
    assert train_retriever(recipe, store).ref == train_retriever(more, store).ref == tuned.ref


def test_encoder_plan_version_follows_what_affects_the_weights(recipe, store):
    index = untuned_index(recipe, store)
    before = encoder_plan(recipe, index).ref.version
    assert (
        encoder_plan(changed(recipe, train={"workers": 2}, retriever={"cached_texts": 9}), index).ref.version == before
    )
    for values in ({"learning_rate": 1e-3}, {"hard_negatives": 3}, {"epochs": 1}, {"relative_margin": 0.95}):
        assert encoder_plan(changed(recipe, retriever=values), index).ref.version != before


def test_index_takes_the_tuned_encoder_and_refuses_the_other(recipe, store, tuned):
    index = build_index(recipe, store)
    assert index.manifest.parents["encoder"] == str(tuned.ref)
    assert untuned_index(recipe, store).ref != index.ref
    assert store.current("index", recipe.name) == index.ref.version
    questions = [q for q in country_questions() if q.split == "test_new_questions"]
    found = Retriever.open(index, recipe.encoder).search([q.text for q in questions], 5)
    hit = sum(any(g.matches(h.passage) for h in few for g in q.golden) for q, few in zip(questions, found, strict=True))
    after = tuned.manifest.measured["splits"]["test_new_questions"]["after"]["recall@5"]["value"]
    assert hit / len(questions) == pytest.approx(after, abs=1e-4)  # what was measured before is what is searched
    elsewhere = changed(recipe, encoder={"model": str(tuned.directory())})
    with pytest.raises(ArtifactError):
        Retriever.open(index, elsewhere.encoder).search(["Austria"], 1)


def test_train_retriever_that_does_not_win_publishes_nothing_until_forced(recipe, store, tuned):
    useless = changed(recipe, retriever={"learning_rate": 1e-12, "epochs": 1})
    ref = encoder_plan(useless, untuned_index(useless, store)).ref
    with pytest.raises(NotBetterError, match=r"^retriever: not published: nDCG@10 on \d+ held-out questions \+0.0"):
        train_retriever(useless, store)
    assert not store.exists(ref)
    assert store.current("encoder", recipe.name) == tuned.ref.version
    forced = train_retriever(useless, store, force=True)
    assert forced.ref == ref
    assert forced.manifest.measured["forced"]
    assert forced.manifest.measured["resumed_at_step"] == forced.manifest.counts["steps"] > 0
    assert train_retriever(recipe, store).ref == tuned.ref  # and makes it current again
    assert store.current("encoder", recipe.name) == tuned.ref.version


def test_train_retriever_command_exits_with_1_where_it_does_not_win(recipe, store, tuned, monkeypatch):
    def refuse(*_, force):
        raise NotBetterError(f"retriever: not published {force}")

    built = []
    monkeypatch.setattr("training.retriever.train_retriever", refuse)
    monkeypatch.setattr("retrieval.index.build_index", lambda *_: built.append(True))
    result = CliRunner().invoke(train_app(lambda *_: recipe), ["retriever", "mine.yaml"])
    assert result.exit_code == 1
    monkeypatch.setattr("training.retriever.train_retriever", lambda *_, force: tuned)
    result = CliRunner().invoke(train_app(lambda *_: recipe), ["retriever", "mine.yaml", "--force"])
    assert (result.exit_code, len(built)) == (0, 2)


def test_mine_gives_the_same_rows_whatever_the_number_of_actors(recipe, store, monkeypatch):
    monkeypatch.setattr("training.retriever_mining.BLOCK_QUESTIONS", 7)
    divided, index = divide_questions(recipe), untuned_index(recipe, store)
    one = mine(recipe, index, divided.by_role(), divided.hidden)
    two = mine(changed(recipe, encoder={"actors": 2}), index, divided.by_role(), divided.hidden)
    assert one == two
    assert [row.question_id for row in one.rows] == [question.question_id for question in divided.training]
    assert one.found_for_validation
    hidden = divided.hidden
    by_id = {chunk.chunk_id: chunk for chunk in Retriever.open(index, recipe.encoder).chunks()}
    for row in one.rows:
        assert not {by_id[chunk_id].doc_id for chunk_id in row.passage_ids} & hidden


def test_divide_questions_leaks_no_held_out_document(recipe):
    divided = divide_questions(recipe)
    trained = {golden.doc_id for question in divided.training for golden in question.golden}
    assert set(TEST_COUNTRIES) <= divided.hidden
    assert not trained & divided.hidden
    assert {q.split for q in divided.training + divided.validation} == {"train"}
    assert set(divided.by_role()) == {TRAINING, VALIDATION, HELD_OUT}


def with_questions(recipe, path: Path, questions: list[Question]):
    write_questions(path, questions)
    return changed(recipe, questions={"path": str(path)})


def refused(recipe) -> str:
    with pytest.raises(UserError) as caught:
        train_retriever(recipe, Store(recipe.store.uri))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_train_retriever_bad_input_is_one_line(recipe, tmp_path, encoder_path):
    assert refused(changed(recipe, questions={"path": ""})).startswith("questions.path is empty")
    assert refused(changed(recipe, search={"mode": "lexical"})).startswith("search.mode is lexical")
    asked = country_questions()
    placeless = [Question(q.question_id, q.text, q.answers, (), q.split) for q in asked]
    told = refused(with_questions(recipe, tmp_path / "placeless.jsonl", placeless))
    assert "0 training questions name golden places" in told
    trained = [q for q in asked if q.split == "train"]
    told = refused(with_questions(recipe, tmp_path / "train.jsonl", trained))
    assert "no question is left to test with" in told
    tests = [q for q in asked if q.split != "train"]
    assert "no question is left to train on" in refused(with_questions(recipe, tmp_path / "test.jsonl", tests))
    weightless = tmp_path / "weightless"
    shutil.copytree(encoder_path, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "holds no *.safetensors weights" in refused(changed(recipe, encoder={"model": str(weightless)}))
    told = refused(changed(recipe, train={"workers": 9}, retriever={"batch_questions": 8}))
    assert told.startswith("train.workers is 9 but retriever.batch_questions is 8")


def test_train_retriever_over_collections_is_refused_with_what_to_do(recipe):
    collections = {"laws": CollectionConfig(corpus=CorpusConfig(path="laws"))}
    told = refused(recipe.model_copy(update={"collections": collections, "corpus": CorpusConfig()}))
    assert told.startswith("collections: an encoder is fine-tuned for one collection; give it a recipe named tiny-laws")


def test_mine_a_lexical_index_is_refused(recipe, tmp_path):
    """The encoder's vocabulary has no Chinese, so that `search.mode: auto` chose BM25."""
    corpus = tmp_path / "corpus.jsonl"
    row = {"_id": "d1", "title": "国家", "text": "土地面积是八十三平方公里。"}
    corpus.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    chinese = changed(recipe, corpus={"path": str(corpus)}, store={"uri": str(tmp_path / "store")})
    index = build_index(chinese, Store(chinese.store.uri))
    questions = {TRAINING: [Question("q", "?", ("a",), (Golden("d1"),), "train")], VALIDATION: [], HELD_OUT: []}
    with pytest.raises(UserError, match=r"^encoder.model: index/tiny/\w+ is lexical"):
        mine(chinese, index, questions, frozenset())


def test_train_retriever_golden_places_outside_the_index_are_named(recipe, tmp_path):
    lost = [
        Question(f"{q.question_id}", q.text, q.answers, (Golden("nowhere" + q.golden[0].doc_id),), q.split)
        for q in country_questions()
    ]
    told = refused(with_questions(recipe, tmp_path / "lost.jsonl", lost))
    assert "gave 0 training rows" in told
    assert "golden passage not in the index" in told


def test_compare_is_paired_and_counts_the_questions_of_a_split():
    questions = [Question(str(n), "?", (), (), "a" if n < 4 else "b") for n in range(10)]
    names = training.retriever.SHOWN
    before = {name: [0.0] * 4 + [0.5] * 6 for name in names}
    after = {name: [0.25] * 4 + [0.5] * 6 for name in names}
    found = compare(questions, "a", before, after, 17)
    assert found["gain"]["nDCG@10"] == {"value": 0.25, "low": 0.25, "high": 0.25, "n": 4}
    whole = compare(questions, None, before, after, 17)["gain"]["recall@1"]
    assert (whole["value"], whole["n"]) == (0.1, 10)
    assert whole["low"] < 0.1 < whole["high"]


def test_progress_stops_after_patience_validations_without_a_gain():
    progress = Progress()
    for value, stops in ((0.5, False), (0.6, False), (0.6, False), (0.55, True)):
        progress = progress.after_step(0.1).after_validation(value, 2)
        assert progress.stopped is stops
    assert (progress.best, progress.best_step) == (0.6, 3)  # of equals the one that has seen more
    assert progress.improves(0.6)
    assert not progress.improves(0.59)


def test_checkpoint_read_back_is_what_was_saved_and_the_newest(encoder_path, tmp_path):
    model = SentenceTransformer(str(encoder_path), device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(model.preprocess(["Austria"]))["sentence_embedding"].sum().backward()
    optimizer.step()
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_checkpoint(str(tmp_path)) is None
    for losses in ((1.0,), (1.0, 0.5)):
        save_checkpoint(str(tmp_path), Progress(losses=losses), model, optimizer, best)
    found = load_checkpoint(str(tmp_path))
    assert found.progress == Progress(losses=(1.0, 0.5))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found.restore_moments(model, fresh)
    for parameter in model.parameters():
        if parameter in optimizer.state:
            torch.testing.assert_close(fresh.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint-old")  # killed between both renames
    assert load_checkpoint(str(tmp_path)).progress.step == 2
    assert json.loads((tmp_path / "checkpoint-old" / "progress.json").read_text())["losses"] == [1.0, 0.5]


def job_of(recipe, index, folder: Path) -> RetrieverJob:
    """A job for one worker in this process, with the whole corpus as pools."""
    divided = divide_questions(recipe)
    mined = mine(recipe, index, divided.by_role(), divided.hidden)
    chunks = [Passage.of(chunk) for chunk in Retriever.open(index, recipe.encoder).chunks()]
    pool = Pool(tuple(chunks), len(chunks))
    return RetrieverJob(
        recipe=recipe.model_dump(include=set(TrainingRecipe.model_fields)),
        rows=mined.rows,
        validation=divided.validation,
        validation_pool=pool,
        held_out=divided.held_out,
        pool=pool,
        uri=str(folder / "encoder"),
        checkpoints=str(folder / "checkpoints"),
    )


def test_train_interrupted_goes_on_from_the_last_validation_to_the_same_weights(recipe, store, tmp_path):
    short = changed(recipe, retriever={"epochs": 3})
    index = untuned_index(recipe, store)
    whole, cut = job_of(short, index, tmp_path / "whole"), job_of(short, index, tmp_path / "cut")
    expected = train(whole, 0, 1, lambda *_: None)

    def stop(done: int, total: int, figures: dict) -> None:
        if done == expected.progress.validations[1][0] + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, 0, 1, stop)
    found = train(cut, 0, 1, lambda *_: None)
    assert found.resumed_at == expected.progress.validations[1][0]
    assert [step for step, _ in found.progress.validations] == [step for step, _ in expected.progress.validations]
    assert [value for _, value in found.progress.validations] == pytest.approx(
        [value for _, value in expected.progress.validations]
    )
    assert found.progress.losses == pytest.approx(expected.progress.losses)
    assert_same_weights(tmp_path / "cut" / "encoder", tmp_path / "whole" / "encoder")
    again = train(cut, 0, 1, lambda *_: None)
    assert (again.resumed_at, again.progress) == (len(found.progress.losses), found.progress)


def assert_same_weights(found: Path, expected: Path) -> None:
    left, right = (load_file(directory / "model.safetensors") for directory in (found, expected))
    assert set(left) == set(right)
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=1e-3, atol=1e-4)


def test_train_loss_that_is_not_finite_is_one_line(recipe, store, tmp_path):
    hopeless = changed(recipe, retriever={"learning_rate": 1e30})
    with pytest.raises(UserError, match=r"^retriever.learning_rate: the loss became nan at step \d+; lower it$"):
        train(job_of(hopeless, untuned_index(recipe, store), tmp_path), 0, 1, lambda *_: None)


@pytest.mark.slow
def test_train_retriever_two_workers_give_what_one_gives(recipe, store, tuned, tmp_path):
    other = changed(recipe, train={"workers": 2}, store={"uri": str(tmp_path / "store")})
    shutil.copytree(Path(recipe.store.uri) / "index", tmp_path / "store" / "index")
    artifact = train_retriever(other, Store(other.store.uri))
    assert artifact.ref == tuned.ref
    assert artifact.manifest.measured["workers"] == 2
    assert artifact.manifest.measured["validations"] == tuned.manifest.measured["validations"]
    assert_same_weights(artifact.directory(), tuned.directory())
