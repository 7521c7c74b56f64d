"""A browser at the page of a real server. Whatever a test does: no console error, no request to another machine."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 20_000  # milliseconds; the machine may be busy
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: the page is not tested")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Web:
    """The page, the server behind it, and what went wrong in the browser."""

    page: Page
    server: Any
    troubles: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)  # for answers, as the page wrote them
    expected: str = r"(?!)"  # console errors that a test causes on purpose

    def open(self) -> "Web":
        self.page.goto(self.server.url)
        expect(self.page.locator("#composer-text")).to_be_visible()
        expect(self.page.locator("#model option")).not_to_have_count(0)
        return self

    @property
    def turns(self) -> Locator:
        return self.page.locator("#turns")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".turn-answer")

    @property
    def stop(self) -> Locator:
        return self.page.locator("#stop")

    def recite(self, *texts: str, **more: object) -> None:
        """From now on the model is made to answer these texts, in turn and then the last again."""
        left = list(texts)

        def handle(route: Route) -> None:
            self.requests.append(route.request.post_data_json)
            guided = {"guided_choice": [left.pop(0) if len(left) > 1 else left[0]]} if left else {}
            body = self.requests[-1] | guided | more
            route.continue_(post_data=json.dumps(body))

        self.page.unroute("**/v1/chat/completions")
        self.page.route("**/v1/chat/completions", handle)

    def recite_on(self) -> None:
        """From now on the model is made to answer in small words that do not end."""
        self.recite(guided_regex="([a-z]{3} ){6000}", max_tokens=6000)

    def type(self, text: str) -> None:
        self.page.locator("#composer-text").fill(text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> Locator:
        """Ask, and wait until the answer is whole; gives the answer."""
        answer = self.answers.nth(self.answers.count())
        self.type(text)
        expect(answer.locator(".turn-foot .turn-actions")).to_be_visible()
        return answer

    def sent(self, act: Callable[[], object]) -> dict[str, Any]:
        """The request for an answer that an act leads to, as the page wrote it; the model must recite."""
        with self.page.expect_request("**/v1/chat/completions"):
            act()
        return self.requests[-1]

    def log_line(self, request_id: str) -> str:
        """What the server noted of a request once it was over."""
        deadline = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < deadline:
            for line in self.server.log.read_text().splitlines():
                if f"id={request_id}" in line:
                    return str(line)
            self.page.evaluate("new Promise(requestAnimationFrame)")
        return pytest.fail(f"the server noted no end of request {request_id}")


@pytest.fixture
def visit(browser: Browser, server: Any) -> Iterator[Callable[..., Web]]:
    """visit(color_scheme="dark", viewport=...): a page in a browser profile of its own; another server is `at`."""
    opened: list[Web] = []

    def visit(at: Any = None, **options: Any) -> Web:
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1200, "height": 800}} | options)
        context.set_default_timeout(PATIENCE)
        web = Web(context.new_page(), at or server)
        _watch(web)
        opened.append(web)
        return web

    yield visit
    for web in opened:
        web.page.context.close()
        assert [one for one in web.troubles if not re.search(web.expected, one)] == []


@pytest.fixture
def web(visit: Callable[..., Web]) -> Web:
    return visit().open()


def _watch(web: Web) -> None:
    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            web.troubles.append(message.text)

    def request(request: Request) -> None:
        if not request.url.startswith((web.server.url, "blob:", "data:")):
            web.troubles.append(f"request to {request.url}")

    context = web.page.context
    context.on("console", console)
    context.on("weberror", lambda error: web.troubles.append(str(error.error)))
    context.on("request", request)
    context.on("dialog", lambda dialog: (web.troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
