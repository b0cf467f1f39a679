"""A picture of the chat page of a running `rayft serve`, for the documentation.

`python -m tests.page_screenshot URL QUESTION OUT.png [--compare] [--dark] [--model rayft-raft]`: asks the
question, waits for the answers, opens the first citation, and writes the picture.
"""

import argparse
import os

from playwright.sync_api import Page, expect, sync_playwright

from tests.browser import ABSENT, find

ANSWER_S = 300


def main() -> None:
    """Asks, waits and takes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("question")
    parser.add_argument("out")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--model", default="rayft-raft")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    options = parser.parse_args()
    browser = find()
    if browser is None:
        parser.exit(2, ABSENT + "\n")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser.path, args=["--no-sandbox"], env={**os.environ, **browser.env}
        )
        page = chromium.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
        )
        page.goto(options.url)
        expect(page.locator("#choices input")).not_to_have_count(0)
        ask(page, options.question, options.model, options.compare)
        page.screenshot(path=options.out)
        chromium.close()


def ask(page: Page, question: str, model: str, compare: bool) -> None:
    """Asks `question` and waits for all answers; opens the first citation where one strategy was asked."""
    if compare:
        page.get_by_text("Compare", exact=True).click()
    else:
        page.select_option("#strategy", model)
    page.fill("#question", question)
    page.press("#question", "Enter")
    expect(page.locator(".answer").first).to_be_visible()
    expect(page.locator(".answer[aria-busy=true]")).to_have_count(0, timeout=ANSWER_S * 1000)
    if not compare and page.locator(".cite").count():
        page.locator(".how summary").click()
        page.locator(".cite").first.click()
    page.wait_for_timeout(200)


if __name__ == "__main__":
    main()
