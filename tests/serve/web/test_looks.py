"""How the page looks and is used: keyboard, screen readers, phones, colours, languages, and text that grows."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

PHONE = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}
WIDE = """A [link](https://example.com/a-very-long-address-without-any-break-in-it-at-all-that-goes-on-and-on).

| a | bb | ccc | dddd | eeeee | ffffff | ggggggg | hhhhhhhh | iiiiiiiii |
|---|---:|:---:|------|-------|--------|---------|----------|-----------|
| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |

```c
int a_very_long_line_of_code = another_very_long_name + yet_another_name_that_is_long + and_one_more_of_these;
```

$$\\sum_{i=0}^{n} a_i x^i + \\int_0^1 f(x)\\,dx + \\prod_{k=1}^{m} b_k + \\sqrt{1 + \\frac{1}{1 + \\frac{1}{x}}} + c$$

Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"""
DOCUMENTS = [
    WIDE,
    "# One\npara\npara\n===\n\n- a\n- b\n\n  still b\n\n1\n2. b\n\n2\n3. x\n\n> quote\nlazy\n\n---\nend",
    "1. a\n\n2. b\n   - c\n\n     d\n\n*\n*bold*\n\n    code\n\n    more\n\ntext",
    "$$\na\n- b\n= c\n$$\n\ntext $x$ and \\[y\\] and \\(z\\), $5 and $6\n\n$$ open\n\nnot math $$\n\n$$\nnever\n- x\n",
    "```python\ndef f():\n    return '$x$'\n```\n\n~~~\nopen\n\nfence\n",
    "see [ref] and [other][ref]\n\ntext\n\n[ref]: https://example.com/x\n\nafter [ref]",
    "line\r\nnext\r\n\r\n- item\r\n- item\r\n\r\ntext **bold\r\n** *x*",
    "| a |\n|---|\n| 1 |\ntext\n\n| not\n\na | b\n-|-\n1 | 2",
]
FITS = """() =>
  [...document.querySelectorAll("html, #transcript")].every((one) => one.scrollWidth <= one.clientWidth)"""
FROM_END = """() => {
  const { scrollHeight, scrollTop, clientHeight } = document.getElementById("transcript");
  return scrollHeight - scrollTop - clientHeight;
}"""
GROW = """async ([text, size]) => {
  // Every state is drawn at once: the page's own pauses depend on the clock.
  window.requestAnimationFrame = (draw) => (draw(), 0);
  window.setTimeout = () => 0;
  const own = document.querySelector("script[type=module]").src;
  const { render } = await import(new URL("markdown.js", own));
  const { LiveMarkdown } = await import(new URL("live-markdown.js", own));
  const [grown, whole] = [document.createElement("div"), document.createElement("div")];
  let made = 0;
  const count = new MutationObserver(() => {});
  count.observe(grown, { childList: true, subtree: true });
  const live = new LiveMarkdown(grown);
  for (let end = size; end < text.length + size; end += size) {
    live.update(text.slice(0, end));
    for (const { addedNodes } of count.takeRecords()) for (const node of addedNodes) made += node.textContent.length;
  }
  live.finish(text);
  whole.append(render(text));
  for (const root of [grown, whole]) root.normalize();
  return { grown: grown.innerHTML, whole: whole.innerHTML, made };
}"""


@pytest.mark.parametrize("size", [1, 7])
def test_text_that_grew_is_the_text_rendered_whole(web: Any, size: int) -> None:
    for text in DOCUMENTS:
        result = web.page.evaluate(GROW, [text, size])
        assert result["grown"].replace("\n", "") == result["whole"].replace("\n", ""), text


def test_work_grows_with_the_length_of_an_answer_and_not_with_its_square(web: Any) -> None:
    paragraph = "Some words of a paragraph with **bold** ones, `code` and $x^2$, as a model writes them.\n\n"
    short, long = (web.page.evaluate(GROW, [paragraph * count, 5])["made"] for count in (20, 80))
    assert long < 5 * short  # 4 times the text; a square would be 16


def test_a_long_answer_stays_at_its_end_unless_the_reader_moves_up(web: Any) -> None:
    web.recite("\n\n".join(f"Paragraph {number}." for number in range(60)))
    web.ask("Many, please.")
    assert web.page.evaluate(FROM_END) < 2
    web.recite_on()
    web.type("More.")
    expect(web.answers.nth(1).locator(".prose")).not_to_be_empty()
    web.page.locator("#transcript").hover()
    web.page.mouse.wheel(0, -500)
    expect(web.page.locator("#to-latest")).to_be_visible()
    top = web.page.evaluate("() => document.getElementById('transcript').scrollTop")
    length = len(web.answers.nth(1).inner_text())
    web.page.wait_for_function(
        "(least) => [...document.querySelectorAll('.prose')].at(-1).textContent.length > least", arg=length + 50
    )
    assert web.page.evaluate("() => document.getElementById('transcript').scrollTop") == top
    web.page.click("#to-latest")
    web.stop.click()
    expect(web.stop).to_be_hidden()
    assert web.page.evaluate(FROM_END) < 2


def test_everything_is_reached_by_keyboard_alone(web: Any) -> None:
    page, press = web.page, web.page.keyboard.press
    web.recite("One.", "Two.", "Three.")
    expect(page.locator("#composer-text")).to_be_focused()
    page.keyboard.type("line one")
    press("Shift+Enter")
    page.keyboard.type("line two")
    press("Enter")
    expect(web.answers.locator(".prose")).to_have_text("One.")
    expect(page.locator(".turn-user .bubble")).to_have_text("line one\nline two")
    expect(web.answers.locator(".turn-actions")).to_be_visible()
    press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_be_focused()
    press("Escape")
    expect(page.locator(".turn-user").get_by_label("Edit")).to_be_focused()
    press("Enter")
    press("Control+a")
    page.keyboard.type("edited")
    press("Enter")
    expect(web.answers.locator(".prose")).to_have_text("Two.")
    expect(web.answers.locator(".turn-actions")).to_be_visible()
    press("Control+k")
    expect(page.locator("#composer-text")).to_be_focused()
    expect(web.answers).to_have_count(0)
    page.locator(".row-more").focus()
    press("Enter")
    press("ArrowDown")
    press("ArrowUp")
    expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    press("Escape")
    expect(page.locator(".row-more")).to_be_focused()
    press("Shift+Tab")
    press("Enter")
    expect(web.answers.locator(".prose")).to_have_text("Two.")
    page.locator("#open-settings").focus()
    press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    press("Escape")
    expect(page.locator("#open-settings")).to_be_focused()


def test_an_input_method_may_use_enter_for_itself(web: Any) -> None:
    web.page.locator("#composer-text").fill("안녕")
    web.page.evaluate(
        """() => document.getElementById("composer-text").dispatchEvent(
             new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))"""
    )
    expect(web.page.locator("#composer-text")).to_have_value("안녕")
    expect(web.page.locator(".turn")).to_have_count(0)


def test_a_phone_needs_no_sideways_scrolling(visit: Callable[..., Any]) -> None:
    web = visit(**PHONE).open()
    assert web.page.evaluate(FITS)
    web.recite(WIDE)
    web.ask("Show me something wide. " + "x" * 200)
    assert web.page.evaluate(FITS)
    web.page.get_by_label("Show as plain text").click()
    assert web.page.evaluate(FITS)
    web.page.locator(".turn-user").get_by_label("Edit").click()
    assert web.page.evaluate(FITS)
    web.page.click("#open-settings")
    sheet = web.page.get_by_role("dialog")
    assert sheet.evaluate("(e) => e.scrollWidth <= innerWidth && e.getBoundingClientRect().right <= innerWidth")
    web.page.keyboard.press("Escape")
    web.page.click("#open-sidebar")
    expect(web.page.locator("#sidebar")).to_be_in_viewport()
    web.page.locator(".row-open").click()
    expect(web.page.locator("#sidebar")).not_to_be_in_viewport()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_button(visit: Callable[..., Any], scheme: str) -> None:
    web = visit(color_scheme=scheme).open()
    ground = "() => getComputedStyle(document.documentElement).backgroundColor"
    by_system = web.page.evaluate(ground)
    assert (sum(map(int, by_system[4:-1].split(","))) < 200) == (scheme == "dark")
    web.page.click("#theme")
    web.page.click("#theme")
    assert web.page.locator("html").get_attribute("data-theme") == "dark"
    web.page.reload()
    assert web.page.locator("html").get_attribute("data-theme") == "dark"


@pytest.mark.parametrize(
    ("locale", "word", "tag"), [("zh-CN", "新对话", "zh-CN"), ("ko-KR", "새 대화", "ko"), ("fr", "New chat", "en")]
)
def test_the_page_speaks_the_browsers_language(visit: Callable[..., Any], locale: str, word: str, tag: str) -> None:
    web = visit(locale=locale).open()
    expect(web.page.locator("#new-chat")).to_contain_text(word)
    expect(web.page.locator("html")).to_have_attribute("lang", tag)


def test_a_language_is_chosen_and_everything_follows(web: Any) -> None:
    web.recite("Hello.")
    web.ask("Hi")
    web.page.locator("#language").select_option("ko")
    expect(web.page.locator("#composer-text")).to_have_attribute("placeholder", "메시지를 입력하세요")
    expect(web.page.get_by_label("다시 답하기")).to_be_visible()
    web.page.reload()
    expect(web.page.locator("#new-chat")).to_contain_text("새 대화")


def test_every_text_exists_in_every_language(web: Any) -> None:
    texts = web.page.evaluate(
        """async () => {
          const own = document.querySelector("script[type=module]").src;
          return (await import(new URL("i18n.js", own))).TEXTS;
        }"""
    )
    for name, versions in texts.items():
        assert len(versions) == 3, name
        assert all(versions), name
        slots = [sorted(part.split("}")[0] for part in text.split("{")[1:]) for text in versions]
        assert slots[0] == slots[1] == slots[2], name


@pytest.mark.skipif(
    importlib.util.find_spec("axe_playwright_python") is None, reason="axe-playwright-python is missing"
)
@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_axe_finds_nothing_serious(visit: Callable[..., Any], options: dict[str, Any]) -> None:
    from axe_playwright_python.sync_playwright import Axe

    web = visit(**options).open()

    def found() -> list[str]:
        violations = Axe().run(web.page).response["violations"]
        return [f"{one['id']}: {[node['html'] for node in one['nodes']]}" for one in violations]

    assert found() == []
    web.recite(DOCUMENTS[1] + "\n\n" + WIDE)
    web.ask("Hello")
    assert found() == []
    web.page.click("#open-settings")
    assert found() == []
    web.page.keyboard.press("Escape")
    if web.page.locator("#sidebar").get_attribute("inert") is not None:
        web.page.click("#open-sidebar")
    web.page.locator(".row-more").click()
    assert found() == []
