import asyncio
import datetime
import email.utils
import time
from types import SimpleNamespace

import httpx
import pytest

from cluster.errors import UserError
from tests.training.teacher_stub import KEY, Answer, good, make_chunk, running, teacher_config
from training.chat_response import read_reply, retry_after
from training.endpoint import Address, EndpointTeacher, NoReplyError, RefusedError
from training.teacher_prompt import QuestionPrompt, load_question_texts


def ask(url, folder, places=(0,), key=KEY, **options):
    """Asks about chunks at the same time; returns the replies, or raises the first fault."""
    config = teacher_config(folder, **options)
    prompt = QuestionPrompt(load_question_texts(config, "en"), config, config.model, 17)

    async def together():
        teacher = EndpointTeacher(config, Address(url, key))
        try:
            requests = [prompt.request(make_chunk(place)) for place in places]
            return await asyncio.gather(*(teacher.ask(request) for request in requests)), dict(teacher.trouble)
        finally:
            await teacher.close()

    return asyncio.run(together())


def after(failures, answer):
    """A script that answers `answer` that often, then well."""
    return lambda place, nth: answer if nth < failures else good(place)


@pytest.mark.parametrize("form", ["seconds", "date", "milliseconds"])
def test_retry_after_is_kept_to(tmp_path, form):
    def header():
        if form == "milliseconds":
            return {"retry-after-ms": "1100"}
        if form == "seconds":
            return {"Retry-After": "1"}
        moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
        return {"Retry-After": email.utils.format_datetime(moment, usegmt=True)}

    with running(lambda place, nth: Answer(429, headers=header()) if nth == 0 else good(place)) as stub:
        began = time.monotonic()
        _, trouble = ask(stub.url, tmp_path, backoff_s=0.01)
        assert 0.95 <= time.monotonic() - began < 3.5
    assert len(stub.seen) == 2
    assert trouble == {"429": 1}


def test_busy_endpoint_is_left_alone_by_all_slots(tmp_path):
    moments = []

    def script(place, nth):
        moments.append(time.monotonic())
        return Answer(429, headers={"Retry-After": "1"}) if place == 0 and nth == 0 else good(place, wait_s=0.1)

    config = teacher_config(tmp_path, backoff_s=0.01)
    prompt = QuestionPrompt(load_question_texts(config, "en"), config, config.model, 17)

    async def second_comes_later(url):
        teacher = EndpointTeacher(config, Address(url, KEY))
        first = asyncio.create_task(teacher.ask(prompt.request(make_chunk(0))))
        await asyncio.sleep(0.3)
        await asyncio.gather(first, teacher.ask(prompt.request(make_chunk(1))))
        await teacher.close()

    with running(script) as stub:
        asyncio.run(second_comes_later(stub.url))
    assert [seen.place for seen in stub.seen].count(1) == 1
    assert moments[1] - moments[0] > 0.95


def test_backoff_grows_and_is_drawn_from_the_seed(tmp_path, monkeypatch):
    waits = []

    async def no_sleep(seconds):
        waits.append(seconds)

    # In this module alone: other loops of the process sleep too.
    monkeypatch.setattr("training.endpoint.asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": no_sleep}))
    runs = []
    with running(lambda place, nth: Answer(500)) as stub:
        for _ in range(2):
            with pytest.raises(NoReplyError, match=r"^500$"):
                ask(stub.url, tmp_path, attempts=9, backoff_s=1, longest_wait_s=10)
            runs.append(waits[:])
            waits.clear()
    assert len(stub.seen) == 18
    assert runs[0] == runs[1]
    reaches = [1, 2, 4, 8, 10, 10, 10, 10]
    assert len(runs[0]) == len(reaches)
    assert all(0 <= wait <= reach for wait, reach in zip(runs[0], reaches, strict=True))
    assert max(runs[0]) > 2  # full jitter over a range that has grown


def test_hang_is_ended_by_the_deadline(tmp_path):
    with running(after(1, Answer(hang=True))) as stub:
        began = time.monotonic()
        _, trouble = ask(stub.url, tmp_path, request_timeout_s=0.5)
        assert time.monotonic() - began < 5
    assert trouble == {"no answer within 0.5 s": 1}


