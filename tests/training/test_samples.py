import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from cluster.store import Store
from retrieval.questions import read_questions, write_questions
from retrieval.records import Question
from tests.retrieval.tiny import COUNTRIES, tiny_encoder
from tests.training.tiny import TEST_COUNTRIES, training_recipe
from training.passage_match import mentions
from training.records import RaftSample
from training.samples import _build, build_samples, load_examples, load_questions, load_samples, samples_plan


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
    share = sum(row.golden_present for row in raft) / 24
    assert built.samples.manifest.measured["golden_share"] == pytest.approx(share, abs=1e-4)
    dsf = load_samples(built.samples, "dsf")
    assert len(dsf) == 24
    assert all(row.passages == () and "##" not in row.target for row in dsf)
    assert built.samples.manifest.measured["test_documents"] == sorted(TEST_COUNTRIES)
    files = {entry.path for entry in built.samples.manifest.files}
    assert files == {"questions.parquet", "dsf.parquet", "examples.parquet", "raft/part-00000.parquet"}
    table = pq.read_table(built.samples.path("raft/part-00000.parquet"))
    assert table.schema.equals(RaftSample.schema())


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
    assert samples.manifest.measured["questions_about_other_facts"] > 0


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


def test_build_samples_workers_of_ray_data_make_the_same_rows(built, local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("training.samples.BLOCK_ROWS", 7)
    store = Store(str(tmp_path / "other"))
    source = Path(built.recipe.store.uri) / "index"
    shutil.copytree(source, Path(store.uri) / "index", ignore=shutil.ignore_patterns(".*"))
    rebuilt = build_samples(built.recipe, store, store.open_ref(built.index.ref))
    assert rebuilt.ref == built.samples.ref
    assert sum("raft/part-" in entry.path for entry in rebuilt.manifest.files) == 4
    for objective in ("raft", "dsf"):
        assert load_samples(rebuilt, objective) == load_samples(built.samples, objective)
    assert load_examples(rebuilt) == load_examples(built.samples)


def test_build_samples_fault_on_a_worker_is_one_line(built, local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("training.samples.BLOCK_ROWS", 12)
    assert "was built with the encoder" in _refused(built, encoder={"model": str(tiny_encoder(tmp_path / "e", seed=9))})


def test_build_rows_are_read_from_where_the_workers_wrote_them(built, tmp_path):
    attempt = SimpleNamespace(directory=tmp_path / "staging", uri=str(tmp_path / "bucket"))
    attempt.directory.mkdir()
    outcome = _build(built.recipe, built.index, attempt)
    assert outcome.counts["raft"] == 24
    assert sorted(path.name for path in attempt.directory.iterdir()) == [
        "dsf.parquet",
        "examples.parquet",
        "questions.parquet",
    ]


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
    other_index = dataclasses.replace(
        built.index, manifest=built.index.manifest.model_copy(update={"version": "0" * 16})
    )
    assert samples_plan(built.recipe, other_index).ref.version != before


def test_samples_plan_version_ignores_what_does_not_matter(built):
    before = _version(built)
    assert _version(built, ray={"num_cpus": 1}) == before
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
    elsewhere = [Question(f"e{i}", "Where?", ("there",), _whole(f"Nowhere{i}")) for i in range(5)]
    write_questions(tmp_path / "elsewhere.jsonl", elsewhere)
    told = _refused(built, questions={"path": str(tmp_path / "elsewhere.jsonl")})
    assert "none of" in told
    assert "golden passage not in the index" in told
    no_places = [dataclasses.replace(q, golden=(), split="train") for q in elsewhere]
    no_places[0] = dataclasses.replace(no_places[0], split="test_new_questions")
    write_questions(tmp_path / "no_places.jsonl", no_places)
    assert "no training question" in _refused(built, questions={"path": str(tmp_path / "no_places.jsonl")})


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
