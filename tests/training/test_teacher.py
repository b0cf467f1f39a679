import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from retrieval.questions import read_questions
from retrieval.records import Chunk
from tests.training.teacher_stub import (
    Answer,
    chunk_text,
    good,
    make_chunk,
    questions_about,
    rejected,
    run_job,
    running,
    stored,
    teacher_config,
)
from training.asking import LocalTeacher
from training.chat_response import Reply
from training.endpoint import RefusedError
from training.teacher import check_output, choose_chunks, generate_questions
from training.teacher_prompt import load_question_texts

ROOT = Path(__file__).resolve().parents[2]


def test_questions_carry_answers_and_the_place_of_their_quote(tmp_path):
    with running(lambda place, nth: good(place)) as stub:
        outcome = run_job(tmp_path, stub.url, 6)
    questions = read_questions(tmp_path / "questions.jsonl")
    assert len(questions) == outcome.questions == 12
    assert sorted(q.text for q in questions) == sorted(q["question"] for i in range(6) for q in questions_about(i))
    for question in questions:
        place = int(question.metadata["chunk_id"].removeprefix("chunk"))
        golden, chunk = question.golden[0], make_chunk(place)
        assert golden.doc_id == chunk.doc_id
        quoted = chunk.text[golden.start - chunk.start : golden.end - chunk.start]
        assert quoted in chunk_text(place).split("\n")
        assert question.answers[0] in quoted
        assert question.metadata["teacher"] == "stub-1"
        assert question.metadata["kind"] == "fact"
    assert (outcome.asked, outcome.tokens_in, outcome.tokens_out) == (6, 600, 240)


def test_request_carries_key_model_schema_and_both_messages(tmp_path):
    with running(lambda place, nth: good(place)) as stub:
        run_job(tmp_path, stub.url, 1, temperature=0.25, max_tokens=77)
    seen = stub.seen[0]
    assert seen.authorization == "Bearer sk-very-secret"
    assert (seen.body["model"], seen.body["temperature"], seen.body["max_tokens"]) == ("stub-1", 0.25, 77)
    assert [message["role"] for message in seen.body["messages"]] == ["system", "user", "assistant", "user"]
    assert chunk_text(0) in seen.body["messages"][-1]["content"]
    assert "2 fact" in seen.body["messages"][-1]["content"]
    item = seen.body["response_format"]["json_schema"]["schema"]["properties"]["questions"]["items"]
    assert item["required"] == ["kind", "question", "answer", "quote"]


def test_never_more_requests_in_flight_than_the_recipe_allows(tmp_path):
    with running(lambda place, nth: good(place, wait_s=0.03)) as stub:
        run_job(tmp_path, stub.url, 20, concurrency=3)
    assert stub.most_in_flight == 3


def test_second_run_asks_nothing_and_writes_the_same_bytes(tmp_path):
    with running(lambda place, nth: good(place)) as stub:
        run_job(tmp_path, stub.url, 5)
        first = (tmp_path / "questions.jsonl").read_bytes()
        outcome = run_job(tmp_path, stub.url, 5)
    assert len(stub.seen) == 5
    assert outcome.asked == 0
    assert (tmp_path / "questions.jsonl").read_bytes() == first


def test_filters_change_without_paying_and_prompts_do_not(tmp_path):
    with running(lambda place, nth: good(place)) as stub:
        run_job(tmp_path, stub.url, 3)
        run_job(tmp_path, stub.url, 3, near_duplicate=0.5, concurrency=1, attempts=2, input_price=3)
        assert len(stub.seen) == 3
        run_job(tmp_path, stub.url, 3, questions_per_chunk=3)
        assert len(stub.seen) == 6
        run_job(tmp_path, stub.url, 3, model="another")
        assert len(stub.seen) == 9


def trouble(place: int, nth: int) -> Answer:
    """Each seventh chunk meets another kind of trouble the first time."""
    if nth > 0:
        return good(place, wait_s=0.02)
    whole = good(place).content
    return {
        0: Answer(429, headers={"Retry-After": "0"}),
        1: Answer(500, error={"message": "overloaded"}),
        2: Answer(content="Sure! Here are two questions about this nice passage."),
        3: Answer(content=whole[:40], finish_reason="length"),
        4: Answer(hang=True),
        5: Answer(raw=b'{"choices": [{"mess'),
        6: good(place, wait_s=0.02),
    }[place % 7]