def test_trickling_answer_is_ended_by_the_deadline(tmp_path):
    """httpx's own read timeout begins anew with every byte."""

    class Trickle(httpx.AsyncByteStream):
        async def __aiter__(self):
            for _ in range(100):
                await asyncio.sleep(0.05)
                yield b" "

    class Transport(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            return httpx.Response(200, stream=Trickle())

    config = teacher_config(tmp_path, request_timeout_s=0.3, attempts=1)
    prompt = QuestionPrompt(load_question_texts(config, "en"), config, config.model, 17)

    async def wait():
        teacher = EndpointTeacher(config, Address("http://slow/v1", ""))
        teacher._client = httpx.AsyncClient(transport=Transport(), timeout=None)
        await teacher.ask(prompt.request(make_chunk(0)))

    began = time.monotonic()
    with pytest.raises(NoReplyError, match=r"no answer within 0\.3 s"):
        asyncio.run(wait())
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "check the key in OPENAI_API_KEY"), (403, "may not use it"), (404, "check OPENAI_BASE_URL")],
)
def test_wrong_key_or_model_ends_at_once_without_showing_the_key(tmp_path, status, hint):
    error = {"message": f"Incorrect API key\n provided: {KEY}"}
    with running(lambda place, nth: Answer(status, error=error)) as stub, pytest.raises(UserError) as caught:
        ask(stub.url, tmp_path)
    assert len(stub.seen) == 1
    assert str(status) in str(caught.value)
    assert hint in str(caught.value)
    assert "stub-1" in str(caught.value)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_credit_is_not_asked_again_although_it_is_a_429(tmp_path):
    error = {"message": "You exceeded your current quota", "code": "insufficient_quota"}
    with running(lambda place, nth: Answer(429, error=error)) as stub, pytest.raises(UserError, match="no credit left"):
        ask(stub.url, tmp_path)
    assert len(stub.seen) == 1


def test_wait_of_a_day_ends_the_job(tmp_path):
    with (
        running(lambda place, nth: Answer(429, headers={"Retry-After": "86400"})) as stub,
        pytest.raises(UserError, match=r"asks to wait 86400 s, more than teacher\.longest_wait_s \(5\)"),
    ):
        ask(stub.url, tmp_path)


def test_redirect_is_not_followed_with_the_key(tmp_path):
    moved = Answer(302, headers={"Location": "http://127.0.0.1:9/elsewhere"})
    with running(lambda place, nth: moved) as stub, pytest.raises(UserError, match=r"redirects \(302\)"):
        ask(stub.url, tmp_path)
    assert len(stub.seen) == 1


def test_bad_request_is_refused_for_this_chunk_only(tmp_path):
    with (
        running(lambda place, nth: Answer(400, error={"message": "flagged by our policy"})) as stub,
        pytest.raises(RefusedError, match="400 flagged by our policy"),
    ):
        ask(stub.url, tmp_path)
    assert len(stub.seen) == 1


def test_parameters_that_the_endpoint_does_not_know_are_left_out(tmp_path):
    """Each refusal is told in another way, as endpoints do."""
    refusals = {
        "json_schema": {"message": "response_format type json_schema is not supported"},
        "seed": {"message": "Extra inputs are not permitted: seed"},
        "temperature": {"message": "Only the default is possible", "param": "temperature"},
        "max_tokens": {"message": "Unsupported parameter: 'max_tokens'; use 'max_completion_tokens'"},
    }
    stubs = []

    def script(place, nth):
        body = stubs[0].seen[-1].body
        if body.get("response_format", {}).get("type") == "json_schema":
            return Answer(400, error=refusals["json_schema"])
        wrong = next((name for name in ("seed", "temperature", "max_tokens") if name in body), None)
        return Answer(400, error=refusals[wrong]) if wrong else good(place)

    with running(script) as stub:
        stubs.append(stub)
        replies, trouble = ask(stub.url, tmp_path, attempts=1)
    assert "Town0" in replies[0].text
    last = stub.seen[-1].body
    assert last["response_format"] == {"type": "json_object"}
    assert last["max_completion_tokens"] == 1500
    assert not {"seed", "temperature", "max_tokens"} & set(last)
    assert len(stub.seen) == 5
    assert trouble == {}


