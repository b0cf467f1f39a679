"""The chat page: its files over HTTP, and what a person sees of it in a headless Chromium over the real API."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import expect, sync_playwright

from retrieval.records import Hit, Passage
from serving import page as page_module
from serving.conversation import Conversation
from serving.interfaces import Caller, Found
from serving.page import mount_page
from serving.records import Answer
from tests.browser import ABSENT, find
from tests.serving.fakes_api import FakeGraph, FakeKeys, Service, serving

QUESTION = "What is the capital of Greece?"
FILES = Path(page_module.__file__).parent / "page"
QUOTE = "Athens is the capital."
# Characters outside the basic plane before the quote: the server counts them as one, JavaScript as two.
GREECE_TEXT = f"🏛️🇬🇷 The Hellenic Republic. {QUOTE} It lies in Attica."
GREECE = Passage("c1", "greece", "Greece", "Government", "https://x.org/gr", GREECE_TEXT, 100, 100 + len(GREECE_TEXT))
SPAIN = Passage("c2", "spain", "Spain", "Government", "javascript:window.hacked=1", "Madrid is the capital.", 7, 29)
CITED = f"##begin_quote##{QUOTE}##end_quote##\n<ANSWER>: Athens, on the sea"
HACK = '<img src="x" onerror="window.hacked=1"><script>window.hacked=1</script>'
COMPARED = ["base", "rag", "finetuned", "raft", "hybrid"]


class PageGraph(FakeGraph):
    """Finds passages of our own."""

    def reset(self):
        self.__init__({"raft": CITED})
        self.passages = (GREECE, SPAIN)

    async def search(self, query, pins):
        self.searches.append(query)
        return Found(tuple(Hit(passage, 1.0 / rank, rank) for rank, passage in enumerate(self.passages, start=1)))


class Cutter:
    """Passes the application on; where `after` is set, a stream goes no further than so many parts: the connection is
    dropped, or (`politely`) the response ends as if it were whole, which is what some proxies make of a dead server."""

    def __init__(self, app):
        self.app, self.after, self.politely = app, None, False

    async def __call__(self, scope, receive, send):
        left = self.after if scope["path"].endswith("/completions") else None

        async def send_some(message):
            nonlocal left
            if left is not None and message["type"] == "http.response.body":
                if left == 0 and self.politely:
                    message = {"type": "http.response.body", "body": b"", "more_body": False}
                elif left == 0:
                    raise ConnectionResetError("cut by the test")
                left -= 1
            if left is None or left >= -1:
                await send(message)

        await self.app(scope, receive, send_some)


def page_service(**parts):
    graph = PageGraph()
    graph.reset()
    service = Service(graph, in_flight=8, **parts)
    mount_page(service.api)
    return service


@pytest.fixture(scope="module")
def service():
    return page_service()


@pytest.fixture(scope="module")
def cutter(service):
    return Cutter(service.api)


@pytest.fixture(scope="module")
def address(cutter):
    with serving(cutter) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    found = find()
    if found is None:
        pytest.skip(ABSENT)
    with sync_playwright() as playwright:
        # No sandbox: CI runs as root, and the only pages opened are our own.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(
            executable_path=found.path, args=arguments, env={**os.environ, **found.env}
        )
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, service, cutter, address):
    """Opens the page; every test ends without an error on the console that it did not expect."""
    service.graph.reset()
    service.feedback.ratings.clear()
    service.quotas.left, cutter.after = 1000, None
    contexts, problems = [], []

    def open_page(url=address, *, width=1280, height=800, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: _note(message, problems))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def _note(message, problems):
    # Statuses and dropped connections are what some tests are about; Chromium logs them by itself.
    if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
        problems.append(message.text)


@pytest.fixture
def page(opened):
    page = opened()
    expect(page.locator("#strategy")).to_be_enabled()
    return page


def ask(page, question=QUESTION, model="rayft-raft"):
    if model:
        page.select_option("#strategy", model)
    page.fill("#question", question)
    page.press("#question", "Enter")


def answered(page, count=1):
    expect(page.locator(".answer.done")).to_have_count(count)
    return page.locator(".answer").last


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(service):
    return TestClient(service.api)


def test_page_is_served_at_the_root_with_headers_that_hold_it_in(files):
    response = files.get("/")
    assert response.status_code == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'" and "unsafe" not in str(policy)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_files_are_revalidated_and_have_their_types(files):
    for name, media_type in (("app.js", "text/javascript"), ("app.css", "text/css"), ("icon.svg", "image/svg+xml")):
        first = files.get(f"/page/{name}")
        assert first.headers["content-type"].startswith(media_type) and first.headers["cache-control"] == "no-cache"
        assert first.content == (FILES / name).read_bytes()
        again = files.get(f"/page/{name}", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
        assert again.status_code == 304 and not again.content
        assert files.get(f"/page/{name}", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", ["/page/page.py", "/page/..%2fpage.py", "/page/%2e%2e/keys.py", "/page/"])
def test_files_of_the_server_are_not_served(files, path):
    response = files.get(path)
    assert response.status_code == 404 and "error" in response.json()


def test_files_name_no_other_host_and_write_no_markup():
    namespace = "http://www.w3.org/2000/svg"
    for path in FILES.iterdir():
        text = path.read_text(encoding="utf-8").replace(namespace, "")
        assert not re.search(r"(https?:)?//[\w-]+\.\w", text.replace("https?:", "")), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path.name
    home = (FILES / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", home)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(scheme):
    css = (FILES / "app.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\n *\}", css, re.S)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#\w{6});", dark))
    pairs = [(ink, paper) for ink in ("ink", "soft", "accent", "bad", "good", "warn") for paper in ("paper", "raised")]
    pairs += [("accent-ink", "accent"), ("accent", "accent-wash"), ("mark-ink", "mark"), ("soft", "sunken")]
    pairs += [("warn", "warn-wash"), ("bad", "bad-wash")]
    for ink, paper in pairs:
        assert _contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    assert _contrast(colours["strong-line"], colours["raised"]) >= 3  # the border of what is typed into


def _contrast(one, other):
    """WCAG 2.2: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


