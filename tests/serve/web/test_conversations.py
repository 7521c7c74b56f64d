"""Conversations are kept in the browser: several, across reloads, renamed, deleted, exported, in two tabs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import expect


def names(web: Any) -> Any:
    return web.page.locator(".row-open")


def menu(web: Any, title: str, entry: str) -> None:
    row = web.page.locator(".row", has_text=title)
    row.hover()
    row.locator(".row-more").click()
    web.page.get_by_role("menuitem", name=entry).click()


def test_a_reload_keeps_the_conversation_and_its_settings(web: Any) -> None:
    web.page.click("#open-settings")
    web.page.get_by_label("Temperature").fill("0.3")
    web.page.keyboard.press("Escape")
    web.recite("Answer **one**.")
    stats = web.ask("Question one").locator(".stats").inner_text()
    web.page.reload()
    expect(web.answers.locator(".prose strong")).to_have_text("one")
    expect(web.answers.locator(".stats")).to_have_text(stats)
    request = web.sent(lambda: web.ask("Question two"))
    assert [message["content"] for message in request["messages"]] == [
        "Question one",
        "Answer **one**.",
        "Question two",
    ]
    assert request["temperature"] == 0.3


def test_an_answer_that_a_reload_cut_off_is_kept_so_far(web: Any) -> None:
    web.recite_on()
    web.type("Tell me")
    web.page.wait_for_function("() => document.querySelector('.turn-answer .prose')?.textContent.length > 200")
    web.page.reload()
    expect(web.answers.locator(".note")).to_have_text("The answer was cut off.")
    assert len(web.answers.locator(".prose").inner_text()) > 100


def test_several_conversations_answer_side_by_side(web: Any) -> None:
    web.recite_on()
    web.type("A long story")
    expect(web.answers.locator(".prose")).not_to_be_empty()
    web.page.keyboard.press("Control+k")
    expect(web.answers).to_have_count(0)
    web.recite("Short.")
    web.ask("A short one")
    expect(names(web)).to_have_text(["A short one", "A long story"])
    names(web).nth(1).click()
    expect(web.stop).to_be_visible()
    web.stop.click()
    expect(web.answers.locator(".note")).to_have_text("Stopped.")
    names(web).nth(0).click()
    expect(web.answers.locator(".prose")).to_have_text("Short.")


def test_a_name_is_given_and_kept(web: Any) -> None:
    web.recite("Hello.")
    web.ask("Some question\nwith a second line")
    expect(names(web)).to_have_text(["Some question"])
    menu(web, "Some question", "Rename")
    web.page.keyboard.type("Physik 物理")
    web.page.keyboard.press("Enter")
    expect(web.page.locator("#title")).to_have_text("Physik 物理")
    web.page.reload()
    expect(names(web)).to_have_text(["Physik 物理"])
    menu(web, "Physik", "Rename")
    web.page.keyboard.type("other")
    web.page.keyboard.press("Escape")
    expect(names(web)).to_have_text(["Physik 物理"])


def test_what_is_deleted_is_gone_unless_it_is_taken_back(web: Any) -> None:
    web.recite("Hello.")
    web.ask("first")
    web.page.keyboard.press("Control+k")
    web.ask("second")
    menu(web, "second", "Delete")
    expect(names(web)).to_have_text(["first"])
    expect(web.answers).to_have_count(0)
    web.page.get_by_role("button", name="Undo").click()
    expect(names(web)).to_have_text(["second", "first"])
    menu(web, "first", "Delete")
    expect(names(web)).to_have_text(["second"])
    web.page.reload()
    expect(names(web)).to_have_text(["second"])


def test_an_export_comes_back_whole_in_another_browser(visit: Callable[..., Any], tmp_path: Path) -> None:
    web = visit().open()
    web.recite("Answer with `code`.")
    web.ask("안녕 <b>")
    with web.page.expect_download() as download:
        web.page.get_by_label("Export all").click()
    file = tmp_path / "all.json"
    download.value.save_as(file)
    written = json.loads(file.read_text())
    assert [message["content"] for message in written["conversations"][0]["messages"]] == [
        "안녕 <b>",
        "Answer with `code`.",
    ]
    other = visit().open()
    for count in (1, 2):  # the second time it is a copy: nothing is overwritten
        other.page.locator("#import-file").set_input_files(file)
        expect(names(other)).to_have_count(count)
    names(other).first.click()
    expect(other.answers.locator(".prose code")).to_have_text("code")
    expect(other.answers.locator(".stats")).to_contain_text("tokens")


def test_two_tabs_show_the_same_conversations(web: Any) -> None:
    other = web.page.context.new_page()
    other.goto(web.server.url)
    web.recite("Hello.")
    web.ask("asked in one tab")
    expect(other.locator(".row-open")).to_have_text(["asked in one tab"])
    other.locator(".row-open").click()
    expect(other.locator(".turn-answer .prose")).to_have_text("Hello.")
    web.ask("and again")
    expect(other.locator(".turn-answer")).to_have_count(2)


def test_a_full_disk_is_told_and_the_talk_goes_on(visit: Callable[..., Any]) -> None:
    web = visit()
    full = "IDBObjectStore.prototype.put = () => { throw new DOMException('no room', 'QuotaExceededError'); }"
    web.page.add_init_script(full)
    web.open().recite("Still here.")
    answer = web.ask("Hello")
    expect(web.page.locator(".toast")).to_contain_text("no room left")
    expect(answer.locator(".prose")).to_have_text("Still here.")


def test_without_a_disk_the_page_works_and_says_what_is_lost(visit: Callable[..., Any]) -> None:
    web = visit()
    web.page.add_init_script(
        """for (const name of ["indexedDB", "localStorage", "sessionStorage"])
             Object.defineProperty(window, name, { get() { throw new DOMException("no", "SecurityError"); } });"""
    )
    web.open()
    expect(web.page.locator(".toast")).to_contain_text("keeps nothing")
    web.recite("Hello.")
    expect(web.ask("Hi").locator(".prose")).to_have_text("Hello.")


def test_settings_are_taken_for_new_conversations_when_a_person_says_so(web: Any) -> None:
    web.recite("Hello.")
    web.page.click("#open-settings")
    web.page.get_by_label("Top k").fill("5")
    web.page.keyboard.press("Escape")
    web.page.keyboard.press("Control+k")
    assert "top_k" not in web.sent(lambda: web.ask("one"))
    web.page.click("#open-settings")
    web.page.get_by_label("Top k").fill("9")
    web.page.get_by_role("button", name="Use for new").click()
    web.page.keyboard.press("Escape")
    web.page.keyboard.press("Control+k")
    assert web.sent(lambda: web.ask("two"))["top_k"] == 9
