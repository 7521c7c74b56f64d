"""What a grammar's first line says of its free text: anyone may write one, so it is taken only where it is usable."""

import json

import pytest

from kiloq.chat.answer_grammar import FREE_TEXT
from kiloq.engine.free_text import FreeSpan
from kiloq.engine.params import Constraint, SamplingParams

USABLE = {"after": "", "until": ["<end>"], "marks": ["<a>"]}


def test_a_usable_line_is_taken() -> None:
    span = FreeSpan.of_grammar(f"{FREE_TEXT}{json.dumps(USABLE)}\nstart: /a/")
    assert span == FreeSpan(b"", (b"<end>",), (b"<a>",))


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "7",
        "[" * 100_000,
        json.dumps({"until": ["<end>"]}),
        json.dumps(USABLE | {"until": [], "marks": []}),
        json.dumps(USABLE | {"until": [""]}),
        json.dumps(USABLE | {"marks": ["<a>", ""]}),
        json.dumps(USABLE | {"marks": ["\ud800"]}),
        json.dumps(USABLE | {"marks": ["a" * 50_000]}),
        json.dumps(USABLE | {"marks": [f"{i:06}" for i in range(5_000)]}),
        json.dumps(USABLE | {"after": "a" * 50_000}),
    ],
    ids=lambda line: line[:40],
)
def test_any_other_is_a_comment_like_all_others(lab, line: str) -> None:
    grammar = f"{FREE_TEXT}{line}\nstart: /b{{3}}/"
    assert FreeSpan.of_grammar(grammar) is None
    engine = lab.engine()
    engine.add(lab.ids(3), SamplingParams(constraint=Constraint("lark", grammar)), request_id="r")
    assert lab.answers(engine)["r", 0] == tuple(b"bbb")
