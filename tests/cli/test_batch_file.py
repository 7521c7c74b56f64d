"""Prompts are checked line by line; answers survive a kill and end in the order of the input."""

import json
from contextlib import closing
from io import BytesIO
from pathlib import Path

import pytest

from kiloq.cli.batch_file import AnswerFile, AnswerStream, Job, read_jobs
from kiloq.errors import DataError

DEEP = "[" * 100_000 + "]" * 100_000


def jobs_of(*ids: str | int) -> list[Job]:
    return read_jobs([json.dumps({"id": job_id, "prompt": "x"}).encode() for job_id in ids], "in.jsonl")[0]


def digests_of(*ids: str | int) -> dict[str | int, str]:
    return {job_id: f"digest of {job_id}" for job_id in ids}


def test_a_line_is_a_prompt_or_messages_with_its_own_sampling() -> None:
    lines = [
        b'{"prompt": "once", "temperature": 0, "logit_bias": {"7": -5}}\n',
        b"\n",
        b'{"id": "b", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}',
    ]
    jobs, faults = read_jobs(lines, "in.jsonl")
    assert not faults
    assert [(job.id, job.line, job.prompt, dict(job.sampling)) for job in jobs] == [
        (1, 1, "once", {"temperature": 0, "logit_bias": {7: -5}}),
        ("b", 3, None, {"max_tokens": 3}),
    ]
    assert jobs[1].messages[0].content == "hi"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ('{"prompt": ""}', "must be text that is not empty"),
        ('{"prompt": 5}', "must be text that is not empty"),
        ('{"prompt": "a", "id": 1.5}', '"id" is 1.5'),
        ('{"prompt": "a", "temprature": 1}', "Did you mean 'temperature'"),
        ('{"prompt": "a", "top_p": 2}', "top_p is 2"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "x"),
        ('{"messages": [{"role": "king", "content": "a"}]}', "role"),
        ('{"prompt": "a", "id": "\\ud800"}', '"id" is "\\ud800", which holds half a character'),
        pytest.param('{"prompt": "a", "id": ' + "9" * 5000 + "}", "digits", id="long id"),
        pytest.param('{"prompt": "a", "id": ' + DEEP + "}", "nested too deeply", id="deep id"),
        pytest.param('{"prompt": "a", "top_k": ' + DEEP + "}", "nested too deeply", id="deep setting"),
        ('{"prompt": "a", "id": "first"}', "used on line 1 already"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(line: str, complaint: str) -> None:
    jobs, faults = read_jobs([b'{"id": "first", "prompt": "x"}', line.encode()], "in.jsonl")
    assert [job.id for job in jobs] == ["first"]
    assert len(faults) == 1
    assert str(faults[0]).startswith("in.jsonl:2: ")
    assert complaint in str(faults[0])


def test_bytes_that_are_no_text_are_a_bad_line() -> None:
    _, faults = read_jobs([b'{"prompt": "\xff"}'], "in.jsonl")
    assert str(faults[0]).startswith("in.jsonl:1: ")


def test_answers_end_in_the_order_of_the_input(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    with closing(AnswerFile(path, digests_of("a", "b", 3))) as answers:
        for job_id in (3, "a", "b"):
            answers.write({"id": job_id, "text": "你好"})
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [3, "a", "b"]
        answers.finish()
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", 3]
    assert [entry.name for entry in path.parent.iterdir()] == ["out.jsonl"]


def test_reopening_keeps_whole_lines_and_cuts_a_half_one(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": "b", "job": "digest of b", "text": "kept"}\n{"id": "a", "te')
    with closing(AnswerFile(path, digests_of("a", "b"))) as answers:
        assert set(answers.done) == {"b"}
        answers.write({"id": "a", "text": "new"})
        answers.finish()
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["new", "kept"]


@pytest.mark.parametrize("line", ['{"id": "z"}', "[1]", '{"id": [1]}', "words", pytest.param(DEEP, id="deep")])
def test_a_file_of_something_else_is_left_alone(line: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(line + "\nhalf")
    with pytest.raises(DataError, match="is not an answer to this input"):
        AnswerFile(path, digests_of("a"))
    assert path.read_text() == line + "\nhalf"


@pytest.mark.parametrize("job", [', "job": "digest of b"', ""])
def test_an_answer_to_what_is_no_longer_asked_is_refused(job: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(f'{{"id": "a"{job}}}\n')
    with pytest.raises(DataError, match=r'out.jsonl:1 answers "id" "a" as another prompt.*now "digest of a".*-o'):
        AnswerFile(path, digests_of("a", "b"))


def test_the_file_begins_with_the_first_answer_and_a_place_for_none_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    with closing(AnswerFile(path, digests_of("a"))) as answers:
        assert not path.parent.exists()
        answers.write({"id": "a"})
        assert path.exists()
    for wrong in (path / "below" / "out.jsonl", path.parent):
        with pytest.raises(DataError, match="cannot write the answers to"):
            AnswerFile(wrong, digests_of("a"))


def test_a_pipe_gets_answers_in_order_and_skips_what_never_comes() -> None:
    out = BytesIO()
    stream = AnswerStream(out, jobs_of("a", "b", "c"))
    stream.write({"id": "c"})
    stream.skip("b")
    assert out.getvalue() == b""
    stream.write({"id": "a"})
    assert out.getvalue() == b'{"id": "a"}\n{"id": "c"}\n'
