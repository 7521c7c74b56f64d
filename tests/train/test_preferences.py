import json
from pathlib import Path

import pytest

from kiloq.chat import Message
from kiloq.errors import DataError
from kiloq.train.preferences import Judged, Pair, judged, pair
from kiloq.train.rows import good_rows

ASKED = Message(role="user", content="hi", trained=False)
GOOD, BAD = (Message(role="assistant", content=text) for text in ("hello", "go away"))


def read_pair(row: dict[str, object], folder: Path) -> Pair:
    path = folder / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (one,) = good_rows(path, pair)
    return one


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


USER = said("user", "hi")
HUMAN = turn("human", "hi")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
        {"question": "hi", "chosen": "hello", "rejected": "go away"},
        {"prompt": [USER], "chosen": [said("assistant", "hello")], "rejected": [said("assistant", "go away")]},
        {"chosen": [USER, said("assistant", "hello")], "rejected": [USER, said("assistant", "go away")]},
        {
            "prompt": "hi",
            "chosen": [USER, said("assistant", "hello")],
            "rejected": [USER, said("assistant", "go away")],
        },
        {"conversations": [HUMAN], "chosen": turn("gpt", "hello"), "rejected": turn("gpt", "go away")},
        {"messages": [USER], "chosen": said("assistant", "hello"), "rejected": "go away"},
        {"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go away"},
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"},
        {
            "input": {"messages": [USER], "tools": []},
            "preferred_output": [said("assistant", "hello")],
            "non_preferred_output": [said("assistant", "go away")],
        },
    ],
)
def test_every_form_of_a_pair_gives_the_same_two_conversations(tmp_path: Path, row: dict[str, object]) -> None:
    one = read_pair(row, tmp_path)
    assert one.chosen.messages == (ASKED, GOOD)
    assert one.rejected.messages == (ASKED, BAD)
    assert one.chosen.where == one.rejected.where == f"{tmp_path / 'a.jsonl'}, line 1"


def test_of_a_pair_only_what_follows_the_shared_beginning_is_trained(tmp_path: Path) -> None:
    history = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    row = {"chosen": [*history, said("assistant", "x")], "rejected": [*history, said("assistant", "y")], "system": "be"}
    one = read_pair(row, tmp_path)
    assert [m.role for m in one.chosen.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.trained for m in one.chosen.messages] == [False] * 4 + [True]
    assert [m.trained for m in one.rejected.messages] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "hi", "chosen": "x"}, "needs chosen and rejected"),
        ({"prompt": "hi", "chosen": "x", "rejected": "x"}, "are the same"),
        ({"prompt": "hi", "chosen": "x", "rejected": ""}, r"turn 1 \(assistant\) has no text"),
        ({"prompt": "hi", "chosen": "x", "rejected": 3}, "rejected is not text"),
        ({"prompt": "hi", "chosen": "x", "rejected": "y", "margin": 10**400}, "margin is 1000"),
        ({"chosen": "x", "rejected": "y"}, "chosen is text without a prompt beside it"),
        ({"chosen": [said("assistant", "x")], "rejected": [said("assistant", "y")]}, "chosen holds no question"),
        (
            {"chosen": [USER, said("assistant", "x")], "rejected": [said("user", "yo"), said("assistant", "y")]},
            "do not begin with the same question",
        ),
        ({"prompt": "no", "chosen": [USER, said("assistant", "x")], "rejected": "y"}, "does not begin with the prompt"),
        ({"conversations": [HUMAN], "chosen": turn("bot", "x"), "rejected": turn("gpt", "y")}, r"chosen\[0\].from is"),
        ({"preferred_output": [], "non_preferred_output": []}, "input is missing"),
        (
            {"chosen": [USER, said("assistant", "x")], "rejected": [USER, said("assistant", "x"), USER]},
            "chosen has no answer of its own",
        ),
    ],
)
def test_a_pair_that_prefers_nothing_is_refused(tmp_path: Path, row: dict[str, object], why: str) -> None:
    with pytest.raises(DataError, match=rf"1 bad rows:\n.*line 1: .*{why}"):
        read_pair(row, tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "hello", "label": True},
        {"prompt": [USER], "completion": [said("assistant", "hello")], "label": True},
        {"messages": [USER, said("assistant", "hello")], "kto_tag": True},
        {"conversations": [HUMAN, turn("gpt", "hello")], "label": True},
        {"instruction": "hi", "output": "hello", "kto_tag": True},
    ],
)
def test_every_form_of_a_label_gives_the_same(row: dict[str, object]) -> None:
    one = judged(row, "here")
    assert one == Judged(one.conversation, good=True)
    assert one.conversation.messages == (ASKED, GOOD)
    name = "label" if "label" in row else "kto_tag"
    assert not judged({**row, name: False}, "here").good


def test_of_a_labelled_conversation_only_the_last_answer_is_trained() -> None:
    turns = [USER, said("assistant", "hello"), said("user", "and?"), said("assistant", "no")]
    one = judged({"messages": turns, "label": False}, "here")
    assert [m.trained for m in one.conversation.messages] == [False, False, False, True]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "hi", "completion": "x"}, "label is missing"),
        ({"prompt": "hi", "completion": "x", "label": "yes"}, "label is 'yes'; it must be true or false"),
        ({"prompt": "hi", "label": True}, "completion is missing"),
        ({"messages": [USER, said("assistant", "x"), USER], "label": True}, "last question has no answer"),
        ({"prompt": "hi", "chosen": "x", "rejected": "y", "label": True}, "chosen and rejected beside a label"),
    ],
)
def test_a_label_without_an_answer_or_value_is_refused(row: dict[str, object], why: str) -> None:
    with pytest.raises(DataError, match=why):
        judged(row, "here")
