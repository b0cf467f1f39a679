import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from retrieval.questions import read_questions, write_questions
from retrieval.records import Question
from retrieval.retriever import Retriever
from tests.retrieval.tiny import COUNTRIES, tiny_encoder
from tests.training.tiny import TEST_COUNTRIES, training_recipe
from training.base_model import load_tokenizer
from training.batching import tokenise
from training.format import PromptFormat
from training.passage_match import mentions
from training.records import RaftSample
from training.sample_writer import write_samples
from training.samples import (
    _build,
    build_samples,
    load_examples,
    load_questions,
    load_samples,
    load_validation,
    sample_files,
    samples_plan,
)


def test_build_samples_files_are_readable_and_keep_their_promises(built):
    raft = load_samples(built.samples, "raft")
    assert len(raft) == 24 == built.samples.manifest.counts["raft"]
    for row in raft:
        shown = {p.doc_id for p in row.passages}
        assert not shown & set(TEST_COUNTRIES)
        assert len(row.passages) == 3
        assert all(any(quote in p.text for p in row.passages) for quote in row.quotes)
        for found, golden in zip(row.passages, row.golden, strict=True):
            assert golden == mentions(row.answer, found.text)
    assert {row.golden_present for row in raft} == {True, False}
    dsf = load_samples(built.samples, "dsf")
    assert len(dsf) == 24
    assert all(row.passages == () and "##" not in row.target for row in dsf)
    assert {entry.path for entry in built.samples.manifest.files} == {
        "questions.parquet",
        "examples.parquet",
        "raft/part-00000.parquet",
        "dsf/part-00000.parquet",
        "validation/raft-00000.parquet",
        "validation/dsf-00000.parquet",
    }
    assert [path.name for path in sample_files(built.samples, "dsf")] == ["part-00000.parquet"]
    table = pq.read_table(built.samples.path("raft/part-00000.parquet"))
    assert table.schema.equals(RaftSample.schema())


def test_load_validation_rows_come_from_training_questions_that_train_nothing(built):
    train = {q.question_id: q for q in load_questions(built.samples, "train")}
    trained = {row.question_id for name in ("raft", "dsf") for row in load_samples(built.samples, name)}
    for objective in ("raft", "dsf"):
        rows = load_validation(built.samples, objective)
        assert len(rows) == built.samples.manifest.counts[f"validation_{objective}"] > 0
        assert {row.objective for row in rows} == {objective}
        assert {row.question_id for row in rows} <= set(train) - trained
        assert not {p.doc_id for row in rows for p in row.passages} & set(TEST_COUNTRIES)
    assert all(row.golden_present for row in load_validation(built.samples, "raft"))
    assert not any(row.golden_present for row in load_validation(built.samples, "dsf"))


def test_data_card_says_what_the_rows_are(built, base_path):
    card = built.samples.manifest.measured["card"]
    raft, dsf = (load_samples(built.samples, name) for name in ("raft", "dsf"))
    assert card["rows"] == {"dsf": 24, "raft": 24, "validation-dsf": 12, "validation-raft": 12}
    assert card["golden_share"] == pytest.approx(sum(row.golden_present for row in raft) / 24, abs=1e-4)
    assert card["quoted_share"] == pytest.approx(sum(bool(row.quotes) for row in raft) / 24, abs=1e-4)
    assert card["quotes"]["kept"] == sum(len(row.quotes) for row in raft)
    assert sum(card["golden_position"].values()) == sum(row.golden_present for row in raft)
    assert card["distractors_per_row"] == {
        str(n): c for n, c in sorted(Counter(len(r.golden) - sum(r.golden) for r in raft).items())
    }
    similarity = card["similarity"]
    assert (similarity["golden_found"], similarity["distractor_score"]) == _similarity_by_hand(built, raft)
    assert card["kinds"]["raft"] == {"area": 6, "exports": 12, "goods": 6}
    tokenizer = load_tokenizer(base_path)
    prompt = PromptFormat.load(built.recipe.prompt, "en")
    for name, rows in (("raft", raft), ("dsf", dsf)):
        lengths = sorted(len(row.input_ids) for row in tokenise(rows, tokenizer, prompt))
        found = card["tokens"][name]
        assert (found["total"], found["longest"], sum(found["counts"])) == (sum(lengths), lengths[-1], 24)
        edges = [*found["edges"], 10**9]
        assert found["counts"] == [sum(low <= n < high for n in lengths) for low, high in pairwise(edges)]
        assert found["median"] == lengths[11]
    assert card["held_out_documents"] == 2
    assert card["coverage"] == _coverage_by_hand(built)


