import gzip
import json
from pathlib import Path

import pytest

from kiloq.chat import Message
from kiloq.errors import DataError
from kiloq.train.conversations import read_conversations, refuse_faults

HELLO = (Message(role="user", content="hi"), Message(role="assistant", content="hello"))


def write(path: Path, rows: list[object]) -> Path:
    text = json.dumps(rows, indent=1) if ".jsonl" not in path.name else "\n".join(map(json.dumps, rows))
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"id": "x", "conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"instruction": "hi", "input": "", "output": "hello"},
    ],
)
def test_every_format_in_every_file_gives_the_same_messages(tmp_path: Path, name: str, row: object) -> None:
    rows, faults = read_conversations(write(tmp_path / name, [row, row]))
    assert faults == []
    assert [one.messages for one in rows] == [HELLO, HELLO]


def test_systems_inputs_histories_and_tools_are_read(tmp_path: Path) -> None:
    tools = [{"name": "add", "description": "Adds.", "parameters": {}}]
    rows, faults = read_conversations(
        write(
            tmp_path / "a.jsonl",
            [
                {"instruction": "say", "input": "hi", "output": "x", "system": "be", "history": [["q", "a"]]},
                {
                    "system": "be",
                    "tools": json.dumps(tools),
                    "conversations": [
                        {"from": "human", "value": "1+1?"},
                        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                        {"from": "observation", "value": "2"},
                        {"from": "gpt", "value": "Two."},
                    ],
                },
            ],
        )
    )
    assert faults == []
    assert [(m.role, m.content) for m in rows[0].messages] == [
        ("system", "be"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "say\nhi"),
        ("assistant", "x"),
    ]
    assert [m.role for m in rows[1].messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert rows[1].messages[2].tool_calls[0].arguments == '{"a": 1}'
    assert rows[1].tools[0].name == "add"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "the row is of type list"),
        ({}, "the row has no fields; it needs messages"),
        ({"text": "x"}, "the row has text; it needs messages"),
        ({"messages": "hi"}, "messages is of type str"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant turn"),
        ({"messages": [{"role": "narrator", "content": "hi"}]}, r"messages[0].role is 'narrator'"),
        ({"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}]}, "messages[0].content"),
        ({"conversations": []}, "conversations is not a list of turns"),
        ({"conversations": ["hi"]}, "conversations[0] is of type str"),
        ({"conversations": [{"from": "bot", "value": "hi"}]}, "conversations[0].from is 'bot'"),
        ({"conversations": [{"from": "user"}]}, "conversations[0].value is missing"),
        ({"conversations": [{"from": "user", "value": ["hi"]}]}, "conversations[0].value is list"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "function_call but not valid JSON"),
        ({"instruction": "hi"}, "output is missing"),
        ({"instruction": "hi", "output": ["x"]}, "output is not text"),
        ({"instruction": "hi", "output": "x", "history": [["q"]]}, "history[0] is not a pair"),
        ({"instruction": "hi", "output": ""}, "turn 1 (assistant) has no text"),
        ({"instruction": "hi", "output": "x", "tools": "{"}, "tools is text but not valid JSON"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "first turn after the system turn is not a user turn"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"},
                          {"role": "assistant", "content": "c"}]},
            "turn 1 is a system turn",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_bad_row_is_named_with_line_and_field_and_spares_the_others(
    tmp_path: Path, row: object, said: str, name: str
) -> None:
    good = {"instruction": "hi", "output": "hello"}
    path = tmp_path / name
    lines = [json.dumps(one) for one in (good, row, good)]
    path.write_text("\n".join(lines) if name == "a.jsonl" else "[" + ",\n".join(lines) + "]", encoding="utf-8")
    rows, faults = read_conversations(path)
    assert len(rows) == 2
    assert len(faults) == 1
    assert faults[0].startswith(f"{path}, line 2: ")
    assert said in faults[0]


def test_broken_json_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "hi", "output": "x"}\n\n{"instruction": \n', encoding="utf-8")
    rows, faults = read_conversations(path)
    assert len(rows) == 1
    assert faults[0].startswith(f"{path}, line 3: not valid JSON")
    path = tmp_path / "a.json"
    path.write_text('[\n{"instruction": "hi", "output": "x"},\n{"instruction" "hi"}\n]', encoding="utf-8")
    rows, faults = read_conversations(path)
    assert len(rows) == 1
    assert faults[0].startswith(f"{path}, line 3: not valid JSON")
    path.write_text('[{"instruction": "hi", "output": "x"}', encoding="utf-8")
    assert "the list has no end" in read_conversations(path)[1][0]


def test_all_faults_come_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(25)])
    with pytest.raises(DataError, match=r"has 25 bad rows:\n.*line 1: (.|\n)*line 20: (.|\n)*and 5 more"):
        refuse_faults(path, read_conversations(path)[1])


@pytest.mark.parametrize("data", [b"\xff\xfe", gzip.compress(b"[]")[:-4]])
def test_a_file_that_is_no_text_is_one_clear_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / ("a.json" if data.startswith(b"\xff") else "a.json.gz")
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        read_conversations(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_conversations(tmp_path / "none.json")


def test_real_files_of_each_format_are_read_whole(shared_data: Path) -> None:
    for name, count in {
        "qwen_format_sample.json": 2,
        "belle_sampled_qwen.json": 2,
        "identity.jsonl.gz": 91,
        "glaive_toolcall_en_demo.json.gz": 225,
        "glaive_toolcall_zh_demo.json.gz": 225,
    }.items():
        rows, faults = read_conversations(shared_data / "sft" / name)
        assert (len(rows), faults) == (count, []), name
