import json
import shlex
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster.errors import UserError
from serving.answering import finish
from serving.chat_shapes import chat_response
from serving.cli import stay_up
from serving.client import Reply, ask_over_http, curl_line, describe_reply, rate_over_http
from serving.config import ServeConfig
from serving.engine import Completion
from serving.keys import asks_for_keys
from serving.strategies import STRATEGIES
from tests.serving.fakes import CITED, FakeRetriever, prompt_format


def response(text=CITED, strategy="raft"):
    [hits] = FakeRetriever().search(["q"], 2)
    answer = finish(Completion("id", text, "stop", 5, 3), STRATEGIES[strategy], hits, prompt_format())
    return chat_response(answer, f"rayft-{strategy}", 0, prompt_format().texts.labels)


@pytest.fixture
def server():
    """A plain HTTP server that answers what the test puts in `reply` and keeps the request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            state.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.path, state.authorization = self.path, self.headers["Authorization"]
            status, content = state.reply
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *args):
            pass

    class State:
        reply = (200, response())
        body = path = authorization = None
        url = ""

    state = State()
    http = HTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def test_ask_sends_the_question_and_reads_the_answer(server):
    reply = ask_over_http(server.url, "Capital?", "rayft-raft", {"update_frequency": "daily"})
    assert server.body["model"] == "rayft-raft" and server.body["metadata"] == {"update_frequency": "daily"}
    assert server.body["messages"] == [{"role": "user", "content": "Capital?"}]
    assert reply.answer == "Athens" and reply.content.startswith("Athens [1]")
    assert [source["doc_id"] for source in reply.sources] == ["greece"]


def test_ask_sends_the_key_of_the_argument_or_the_environment(server, monkeypatch):
    monkeypatch.delenv("RAYFT_API_KEY", raising=False)
    ask_over_http(server.url, "Capital?")
    assert server.authorization is None
    monkeypatch.setenv("RAYFT_API_KEY", "rk-environment")
    ask_over_http(server.url, "Capital?")
    assert server.authorization == "Bearer rk-environment"
    ask_over_http(server.url, "Capital?", api_key="rk-argument")
    assert server.authorization == "Bearer rk-argument"
    server.reply = (401, {"error": {"message": "an API key is needed"}})
    with pytest.raises(UserError, match=r"answered 401: an API key is needed \(the key is read from RAYFT_API_KEY\)"):
        ask_over_http(server.url, "Capital?")


def test_rate_sends_what_was_said(server):
    rate_over_http(server.url, ask_over_http(server.url, "Capital?").request_id, satisfied=0.0, correction="Athens")
    assert server.path == "/v1/feedback"
    assert server.body == {"request_id": "id", "satisfied": 0.0, "correction": "Athens"}
    server.reply = (404, {"error": {"message": "there is no such answer"}})
    with pytest.raises(UserError, match="answered 404: there is no such answer"):
        rate_over_http(server.url, "other", satisfied=1.0)


def test_ask_refused_question_is_one_line_with_the_servers_words(server):
    server.reply = (400, {"error": {"message": "the prompt has 9000 tokens", "type": "x", "param": None, "code": "y"}})
    with pytest.raises(UserError, match="answered 400: the prompt has 9000 tokens"):
        ask_over_http(server.url, "Capital?")


def test_ask_nobody_listening_says_what_to_run(server):
    with pytest.raises(UserError, match="is `rayft serve` running"):
        ask_over_http("http://127.0.0.1:9", "Capital?", timeout_s=2)


def test_describe_shows_answer_route_quote_and_source():
    body = response()
    text = describe_reply("Capital?", Reply(body["choices"][0]["message"]["content"], body["rayft"], body["usage"]))
    assert "A: Athens\n" in text and "route: raft: asked for" in text
    assert "verified quote: “Athens is the capital.” (https://x.org/gr)" in text


def test_describe_unverified_quote_is_not_shown_as_verified():
    body = response("##begin_quote##Lisbon!##end_quote##<ANSWER>: Lisbon")
    text = describe_reply("Capital?", Reply("", body["rayft"], body["usage"]))
    assert "Lisbon!" not in text and "no verified quote; passages shown were from: Greece, Spain" in text


def test_curl_line_survives_the_shell():
    words = shlex.split(curl_line("http://127.0.0.1:8000", "What's Côte d'Ivoire's \"capital\"? $HOME"))
    assert json.loads(words[-1])["messages"][0]["content"] == "What's Côte d'Ivoire's \"capital\"? $HOME"


def test_curl_line_leaves_the_key_to_the_shell():
    assert '"Authorization: Bearer $RAYFT_API_KEY"' in curl_line("http://127.0.0.1:8000", "x", with_key=True)
    assert "Authorization" not in curl_line("http://127.0.0.1:8000", "x")


@pytest.mark.parametrize(
    ("file", "variable", "asks"),
    [("", "", False), ("", " ,", False), ("keys.json", "", True), ("", "a:" + "0" * 64, True)],
)
def test_served_line_to_try_carries_a_key_where_the_server_wants_one(monkeypatch, capsys, file, variable, asks):
    monkeypatch.setenv("RAYFT_API_KEYS", variable)
    ended = threading.Event()
    ended.set()
    stay_up("http://127.0.0.1:8000", "release/x", ended, with_key=asks_for_keys(ServeConfig(keys=file)))
    said = "".join(capsys.readouterr())
    assert "curl -s http://127.0.0.1:8000" in said and ("$RAYFT_API_KEY" in said) is asks
