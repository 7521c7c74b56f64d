"""The check before step 1: what ends an answer is learned, stops the saved model, and is all that must be learned.

Models that never stop, or learn nothing, come from a broken chain of three: the template's end token, the token that
is trained, and the token at which generation stops. Knows no weights.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kiloq.checkpoint import GenerationDefaults, open_checkpoint
from kiloq.errors import CheckpointError, ConfigError, DataError
from kiloq.tokenizer import Tokenizer

from .losses import IGNORE
from .samples import Sample
from .show import token_lines

_LITTLE = 0.05  # a smaller share of trained tokens is more often a mistake than a wish
_SHOWN = 3
_LONGEST = 400  # tokens of a sample that are shown
_TAIL = 12  # trained tokens of it that a log shows


def check_contract(
    samples: Sequence[Sample], tokenizer: Tokenizer, generation: GenerationDefaults, *, vocab_size: int
) -> list[str]:
    """What a person should know of it, for the log; an error where training would teach what nobody wants.

    `generation` is what will be saved with the model, `vocab_size` how many ids its embedding has.
    """
    end = tokenizer.im_end_id
    for number, sample in enumerate(samples, 1):
        if endless := _endless_turns(sample, tokenizer):
            raise DataError(
                f"sample {number:,}: {endless} trained turns do not end with a trained {_name(end, tokenizer)}, so the "
                "model would not learn to stop. This is a fault of the chat format; please report it."
            )
        if (highest := int(sample.ids.max())) >= vocab_size:
            raise ConfigError(
                f"sample {number:,} holds id {highest:,}, but the model's embedding has {vocab_size:,} rows. "
                "Use the tokenizer that belongs to the model."
            )
    if end not in generation.stop_ids:
        raise ConfigError(
            f"answers are trained to end with {_name(end, tokenizer)}, but the saved model would stop only at "
            f"{', '.join(_name(stop, tokenizer) for stop in generation.stop_ids)}. Add it to generation_config.json."
        )
    tokens = sum(len(sample.ids) for sample in samples)
    trained = sum(int((sample.targets != IGNORE).sum()) for sample in samples)
    if not trained:
        raise DataError(f"of {tokens:,} tokens in {len(samples):,} samples none is trained; see `kiloq train show`.")
    notes = [f"each answer is trained to end with {_name(end, tokenizer)}, at which the saved model stops"]
    if trained < _LITTLE * tokens:
        notes.append(
            f"warning: only {100 * trained / tokens:.1f} % of {tokens:,} tokens are trained; "
            "`kiloq train show` shows which"
        )
    return notes


def check_saved(folder: Path) -> None:
    """The same of what was written; CheckpointError where a server that loads it would not stop.

    An adapter has no tokenizer of its own to ask; it holds the generation_config.json that was checked.
    """
    if not (folder / "config.json").exists():
        return
    checkpoint = open_checkpoint(folder)
    end = checkpoint.tokenizer.im_end_id
    if end not in checkpoint.generation.stop_ids:
        raise CheckpointError(
            f"{folder}: generation_config.json stops at {checkpoint.generation.stop_ids}, and not at {end}, with which "
            "the trained answers end. Add it to eos_token_id."
        )


def first_samples(samples: Sequence[Sample], tokenizer: Tokenizer, *, whole: bool) -> Iterator[str]:
    """Some samples for people: `whole` as coloured tokens, else a line for each, with the end of what is trained."""
    for number, sample in enumerate(samples[:_SHOWN], 1):
        marks = trained_marks(sample)
        said = f"sample {number}: {len(sample.ids):,} tokens, {sum(marks):,} trained"
        if whole:
            yield said
            yield from token_lines(sample.ids[:_LONGEST].tolist(), marks[:_LONGEST], tokenizer, colour=True)
        else:
            last = [token_id for token_id, marked in zip(sample.ids.tolist(), marks, strict=True) if marked][-_TAIL:]
            yield f"{said}, the last of them {tokenizer.decode(last)!r}"


def trained_marks(sample: Sample) -> list[bool]:
    """Which of a sample's ids are the target of the one before."""
    return [False, *(sample.targets[:-1] != IGNORE).tolist()]


def _endless_turns(sample: Sample, tokenizer: Tokenizer) -> int:
    """Turns of which something is trained, but not the token that ends them."""
    marks = np.array(trained_marks(sample))
    turn = np.cumsum(sample.ids == tokenizer.im_start_id)  # [n], which turn a token belongs to; 0 before the first
    if not turn[-1]:
        return 0  # plain text
    opened = sample.ids == tokenizer.im_start_id  # that a turn begins is no part of the turn (mask "qwen1" trains it)
    learned = np.bincount(turn[marks & ~opened], minlength=turn[-1] + 1)
    ended = np.bincount(turn[marks & (sample.ids == tokenizer.im_end_id)], minlength=turn[-1] + 1)
    return int(((learned > 0) & (ended == 0)).sum())


def _name(token_id: int, tokenizer: Tokenizer) -> str:
    return f"{tokenizer.decode([token_id])} ({token_id})"