PAID_PER_CHUNK = {2: 2, 3: 2}  # unreadable and cut-off replies cost as well, and are asked for once more


def test_busy_failing_hanging_and_garbled_endpoint_still_gives_every_chunk(tmp_path):
    with running(trouble) as stub:
        run_job(tmp_path, stub.url, 21, request_timeout_s=0.4, attempts=8)
    assert len(read_questions(tmp_path / "questions.jsonl")) == 42
    assert rejected(tmp_path) == []
    paid = collections.Counter(stub.paid)
    assert {place: paid[place] for place in range(21)} == {p: PAID_PER_CHUNK.get(p % 7, 1) for p in range(21)}
    assert len(stored(tmp_path)) == len(stub.paid)


def test_killed_runs_repeat_at_most_what_was_in_flight(tmp_path):
    chunks, concurrency = 63, 4
    options = {"chunks": chunks, "concurrency": concurrency, "request_timeout_s": 1.0, "attempts": 20}
    (tmp_path / "job.json").write_text(json.dumps(options))
    kept_at: list[dict[str, int]] = []
    with running(lambda place, nth: _slower(trouble(place, nth))) as stub:
        for kill_after in (8, 25, 45):
            process = start_job(tmp_path, stub.url)
            wait_for(process, lambda least=kill_after: len(stored(tmp_path)) >= least)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            kept_at.append(collections.Counter(row["chunk_id"] for row in stored(tmp_path)))
            asked_before = len(stub.seen)
            if len(kept_at) == 2:  # and the machine failed in the middle of a write
                with (tmp_path / "journal.jsonl").open("ab") as file:
                    file.write(b'{"key": "torn')
        assert start_job(tmp_path, stub.url).wait(timeout=60) == 0
    questions = read_questions(tmp_path / "questions.jsonl")
    assert len(questions) == 2 * chunks
    finished = {
        place for place in range(chunks) if kept_at[-1].get(f"chunk{place}", 0) >= PAID_PER_CHUNK.get(place % 7, 1)
    }
    assert len(finished) > 20
    assert not finished & {seen.place for seen in stub.seen[asked_before:]}, "a stored row was asked for again"
    needed = sum(PAID_PER_CHUNK.get(place % 7, 1) for place in range(chunks))
    repeats = len(stub.paid) - needed
    assert 0 <= repeats <= concurrency * len(kept_at)


def _slower(answer: Answer) -> Answer:
    answer.wait_s += 0.06
    return answer


