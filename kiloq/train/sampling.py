"""What the model says now to a few questions: lines for the log beside held-out figures. Knows no method."""

from collections.abc import Sequence

from kiloq.chat import Message, chat_format_for, render
from kiloq.checkpoint import Checkpoint
from kiloq.errors import ConfigError
from kiloq.model import Transformer

from .live import Live
from .parallel import Parallel
from .rollouts import Player, Prompt, RolloutConfig


class Answers:
    """Greedy answers of the live model, by the engine that serves it later.

    Nothing is copied but what kernels pack, and that only while it answers.
    """

    def __init__(
        self,
        model: Transformer,
        checkpoint: Checkpoint,
        questions: Sequence[str],
        *,
        parallel: Parallel,
        most: int = 64,
    ) -> None:
        if questions and parallel.is_sharded:
            raise ConfigError(
                "the recipe has prompts, which a whole model answers, and each process holds only a part of this one. "
                "Leave prompts out, or set parallel.kind = ddp."
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
