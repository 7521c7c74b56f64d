"""Talking with a model through the page: what is sent, what appears, what is kept."""

import json
from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect

MANY_WORDS = "() => document.querySelector('.turn-answer .prose').textContent.length > 40"


def test_an_answer_streams_and_its_usage_is_shown(web: Any) -> None:
    web.recite("The sky is blue because **short waves** scatter more.")
    answer = web.ask("Why is the sky blue?")
    expect(answer.locator(".prose")).to_have_text("The sky is blue because short waves scatter more.")
    expect(answer.locator("strong")).to_have_text("short waves")
    expect(answer.locator(".stats")).to_contain_text("tokens/s")
    expect(answer.locator(".stats")).to_contain_text("prompt")
    expect(web.page.locator("#announcer")).to_contain_text("short waves")
    web.recite("As I said.")
    expect(web.ask("Again?").locator(".stats")).to_contain_text("cached")


def test_what_is_there_is_shown_before_the_rest_and_escape_ends_it_on_the_server_too(web: Any) -> None:
    web.recite_on()
    with web.page.expect_response("**/v1/chat/completions") as response:
        web.type("Tell me a story.")
    web.page.wait_for_function(MANY_WORDS)
    assert web.stop.is_visible()
    assert web.page.locator("#announcer").inner_text() == ""  # not token by token
    web.page.keyboard.press("Escape")
    expect(web.stop).to_be_hidden()
    expect(web.answers.locator(".note")).to_have_text("Stopped.")
    assert "end=gone" in web.log_line(response.value.headers["x-request-id"])


def test_history_is_raw_text_and_the_settings_go_with_it(web: Any) -> None:
    page = web.page
    page.click("#open-settings")
    page.get_by_label("System prompt").fill("You are *brief*.")
    for name, value in (
        ("Temperature", "0.5"),
        ("Top p", "0.9"),
        ("Top k", "20"),
        ("Seed", "7"),
        ("Repetition", "1.1"),
    ):
        page.get_by_label(name).fill(value)
    page.get_by_label("Longest answer").fill("50")
    page.get_by_role("button", name="Done").last.click()
    web.recite("**Yes** & <b>no</b> `x < 1`")
    web.ask("<i>Really?</i>")
    request = web.sent(lambda: web.ask("Sure?"))
    assert request["messages"] == [
        {"role": "system", "content": "You are *brief*."},
        {"role": "user", "content": "<i>Really?</i>"},
        {"role": "assistant", "content": "**Yes** & <b>no</b> `x < 1`"},
        {"role": "user", "content": "Sure?"},
    ]
    expected = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "seed": 7, "repetition_penalty": 1.1, "max_tokens": 50}
    assert {name: request[name] for name in expected} == expected
    assert request["stream_options"] == {"include_usage": True}


def test_a_value_out_of_bounds_is_told_and_not_sent(web: Any) -> None:
    web.page.click("#open-settings")
    web.page.get_by_label("Temperature").fill("9")
    expect(web.page.locator("#temperature-wrong")).to_have_text("From 0 to 2.")
    web.page.get_by_label("Tools").fill('[{"no": "name"}]')
    expect(web.page.get_by_text("it is not used")).to_be_visible()
    web.page.keyboard.press("Escape")
    web.recite("Good.")
    request = web.sent(lambda: web.ask("Hello"))
    assert not {"temperature", "tools"} & set(request)


def test_an_edited_question_replaces_what_followed(web: Any) -> None:
    web.recite("One.", "Two.", "Three.")
    web.ask("first")
    web.ask("second")
    web.page.locator(".turn-user").first.hover()
    web.page.locator(".turn-user").first.get_by_label("Edit").click()
    web.page.get_by_label("Edit the message").fill("another first")
    request = web.sent(lambda: web.page.get_by_role("button", name="Send again").click())
    assert request["messages"] == [{"role": "user", "content": "another first"}]
    expect(web.answers).to_have_count(1)
    expect(web.answers.locator(".prose")).to_have_text("Three.")
    expect(web.page.locator(".turn-user .bubble")).to_have_text(["another first"])


