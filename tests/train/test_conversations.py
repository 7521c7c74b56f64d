import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kiloq.chat import Message, ToolCall
from kiloq.errors import DataError
from kiloq.train import rows as rows_of_files
from kiloq.train.conversations import read_conversations
from kiloq.train.rows import kinds_of, refuse_faults

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
        ({"messages": "hi"}, "messages is not a list of turns"),
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
        ({"instruction": "hi", "output": ""}, "output is empty"),
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
    assert str(faults[0]).startswith(f"{path}, line 2: ")
    assert said in str(faults[0])


def as_openai(message: Message) -> dict[str, object]:
    raw: dict[str, object] = {"role": message.role, "content": message.content}
    if message.reasoning:
        raw["reasoning_content"] = message.reasoning
    if message.tool_calls:
        raw["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        raw["tool_call_id"] = message.tool_call_id
    return raw if message.trained else {**raw, "weight": 0}


SAID = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)
CALLS = st.builds(ToolCall, name=SAID, arguments=st.just('{"a": 1}'), id=SAID)
ANSWERS = st.builds(
    Message,
    role=st.just("assistant"),
    content=SAID,
    reasoning=st.text(st.sampled_from("a\n<"), max_size=3),
    tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    trained=st.booleans(),
)
ROUNDS = st.tuples(
    st.builds(Message, role=st.just("user"), content=SAID),
    ANSWERS,
    st.builds(Message, role=st.just("tool"), content=SAID, tool_call_id=SAID),
    ANSWERS,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(ROUNDS, min_size=1, max_size=3), name=st.sampled_from(["a.json", "a.jsonl.gz", "a.parquet"]))
def test_messages_come_back_from_a_file_as_they_were(
    tmp_path: Path, rounds: list[tuple[Message, ...]], name: str
) -> None:
    messages = tuple(message for one in rounds for message in one)
    row = {"messages": [as_openai(message) for message in messages], "unused": None}
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / name)
    else:
        write(tmp_path / name, [row, row])
    rows, faults = read_conversations(tmp_path / name)
    assert faults == []
    assert [one.messages for one in rows] == [messages, messages]


def test_a_fault_in_parquet_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"instruction": "hi", "output": None if i == 1500 else "x"} for i in range(1600)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    good, faults = read_conversations(path)
    assert len(good) == 1599
    assert list(map(str, faults)) == [f"{path}, row 1501: output is missing; it must be text."]
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_conversations(path)


def test_turns_of_roles_under_conversations_and_parts_with_thoughts_and_calls_are_read(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    path = write(
        tmp_path / "a.jsonl",
        [
            {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": "1+1?"}]},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "reasoning", "value": "add"},
                            {"type": "tool_call", "value": json.dumps(call)},
                            {"type": "tool_call", "value": call},
                        ],
                    },
                ]
            },
            {"prompt": "hi", "completion": "hello"},
        ],
    )
    rows, faults = read_conversations(path)
    assert faults == []
    assert rows[0].messages == rows[2].messages == HELLO
    answer = rows[1].messages[1]
    assert (answer.content, answer.reasoning, len(answer.tool_calls)) == ("", "add", 2)
    assert answer.tool_calls[0] == answer.tool_calls[1]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_list_read_in_pieces_gives_the_same_rows_and_lines(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_of_files, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    good = json.dumps({"instruction": 'h\u00e9\ud83d\ude00"}]\n', "output": "true"}, indent=1)
    path.write_text(f"\n [\n{good},\n{good} ,\n  3,\n{good}\n]\n", encoding="utf-8-sig")
    rows, faults = read_conversations(path)
    assert [one.messages[0].content for one in rows] == ['h\u00e9\U0001f600"}]\n'] * 3
    assert [one.where.partition(", ")[2] for one in rows] == ["line 3", "line 7", "line 12"]
    assert list(map(str, faults)) == [f"{path}, line 11: the row is of type int; it must be an object."]
    path.write_text(f"[{good}]\n\n{{}}", encoding="utf-8")
    _, faults = read_conversations(path)
    assert "line 4: behind the list stands '{" in str(faults[0])
    path.write_text(f"[\n{good},\n\n{{'a': 1}}]", encoding="utf-8")
    rows, faults = read_conversations(path)
    assert len(rows) == 1
    assert str(faults[0]).startswith(f"{path}, line 7: not valid JSON")
    assert "has not been read" in str(faults[0])


@pytest.mark.parametrize("arguments", ['{"city": ', "[1]", "Seoul"])
def test_calls_that_no_tool_could_read_are_not_learned(tmp_path: Path, arguments: str) -> None:
    call = {"function": {"name": "weather", "arguments": arguments}}
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]}
    _, faults = read_conversations(write(tmp_path / "a.jsonl", [row]))
    assert "line 1: turn 1: the arguments of weather are" in str(faults[0])


