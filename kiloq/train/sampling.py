"""What the model says now to a few questions: lines for the log beside held-out figures. Knows no method."""

from collections.abc import Sequence

from kiloq.chat import Message, chat_format_for, render
from kiloq.checkpoint import Checkpoint
from kiloq.errors import ConfigError
from kiloq.model import Transformer
from kiloq.model.shard import is_split

from .live import Live
from .rollouts import Player, Prompt, RolloutConfig


class Answers:
    """Greedy answers of the live model, by the engine that serves it later.

    Nothing is copied but what kernels pack, and that only while it answers.
    """

    def __init__(self, model: Transformer, checkpoint: Checkpoint, questions: Sequence[str], *, most: int = 64) -> None:
        if questions and is_split(model):
            raise ConfigError(
                "parallel.tensor is set, and a model in shares answers no prompts; leave one of them out."
            )
        fmt = chat_format_for(checkpoint.config.family, checkpoint.folder)
        asked = [(Message(role="user", content=question),) for question in questions]
        self._prompts = [Prompt(one, tuple(render(one, checkpoint.tokenizer, fmt).ids), "") for one in asked]
        self._player = Player(Live(model), checkpoint, RolloutConfig(max_tokens=most))

    def lines(self) -> list[str]:
        """One for each question."""
        if not self._prompts:
            return []
        answers = self._player.best(self._prompts)
        return [f"{one.prompt.messages[-1].content!r} -> {one.text!r}" for one in answers]
