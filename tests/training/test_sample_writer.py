"""The rows, files and counts of samples are the same whoever writes them, and in whatever order."""

import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from cluster.store import Store
from retrieval.index import build_index
from retrieval.parts import Parts
from retrieval.records import Question
from tests.training.tiny import training_recipe
from training.config import SamplesConfig
from training.data_card import Tally
from training.format import PromptFormat
from training.sample_choice import choose_questions
from training.sample_writer import (
    COVERAGE,
    DSF,
    RAFT,
    VALIDATION,
    SampleJob,
    SampleWriter,
    _cut,
    part_name,
    validation_config,
)
from training.samples import build_samples, load_samples
from training.splits import held_out_documents, prepare_questions


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def parts(built) -> dict[str, list[Question]]:
    questions = prepare_questions(built.recipe).questions
    closed_book = SampleWriter(_job(built, "", questions)).closed_book_maker.dsf
    chosen = choose_questions(questions, built.recipe.samples, built.recipe.seed, closed_book)
    return {
        RAFT: chosen.raft,
        DSF: chosen.dsf,
        VALIDATION + RAFT: chosen.validation_raft,
        VALIDATION + DSF: chosen.validation_dsf,
        COVERAGE: questions,
    }


def _job(built, uri: str, questions: list[Question]) -> SampleJob:
    config = built.recipe
    prompt_format = PromptFormat.load(config.prompt, config.language)
    return SampleJob(config, prompt_format, built.index, uri, frozenset(held_out_documents(questions)))


@pytest.fixture(scope="module")
def workers(built, parts, tmp_path_factory) -> list[SampleWriter]:
    """Three workers of one job, as Ray's actors are; their index is opened once for all examples."""
    folder = tmp_path_factory.mktemp("parts")
    return [SampleWriter(_job(built, str(folder), parts[COVERAGE])) for _ in range(3)]


def run_blocks(
    workers: list[SampleWriter], blocks: list, order: list[int], seed: int
) -> tuple[dict[str, bytes], Tally]:
    """Each block goes to a worker drawn from the seed; its files and the sum of what the workers counted."""
    folder = Path(workers[0].job.uri)
    shutil.rmtree(folder, ignore_errors=True)
    rng = random.Random(seed)
    tally = Tally()
    for place in order:
        row = rng.choice(workers)(blocks[place]).to_pylist()[0]
        assert row["fault"] == ""
        tally.merge(Tally.from_json(row["tally"]))
    return files_below(folder), tally


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_workers_any_number_and_order_of_blocks_give_the_same_bytes_and_counts(workers, parts, monkeypatch, data):
    monkeypatch.setattr("training.sample_writer.BLOCK_ROWS", 7)
    blocks = [block for part, questions in parts.items() for block in _cut(part, questions)]
    assert len(blocks) > 12
    order = data.draw(st.permutations(range(len(blocks))))
    used = workers[: data.draw(st.integers(2, 3))]
    first = run_blocks(workers[:1], blocks, list(range(len(blocks))), 0)
    files, tally = run_blocks(used, blocks, order, data.draw(st.integers(0, 99)))
    assert files == first[0]
    assert {name.split("-")[0] for name in files} == {"raft/part", "dsf/part", "validation/raft", "validation/dsf"}
    assert tally.counts == first[1].counts


@pytest.fixture(scope="module")
def lexical(corpus_path, encoder_path, tmp_path_factory):
    """A recipe whose actors load no model: they start in a second, and two cores carry three of them."""
    folder = tmp_path_factory.mktemp("lexical")
    recipe = training_recipe(
        folder, corpus_path, encoder_path, Path("nowhere"), search={"mode": "lexical"}, samples={"workers": 3}
    )
    return recipe, build_index(recipe, Store(recipe.store.uri))