def _similarity_by_hand(built, raft) -> tuple:
    """Share of golden passages among the hits, and the mean cosine of those distractors that are."""
    retriever = Retriever.open(built.index, built.recipe.encoder)
    golden, distractors = [], []
    for row in raft:
        [hits] = retriever.search([row.question], built.recipe.samples.mining_depth)
        scores = {hit.passage.chunk_id: hit.score for hit in hits}
        for shown, is_golden in zip(row.passages, row.golden, strict=True):
            (golden if is_golden else distractors).append(scores.get(shown.chunk_id))
    found = [score for score in distractors if score is not None]
    share = sum(score is not None for score in golden) / len(golden)
    return pytest.approx(share, abs=1e-4), pytest.approx(sum(found) / len(found), abs=1e-3)


def _coverage_by_hand(built) -> dict:
    """The same counted the slow way: every question against every chunk."""
    chunks = list(Retriever.open(built.index, built.recipe.encoder).chunks())
    touched: dict[str, tuple[set, set]] = {}
    for question in load_questions(built.samples):
        for key in (question.split, "all"):
            documents, places = touched.setdefault(key, (set(), set()))
            documents |= {golden.doc_id for golden in question.golden}
            places |= {c.chunk_id for c in chunks for golden in question.golden if golden.matches(c)}
    return {
        split: {
            "documents": len(documents),
            "chunks": len(places),
            "document_share": round(len(documents) / len(COUNTRIES), 4),
            "chunk_share": round(len(places) / len(chunks), 4),
        }
        for split, (documents, places) in touched.items()
    }


def test_data_card_without_the_base_model_says_so_and_rows_are_made(built, capsys):
    recipe = built.recipe.model_copy(
        update={"name": "modelless", "model": built.recipe.model.model_copy(update={"base": "./nowhere"})}
    )
    samples = build_samples(recipe, built.store, built.index)
    assert load_samples(samples, "raft") == load_samples(built.samples, "raft")
    assert samples.manifest.measured["card"]["tokens"] == {}
    assert "the data card lacks token lengths: model.base: no such model directory" in capsys.readouterr().out


def test_load_questions_splits_stay_apart(built):
    new = load_questions(built.samples, "test_new_documents")
    assert {q.golden[0].doc_id for q in new} == set(TEST_COUNTRIES)
    assert len(new) == 6 * len(TEST_COUNTRIES)
    everything = load_questions(built.samples)
    assert len(everything) == sum(
        count for name, count in built.samples.manifest.counts.items() if name.startswith("questions_")
    )
    original = {q.question_id: q for q in read_questions(built.recipe.questions.path)}
    assert all(original[q.question_id] == q for q in everything)


def test_load_questions_new_questions_ask_only_what_dsf_rows_teach(built, tmp_path):
    def asked(samples) -> tuple[set, set]:
        facts = {(q.golden, q.answers) for q in load_questions(samples, "test_new_questions")}
        rows = {row.question_id for row in load_samples(samples, "dsf")}
        train = {q.question_id: q for q in load_questions(samples, "train")}
        return facts, {(train[name].golden, train[name].answers) for name in rows}

    facts, seen = asked(built.samples)
    assert len(facts) == len(COUNTRIES) - len(TEST_COUNTRIES)
    assert facts <= seen
    few = built.recipe.model_copy(update={"samples": built.recipe.samples.model_copy(update={"dsf_rows": 5})})
    samples = build_samples(few, built.store, built.index)
    facts, seen = asked(samples)
    assert 0 < len(facts) < len(COUNTRIES) - len(TEST_COUNTRIES)
    assert facts <= seen
    left_out = samples.manifest.measured["card"]["drops"]["test questions"]
    assert left_out["asks about a fact that no closed-book row teaches"] > 0


def test_load_examples_show_the_whole_format(built):
    examples = load_examples(built.samples)
    assert len(examples) == 4
    for example in examples:
        assert example.target.startswith("##begin_quote##")
        assert "<ANSWER>: " in example.target
        assert len(example.passages) == 3
    lengths = [sum(len(p.text) for p in example.passages) for example in examples]
    assert lengths == sorted(lengths)


def test_build_samples_same_inputs_are_skipped(built):
    again = build_samples(built.recipe, built.store, built.index)
    assert again.manifest.attempt == built.samples.manifest.attempt


def test_build_rows_are_read_from_where_the_workers_wrote_them(built, tmp_path):
    attempt = SimpleNamespace(directory=tmp_path / "staging", uri=str(tmp_path / "bucket"))
    attempt.directory.mkdir()
    outcome = _build(built.recipe, built.index, attempt)
    assert outcome.counts["raft"] == 24
    assert sorted(path.name for path in attempt.directory.iterdir()) == ["examples.parquet", "questions.parquet"]
    assert sorted(path.name for path in (tmp_path / "bucket").iterdir()) == ["dsf", "raft", "validation"]