def test_an_edit_while_an_answer_comes_ends_that_answer(web: Any) -> None:
    web.recite_on()
    web.type("first")
    web.page.wait_for_function(MANY_WORDS)
    web.recite("Done.")
    web.page.locator(".turn-user").hover()
    web.page.get_by_label("Edit").click()
    web.page.keyboard.press("Control+a")
    web.page.keyboard.type("second")
    web.page.keyboard.press("Enter")
    expect(web.answers.locator(".prose")).to_have_text(["Done."])
    expect(web.stop).to_be_hidden()


def test_an_answer_is_made_again(web: Any) -> None:
    web.recite("One.", "Two.")
    web.ask("Say a number.")
    request = web.sent(lambda: web.page.get_by_label("Answer again").click())
    assert request["messages"] == [{"role": "user", "content": "Say a number."}]
    expect(web.answers.locator(".prose")).to_have_text(["Two."])


def test_an_answer_shows_as_it_was_written_and_back(web: Any) -> None:
    web.recite("# Head\n\ntext")
    answer = web.ask("Hello")
    expect(answer.locator("h1")).to_have_text("Head")
    raw = answer.get_by_label("Show as plain text")
    raw.click()
    expect(raw).to_have_attribute("aria-pressed", "true")
    expect(answer.locator("pre.raw")).to_have_text("# Head\n\ntext")
    raw.click()
    expect(answer.locator("h1")).to_have_text("Head")


def test_code_is_copied_as_the_model_wrote_it(visit: Callable[..., Any]) -> None:
    web = visit(permissions=["clipboard-read", "clipboard-write"]).open()
    web.recite("```python\nif a < b:\n    print('&amp;')\n```")
    answer = web.ask("Code, please.")
    expect(answer.locator(".hljs-keyword").first).to_have_text("if")
    answer.get_by_label("Copy the code").click()
    expect(answer.locator(".icon-check")).to_be_visible()
    assert web.page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    print('&amp;')\n"


def test_tools_are_called_and_their_results_typed_in(start_server: Any, visit: Callable[..., Any]) -> None:
    web = visit(start_server("qwen2.5")).open()
    tool = {"name": "weather", "description": "now", "parameters": {"type": "object", "properties": {}}}
    web.page.click("#open-settings")
    web.page.get_by_label("Tools").fill(json.dumps([tool]))
    web.page.keyboard.press("Escape")
    calls = [{"name": "weather", "arguments": {"city": city}} for city in ("Seoul", "Bath")]
    text = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    web.recite(text, "Rain in Seoul, sun in Bath.")
    answer = web.ask("How is the weather?")
    expect(answer.locator(".calls summary > span:first-of-type")).to_have_text(["Calls weather"] * 2)
    expect(answer.locator(".calls pre").first).to_be_hidden()
    answer.locator(".calls summary").first.click()
    expect(answer.locator(".calls pre").first).to_contain_text('"city": "Seoul"')
    results = web.page.get_by_label("Result of weather")
    results.nth(0).fill("<b>rain</b>")
    results.nth(1).fill('{"sky": "clear"}')
    request = web.sent(lambda: web.page.get_by_role("button", name="Send results").click())
    assert request["tools"] == [{"type": "function", "function": tool}]
    asked, *given = request["messages"][1:]
    assert [json.loads(call["function"]["arguments"]) for call in asked["tool_calls"]] == [
        {"city": "Seoul"},
        {"city": "Bath"},
    ]
    assert [(one["role"], one["content"]) for one in given] == [("tool", "<b>rain</b>"), ("tool", '{"sky": "clear"}')]
    assert [one["tool_call_id"] for one in given] == [call["id"] for call in asked["tool_calls"]]
    expect(web.answers.last.locator(".prose")).to_have_text("Rain in Seoul, sun in Bath.")
    expect(web.page.locator(".turn-result pre").first).to_have_text("<b>rain</b>")


def test_thoughts_are_folded_and_not_sent_again(start_server: Any, visit: Callable[..., Any]) -> None:
    web = visit(start_server("qwen3")).open()
    web.recite("<think>\nThe user greets.\n</think>\n\nHello!")
    answer = web.ask("Hi")
    expect(answer.locator(".prose")).to_have_text("Hello!")
    expect(answer.locator(".thoughts")).to_be_hidden()
    answer.get_by_text("Thoughts").click()
    expect(answer.locator(".thoughts")).to_have_text("The user greets.")
    request = web.sent(lambda: web.ask("Bye"))
    assert request["messages"][1] == {"role": "assistant", "content": "Hello!"}