def test_faults_are_counted_by_kind(tmp_path: Path) -> None:
    bad = [{"conversations": [{"from": "user", "value": "x"}] * (i + 1) + [{"from": "gpt"}]} for i in range(30)]
    path = write(tmp_path / "a.jsonl", [*bad, {"messages": [{"role": "it's", "content": "x"}]}])
    _, faults = read_conversations(path)
    first, second = kinds_of(faults)
    assert first == f"30 rows, first {path}, line 1: conversations[1].value is missing; it must be text."
    assert second.startswith(f"1 row, first {path}, line 31: messages[0].role is ")
    with pytest.raises(
        DataError, match=r"has 31 bad rows:\n(.*\n){20}\.\.\. and 11 more. Of each kind:\n30 rows, first"
    ):
        refuse_faults(path, faults)


def test_rows_that_judge_answers_are_no_conversations(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [
            {"prompt": "hi", "chosen": "a", "rejected": "b"},
            {"prompt": "hi", "completion": "a", "label": False},
            {"prompt": "hi", "completion": "a", "label": "greeting"},
        ],
    )
    rows, faults = read_conversations(path)
    assert len(rows) == 1
    assert "chosen and rejected, so it says which answers are good; train it with reward or dpo" in str(faults[0])
    assert "the row has label" in str(faults[1])


def test_broken_json_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "hi", "output": "x"}\n\n{"instruction": \n', encoding="utf-8")
    rows, faults = read_conversations(path)
    assert len(rows) == 1
    assert str(faults[0]).startswith(f"{path}, line 3: not valid JSON")
    path = tmp_path / "a.json"
    path.write_text('[\n{"instruction": "hi", "output": "x"},\n{"instruction" "hi"}\n]', encoding="utf-8")
    rows, faults = read_conversations(path)
    assert len(rows) == 1
    assert str(faults[0]).startswith(f"{path}, line 3: not valid JSON")
    path.write_text('[{"instruction": "hi", "output": "x"}', encoding="utf-8")
    assert "the list has no end" in str(read_conversations(path)[1][0])


def test_all_faults_come_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(25)])
    with pytest.raises(
        DataError, match=r"has 25 bad rows:\n.*line 1: (.|\n)*line 20: (.|\n)*and 5 more. Of each kind:\n25 rows, first"
    ):
        refuse_faults(path, read_conversations(path)[1])


@pytest.mark.parametrize(("name", "data"), [("a.json", b"[\xff\xfe]"), ("a.json.gz", gzip.compress(b"[]")[:-4])])
def test_a_file_that_is_no_text_is_one_clear_error(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
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
        "reason_tool_use_demo_50.jsonl.gz": 50,
        "oasst_octopack_en.jsonl.gz": 1176,
        "classical_to_modern_zh.jsonl.gz": 12000,
    }.items():
        rows, faults = read_conversations(shared_data / "sft" / name)
        assert (len(rows), faults) == (count, []), name


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_is_a_fault_and_a_whole_one_is_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [r'{"prompt": "\ud83d\ude00", "completion": "b"}', r'{"prompt": "a", "completion": "b\uDFFF"}']
    path.write_text(f"[{','.join(rows)}]" if name == "a.json" else "\n".join(rows))
    read, faults = read_conversations(path)
    assert [row.messages[0].content for row in read] == ["😀"]
    assert [fault.said for fault in faults] == [r"the text has half of a character ('\udfff', an unpaired surrogate)."]


def test_an_answer_of_blanks_is_empty(tmp_path: Path) -> None:
    _, faults = read_conversations(write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": " \n "}]))
    assert [fault.said for fault in faults] == ["turn 1 (assistant) has no text."]


def test_text_in_parquet_that_is_no_text_is_one_clear_error(tmp_path: Path) -> None:
    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    prompts = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts, "completion": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet: 'utf-8' codec"):
        read_conversations(tmp_path / "a.parquet")


@pytest.mark.parametrize("label", [0, 1, 1.0])
def test_a_label_beside_one_answer_judges_it_however_it_is_written(tmp_path: Path, label: object) -> None:
    _, faults = read_conversations(write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": label}]))
    assert [fault.said for fault in faults] == [
        "the row has label, so it says which answers are good; train it with reward or dpo."
    ]