def test_build_samples_part_of_a_killed_worker_is_not_published(built, monkeypatch):
    def write_and_leave_a_part(job, parts):
        written = write_samples(job, parts)
        Path(job.uri, "raft", "part-00000.parquet.unfinished-1234").write_bytes(b"half")
        return written

    monkeypatch.setattr("training.samples.write_samples", write_and_leave_a_part)
    recipe = built.recipe.model_copy(update={"name": "killed"})
    samples = build_samples(recipe, built.store, built.index)
    assert not [entry.path for entry in samples.manifest.files if "unfinished" in entry.path]


def _version(built, **sections) -> str:
    recipe = built.recipe
    for name, changes in sections.items():
        section = getattr(recipe, name)
        changed = section.model_copy(update=changes) if isinstance(changes, dict) else changes
        recipe = recipe.model_copy(update={name: changed})
    return samples_plan(recipe, built.index).ref.version


def test_samples_plan_version_follows_content(built, tmp_path):
    before = _version(built)
    assert before == built.samples.ref.version
    edited = tmp_path / "edited.jsonl"
    lines = Path(built.recipe.questions.path).read_text().splitlines(keepends=True)
    edited.write_text("".join(lines))
    assert _version(built, questions={"path": str(edited)}) == before  # elsewhere, the same bytes
    row = json.loads(lines[3])
    edited.write_text("".join([*lines[:3], json.dumps({**row, "text": row["text"] + "?"}) + "\n", *lines[4:]]))
    assert _version(built, questions={"path": str(edited)}) != before
    prompt = tmp_path / "prompt.yaml"
    original = (Path(__file__).parents[2] / "training/prompts/en.yaml").read_text(encoding="utf-8")
    prompt.write_text(original, encoding="utf-8")
    assert _version(built, prompt={"path": str(prompt)}) == before
    prompt.write_text(original.replace("do not say", "are silent"), encoding="utf-8")
    assert _version(built, prompt={"path": str(prompt)}) != before
    assert _version(built, language="zh") != before
    assert _version(built, seed=18) != before
    assert _version(built, samples={"distractors": 3}) != before
    assert _version(built, prompt={"quotes": False}) != before
    assert _version(built, questions={"test_path": str(edited)}) != before
    assert _version(built, search={"rerank": "a/reranker"}) != before
    fused = {_version(built, search={"mode": "hybrid", "dense_weight": weight}) for weight in (0.6, 0.5)}
    assert len(fused | {before}) == 3
    other_index = dataclasses.replace(
        built.index, manifest=built.index.manifest.model_copy(update={"version": "0" * 16})
    )
    assert samples_plan(built.recipe, other_index).ref.version != before


def test_samples_plan_version_follows_judgements_beside_beir_queries(built, tmp_path):
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "Where?"}\n')
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("q\tghana\t1\n")
    before = _version(built, questions={"path": str(tmp_path / "queries.jsonl")})
    (tmp_path / "qrels" / "test.tsv").write_text("q\thungary\t1\n")
    assert _version(built, questions={"path": str(tmp_path / "queries.jsonl")}) != before


def test_samples_plan_version_ignores_what_does_not_matter(built):
    before = _version(built)
    assert _version(built, search={"mode": built.recipe.search.mode, "rrf_constant": 60}) == before
    assert _version(built, ray={"num_cpus": 1}) == before
    assert _version(built, samples={"workers": 7}) == before
    assert _version(built, train={"learning_rate": 0.5, "workers": 2}) == before
    assert _version(built, lora={"rank": 64}) == before
    assert _version(built, model={"base": "elsewhere"}) == before
    assert _version(built, encoder={"batch_size": 3} if hasattr(built.recipe.encoder, "batch_size") else {}) == before


def test_build_samples_own_questions_with_whole_documents_and_a_test_file(built, tmp_path):
    train = [
        Question(f"t{place}", f"What is there in summer in {title}?", ("cold winters",), _whole(title))
        for place, title in enumerate(COUNTRIES[:5])
    ]
    tests = [Question("x", "Exports of Hungary?", ("paprika",), _whole("Hungary"))]
    tests += [Question("y", "Exports of Chile?", ("copper",), _whole("Chile"))]
    write_questions(tmp_path / "q.jsonl", train)
    write_questions(tmp_path / "t.jsonl", tests)
    recipe = built.recipe.model_copy(
        update={
            "name": "own",
            "questions": built.recipe.questions.model_copy(
                update={"path": str(tmp_path / "q.jsonl"), "test_path": str(tmp_path / "t.jsonl")}
            ),
        }
    )
    samples = build_samples(recipe, built.store, built.index)
    assert [q.question_id for q in load_questions(samples, "test_new_documents")] == ["x"]
    assert [q.question_id for q in load_questions(samples, "test_new_questions")] == ["y"]
    for row in load_samples(samples, "raft"):
        golden = [p for p, is_golden in zip(row.passages, row.golden, strict=True) if is_golden]
        # Every other climate chunk holds `cold winters` too: such a passage would be a false negative.
        assert all("cold winters" in p.text for p in golden)
        assert sum("cold winters" in p.text for p in row.passages) == len(golden)
        assert "hungary" not in {p.doc_id for p in row.passages}


