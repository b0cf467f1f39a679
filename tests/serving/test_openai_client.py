"""The official client against a real HTTP server, as its users write it."""

import asyncio

import openai
import pytest

from serving.interfaces import Caller
from tests.serving.fakes_api import USER, FakeGraph, FakeKeys, FakeQuotas, Service, serving

KEY = "rk-test"


@pytest.fixture(scope="module")
def server():
    service = Service(FakeGraph(), keys=FakeKeys({KEY: Caller("acme", "k1", strategies=("raft", "rag", "base"))}))
    with serving(service.api) as url:
        yield f"{url}/v1"


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server, api_key=KEY, max_retries=0) as client:
        yield client


def test_chat_with_annotations_and_details(client):
    completion = client.chat.completions.create(
        model="rayft-raft",
        messages=USER,
        temperature=0,
        max_tokens=50,
        seed=1,
        stop=["\n\n"],
        user="ann",
        metadata={"team": "blue"},
        extra_body={"rayft": {"filter": {"doc_id": "greece"}}},
    )
    message = completion.choices[0].message
    assert message.content.startswith("Athens [1]")
    [annotation] = message.annotations
    cited = annotation.url_citation
    assert cited.title == "Greece" and message.content[cited.start_index : cited.end_index] == "[1]"
    assert completion.usage.total_tokens == 18
    assert completion.rayft["strategy"] == "raft" and len(completion.rayft["hits"]) == 1


def test_chat_answer_may_be_sent_back_as_history(client):
    first = client.chat.completions.create(model="rayft-raft", messages=USER)
    history = [*USER, first.choices[0].message, {"role": "user", "content": "And its population?"}]
    assert client.chat.completions.create(model="rayft-raft", messages=history).choices[0].message.content


def test_chat_streams(client):
    stream = client.chat.completions.create(
        model="rayft-raft", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.startswith("Athens [1]") and chunks[-1].usage.completion_tokens == 7
    assert chunks[-2].rayft["citations"][0]["verified"] and chunks[-2].choices[0].delta.annotations


def test_chat_helper_stream_accumulates(client):
    with client.chat.completions.stream(model="rayft-raft", messages=USER) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content.startswith("Athens [1]")


def test_completions(client):
    assert client.completions.create(model="rayft-base", prompt="Capital?").choices[0].text.startswith("Athens of old")
    chunks = list(client.completions.create(model="rayft-base", prompt="Capital?", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks).startswith("Athens of old")


def test_embeddings_arrive_alike_in_both_encodings(client):
    packed = client.embeddings.create(model="rayft-embedding", input=["a b", "c"])  # the client asks for base64
    plain = client.embeddings.create(model="rayft-embedding", input=["a b", "c"], encoding_format="float")
    assert [row.embedding for row in packed.data] == [row.embedding for row in plain.data]
    assert [row.index for row in packed.data] == [0, 1] and packed.data[1].embedding == [3.0, 4.0, 5.0]
    assert packed.usage.prompt_tokens == 7
    assert len(client.embeddings.create(model="rayft-embedding", input="one").data) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input": [1, 2]}, "text only"),
        ({"input": [[1], [2]]}, "text only"),
        ({"input": []}, "1 to 256"),
        ({"input": ["a", " "]}, "empty"),
        ({"input": ["a"] * 257}, "1 to 256"),
        ({"input": ["a", "word " * 40]}, "input.1: the text has 42 tokens, and the encoder reads 16"),
        ({"input": "x", "dimensions": 2}, "dimensions"),
    ],
)
def test_embeddings_refuse_what_would_be_cut_or_ignored(client, given, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.embeddings.create(model="rayft-embedding", **given)


def test_models(client):
    assert [model.id for model in client.models.list()][:1] == ["rayft-base"]
    assert client.models.retrieve("rayft-raft").owned_by == "rayft"


def test_raw_response_shows_the_headers(client):
    raw = client.chat.completions.with_raw_response.create(model="rayft-base", messages=USER)
    assert raw.headers["x-rayft-release"] == "release/test/0123456789abcdef"
    assert raw.request_id == raw.headers["x-request-id"] and raw.parse().choices[0].finish_reason == "stop"
    with client.chat.completions.with_streaming_response.create(model="rayft-base", messages=USER) as streamed:
        assert streamed.status_code == 200 and streamed.parse().model == "rayft-base"


def test_errors_are_its_own_exceptions(client, server):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=USER)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="rayft-raft", messages=[])
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="rayft-raft", messages=USER, tools=[{"type": "function"}])
    with pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.create(model="rayft-finetuned", messages=USER)
    stranger = openai.OpenAI(base_url=server, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.parametrize(
    ("service", "error"),
    [
        (Service(FakeGraph(first_s=9), timeout_s=0.1), openai.InternalServerError),
        (Service(quotas=FakeQuotas(requests=0)), openai.RateLimitError),
        (Service(draining=lambda: True), openai.InternalServerError),
        (Service(FakeGraph(error_code="context_length_exceeded")), openai.BadRequestError),
        (Service(max_body_bytes=20), openai.APIStatusError),
    ],
)
def test_failures_are_its_own_exceptions(service, error):
    with serving(service.api) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(error):
            client.chat.completions.create(model="rayft-base", messages=USER)
        with pytest.raises(error):
            client.chat.completions.create(model="rayft-base", messages=USER, stream=True)


def test_deadline_is_not_tried_again():
    """Two more tries of what took too long would treble the load of a server that is too slow already."""
    service = Service(FakeGraph(first_s=9), timeout_s=0.1)
    with serving(service.api) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=2)
        with client, pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="rayft-base", messages=USER)
    assert len(service.graph.requests) == 1


def test_stream_that_breaks_raises_instead_of_ending_short():
    service = Service(FakeGraph(breaks_after=5))
    with serving(service.api) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(model="rayft-base", messages=USER, stream=True)
        with pytest.raises(openai.APIError, match="broke off"):
            list(stream)


def test_client_waits_as_long_as_it_is_told():
    """429 and its Retry-After are the client's own cue to try again."""
    service = Service(FakeGraph(delay_s=0.02), in_flight=1)

    async def both(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=2) as client:
            asks = [client.chat.completions.create(model="rayft-base", messages=USER) for _ in range(2)]
            return await asyncio.gather(*asks)

    with serving(service.api) as url:
        answers = asyncio.run(both(url))
    assert len(answers) == 2 and "refused" in service.observer.events


def test_async_client(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=server, api_key=KEY, max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="rayft-raft", messages=USER) for _ in range(3))
            )
            stream = await client.chat.completions.create(model="rayft-raft", messages=USER, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            vectors = await client.embeddings.create(model="rayft-embedding", input="x")
            return answers, "".join(pieces), vectors

    answers, text, vectors = asyncio.run(run())
    assert {answer.choices[0].message.content for answer in answers} == {text}
    assert len({answer.id for answer in answers}) == 3 and vectors.data[0].embedding == [0.0, 1.0, 2.0]
