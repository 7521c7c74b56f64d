"""One conversation: carries out the lines that a person types. Knows no terminal: it calls `write` and `say`."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from kiloq.chat import Message, parse_messages, parse_reply
from kiloq.cli.chat_commands import help_text, parse_line, parse_seed, parse_settings
from kiloq.engine import SamplingParams
from kiloq.errors import DataError, RequestError

if TYPE_CHECKING:
    from kiloq.engine import LLM, Piece

# Several answers at once and their probabilities have no place in a conversation.
_NOT_IN_A_CHAT = {"n", "logprobs"}


@dataclass(kw_only=True)
class ChatSession:
    """A conversation with one model. `conf` holds only what differs from the model's own sampling."""

    llm: "LLM"
    write: Callable[[str], None]
    say: Callable[[str], None]
    clear_screen: Callable[[], None]
    conf: dict[str, object]
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    path: Path | None = None
    stop_requested: bool = False
    first_conf: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        self.first_conf = dict(self.conf)
        self.params()

    def params(self) -> SamplingParams:
        return SamplingParams.for_model(self.llm.generation, **self.conf)

    def handle(self, typed: str) -> bool:
        """Carry out one line; False when the person wants to leave. A mistake is a KiloqError and changes nothing."""
        line = parse_line(typed)
        match line.command:
            case None:
                if line.text.strip():
                    self.answer(line.text)
            case "quit":
                return False
            case "help":
                self.say(help_text())
            case "clear":
                self.clear_screen()
            case "clear-history":
                self.say(f"Forgot {count(len(self.messages), 'message')}.")
                self.messages.clear()
            case "history":
                self.show_history()
            case "save":
                self.save(line.text)
            case "system":
                self.change_system(line.text)
            case command:
                self.change_sampling(command, line.text)
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to one message; both join the conversation, also when the answer is stopped half-way.

        A KeyboardInterrupt passes through: what was said before it is kept, and where nothing was, nothing changes.
        """
        question = Message(role="user", content=text)
        said: list[Piece] = []
        self.stop_requested = False
        pieces = self.llm.stream([*self.opening(), *self.messages, question], self.params())
        try:
            for piece in pieces:
                said.append(piece)
                self.write(piece.text)
                if self.stop_requested:
                    break
        except KeyboardInterrupt:
            if said:
                self._keep(question, said)
            raise
        finally:
            pieces.close()
            self.write("\n")
        if self.stop_requested:
            self.say("(stopped; what was said is kept)")
        self._keep(question, said)

    def _keep(self, question: Message, said: "Sequence[Piece]") -> None:
        reply = parse_reply("".join(piece.text for piece in said), self.llm.format)
        ids = tuple(token_id for piece in said for token_id in piece.token_ids)
        answer = Message(role="assistant", content=reply.content, reasoning=reply.reasoning, token_ids=ids)
        self.messages += [question, answer]

    def opening(self) -> list[Message]:
        """The system prompt as messages: none leaves it to the model's own format."""
        return [] if self.system is None else [Message(role="system", content=self.system)]

    def stop(self) -> None:
        """End the answer that is being streamed after its next piece."""
        self.stop_requested = True

    def show_history(self) -> None:
        for message in [*self.opening(), *self.messages]:
            self.say(f"{message.role}: {message.content}")
        if not self.messages:
            self.say("Nothing has been said yet.")

    def change_system(self, text: str) -> None:
        if text:
            self.system = None if text == "-" else text
        self.say("No system prompt but the model's own." if self.system is None else f"system: {self.system}")

    def change_sampling(self, command: str, text: str) -> None:
        """`:seed`, `:conf` and `:reset-conf`: a new sampling is checked whole before it takes effect."""
        if command == "reset-conf":
            changed = dict(self.first_conf)
        elif command == "seed":
            changed = self.conf | ({"seed": parse_seed(text)} if text else {})
        else:
            changed = self.conf | parse_settings(text)
        unfit = sorted(_NOT_IN_A_CHAT & changed.keys())
        if unfit:
            raise RequestError(f"{unfit[0]} has no meaning in a chat; use `kiloq generate` for it.")
        params = SamplingParams.for_model(self.llm.generation, **changed)
        self.conf = changed
        if command == "seed":
            self.say(f"seed={json.dumps(params.seed)}")
        else:
            names = [item.name for item in fields(params) if item.name not in _NOT_IN_A_CHAT]
            self.say("\n".join(f"{name}={json.dumps(getattr(params, name), default=list)}" for name in names))

    def save(self, text: str) -> None:
        try:
            path = Path(text).expanduser() if text else self.path
        except RuntimeError as error:
            raise DataError(f"cannot save the conversation to {text}: {error}") from error
        if path is None:
            raise RequestError("there is no file to save to yet; name one, such as :save talk.json.")
        write_conversation(path, [*self.opening(), *self.messages])
        self.path = path
        self.say(f"Saved {count(len(self.messages), 'message')} to {path}; continue with: kiloq chat -c {path}")


def read_conversation(path: Path) -> tuple[str | None, list[Message]]:
    """A saved chat: its system prompt, if it has one, and its messages."""
    try:
        messages = list(parse_messages(json.loads(path.read_text(encoding="utf-8"))))
    except RequestError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read the conversation {path}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not a saved conversation, a JSON list of messages: {error}.") from error
    except RecursionError as error:
        raise DataError(f"{path} is not a saved conversation: it is nested too deeply.") from error
    if messages and messages[0].role == "system":
        return messages[0].content, messages[1:]
    return None, messages


def write_conversation(path: Path, messages: Sequence[Message]) -> None:
    """Save messages as the JSON list that every OpenAI-shaped door reads; never leaves half a file."""
    rows = [
        {"role": message.role, "content": message.content}
        | ({"reasoning_content": message.reasoning} if message.reasoning else {})
        for message in messages
    ]
    try:
        content = (json.dumps(rows, ensure_ascii=False, indent=1) + "\n").encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"cannot save the conversation to {path}: a message holds half a character, {error.object[error.start]!a}; "
            "forget it with :clear-history."
        ) from error
    part = path.with_name(path.name + ".part") if path.name else path
    try:
        if path.is_dir():
            raise DataError(f"cannot save the conversation to {path}: it is a folder; name a file in it.")
        part.write_bytes(content)
        part.replace(path)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):  # a name that no file can have has left nothing
            part.unlink()
        raise DataError(f"cannot save the conversation to {path}: {error}.") from error


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