def _whole(title: str):
    from retrieval.records import Golden

    return (Golden(title.lower()),)


def _refused(built, *, index=None, **sections) -> str:
    recipe = built.recipe.model_copy(update={"name": "refused"})
    for name, changes in sections.items():
        recipe = recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=changes)})
    with pytest.raises(UserError) as caught:
        build_samples(recipe, built.store, index or built.index)
    assert "\n" not in str(caught.value)
    assert built.store.current("samples", "refused") is None
    assert built.store.versions("samples", "refused") == []
    return str(caught.value)


def test_build_samples_bad_input_is_one_line_and_publishes_nothing(built, tmp_path):
    assert "questions.path is empty" in _refused(built, questions={"path": ""})
    assert "questions.path: no such file" in _refused(built, questions={"path": str(tmp_path / "none.jsonl")})
    assert "questions.test_path: no such" in _refused(built, questions={"test_path": str(tmp_path / "none.jsonl")})
    assert "prompt.path" in _refused(built, prompt={"path": str(tmp_path / "none.yaml")})
    (tmp_path / "bad.yaml").write_text("question: '{query}'")
    assert "prompt.path" in _refused(built, prompt={"path": str(tmp_path / "bad.yaml")})
    elsewhere = [Question(f"e{i}", f"Where is {i}?", ("there",), _whole(f"Nowhere{i}")) for i in range(5)]
    write_questions(tmp_path / "elsewhere.jsonl", elsewhere)
    told = _refused(built, questions={"path": str(tmp_path / "elsewhere.jsonl")})
    assert "none of" in told
    assert "golden passage not in the index" in told
    repeated = [dataclasses.replace(question, text="Where?") for question in elsewhere]
    write_questions(tmp_path / "repeated.jsonl", repeated)
    told = _refused(built, questions={"path": str(tmp_path / "repeated.jsonl")})
    assert "none of 0 training questions gave a row: 4 repeats a test question" in told
    no_places = [dataclasses.replace(q, text=f"Where is {q.question_id}?", golden=(), split="train") for q in elsewhere]
    no_places[0] = dataclasses.replace(no_places[0], split="test_new_questions")
    write_questions(tmp_path / "no_places.jsonl", no_places)
    told = _refused(built, questions={"path": str(tmp_path / "no_places.jsonl")})
    assert "none of 0 training questions gave a row: 4 no golden place" in told


def test_build_samples_index_of_another_encoder_is_refused_in_one_line(built, tmp_path):
    other = tiny_encoder(tmp_path / "other", seed=9)
    told = _refused(built, encoder={"model": str(other)})
    assert "was built with the encoder" in told
    assert "encoder.model is" in told


def test_build_samples_prompt_path_relative_to_the_driver_is_read(built, tmp_path, monkeypatch):
    original = (Path(__file__).parents[2] / "training/prompts/en.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(original.replace("do not say", "are silent"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = training_recipe(
        tmp_path / "own",
        Path(built.recipe.corpus.path),
        Path(built.recipe.encoder.model),
        Path(built.recipe.model.base),
        name="relative",
        prompt={"path": "mine.yaml"},
        samples={"golden_fraction": 0, "without_golden": "abstain"},
        store={"uri": built.recipe.store.uri},
    )
    samples = build_samples(recipe, built.store, built.index)
    assert {row.answer for row in load_samples(samples, "raft")} == {"The documents are silent."}


def test_build_samples_unanswerable_questions_teach_to_abstain(built, tmp_path):
    silent = [
        Question(f"u{n}", f"Who invented the {thing}?", split="train", metadata={"kind": "unanswerable"})
        for n, thing in enumerate(("zip", "lamp", "wheel"))
    ]
    write_questions(tmp_path / "q.jsonl", [*read_questions(built.recipe.questions.path), *silent])
    questions = built.recipe.questions.model_copy(update={"path": str(tmp_path / "q.jsonl")})
    samples = built.recipe.samples.model_copy(update={"raft_rows": 100, "validation_rows": 0})
    recipe = built.recipe.model_copy(update={"name": "silent", "questions": questions, "samples": samples})
    made = build_samples(recipe, built.store, built.index)
    rows = [row for row in load_samples(made, "raft") if row.question_id.startswith("u")]
    assert len(rows) == 3
    for row in rows:
        assert row.answer == PromptFormat.load(recipe.prompt, "en").texts.abstention
        assert not row.golden_present
        assert (len(row.passages), row.quotes) == (3, ())
    assert not [row for row in load_samples(made, "dsf") if row.question_id.startswith("u")]