def test_build_samples_three_actors_make_the_same_files_as_one_process(lexical, local_ray, tmp_path, monkeypatch):
    recipe, index = lexical
    monkeypatch.setattr("training.sample_writer.BLOCK_ROWS", 7)
    spread_out = _rebuilt(recipe, index, tmp_path / "actors")
    assert sum("raft/part-" in entry.path for entry in spread_out.manifest.files) == 4
    monkeypatch.setattr("training.sample_writer._write_on_workers", _write_here_reversed)
    alone = _rebuilt(recipe, index, tmp_path / "alone")
    assert files_below(alone.directory()) == files_below(spread_out.directory())
    assert alone.manifest.measured["card"] == spread_out.manifest.measured["card"]
    assert len(load_samples(alone, "raft")) == 24


def _write_here_reversed(blocks, job):
    writer = SampleWriter(job)
    for block in reversed(list(blocks)):
        yield from writer(block).to_pylist()


def _rebuilt(recipe, index, folder: Path):
    store = Store(str(folder))
    source = Path(recipe.store.uri) / "index"
    shutil.copytree(source, Path(store.uri) / "index", ignore=shutil.ignore_patterns(".*"))
    return build_samples(recipe, store, store.open_ref(index.ref))


def test_build_samples_fault_on_every_actor_is_one_line_and_publishes_nothing(
    lexical, local_ray, tmp_path, monkeypatch
):
    recipe, index = lexical
    monkeypatch.setattr("training.sample_writer.BLOCK_ROWS", 7)
    store = Store(str(tmp_path / "damaged"))
    shutil.copytree(Path(recipe.store.uri) / "index", tmp_path / "damaged" / "index")
    [chunks] = (tmp_path / "damaged").rglob("chunks.arrow")
    data = bytearray(chunks.read_bytes())
    data[len(data) // 2] ^= 1
    chunks.write_bytes(data)
    with pytest.raises(UserError, match=r"chunks\.arrow") as caught:
        build_samples(recipe, store, store.open_ref(index.ref))
    assert "\n" not in str(caught.value)
    assert store.versions("samples", recipe.name) == []


def test_writer_place_that_cannot_be_written_is_one_line(built, parts, tmp_path):
    (tmp_path / "file").write_text("in the way")
    writer = SampleWriter(_job(built, str(tmp_path / "file"), parts[COVERAGE]))
    row = writer(next(_cut(DSF, parts[DSF]))).to_pylist()[0]
    assert row["fault"].startswith(f"store.uri: cannot write samples to {tmp_path / 'file'}: ")
    assert "\n" not in row["fault"]


def test_write_part_in_an_object_store_leaves_no_folder_marks(monkeypatch):
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    made = []
    monkeypatch.setattr(type(memory), "mkdir", lambda self, path, *_, **__: made.append(path))
    monkeypatch.setattr(type(memory), "makedirs", lambda self, path, *_, **__: made.append(path))
    wrapped = PyFileSystem(FSSpecHandler(memory))
    monkeypatch.setattr("retrieval.parts.open_filesystem", lambda uri: (wrapped, "/" + uri.partition("://")[2]))
    from training.sample_writer import write_part

    write_part("memory://bucket/attempt", part_name(VALIDATION + RAFT, 3), [])
    assert memory.exists("/bucket/attempt/validation/raft-00003.parquet")
    assert made == []
    assert Parts("memory://bucket/attempt").read_table("validation/raft-00003.parquet").num_rows == 0


def test_cut_blocks_hold_every_question_once_in_order_and_grow_with_their_number():
    questions = [Question(f"q{n}", f"What is {n}?", ("x",)) for n in range(70)]
    blocks = list(_cut(RAFT, questions))
    assert [len(block) for block in blocks] == [64, 6]
    assert [q for block in blocks for q in block["question_id"].to_pylist()] == [q.question_id for q in questions]
    assert [block["block"][0].as_py() for block in blocks] == [0, 1]
    many = [questions[0]] * 25_600
    assert {len(block) for block in _cut(RAFT, many)} == {100}


def test_validation_config_shows_the_golden_passage_unless_rows_teach_to_abstain():
    assert validation_config(SamplesConfig(golden_fraction=0.5)).golden_fraction == 1.0
    abstaining = SamplesConfig(golden_fraction=0.5, without_golden="abstain")
    assert validation_config(abstaining) == abstaining