def test_error_in_the_body_of_a_200_is_an_error(tmp_path):
    with running(after(1, Answer(200, error={"message": "provider is busy", "code": 429}))) as stub:
        _, trouble = ask(stub.url, tmp_path)
    assert trouble == {"429": 1}


def test_body_that_is_no_chat_completion_is_asked_again(tmp_path):
    for raw in (b"<html>", b"", b"[" * 100_000, b'{"choices": []}', b'{"choices": [{"message": "x"}]}', b"null"):
        with running(after(1, Answer(raw=raw))) as stub:
            replies, trouble = ask(stub.url, tmp_path)
        assert trouble == {"200, but no chat completion in the body": 1}
        assert "Town0" in replies[0].text


def test_endpoint_that_nobody_listens_at_is_named(tmp_path, free_port):
    with pytest.raises(NoReplyError, match="ConnectError"):
        ask(f"http://127.0.0.1:{free_port}/v1", tmp_path, attempts=2)


def test_no_key_sends_no_authorization(tmp_path):
    with running(lambda place, nth: good(place)) as stub:
        ask(stub.url, tmp_path, key="")
    assert stub.seen[0].authorization == ""


def test_reply_reads_parts_refusals_and_missing_usage():
    def reply(message, **more):
        body = {"choices": [{"message": message, "finish_reason": "stop"}], **more}
        return read_reply(httpx.Response(200, json=body))

    assert reply({"content": [{"type": "text", "text": "a"}, {"text": "b"}]}).text == "ab"
    assert reply({"content": None, "refusal": "I cannot"}).finish_reason == "refusal"
    assert reply({"content": "x"}, usage={"prompt_tokens": "many"}).tokens_in == 0
    assert reply({"content": "x"}, usage=None).tokens_out == 0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0.5"}, 0.5),
        ({"Retry-After": "-3"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "9", "retry-after-ms": "250"}, 0.25),
    ],
)
def test_retry_after_forms(headers, seconds):
    assert retry_after(httpx.Response(429, headers=headers)) == seconds


def test_address_comes_from_the_variables_that_the_recipe_names(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_URL", " http://127.0.0.1:9/v1/chat/completions/ ")
    monkeypatch.setenv("MY_KEY", "abc\n")
    config = teacher_config(tmp_path, base_url_env="MY_URL", api_key_env="MY_KEY")
    assert Address.from_environment(config) == Address("http://127.0.0.1:9/v1", "abc")
    without_key = teacher_config(tmp_path, base_url_env="MY_URL", api_key_env="")
    assert Address.from_environment(without_key).key == ""


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        (None, "k", r"teacher\.base_url_env: the environment variable MY_URL is not set"),
        ("ftp://host/v1", "k", r"teacher\.base_url_env: MY_URL holds 'ftp://host/v1'"),
        ("127.0.0.1:9", "k", r"teacher\.base_url_env: MY_URL"),
        ("http://host/v1", None, r"teacher\.api_key_env: the environment variable MY_KEY is not set"),
        ("http://host/v1", "schlüssel", r"teacher\.api_key_env: MY_KEY holds characters"),
    ],
)
def test_unusable_address_or_key_names_the_recipe_key_and_not_the_secret(tmp_path, monkeypatch, url, key, message):
    for name, value in (("MY_URL", url), ("MY_KEY", key)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught:
        Address.from_environment(teacher_config(tmp_path, base_url_env="MY_URL", api_key_env="MY_KEY"))
    assert key is None or len(key) < 3 or key not in str(caught.value)


def test_model_must_be_named(tmp_path):
    with pytest.raises(UserError, match=r"teacher\.model is empty"):
        EndpointTeacher(teacher_config(tmp_path, model=""), Address("http://h/v1", ""))
