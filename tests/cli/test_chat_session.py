"""A conversation with a real engine, without a terminal."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kiloq.chat import Message
from kiloq.cli.chat import talk_in_terminal
from kiloq.cli.chat_session import ChatSession, read_conversation, write_conversation
from kiloq.engine import LLM
from kiloq.errors import DataError, RequestError


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model)


@pytest.fixture
def start(llm: LLM) -> Callable[..., tuple[ChatSession, list[str], list[str]]]:
    """A session that begins with the given settings, and what it writes and says."""

    def make(**conf: object) -> tuple[ChatSession, list[str], list[str]]:
        written: list[str] = []
        said: list[str] = []
        session = ChatSession(llm=llm, write=written.append, say=said.append, clear_screen=lambda: None, conf=conf)
        return session, written, said

    return make


def test_what_is_written_is_what_is_kept(start: Callable[..., tuple[ChatSession, list[str], list[str]]]) -> None:
    session, written, _ = start(seed=1)
    assert session.handle("hello")
    assert [message.role for message in session.messages] == ["user", "assistant"]
    assert "".join(written) == session.messages[1].content + "\n"


def test_a_second_turn_computes_only_what_is_new(
    start: Callable[..., tuple[ChatSession, list[str], list[str]]], llm: LLM
) -> None:
    session, _, _ = start(seed=1, max_tokens=20, ignore_eos=True)
    session.handle("a long question " * 8)
    before = llm.engine.stats.computed_tokens
    session.handle("why?")
    computed = llm.engine.stats.computed_tokens - before
    prompt_ids, _ = llm.prompt_of(session.messages[:-1])
    answer_ids = session.messages[-1].token_ids
    assert answer_ids is not None
    assert len(prompt_ids) > 100
    assert computed < len(answer_ids) + 60


def test_a_stopped_answer_keeps_its_ids_and_the_chat_goes_on(
    start: Callable[..., tuple[ChatSession, list[str], list[str]]], llm: LLM
) -> None:
    session, written, said = start(seed=1, max_tokens=500, ignore_eos=True)

    def write_and_stop(text: str) -> None:
        written.append(text)
        session.stop()

    session.write = write_and_stop
    session.handle("hello")
    assert "stopped" in said[-1]
    ids = session.messages[1].token_ids
    assert ids is not None
    assert 0 < len(ids) < 500
    assert llm.tokenizer.decode(ids, skip_special=True) == "".join(written).removesuffix("\n")
    assert llm.engine.stats.running == 0
    session.handle("go on")
    assert len(session.messages) == 4


@pytest.mark.parametrize("begun", [True, False])
def test_a_second_ctrl_c_ends_the_answer_and_not_the_talk(
    start: Callable[..., tuple[ChatSession, list[str], list[str]]],
    llm: LLM,
    capsys: pytest.CaptureFixture[str],
    begun: bool,
) -> None:
    session, written, _ = start(seed=1, max_tokens=500, ignore_eos=True)
    session.handle("before")
    lines = iter(["the one that is cut", ":conf max_tokens=4", "after"])

    def press_twice(*_: object) -> None:
        hook.remove()
        session.write = written.append
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    def read() -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    hook = llm.model.register_forward_pre_hook(press_twice)  # in the middle of a step of the engine
    if begun:
        hook.remove()
        session.write = press_twice
    assert talk_in_terminal(read, handle=session.handle, stop=session.stop) == 0
    assert "goes on" in capsys.readouterr().err
    questions = [message.content for message in session.messages if message.role == "user"]
    assert questions == (["before", "the one that is cut", "after"] if begun else ["before", "after"])
    assert all(message.token_ids for message in session.messages if message.role == "assistant")
    assert llm.engine.stats.running == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_message_that_is_too_long_changes_nothing(
    start: Callable[..., tuple[ChatSession, list[str], list[str]]],
) -> None:
    session, _, _ = start(max_tokens=4)
    session.handle("hello")
    before = list(session.messages)
    with pytest.raises(RequestError, match="the limit is"):
        session.handle("word " * 3000)
    assert session.messages == before


def test_settings_that_a_chat_cannot_honour_are_refused(
    start: Callable[..., tuple[ChatSession, list[str], list[str]]],
) -> None:
    session, _, _ = start()
    with pytest.raises(RequestError, match="n has no meaning in a chat"):
        session.handle(":conf n=2")
    assert session.conf == {}


def test_a_chat_is_saved_and_read_back(
    start: Callable[..., tuple[ChatSession, list[str], list[str]]], tmp_path: Path
) -> None:
    session, _, _ = start(seed=2, max_tokens=4)
    with pytest.raises(RequestError, match="name one, such as"):
        session.handle(":save")
    session.handle(":system 簡潔に。")
    session.handle("你好")
    session.handle(f":save {tmp_path / 'talk.json'}")
    session.handle("again")
    session.handle(":save")
    system, messages = read_conversation(tmp_path / "talk.json")
    assert system == "簡潔に。"
    assert [(one.role, one.content) for one in messages] == [(one.role, one.content) for one in session.messages]
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.parametrize(
    "content", ["{", "3", '[{"role": "king", "content": ""}]', pytest.param("[" * 100_000, id="deep"), None]
)
def test_a_file_that_is_no_chat_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=str(path)):
        read_conversation(path)


@pytest.mark.parametrize("name", [".", "/", "..", "folder", "~nouser/x", "a\0b", "x" * 300, "half \ud800", "none/x"])
def test_a_chat_that_cannot_be_saved_is_told_and_leaves_nothing(
    start: Callable[..., tuple[ChatSession, list[str], list[str]]],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    session, _, _ = start(max_tokens=4)
    session.handle("hello")
    with pytest.raises(DataError, match="cannot save the conversation to"):
        session.handle(f":save {name}")
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "folder"]
    assert session.path is None


def test_half_a_character_in_a_chat_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="half a character"):
        write_conversation(tmp_path / "talk.json", [Message(role="user", content="\ud800")])
    assert not list(tmp_path.iterdir())


def test_a_saved_chat_of_only_a_system_prompt_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"role": "system", "content": "Be brief."}]))
    assert read_conversation(path) == ("Be brief.", [])