# ---- In a browser ---------------------------------------------------------------------------------------------------


def test_answer_streams_in_piece_by_piece(page, service):
    service.graph.texts["finetuned"] = "<ANSWER>: one two three four five six seven eight nine ten"
    service.graph.delay_s = 0.02
    page.evaluate(
        """() => { window.seen = new Set();
        new MutationObserver(() => window.seen.add(document.querySelector('.answer .text')?.textContent ?? ''))
          .observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
    )
    ask(page, model="rayft-finetuned")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator(".answer .text")).to_contain_text("one two")
    assert "ten" not in page.locator(".answer .text").inner_text()
    answer = answered(page)
    expect(answer.locator(".text")).to_have_text("one two three four five six seven eight nine ten")
    assert len(page.evaluate("[...window.seen]")) > 5
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(page.locator("#send")).to_be_visible()


def test_citation_opens_the_passage_with_the_quote_marked(page):
    ask(page)
    answer = answered(page)
    expect(answer.locator(".text")).to_have_text(re.compile(r"^Athens, on the sea\s*1$"))
    expect(answer.locator(".source")).to_have_text(re.compile("Greece.*" + re.escape(QUOTE), re.S))
    answer.locator(".cite").click()
    panel = page.get_by_role("dialog", name="Greece")
    expect(panel).to_be_visible()
    expect(panel.locator("mark")).to_have_text(QUOTE)
    assert panel.locator("mark").text_content() == QUOTE
    expect(panel.locator(".passage")).to_have_text(GREECE_TEXT)
    start = 100 + GREECE_TEXT.index(QUOTE)
    expect(panel).to_contain_text(f"Characters {start} to {start + len(QUOTE)}")
    link = panel.get_by_role("link", name="https://x.org/gr")
    assert link.get_attribute("href") == "https://x.org/gr" and "noopener" in link.get_attribute("rel")


def test_quote_that_is_in_no_passage_is_no_source(page, service):
    service.graph.texts["raft"] = "##begin_quote##Lisbon is!##end_quote##\n<ANSWER>: Lisbon"
    ask(page)
    answer = answered(page)
    expect(answer.locator(".cite")).to_have_count(0)
    expect(answer.locator(".text")).to_have_text("Lisbon")
    expect(answer.locator(".invented")).to_contain_text("stand in no passage")
    answer.locator(".invented button").click()
    expect(page.locator("#panel")).to_contain_text("stands in none of the passages")
    expect(page.locator("#panel mark")).to_have_count(0)


def test_route_times_tokens_and_release_are_shown(page):
    ask(page, model="rayft-auto")
    answer = answered(page)
    expect(answer.locator("h3")).to_have_text(re.compile(r"^auto → \w+"))
    expect(answer.locator(".route")).to_contain_text(re.compile(r"Route \S+"))
    expect(answer.locator(".hops")).to_contain_text("Generation")
    expect(answer.locator(".hops")).to_contain_text("Total")
    answer.get_by_text("How it was answered").click()
    facts = answer.locator(".how .facts")
    for fact in ("Intent", "Confidence", "Tokens", "First words", "release/test/0123456789abcdef"):
        expect(facts).to_contain_text(fact)
    expect(page.locator("#release")).to_have_text("test 01234567")
    answer.get_by_role("button", name="Spain · Government").click()
    expect(page.locator("#panel .passage")).to_have_text(SPAIN.text)


def test_strategy_that_was_asked_for_is_shown_without_an_intent(page):
    ask(page, model="rayft-raft")
    answer = answered(page)
    answer.get_by_text("How it was answered").click()
    facts = answer.locator(".how .facts")
    expect(facts).to_contain_text("Tokens")
    for guess in ("Intent", "Confidence"):
        expect(facts).not_to_contain_text(guess)


def test_abstention_is_shown_as_one(page, service):
    service.graph.texts["raft"] = "<ANSWER>: The documents do not say."
    ask(page)
    answer = answered(page)
    expect(answer.locator(".abstained")).to_be_visible()
    expect(answer.locator(".sources")).to_have_count(0)


def test_compare_puts_one_question_to_five_strategies_side_by_side(opened, service):
    page = opened(width=1600)
    page.get_by_text("Compare", exact=True).click()
    expect(page.locator("#choices input:checked")).to_have_count(5)
    expect(page.locator("#choices input[value='rayft-auto']")).to_be_disabled()  # five is the most
    assert page.locator("#choices input[value='rayft-embedding']").count() == 0
    ask(page, model=None)
    answered(page, 5)
    cards = page.locator(".answer")
    assert [name.split()[0] for name in cards.locator("h3").all_inner_texts()] == COMPARED
    boxes = [cards.nth(place).bounding_box() for place in range(5)]
    assert len({round(box["y"]) for box in boxes}) == 1 and len({round(box["x"]) for box in boxes}) == 5
    assert page.locator(".asked").count() == 1
    for place, name in enumerate(COMPARED):
        expect(cards.nth(place).locator(".route")).to_be_visible()
        expect(cards.nth(place).locator(".hops")).to_contain_text("Total")
        assert (cards.nth(place).locator(".cite").count() > 0) == (name in ("raft", "hybrid"))
    assert len(service.graph.requests) == 6  # hybrid asks two models
    page.set_viewport_size({"width": 420, "height": 800})
    boxes = [cards.nth(place).bounding_box() for place in range(5)]
    assert len({round(box["x"]) for box in boxes}) == 1 and len({round(box["y"]) for box in boxes}) == 5


def test_compare_without_a_strategy_says_so(opened):
    page = opened()
    page.get_by_text("Compare", exact=True).click()
    for name in COMPARED:
        page.locator("#choices").get_by_text(name, exact=True).click()
    ask(page, model=None)
    expect(page.get_by_text("Choose at least one strategy")).to_be_in_viewport()
    page.locator("#choices").get_by_text("rag", exact=True).click()
    page.press("#question", "Enter")
    answered(page)


def test_compare_shows_the_failure_of_one_beside_the_answers_of_others(opened, service):
    service.graph.texts.pop("finetuned")  # the fake then fails for it; hybrid has its cited answer all the same
    page = opened(width=1600)
    page.get_by_text("Compare", exact=True).click()
    ask(page, model=None)
    expect(page.locator(".answer.done")).to_have_count(4)
    expect(page.locator(".answer.failed")).to_have_count(1)
    expect(page.locator(".answer.failed .problem")).to_contain_text("could not answer (500): internal error")


def test_thumb_and_correction_are_stored(page, service):
    ask(page)
    answer = answered(page)
    answer.get_by_role("button", name="Good answer").click()
    expect(answer.locator(".told")).to_have_text("Thank you: stored")
    expect(answer.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    answer.get_by_role("button", name="Bad answer").click()
    box = answer.get_by_label("What should it have said?")
    expect(box).to_be_focused()
    box.fill("Athens, of course")
    answer.get_by_role("button", name="Send correction").click()
    expect(box).to_be_hidden()
    answer.get_by_role("button", name="Good answer").click()
    expect(answer.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    expect(answer.get_by_role("button", name="Bad answer")).to_have_attribute("aria-pressed", "false")
    stored = [(rating.satisfied, rating.correction) for rating in service.feedback.ratings]
    assert stored == [(1.0, ""), (0.0, ""), (0.0, "Athens, of course"), (1.0, "Athens, of course")]
    [rated] = {rating.request_id for rating in service.feedback.ratings}
    assert rated in service.feedback.noted


def test_feedback_that_is_not_stored_is_said(page, service):
    ask(page)
    answer = answered(page)
    service.feedback.noted.clear()
    answer.get_by_role("button", name="Good answer").click()
    expect(answer.locator(".told")).to_contain_text("Not stored: The request was refused (404)")
    expect(answer.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "false")


def test_stop_frees_the_server_and_says_that_the_answer_is_incomplete(page, service):
    service.graph.texts["finetuned"] = "<ANSWER>: " + "word " * 400
    service.graph.delay_s = 0.02
    ask(page, model="rayft-finetuned")
    expect(page.locator(".answer .text")).to_contain_text("word word")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".answer.failed .note")).to_have_text("Stopped: the answer is incomplete")
    expect(page.locator(".answer .text")).to_contain_text("word word")
    expect(page.locator("#question")).to_be_focused()
    page.wait_for_timeout(50)
    assert _soon(page, lambda: service.graph.cancelled == 1)


def _soon(page, condition):
    for _ in range(100):
        if condition():
            return True
        page.wait_for_timeout(20)
    return False


@pytest.mark.parametrize("politely", [True, False])
def test_stream_without_done_is_called_incomplete(page, cutter, service, politely):
    cutter.after, cutter.politely = 3, politely
    service.graph.delay_s = 0.02
    ask(page, model="rayft-base")
    failed = page.locator(".answer.failed")
    expect(failed.locator(".problem")).to_contain_text("The answer is incomplete")
    cutter.after = None
    failed.get_by_role("button", name="Try again").click()
    expect(answered(page).locator(".text")).to_have_text("Athens of old")


def test_stream_that_breaks_on_the_server_is_called_incomplete(page, service):
    service.graph.breaks_after = 6
    ask(page, model="rayft-base")
    expect(page.locator(".answer.failed .problem")).to_contain_text("The answer is incomplete: the answer broke off")
    expect(page.locator(".answer.failed .text")).to_have_text("Athens")
    expect(page.locator(".actions")).to_have_count(0)


def test_busy_server_says_when_to_try_again(page, service):
    service.quotas.left = 0
    ask(page)
    expect(page.locator(".answer.failed .problem")).to_have_text("The server is busy: the quota is used up")
    again = page.locator(".again")
    expect(again).to_be_disabled()
    expect(again).to_have_text(re.compile(r"Try again in (30|29|28) s"))


def test_refused_request_shows_the_servers_reason(page, service):
    service.graph.error_code = "context_length_exceeded"
    ask(page, model="rayft-base")
    expect(page.locator(".answer.failed .problem")).to_have_text("The request was refused (400): no")


def test_server_that_is_gone_is_said(page, opened):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page)
    expect(page.locator(".answer.failed .problem")).to_have_text("The server cannot be reached")


def test_api_key_is_asked_for_and_kept_in_the_tab_only(opened):
    keyed = page_service(keys=FakeKeys({"rk-right": Caller(tenant="acme", key_id="k1")}))
    with serving(keyed.api) as url:
        page = opened(url)
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_contain_text("asks for an API key")
        dialog.get_by_label("API key").fill("rk-wrong")
        dialog.get_by_label("API key").press("Enter")
        expect(dialog).to_contain_text("did not accept this key")
        dialog.get_by_label("API key").fill("rk-right")
        dialog.get_by_role("button", name="Use this key").click()
        expect(page.locator("#strategy")).to_be_enabled()
        ask(page)
        answered(page)
        stored = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
        assert "rk-right" in stored[0] and stored[1:] == ["{}", ""]
        page.context.pages[0].close()


def test_text_of_documents_and_models_stays_text(page, service):
    text = f"{HACK} {QUOTE}"
    service.graph.passages = (
        Passage("c1", HACK, HACK, HACK, "javascript:window.hacked=1", text, 0, len(text)),
        SPAIN,
    )
    service.graph.texts["raft"] = f"##begin_quote##{text}##end_quote##\n<ANSWER>: {HACK}"
    ask(page, HACK)
    answer = answered(page)
    expect(page.locator(".asked p")).to_have_text(HACK)
    expect(answer.locator(".text")).to_contain_text(HACK)
    answer.locator(".cite").click()
    expect(page.locator("#panel mark")).to_have_text(text)
    expect(page.locator("#panel .facts")).to_contain_text("javascript:window.hacked=1")
    assert page.locator("#panel a").count() == 0
    assert page.locator("main img, main script, #panel img, #panel script").count() == 0
    assert page.evaluate("window.hacked") is None


def test_browser_refuses_markup_that_a_script_would_write(browser, address):
    page = browser.new_page()
    page.goto(address)
    write = (
        "() => { try { document.body.innerHTML = '<b>x</b>'; return 'written' } catch (error) { return error.name } }"
    )
    assert page.evaluate(write) == "TypeError"
    page.close()


def test_later_turns_send_the_conversation_and_show_the_standalone_question(page, service, monkeypatch):
    stream = Conversation.stream

    async def with_standalone(self, asked):
        async for piece in stream(self, asked):
            standalone = "How many people live in Athens?" if asked.history else ""
            yield dataclasses.replace(piece, standalone=standalone) if isinstance(piece, Answer) else piece

    monkeypatch.setattr(Conversation, "stream", with_standalone)
    sent = []
    page.on("request", lambda request: sent.append(request) if "/chat/" in request.url else None)
    ask(page)
    answered(page)
    expect(page.locator(".standalone")).to_be_hidden()
    ask(page, "And how many people live there?")
    answer = answered(page, 2)
    expect(answer.locator(".standalone")).to_have_text("Understood as: How many people live in Athens?")
    messages = json.loads(sent[-1].post_data)["messages"]
    assert messages == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Athens, on the sea"},
        {"role": "user", "content": "And how many people live there?"},
    ]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#question")).to_be_focused()
    ask(page)
    answered(page)
    assert len(json.loads(sent[-1].post_data)["messages"]) == 1


def test_keyboard_alone_asks_opens_and_closes(page):
    page.select_option("#strategy", "rayft-raft")
    page.locator("#question").focus()
    page.keyboard.type("Line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    answer = answered(page)
    expect(page.locator(".asked p")).to_have_text("Line one\nline two")
    expect(page.locator("#question")).to_be_focused()
    while page.evaluate("document.activeElement.className") != "cite":
        page.keyboard.press("Shift+Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus must be seen"
    page.keyboard.press("Enter")
    expect(page.locator("#panel-title")).to_be_focused()
    expect(answer.locator(".cite")).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    expect(answer.locator(".cite")).to_be_focused()


def test_enter_that_chooses_a_word_of_an_input_method_asks_nothing(page):
    page.fill("#question", "雅典")
    page.evaluate(
        """() => document.querySelector('#question').dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"""
    )
    expect(page.locator(".turn")).to_have_count(0)


def test_narrow_screen_scrolls_down_only_and_the_panel_covers_it(opened, service):
    service.graph.texts["raft"] = f"##begin_quote##{QUOTE}##end_quote##\n<ANSWER>: {'Lopadotemachoselacho' * 8}"
    page = opened(width=360, height=640, has_touch=True)
    expect(page.locator("#strategy")).to_be_enabled()
    ask(page)
    answer = answered(page)
    answer.get_by_text("How it was answered").click()
    _fits(page)
    answer.locator(".cite").click()
    panel = page.locator("#panel").bounding_box()
    assert (panel["x"], panel["y"], panel["width"], panel["height"]) == (0, 0, 360, 640)
    assert page.locator("#talk").evaluate("node => node.inert")
    _fits(page)
    page.get_by_role("button", name="Close the passage").click()
    expect(answer.locator(".cite")).to_be_focused()
    page.get_by_text("Compare", exact=True).click()
    ask(page, model=None)
    answered(page, 6)
    _fits(page)


def _fits(page):
    widths = page.evaluate(
        "['html', 'main', '#panel-body'].map(q => { const n = document.querySelector(q);"
        " return n.scrollWidth - n.clientWidth; })"
    )
    assert widths == [0, 0, 0]


def test_chinese_browser_gets_a_chinese_page(opened):
    page = opened(locale="zh-CN")
    expect(page.locator("html")).to_have_attribute("lang", "zh")
    expect(page.get_by_role("button", name="提问")).to_be_visible()
    ask(page)
    expect(answered(page)).to_contain_text("出处")
    both = page.evaluate(
        "import('/page/strings.js').then(m => [Object.entries(m.dictionaries.EN), Object.entries(m.dictionaries.ZH)])"
    )
    english, chinese = map(dict, both)
    assert set(english) == set(chinese)
    for key, words in english.items():
        assert set(re.findall(r"\{\w+\}", words)) == set(re.findall(r"\{\w+\}", chinese[key])), key
