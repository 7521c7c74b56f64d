"""Hostile text, wherever it comes from, stays text: nothing runs, nothing loads, nothing leaves the page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

ATTACKS = [
    '<img src=x onerror="window.pwned=1">',
    "<script>window.pwned=1</script>",
    "<svg onload=window.pwned=1><script>window.pwned=1</script></svg>",
    "<svg><animate onbegin=window.pwned=1 attributeName=x dur=1s>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.pwned=1>",
    '<iframe srcdoc="<script>parent.pwned=1</script>"></iframe>',
    '<style>@import "http://evil.test/x.css"; body { background: url(http://evil.test/b) }</style>',
    '<a href="javascript:window.pwned=1">press</a>',
    "[press](javascript:window.pwned=1)",
    "[press](JaVaScRiPt&colon;window.pwned=1)",
    "[press](&#106;avascript:window.pwned=1)",
    "[press](data:text/html;base64,PHNjcmlwdD4=)",
    "[press](vbscript:msgbox)",
    "[ref]\n\n[ref]: javascript:window.pwned=1",
    "<javascript:window.pwned=1>",
    "![spy](http://evil.test/spy.png?secret)",
    "![spy][far]\n\n[far]: http://evil.test/far.png",
    '[a](https://evil.test "t\\" onmouseover=window.pwned=1 x=\\"")',
    "`<img src=x onerror=window.pwned=1>`",
    "```html\n<img src=x onerror=window.pwned=1><script>window.pwned=1</script>\n```",
    '```"><img src=x onerror=window.pwned=1>\ntext\n```',
    '```mermaid\ngraph TD; A["<img src=x onerror=window.pwned=1>"]; click A "javascript:window.pwned=1"\n```',
    "$\\href{javascript:window.pwned=1}{x}$",
    '$\\htmlClass{" onclick="window.pwned=1}{x}$ $\\htmlStyle{background:url(http://evil.test/s)}{x}$',
    "$$\\includegraphics{http://evil.test/i.png}$$",
    "$\\url{javascript:window.pwned=1}$ $\\text{<img src=x onerror=window.pwned=1>}$",
    "$\\def\\a{\\a\\a}\\a$ and $\\rule{99999em}{99999em}$",
    "| a |\n|---|\n| <img src=x onerror=window.pwned=1> |",
    "> <form action=http://evil.test><button formaction=javascript:window.pwned=1>go</button></form>",
    "<base href=http://evil.test><meta http-equiv=refresh content=0;url=http://evil.test>",
    '<noscript><p title="</noscript><img src=x onerror=window.pwned=1>">',
    "</textarea></title></script><img src=x onerror=window.pwned=1>",
    "<input name=attributes autofocus onfocus=window.pwned=1><form id=turns>",
]
# What is wrong with the page now; every link, handler and element is looked at.
HARM = """() => {
  const found = window.pwned === undefined ? [] : ["script ran"];
  const foreign = "img, script:not([src]), iframe, object, embed, style, base, animate, foreignObject, " +
    "form:not(#composer, .results), meta[http-equiv], [formaction], [srcdoc], #turns #turns, link:not([href^=web])";
  for (const node of document.querySelectorAll(foreign)) found.push(node.outerHTML);
  for (const node of document.querySelectorAll("body *")) {
    for (const { name, value } of node.attributes) {
      if (name.startsWith("on")) found.push(node.outerHTML);
      if (/href|src|action/.test(name) && !/^(https?:|mailto:|#)/.test(value)) found.push(node.outerHTML);
    }
    if (node.matches("#turns a")) {
      if (node.target !== "_blank" || node.rel !== "noopener noreferrer") found.push(node.outerHTML);
      if (!/^(https?|mailto):$/.test(node.protocol)) found.push(node.outerHTML);
    }
  }
  return found;
}"""


def harm(web: Any) -> list[str]:
    web.page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    found: list[str] = web.page.evaluate(HARM)
    return found


def test_harm_would_be_seen(web: Any) -> None:
    web.expected = "Content Security Policy|inline event handler"
    for markup in ('<a href="javascript:1">x</a>', "<img>", "<b onclick=1>x</b>", '<a href="https://x.test">x</a>'):
        web.page.evaluate(
            """(markup) => {
              const inert = document.implementation.createHTMLDocument();
              const parsed = DOMPurify.sanitize(markup, {
                RETURN_DOM_FRAGMENT: true,
                ADD_ATTR: ["onclick"],
                ALLOWED_URI_REGEXP: /./,
              });
              for (const link of parsed.querySelectorAll("a")) link.removeAttribute("rel");
              document.getElementById("turns").replaceChildren(parsed);
            }""",
            markup,
        )
        assert harm(web), markup


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "streamed"])
def test_attacks_in_an_answer_are_inert(web: Any, whole: bool) -> None:
    """The page's own renderer, fed with every attack; streamed: letter by letter, each state looked at."""
    show = """async ([texts, whole]) => {
      const own = document.querySelector("script[type=module]").src;
      const { render } = await import(new URL("markdown.js", own));
      const { LiveMarkdown } = await import(new URL("live-markdown.js", own));
      const root = document.getElementById("turns");
      for (const text of texts) {
        const place = root.appendChild(document.createElement("div"));
        if (whole) place.append(render(text));
        else {
          const live = new LiveMarkdown(place);
          for (let end = 1; end <= text.length; end++) live.finish(text.slice(0, end));
        }
      }
    }"""
    web.page.evaluate(show, [ATTACKS, whole])
    assert harm(web) == []
    assert web.page.locator("#turns").inner_text().count("onerror") >= 9  # they are shown, as text


def test_attacks_from_the_model_the_person_and_the_names_are_inert(web: Any) -> None:
    page = web.page
    page.click("#open-settings")
    page.get_by_label("System prompt").fill("\n".join(ATTACKS[:6]))
    page.keyboard.press("Escape")
    for attack in (ATTACKS[0], "\n\n".join(ATTACKS[7:9] + ATTACKS[15:16] + ATTACKS[19:20])):
        web.recite(attack)
        web.ask(attack)
        assert harm(web) == []
    page.locator(".row-more").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.keyboard.type(ATTACKS[0])
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text(ATTACKS[0])
    page.reload()
    expect(page.locator(".turn-user .bubble").first).to_have_text(ATTACKS[0])
    page.click("#open-settings")
    assert harm(web) == []
    page.keyboard.press("Escape")
    page.locator(".row-more").click()
    page.get_by_role("menuitem", name="Delete").click()
    expect(page.locator(".toast")).to_contain_text("onerror")
    assert harm(web) == []


def test_links_open_elsewhere_and_pictures_become_links(web: Any) -> None:
    web.recite(
        "[ok](https://example.com/a) ![a picture](https://example.com/b.png) <me@example.com> https://example.com/c"
    )
    links = web.ask("Links?").locator(".prose a")
    addresses = links.evaluate_all("(all) => all.map((link) => [link.href, link.target, link.rel])")
    assert [address for address, *_ in addresses] == [
        "https://example.com/a",
        "https://example.com/b.png",
        "mailto:me@example.com",
        "https://example.com/c",
    ]
    assert {tuple(rest) for _, *rest in addresses} == {("_blank", "noopener noreferrer")}


def test_attacks_in_an_imported_file_are_inert(web: Any, tmp_path: Path) -> None:
    attack = "\n\n".join(ATTACKS)
    call = {"id": attack, "name": ATTACKS[0], "arguments": attack}
    answer = {"role": "assistant", "content": attack, "reasoning": attack, "calls": [call], "ending": "constructor"}
    stats = {"first": "<img>", "speed": ATTACKS[0], "prompt": 3, "cached": {}, "answer": None}
    hostile = {
        "id": '"><img src=x onerror=window.pwned=1>',
        "title": ATTACKS[0],
        "named": True,
        "updated": "<b>",
        "settings": {
            "model": ATTACKS[0],
            "system": attack,
            "temperature": "<img>",
            "tools": attack,
            "__proto__": {"x": 1},
        },
        "messages": [
            {"role": "user", "content": attack},
            {**answer, "stats": stats},
            {"role": "tool", "tool_call_id": attack, "name": ATTACKS[0], "content": attack},
            {"role": "assistant", "content": {"html": attack}, "calls": {"length": 9}, "stats": [1]},
            {"role": "system", "content": attack},
            {"role": ["user"], "content": attack},
            None,
            7,
        ],
    }
    file = tmp_path / "hostile.json"
    file.write_text(
        json.dumps(
            {"format": "kiloq-conversations", "version": 1, "conversations": [hostile, None, [], {"messages": 1}]}
        )
    )
    web.page.locator("#import-file").set_input_files(file)
    expect(web.page.locator(".toast")).to_have_text("1 imported.")
    web.page.locator(".row-open").click()
    expect(web.page.locator(".turn")).to_have_count(4)
    for summary in web.page.locator("#turns summary:visible").all():
        summary.click()
    web.page.click("#open-settings")
    assert harm(web) == []


def test_a_file_that_is_not_ours_is_refused(web: Any, tmp_path: Path) -> None:
    for count, content in enumerate(("", "{", "[]", '{"format": "other", "conversations": []}', "\x00\xff")):
        file = tmp_path / f"{count}.json"
        file.write_text(content)
        web.page.evaluate("() => document.getElementById('toasts').replaceChildren()")
        web.page.locator("#import-file").set_input_files(file)
        expect(web.page.locator(".toast")).to_contain_text("holds no conversations")
    expect(web.page.locator(".row")).to_have_count(0)


def test_attacks_in_tool_results_and_errors_are_inert(start_server: Any, visit: Callable[..., Any]) -> None:
    web = visit(start_server("qwen2.5")).open()
    web.page.click("#open-settings")
    web.page.get_by_label("Tools").fill(json.dumps({"name": "look"}))
    web.page.keyboard.press("Escape")
    web.recite(f"<tool_call>\n{json.dumps({'name': 'look', 'arguments': {'at': ATTACKS[0]}})}\n</tool_call>", "Seen.")
    web.ask("Look.").get_by_text("Calls look").click()
    web.page.get_by_label("Result of look").fill(ATTACKS[1])
    web.page.get_by_role("button", name="Send results").click()
    expect(web.answers.last.locator(".prose")).to_have_text("Seen.")
    web.page.locator(".turn-result summary").click()
    assert harm(web) == []
    web.expected = "400"
    error = {"error": {"message": ATTACKS[0], "type": "x", "param": None, "code": None}}
    web.page.unroute("**/v1/chat/completions")
    web.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, body=json.dumps(error)))
    web.type("Again")
    expect(web.page.get_by_role("alert")).to_contain_text("onerror")
    assert harm(web) == []
