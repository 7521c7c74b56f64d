"""What the page does when the server says no, not now, or nothing."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Route, expect

FAILED = "Failed to load resource"


def fulfil(web: Any, *statuses: int, headers: dict[str, str] | None = None) -> None:
    """The next answers have these statuses; after them the real server answers."""
    left = list(statuses)

    def handle(route: Route) -> None:
        if not left:
            route.continue_()
            return
        error = {"error": {"message": "Too much to do.", "type": "server_error", "param": None, "code": None}}
        route.fulfill(status=left.pop(0), headers=headers or {}, body=json.dumps(error))

    web.expected = FAILED
    web.page.route("**/v1/chat/completions", handle)


def test_a_busy_server_is_asked_again_when_it_said(web: Any) -> None:
    fulfil(web, 503, 503, headers={"Retry-After": "1"})
    web.type("Hello")
    expect(web.page.get_by_role("alert")).to_contain_text("The server is busy. Too much to do.")
    expect(web.page.get_by_role("alert")).to_contain_text("Trying again in")
    expect(web.answers.locator(".turn-foot .turn-actions")).to_be_visible()
    expect(web.page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize(("status", "said"), [(400, "refused: Too much"), (500, "failed: Too much"), (429, "refused")])
def test_a_refusal_is_shown_with_a_way_on(web: Any, status: int, said: str) -> None:
    fulfil(web, status)
    web.type("Hello")
    expect(web.page.get_by_role("alert")).to_contain_text(said)
    expect(web.page.locator(".turn-user .bubble")).to_have_text("Hello")
    web.page.get_by_role("button", name="Try again").click()
    expect(web.answers.locator(".turn-foot .turn-actions")).to_be_visible()


def test_a_server_that_is_gone_is_named_and_the_question_survives_a_reload(web: Any) -> None:
    web.expected = FAILED
    web.page.route("**/v1/chat/completions", lambda route: route.abort())
    web.type("Are you there?")
    expect(web.page.get_by_role("alert")).to_contain_text("does not answer")
    web.page.reload()
    expect(web.page.locator(".problem")).to_contain_text("Not answered yet.")
    web.page.unroute("**/v1/chat/completions")
    web.recite("Yes.")
    web.page.get_by_role("button", name="Try again").click()
    expect(web.answers.locator(".prose")).to_have_text("Yes.")


def test_an_error_in_the_middle_keeps_what_came_and_asks_anew(web: Any) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "Half an ans"}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\r\n\r\ndata: {json.dumps({'error': {'message': 'Lost.'}})}\r\n\r\n"
    web.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    web.type("Hello")
    expect(web.page.get_by_role("alert")).to_contain_text("failed: Lost.")
    expect(web.answers.locator(".prose")).to_have_text("Half an ans")
    web.page.unroute("**/v1/chat/completions")
    web.recite("A whole answer.")
    web.page.get_by_role("button", name="Try again").click()
    expect(web.answers.locator(".prose")).to_have_text(["A whole answer."])


def test_a_stream_that_just_ends_is_cut_off(web: Any) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\n"
    web.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    web.type("Hello")
    expect(web.answers.locator(".note")).to_have_text("The answer was cut off.")
    expect(web.page.get_by_role("alert")).to_be_visible()


def test_a_server_with_a_key_asks_for_it_and_keeps_it_for_the_tab_only(
    start_server: Any, visit: Callable[..., Any]
) -> None:
    web = visit(start_server("qwen1", "--api-key", "open-sesame"))
    web.expected = FAILED
    web.page.goto(web.server.url)
    field = web.page.get_by_label("API key")
    field.fill("wrong")
    web.page.keyboard.press("Enter")
    expect(web.page.get_by_text("did not accept")).to_be_visible()
    field.fill("open-sesame")
    web.page.keyboard.press("Enter")
    expect(web.page.locator("#model option")).not_to_have_count(0)
    web.recite("Open.")
    expect(web.ask("Sesame").locator(".prose")).to_have_text("Open.")
    web.page.reload()
    expect(web.ask("Still?").locator(".prose")).to_have_text("Open.")
    kept = web.page.evaluate("JSON.stringify(localStorage) + document.cookie")
    assert "sesame" not in kept
    other = web.page.context.new_page()
    other.goto(web.server.url)
    expect(other.get_by_label("API key")).to_be_visible()
