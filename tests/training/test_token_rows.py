import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cache import cache_directory
from cluster.errors import UserError
from cluster.stage import Outcome, Plan, run_stage
from cluster.store import Artifact, Attempt, Store
from tests.training.tiny import passage, prompt_format
from training import token_files, token_rows
from training.base_model import load_tokenizer
from training.batching import TokenRow, tokenise
from training.config import TrainingRecipe
from training.records import RaftSample
from training.token_rows import TokenRows, mixture_order, write_token_rows

RAFT_PARTS = (5, 0, 7, 8)
RAFT, DSF = sum(RAFT_PARTS), 9


def sample(objective: str, number: int) -> RaftSample:
    shown = (passage("word " * (5 + 13 * number % 40)),) if objective == "raft" else ()
    target = f"<ANSWER>: {number * 7}"
    return RaftSample(
        f"{objective}-{number}", f"q{number}", objective, f"What is {number}?", shown, (True,) * len(shown), True,
        "", (), str(number * 7), target, "train",
    )  # fmt: skip


RAFT_SAMPLES = [sample("raft", number) for number in range(RAFT)]
DSF_SAMPLES = [sample("dsf", number) for number in range(DSF)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    def write(attempt: Attempt) -> Outcome:
        def part(name: str, rows: list[RaftSample]) -> None:
            path = attempt.directory / name
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist([row.to_row() for row in rows], schema=RaftSample.schema()), path)

        start = 0
        for number, count in enumerate(RAFT_PARTS):
            part(f"raft/part-{number:05d}.parquet", RAFT_SAMPLES[start : start + count])
            start += count
        part("dsf/part-00000.parquet", DSF_SAMPLES)
        return Outcome()

    return run_stage(Store(str(tmp_path_factory.mktemp("tokens") / "store")), Plan("samples", "tiny"), write)


@pytest.fixture
def recipe(base_path: Path) -> TrainingRecipe:
    return recipe_of(base_path)


def recipe_of(base_path: Path, **train: object) -> TrainingRecipe:
    values = {"name": "x", "model": {"base": str(base_path)}, "train": {"max_tokens": 4000, **train}}
    return TrainingRecipe.model_validate(values)


def expected(base_path: Path, rows: list[RaftSample], max_tokens: int = 4000) -> list[TokenRow]:
    """Independent of files: the rows tokenised one at a time."""
    tokenizer = load_tokenizer(base_path)
    made = [row for one in rows for row in tokenise([one], tokenizer, prompt_format())]
    return [row for row in made if len(row.input_ids) <= max_tokens]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_token_rows_are_the_samples_in_order(samples, recipe, base_path, tmp_path):
    uri = str(tmp_path / "tokens")
    counts = write_token_rows(recipe, samples, "raft", prompt_format(), uri)
    rows, oracle = TokenRows.open(uri), expected(base_path, RAFT_SAMPLES)
    assert [rows[i] for i in range(len(rows))] == oracle
    assert rows.lengths.tolist() == [len(row.input_ids) for row in oracle]
    assert rows.target_tokens.tolist() == [row.target_tokens for row in oracle]
    assert counts == rows.counts
    assert (counts.rows, counts.too_long) == (RAFT, 0)
    assert counts.tokens == sum(len(row.input_ids) for row in oracle)
    assert counts.target_tokens == sum(row.target_tokens for row in oracle)
    with pytest.raises(IndexError):
        rows[RAFT]


def test_token_files_do_not_depend_on_who_writes_them(samples, recipe, base_path, tmp_path, monkeypatch, local_ray):
    monkeypatch.setattr(token_rows, "FILE_ROWS", 6)
    by_workers, alone = tmp_path / "workers", tmp_path / "alone"
    write_token_rows(recipe, samples, "raft", prompt_format(), str(by_workers))

    def write_here(units, arguments, label):
        return [token_rows._Writer(*arguments).write(number, unit) for number, unit in enumerate(units)][::-1]

    monkeypatch.setattr(token_rows, "_write_on_workers", write_here)
    write_token_rows(recipe, samples, "raft", prompt_format(), str(alone))
    assert files_below(by_workers) == files_below(alone)
    assert sorted(path.name for path in (alone / "raft").iterdir()) == [f"tokens-0000{n}.arrow" for n in range(4)]
    rows = TokenRows.open(str(by_workers))
    assert [rows[i] for i in range(len(rows))] == expected(base_path, RAFT_SAMPLES)


