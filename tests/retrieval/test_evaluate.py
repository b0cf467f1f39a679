import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.recipe import load_recipe
from cluster.stage import Outcome, Plan, run_stage
from cluster.store import Artifact, Attempt, Store
from retrieval import evaluate as module
from retrieval.cli import index_app
from retrieval.config import RetrievalRecipe
from retrieval.evaluate import MODES, evaluate_retrieval, read_retrieval_report
from retrieval.evaluate_cli import parse_ks, parse_modes
from retrieval.evaluate_view import render_text
from retrieval.judged import choose_questions, read_judged
from retrieval.records import Golden, Hit, Passage, Question
from tests.retrieval.tiny import tiny_recipe

DOCUMENTS = [f"d{number:02d}" for number in range(30)]
KINDS = ("capital", "area")
QUESTIONS = [
    Question(f"q{number}", f"{number}", golden=(Golden(DOCUMENTS[number]),), metadata={"kind": KINDS[number % 2]})
    for number in range(20)
]


class RankedSearch:
    """Finds the golden document of question number n at rank `ranks[n]`; counts its calls."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks
        self.calls: list[tuple[int, int]] = []

    def __call__(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.calls.append((len(queries), k))
        return [self._hits(int(query), k) for query in queries]

    def _hits(self, number: int, k: int) -> list[Hit]:
        order = [document for document in DOCUMENTS if document != DOCUMENTS[number]]
        order.insert(self.ranks[number] - 1, DOCUMENTS[number])
        return [Hit(Passage(name, name, "", "", "", "x", 0, 1), 1.0, rank) for rank, name in enumerate(order[:k], 1)]


DENSE = [1, 2, 6, 1, 12, 1, 3, 1, 1, 9, 1, 1, 2, 1, 1, 7, 1, 4, 1, 1]
HYBRID = [max(1, rank - 1) for rank in DENSE]


@pytest.fixture
def index(store: Store) -> Artifact:
    def build(attempt: Attempt) -> Outcome:
        (attempt.directory / "index.json").write_text("{}")
        return Outcome({"chunks": len(DOCUMENTS)}, {"encoder": "tiny"})

    return run_stage(store, Plan("index", "tiny", inputs={"corpus": "1"}), build)


@pytest.fixture
def recipe(store: Store) -> RetrievalRecipe:
    return RetrievalRecipe.model_validate({"name": "tiny", "seed": 7, "store": {"uri": store.uri}})


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> dict[str, RankedSearch]:
    found = {"dense": RankedSearch(DENSE), "hybrid": RankedSearch(HYBRID)}
    left_out = {"reranked": "search.rerank names no cross-encoder"}
    monkeypatch.setattr(module, "open_searches", lambda *_: (found, left_out, len(DOCUMENTS), DOCUMENTS.__contains__))
    return found


def test_report_holds_the_means_by_hand_with_intervals_and_paired_differences(
    store: Store, recipe: RetrievalRecipe, index: Artifact, searches: dict[str, RankedSearch]
) -> None:
    report = read_retrieval_report(evaluate_retrieval(recipe, store, index, choose_questions(QUESTIONS), ks=(1, 5)))
    for mode, ranks in (("dense", DENSE), ("hybrid", HYBRID)):
        measured = report["modes"][mode]
        assert measured["recall@1"]["value"] == pytest.approx(sum(rank == 1 for rank in ranks) / 20)
        assert measured["recall@5"]["value"] == pytest.approx(sum(rank <= 5 for rank in ranks) / 20)
        assert measured["MRR@10"]["value"] == pytest.approx(sum(1 / r for r in ranks if r <= 10) / 20, abs=1e-6)
        assert measured["MAP@30"]["value"] == pytest.approx(sum(1 / rank for rank in ranks) / 20, abs=1e-6)
        assert measured["recall@5"]["low"] < measured["recall@5"]["value"] < measured["recall@5"]["high"]
    gain = report["differences"]["hybrid"]["recall@1"]
    assert gain["value"] == pytest.approx((HYBRID.count(1) - DENSE.count(1)) / 20)
    assert gain["low"] >= 0  # no question is worse, so neither is any resample
    assert report["reference"] == "dense"
    assert report["ranked"] == "documents"
    assert report["latency_ms"]["dense"]["n"] == 20
    assert {kind: row["n"] for kind, row in report["kinds"].items()} == {"area": 10, "capital": 10}
    by_kind = [report["kinds"][kind]["modes"]["dense"]["recall@1"]["value"] for kind in ("capital", "area")]
    assert by_kind == [DENSE[0::2].count(1) / 10, DENSE[1::2].count(1) / 10]


def test_report_files_are_published_and_the_second_run_searches_nothing(
    store: Store, recipe: RetrievalRecipe, index: Artifact, searches: dict[str, RankedSearch]
) -> None:
    judged = choose_questions(QUESTIONS)
    report = evaluate_retrieval(recipe, store, index, judged)
    assert report.ref.kind == "report"
    assert report.ref.name == "tiny-retrieval"
    assert report.manifest.parents == {"index": str(index.ref)}
    assert report.path("retrieval.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in report.path("ranks.jsonl").read_text().splitlines()]
    assert [row["ranks"] for row in rows] == [
        {"dense": dense, "hybrid": hybrid} for dense, hybrid in zip(DENSE, HYBRID, strict=True)
    ]
    calls = len(searches["dense"].calls)
    assert evaluate_retrieval(recipe, store, index, judged).ref == report.ref
    assert len(searches["dense"].calls) == calls
    fewer = choose_questions(QUESTIONS[1:])
    assert evaluate_retrieval(recipe, store, index, fewer).ref != report.ref


def test_tables_show_each_mode_the_differences_the_kinds_and_what_is_left_out(
    store: Store, recipe: RetrievalRecipe, index: Artifact, searches: dict[str, RankedSearch]
) -> None:
    judged = choose_questions([*QUESTIONS, Question("lost", "?")])
    text = render_text(read_retrieval_report(evaluate_retrieval(recipe, store, index, judged)))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "20 questions" in text
    assert "left out because they name no golden place: 1" in " ".join(text.split())
    assert "hybrid − dense" in text
    assert f"recall@1 {DENSE.count(1) / 20:.3f}" in " ".join(text.split())
    assert "reranked is left out: search.rerank names no cross-encoder" in text
    assert "recall@5 by kind of question" in text


def test_more_than_the_index_holds_is_refused(
    store: Store, recipe: RetrievalRecipe, index: Artifact, searches: dict[str, RankedSearch]
) -> None:
    with pytest.raises(UserError, match=r"^--k: 31 is more than the 30 passages"):
        evaluate_retrieval(recipe, store, index, choose_questions(QUESTIONS), ks=(1, 31))


def test_golden_documents_that_the_index_lacks_are_told_and_none_at_all_is_refused(
    store: Store,
    recipe: RetrievalRecipe,
    index: Artifact,
    searches: dict[str, RankedSearch],
    capsys: pytest.CaptureFixture[str],
) -> None:
    elsewhere = [Question(f"x{number}", f"{number}", golden=(Golden(f"other-{number}"),)) for number in range(3)]
    judged = choose_questions([*QUESTIONS, *elsewhere])
    report = read_retrieval_report(evaluate_retrieval(recipe, store, index, judged))
    assert "no golden document of 3 of 23 questions is in index/tiny/" in capsys.readouterr().out
    assert report["questions"]["golden_missing"] == 3
    assert "no golden document is in the index: 3" in " ".join(render_text(report).split())
    with pytest.raises(
        UserError, match=r"holds none of the golden documents of 3 questions \(the first is 'other-0'\)"
    ):
        evaluate_retrieval(recipe, store, index, choose_questions(elsewhere))


def test_without_depths_a_small_index_is_measured_at_those_it_can_fill(
    store: Store,
    recipe: RetrievalRecipe,
    index: Artifact,
    searches: dict[str, RankedSearch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "open_searches", lambda *_: (searches, {}, 4, DOCUMENTS.__contains__))
    report = read_retrieval_report(evaluate_retrieval(recipe, store, index, choose_questions(QUESTIONS)))
    assert report["settings"]["k"] == [1, 3]


def test_questions_of_training_are_left_out_unless_named() -> None:
    splits = ["train", "valid", "test_new_documents", ""]
    questions = [dataclasses.replace(q, split=splits[place % 4]) for place, q in enumerate(QUESTIONS)]
    assert {q.split for q in choose_questions(questions).questions} == {"test_new_documents", ""}
    assert {q.split for q in choose_questions(questions, ["train"]).questions} == {"train"}
    trained = [dataclasses.replace(q, split="train") for q in QUESTIONS]
    assert len(choose_questions(trained).questions) == len(QUESTIONS)
    with pytest.raises(UserError, match=r"^--split: questions\.path has no split 'tset'; it has train, valid"):
        choose_questions(questions, ["tset"])


def test_questions_without_golden_or_with_grade_zero_are_counted_and_left_out() -> None:
    grades = {"q0": {DOCUMENTS[0]: 0}}
    judged = choose_questions([*QUESTIONS, Question("lost", "?")], grades=grades)
    assert judged.without_golden == 2
    assert len(judged.questions) == 19
    with pytest.raises(UserError, match=r"^--questions: none of 1 questions names a golden document"):
        choose_questions([Question("lost", "?")], key="--questions")


def test_digest_follows_text_golden_and_grades() -> None:
    judged = choose_questions(QUESTIONS)
    changed = [dataclasses.replace(QUESTIONS[0], text="other"), *QUESTIONS[1:]]
    moved = [dataclasses.replace(QUESTIONS[0], golden=(Golden("d05"),)), *QUESTIONS[1:]]
    graded = choose_questions(QUESTIONS, grades={"q0": {"d00": 2}})
    digests = {judged.digest, choose_questions(changed).digest, choose_questions(moved).digest, graded.digest}
    assert len(digests) == 4
    assert choose_questions(list(QUESTIONS)).digest == judged.digest


@pytest.mark.parametrize(
    ("call", "text", "message"),
    [
        (parse_modes, "dense,fuzzy", r"^--modes: expected some of dense, lexical, hybrid, reranked, got 'fuzzy'"),
        (parse_modes, ",", r"^--modes: .* got nothing"),
        (parse_ks, "1,x", r"^--k: expected whole numbers from 1"),
        (parse_ks, "0,5", r"^--k: expected whole numbers from 1"),
    ],
)
def test_bad_options_are_refused_by_name(call: object, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(text)  # type: ignore[operator]


def test_options_are_sorted_and_told_once() -> None:
    assert parse_modes("hybrid, dense") == ("dense", "hybrid")
    assert parse_ks("10,1,1") == (1, 10)
    assert parse_modes(",".join(MODES)) == MODES


def write_beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": question.question_id, "text": question.text} for question in QUESTIONS]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judgements = [("q0", "d00", 2), ("q0", "d05", 1), ("q0", "d06", 0), ("q1", "d01", 1), ("q2", "d02", 0)]
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in judgements)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", ["", "queries.jsonl"])
def test_beir_folder_gives_graded_questions_and_counts_those_without_relevant_documents(
    tmp_path: Path, name: str
) -> None:
    judged = read_judged(str(write_beir(tmp_path / "beir") / name), [], "--questions")
    assert [question.question_id for question in judged.questions] == ["q0", "q1"]
    assert judged.without_golden == 1
    assert judged.grades is not None
    assert judged.grades["q0"] == {"d00": 2, "d05": 1, "d06": 0}


def test_beir_split_that_is_not_there_and_two_splits_are_refused(tmp_path: Path) -> None:
    folder = str(write_beir(tmp_path / "beir"))
    with pytest.raises(UserError, match=r"^--questions: .*dev\.tsv does not exist"):
        read_judged(folder, ["dev"], "--questions")
    with pytest.raises(UserError, match=r"^--split: --questions is a BEIR data set: name one qrels file"):
        read_judged(folder, ["dev", "test"], "--questions")


def test_grades_reach_ndcg(
    tmp_path: Path, store: Store, recipe: RetrievalRecipe, index: Artifact, searches: dict[str, RankedSearch]
) -> None:
    judged = read_judged(str(write_beir(tmp_path / "beir")), [], "--questions")
    report = read_retrieval_report(evaluate_retrieval(recipe, store, index, judged, ks=(1,)))
    # dense: q0 finds d00 (grade 2) first and d05 (grade 1) sixth, q1 finds d01 second
    first = (2 + 1 / math.log2(7)) / (2 + 1 / math.log2(3))
    assert report["modes"]["dense"]["nDCG@10"]["value"] == pytest.approx((first + 1 / math.log2(3)) / 2, abs=1e-6)


def write_recipe(folder: Path, corpus: Path, encoder: Path, **search: object) -> Path:
    sections = tiny_recipe(folder, corpus, encoder).model_dump(mode="json")
    sections["search"] |= search
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return file


def index_commands() -> typer.Typer:
    app = typer.Typer()
    app.add_typer(index_app(lambda path, overrides: load_recipe(path, overrides, RetrievalRecipe)), name="index")
    return app


def write_span_questions(path: Path, corpus: Path) -> Path:
    rows = []
    for document in map(json.loads, corpus.read_text(encoding="utf-8").splitlines()):
        start = document["text"].index("total:")
        golden = {"doc_id": document["_id"], "start": start, "end": document["text"].index("sq km")}
        rows.append({"_id": document["_id"], "text": f"area of {document['title']}", "golden": [golden]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_index_evaluate_scores_what_the_index_can_serve_and_says_what_it_cannot(
    tmp_path: Path, corpus_path: Path, encoder_path: Path
) -> None:
    recipe = write_recipe(tmp_path, corpus_path, encoder_path)
    questions = write_span_questions(tmp_path / "questions.jsonl", corpus_path)
    runner, app = CliRunner(), index_commands()
    runner.invoke(app, ["index", "build", str(recipe)], catch_exceptions=False)
    command = ["index", "evaluate", str(recipe), "--questions", str(questions), "--k", "1,5"]
    done = runner.invoke(app, command, catch_exceptions=False)
    told = " ".join(done.stdout.split())
    assert "dense lexical hybrid" in told
    assert "8 questions" in told
    assert "Ranked: passages" in told
    assert "reranked is left out: search.rerank names no cross-encoder" in told
    report = Store(str(tmp_path / "store")).open("report", "tiny-retrieval")
    for name in ("retrieval.json", "retrieval.png", "ranks.jsonl"):
        assert str(report.path(name)) in done.stdout.replace("\n", "")
    # BM25 finds the one passage that holds both words of each question
    assert read_retrieval_report(report)["modes"]["lexical"]["recall@1"]["value"] == 1
    with pytest.raises(UserError, match=r"^--modes: reranked cannot be evaluated: search\.rerank names no"):
        runner.invoke(app, [*command, "--modes", "reranked"], catch_exceptions=False)
    with pytest.raises(UserError, match=r"^questions\.path is empty"):
        runner.invoke(app, ["index", "evaluate", str(recipe)], catch_exceptions=False)


def test_index_evaluate_lexical_index_leaves_dense_out(tmp_path: Path, corpus_path: Path, encoder_path: Path) -> None:
    recipe = write_recipe(tmp_path, corpus_path, encoder_path, mode="lexical")
    questions = write_span_questions(tmp_path / "questions.jsonl", corpus_path)
    runner, app = CliRunner(), index_commands()
    runner.invoke(app, ["index", "build", str(recipe)], catch_exceptions=False)
    done = runner.invoke(app, ["index", "evaluate", str(recipe), "--questions", str(questions)], catch_exceptions=False)
    assert "dense is left out:" in done.stdout
    assert "hybrid is left out:" in done.stdout
    report = read_retrieval_report(Store(str(tmp_path / "store")).open("report", "tiny-retrieval"))
    assert list(report["modes"]) == ["lexical"]
    assert report["differences"] == {}


def test_reranked_hits_come_before_the_first_searchs_other_hits() -> None:
    reranked, plain = RankedSearch([1] * 20), RankedSearch([9] * 20)
    both = module._Reranked(reranked, plain, 4)
    hits = both(["3"], 10)[0]
    assert [hit.passage.doc_id for hit in hits] == [
        "d03",
        "d00",
        "d01",
        "d02",
        "d04",
        "d05",
        "d06",
        "d07",
        "d08",
        "d09",
    ]
    assert reranked.calls == [(1, 4)]
    assert [hit.passage.doc_id for hit in both(["3"], 3)[0]] == ["d03", "d00", "d01"]
    assert plain.calls == [(1, 10)]