def start_job(folder: Path, url: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "tests.training.teacher_stub", str(folder), url]
    return subprocess.Popen(
        arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(process, condition, seconds=40.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "the job made no progress"
        time.sleep(0.01)


def test_second_process_on_the_same_journal_is_refused(tmp_path):
    (tmp_path / "job.json").write_text(json.dumps({"chunks": 4}))
    with running(lambda place, nth: good(place, wait_s=1.5)) as stub:
        process = start_job(tmp_path, stub.url)
        wait_for(process, lambda: stub.in_flight > 0)
        with pytest.raises(UserError, match=r"^teacher\.directory: another process is writing .*journal\.jsonl"):
            run_job(tmp_path, stub.url, 4)
        assert process.wait(timeout=60) == 0
    assert len(stub.seen) == 4


def test_one_bad_chunk_is_recorded_and_the_others_go_on(tmp_path):
    def script(place: int, nth: int) -> Answer:
        if place == 2:
            too_long = {
                "message": "maximum context length is 8 tokens; lower max_tokens",
                "code": "context_length_exceeded",
            }
            return Answer(400, error=too_long)
        return Answer(content="I would rather not.", finish_reason="stop") if place == 3 else good(place)

    with running(script) as stub:
        run_job(tmp_path, stub.url, 6)
    assert len(read_questions(tmp_path / "questions.jsonl")) == 8
    by_chunk = {row["chunk_id"]: row["reason"] for row in rejected(tmp_path)}
    assert by_chunk == {
        "chunk2": "the endpoint answers 400 maximum context length is 8 tokens; lower max_tokens",
        "chunk3": "no question in the reply",
    }
    assert collections.Counter(seen.place for seen in stub.seen) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1}


def test_whole_questions_of_a_cut_off_reply_are_kept(tmp_path):
    def script(place: int, nth: int) -> Answer:
        return Answer(content=good(place).content[:-30], finish_reason="length")

    with running(script) as stub:
        run_job(tmp_path, stub.url, 3)
    assert len(stub.seen) == 3
    assert [q.text for q in read_questions(tmp_path / "questions.jsonl")] == [
        questions_about(place)[0]["question"] for place in range(3)
    ]


def test_nothing_that_stands_up_to_the_checks_is_an_error_that_names_the_reasons(tmp_path):
    def script(place: int, nth: int) -> Answer:
        wrong = [{**question, "quote": "The moon is made of cheese."} for question in questions_about(place)]
        return Answer(content=json.dumps(wrong))

    with running(script) as stub, pytest.raises(UserError, match=r"none of 2 chunks .*4 quote is not in the passage"):
        run_job(tmp_path, stub.url, 2)
    assert not (tmp_path / "questions.jsonl").exists()
    assert len(rejected(tmp_path)) == 4


def test_endpoint_that_is_down_ends_the_job_and_keeps_what_was_received(tmp_path):
    with running(lambda place, nth: good(place) if place < 5 else Answer(503)) as stub:
        with pytest.raises(UserError, match=r"10 chunks in a row got no reply .*503.*5 replies are kept"):
            run_job(tmp_path, stub.url, 40, attempts=2, concurrency=1)
        assert len(stub.seen) == 5 + 2 * 10
        stub.script = lambda place, nth: good(place)
        run_job(tmp_path, stub.url, 40)
    assert len(read_questions(tmp_path / "questions.jsonl")) == 80
    assert len(stub.paid) == 40


def test_replies_received_while_the_job_is_being_stopped_are_kept(tmp_path, monkeypatch):
    """A wrong key is found out while another slot's reply waits for its flush."""
    from training.journal import Journal

    append = Journal.append

    def slow_append(self, rows):
        time.sleep(0.3)
        append(self, rows)

    monkeypatch.setattr(Journal, "append", slow_append)

    def script(place: int, nth: int) -> Answer:
        return Answer(401, wait_s=0.2) if place == 3 else good(place, wait_s=0.05 * place)

    with running(script) as stub, pytest.raises(UserError, match="401"):
        run_job(tmp_path, stub.url, 4)
    assert {row["chunk_id"] for row in stored(tmp_path)} == {"chunk0", "chunk1", "chunk2"}


def test_questions_of_a_person_are_not_replaced(tmp_path):
    mine = tmp_path / "questions.jsonl"
    mine.write_text('{"_id": "1", "text": "Mine?", "answers": ["yes"], "golden": ["doc0"]}\n')
    with pytest.raises(UserError, match=r"--out: .*questions\.jsonl:1 is not a generated question"):
        check_output(mine)
    with running(lambda place, nth: good(place)) as stub, pytest.raises(UserError, match="would be lost"):
        run_job(tmp_path, stub.url, 2)
    assert stub.seen == []
    assert "Mine?" in mine.read_text()


def test_prices_give_the_cost(tmp_path):
    with running(lambda place, nth: good(place)) as stub:
        outcome = run_job(tmp_path, stub.url, 10, input_price=2.0, output_price=10.0)
    assert outcome.cost == pytest.approx((1000 * 2.0 + 400 * 10.0) / 1e6)


def test_limit_takes_a_chunk_of_every_document_first(tmp_path):
    with running(lambda place, nth: good(place)) as stub:
        run_job(tmp_path, stub.url, 20, limit=10)  # ten documents of two chunks
    assert sorted(seen.place // 2 for seen in stub.seen) == list(range(10))


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    seed=st.integers(0, 99),
    limits=st.tuples(st.integers(1, 30), st.integers(0, 30)),
)
def test_higher_limit_adds_chunks_and_documents_stay_even(sizes, seed, limits):
    chunks = [
        Chunk(f"{doc}-{place}", str(doc), "", "", f"text {doc} {place}", 0, 10, 2)
        for doc, size in enumerate(sizes)
        for place in range(size)
    ]
    less = choose_chunks(lambda: chunks, limits[0], seed, 1).chunk_ids
    more = choose_chunks(lambda: chunks[::-1], sum(limits), seed, 1).chunk_ids
    assert less <= more
    assert len(less) == min(limits[0], len(chunks))
    taken = collections.Counter(chunk_id.split("-")[0] for chunk_id in less)
    open_documents = [taken[str(doc)] for doc, size in enumerate(sizes) if taken[str(doc)] < size]
    assert not open_documents or max(taken.values()) - min(open_documents) <= 1


def test_short_and_repeated_chunks_are_not_asked_about():
    chunks = [
        Chunk("a", "1", "T", "", "long enough to ask", 0, 18, 4),
        Chunk("b", "2", "T", "", "long enough to ask", 0, 18, 4),
        Chunk("c", "3", "U", "", "long enough to ask", 0, 18, 4),
        Chunk("d", "3", "U", "", "short", 20, 25, 1),
    ]
    chosen = choose_chunks(lambda: chunks, None, 1, 10)
    assert chosen.chunk_ids == {"a", "c"}  # under another title the same text is about something else
    assert chosen.passed_over == {"chunk is too short": 1, "same text as an earlier chunk": 1}


def test_index_of_nothing_but_short_chunks_names_the_key(tmp_path):
    with pytest.raises(UserError, match=r"4 chunk is too short.*teacher\.min_chunk_chars \(100000\)"):
        run_job(tmp_path, "http://127.0.0.1:9/v1", 4, min_chunk_chars=100_000)


def generate_locally(folder, ask, chunks=4, **options):
    config = teacher_config(folder, engine="local", **options)
    return generate_questions(
        config,
        load_question_texts(config, "en"),
        17,
        lambda: map(make_chunk, range(chunks)),
        LocalTeacher("tiny", ask, config.concurrency),
        folder / "journal.jsonl",
        folder / "questions.jsonl",
    )


def test_local_model_is_asked_from_several_threads_and_journaled(tmp_path):
    import threading

    together = threading.Barrier(4, timeout=20)  # passes only when four requests wait at once

    def ask(request):
        together.wait()
        place = next(i for i in range(4) if chunk_text(i) in request.messages[-1]["content"])
        return Reply(good(place).content, "stop", 50, 20)

    outcome = generate_locally(tmp_path, ask)
    assert (outcome.questions, outcome.tokens_in) == (8, 200)
    again = generate_locally(tmp_path, lambda request: pytest.fail("asked again"))
    assert (again.questions, again.asked) == (8, 0)


def test_local_model_refuses_one_chunk(tmp_path):
    def ask(request):
        if chunk_text(1) in request.messages[-1]["content"]:
            raise RefusedError("the prompt has 9000 tokens")
        place = next(i for i in range(4) if chunk_text(i) in request.messages[-1]["content"])
        return Reply(good(place).content)

    assert generate_locally(tmp_path, ask).questions == 6
    assert rejected(tmp_path) == [{"chunk_id": "chunk1", "doc_id": "doc0", "reason": "the prompt has 9000 tokens"}]


def test_duplicates_over_chunks_are_rejected_in_chunk_order_whoever_answers_first(tmp_path):
    asked = ("What did the two brothers from the coast open?", "What did two brothers from the coast open there?")

    def script(place: int, nth: int) -> Answer:
        question = {"question": asked[place], "answer": "The mine", "quote": chunk_text(place).split("\n")[0]}
        return Answer(content=json.dumps([question]), wait_s=0.3 * (1 - place))

    with running(script) as stub:
        run_job(tmp_path, stub.url, 2)
    assert [row["chunk_id"] for row in stored(tmp_path)] == ["chunk1", "chunk0"]
    assert [q.text for q in read_questions(tmp_path / "questions.jsonl")] == [asked[0]]
    (row,) = rejected(tmp_path)
    assert (row["chunk_id"], row["question"], row["reason"]) == ("chunk1", asked[1], "near-duplicate question")


def test_unanswerable_questions_have_no_golden_place(tmp_path):
    asked = {"kind": "unanswerable", "question": "Who owns the mine of Town0 today?", "answer": "", "quote": ""}

    with running(lambda place, nth: Answer(content=json.dumps({"questions": [asked]}))) as stub:
        run_job(tmp_path, stub.url, 1, kinds=("unanswerable",))
    (question,) = read_questions(tmp_path / "questions.jsonl")
    assert (question.answers, question.golden) == ((), ())
    assert question.metadata["answerable"] is False
    assert (question.metadata["chunk_id"], question.metadata["doc_id"]) == ("chunk0", "doc0")