def test_rows_above_max_tokens_are_left_out_and_counted(samples, base_path, tmp_path):
    lengths = sorted(len(row.input_ids) for row in expected(base_path, RAFT_SAMPLES))
    most = lengths[RAFT // 2]
    uri = str(tmp_path / "tokens")
    counts = write_token_rows(recipe_of(base_path, max_tokens=most), samples, "raft", prompt_format(), uri)
    kept = expected(base_path, RAFT_SAMPLES, most)
    rows = TokenRows.open(uri)
    assert [rows[i] for i in range(len(rows))] == kept
    assert counts.too_long == RAFT - len(kept) > 0


def test_no_row_within_max_tokens_is_refused(samples, base_path, tmp_path):
    with pytest.raises(UserError, match=rf"train\.max_tokens: none of {RAFT} raft rows has at most 64 tokens"):
        write_token_rows(recipe_of(base_path, max_tokens=64), samples, "raft", prompt_format(), str(tmp_path / "t"))
    with pytest.raises(UserError, match=r"tokens\.json"):
        TokenRows.open(str(tmp_path / "t"))


def test_a_mixture_holds_all_raft_rows_and_closed_book_rows_to_their_share(samples, base_path, tmp_path):
    uri = str(tmp_path / "tokens")
    recipe = recipe_of(base_path, mixture={"raft": 0.8, "dsf": 0.2})
    counts = write_token_rows(recipe, samples, "raft", prompt_format(), uri)
    rows = TokenRows.open(uri)
    ids = [rows[i].sample_id for i in range(len(rows))]
    assert ids[:RAFT] == [row.sample_id for row in RAFT_SAMPLES]
    assert len(ids) == counts.rows == RAFT + 5
    assert len(set(ids[RAFT:])) == 5
    oracle = {row.sample_id: row for row in expected(base_path, RAFT_SAMPLES + DSF_SAMPLES)}
    assert all(rows[i] == oracle[ids[i]] for i in range(len(rows)))
    assert rows.lengths.tolist() == [len(oracle[name].input_ids) for name in ids]
    write_token_rows(recipe, samples, "dsf", prompt_format(), str(tmp_path / "dsf"))
    assert len(TokenRows.open(str(tmp_path / "dsf"))) == DSF


@given(
    raft_rows=st.integers(1, 60),
    dsf_rows=st.integers(1, 60),
    weights=st.tuples(st.floats(0.05, 1), st.floats(0, 1)),
    seed=st.integers(0, 3),
)
def test_mixture_order_repeats_evenly_and_meets_the_share(raft_rows, dsf_rows, weights, seed):
    mixture = {"raft": weights[0], "dsf": weights[1]}
    order = mixture_order(raft_rows, dsf_rows, mixture, seed)
    assert order.tolist() == mixture_order(raft_rows, dsf_rows, mixture, seed).tolist()
    assert order[:raft_rows].tolist() == list(range(raft_rows))
    drawn = order[raft_rows:]
    share = weights[1] / sum(weights)
    assert abs(len(drawn) - share * len(order)) <= 1
    times = np.bincount(drawn - raft_rows, minlength=dsf_rows)
    assert len(times) == dsf_rows
    assert times.max() - times.min() <= 1


def test_finished_token_files_are_taken_as_they_are_and_other_rows_written_anew(
    samples, recipe, base_path, tmp_path, monkeypatch
):
    uri, made = str(tmp_path / "tokens"), []
    write = token_rows._Writer.write

    def counted(self, number, pieces):
        made.append(number)
        return write(self, number, pieces)

    monkeypatch.setattr(token_rows._Writer, "write", counted)
    first = write_token_rows(recipe, samples, "raft", prompt_format(), uri)
    assert write_token_rows(recipe, samples, "raft", prompt_format(), uri) == first
    assert made == [0]
    fewer = write_token_rows(recipe_of(base_path, max_tokens=400), samples, "raft", prompt_format(), uri)
    assert made == [0, 0]
    assert fewer.rows < first.rows


def test_a_damaged_token_file_is_refused_by_workers_and_written_anew_by_the_next_run(samples, recipe, tmp_path):
    uri = str(tmp_path / "tokens")
    counts = write_token_rows(recipe, samples, "raft", prompt_format(), uri)
    file = tmp_path / "tokens" / "raft" / "tokens-00000.arrow"
    whole = file.read_bytes()
    for damaged in (whole[:-20] + b"x" + whole[-19:], whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"tokens-00000\.arrow: missing, or not what was written"):
            TokenRows.open(uri)
        assert write_token_rows(recipe, samples, "raft", prompt_format(), uri) == counts
        assert file.read_bytes() == whole
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        TokenRows.open(uri)


def test_an_unfinished_run_leaves_no_token_rows(samples, recipe, tmp_path, monkeypatch):
    def killed(uri, name, data):
        if name == token_files.COMMIT:
            raise KeyboardInterrupt
        token_files.write_file(uri, name, data)

    uri = str(tmp_path / "tokens")
    monkeypatch.setattr(token_rows, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_token_rows(recipe, samples, "raft", prompt_format(), uri)
    with pytest.raises(UserError, match=r"no tokens\.json"):
        TokenRows.open(uri)


class Objects:
    """An object store: whole objects by name, and no folders to create."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    @contextlib.contextmanager
    def open_output_stream(self, name: str) -> Iterator[io.BytesIO]:
        sink = io.BytesIO()
        yield sink
        self.objects[name] = sink.getvalue()

    def open_input_stream(self, name: str) -> pa.BufferReader:
        if name not in self.objects:
            raise FileNotFoundError(name)
        return pa.BufferReader(self.objects[name])


def test_object_stores_hold_the_files_alone_and_readers_leave_no_copy(samples, recipe, base_path, monkeypatch):
    store = Objects()
    monkeypatch.setattr(token_files, "open_filesystem", lambda uri: (store, uri.removeprefix("s3://")))
    counts = write_token_rows(recipe, samples, "raft", prompt_format(), "s3://bucket/work/tokens")
    rows = TokenRows.open("s3://bucket/work/tokens")
    assert [rows[i] for i in range(len(rows))] == expected(base_path, RAFT_SAMPLES)
    assert rows.counts == counts
    assert sorted(store.objects) == ["bucket/work/tokens/raft/tokens-00000.arrow", "bucket/work/tokens/tokens.json"]
    assert list((cache_directory() / "tokens").iterdir()) == []
    with pytest.raises(UserError, match=r"no tokens\.json there"):
        TokenRows.open("s3://bucket/elsewhere")
    del store.objects["bucket/work/tokens/raft/tokens-00000.arrow"]
    with pytest.raises(UserError, match="missing"):
        TokenRows.open("s3://bucket/work/tokens")


def test_a_place_that_cannot_be_written_is_one_line(samples, recipe, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"store\.uri: cannot write .*: ") as refusal:
        write_token_rows(recipe, samples, "raft", prompt_format(), str(tmp_path / "file" / "tokens"))
    assert "\n" not in str(refusal.value)


def test_the_commit_names_every_file_and_its_digest(samples, recipe, tmp_path):
    write_token_rows(recipe, samples, "dsf", prompt_format(), str(tmp_path))
    committed = json.loads((tmp_path / "tokens.json").read_text())
    assert [file["name"] for file in committed["files"]["dsf"]] == ["dsf/tokens-00000.arrow"]
    assert committed["files"]["dsf"][0]["rows"] == DSF
