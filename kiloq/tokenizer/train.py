"""Learns a byte-level BPE vocabulary from text, cut by Qwen's pattern, and writes it as `.tiktoken`."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import regex

from kiloq.errors import DataError, MissingExtraError, TokenizerError

from .formats import dump_ranks, write_files
from .formats_hf import ranks_of_merges
from .normalise import join_surrogates, nfc
from .vocabulary import NUM_SPECIALS, QWEN_PATTERN

# The learner takes quadratic time on one piece: 6 s for 100,000 letters. Cutting there costs a pair in thousands.
_MAX_PIECE = 2000
_LONG_PIECE = regex.compile(r"(?<!\p{L})\p{L}{2000,}|(?<!\s)\s{2000,}|(?<![^\s\p{L}\p{N}])[^\s\p{L}\p{N}]{2000,}")
_BLOCK = 2**20  # characters of whole lines that are handed over at once


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, output: str | Path | None = None, min_count: int = 2
) -> dict[bytes, int]:
    """Ranks learned from the texts, the same on every run; `vocab_size` counts them and the 208 specials.

    The ranks go to `output`, a `.tiktoken` file, if it is given. Pairs seen less than `min_count` times stay apart.
    """
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingExtraError("training a tokenizer needs pip install 'kiloq[tokenizer]'") from error

    num_ranks = vocab_size - NUM_SPECIALS
    if num_ranks < 256:
        raise TokenizerError(f"vocab_size is {vocab_size}; 256 bytes and {NUM_SPECIALS} specials need at least 464.")
    if output is not None and Path(output).suffix != ".tiktoken":
        raise TokenizerError(f"the vocabulary would be written to {output}; its name must end in .tiktoken.")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks,
        min_frequency=min_count,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(_clean(texts), trainer)
    model = json.loads(learner.to_str())["model"]
    ranks = ranks_of_merges(model["vocab"], map(tuple, model["merges"]), {}, "the learned vocabulary")
    if len(ranks) < num_ranks:
        raise TokenizerError(
            f"vocab_size is {vocab_size}, but the texts hold pairs for only {len(ranks) + NUM_SPECIALS}. "
            "Give more text or a smaller vocab_size."
        )
    if output is not None:
        write_files(Path(output).parent, {Path(output).name: dump_ranks(ranks)})
    return ranks


def read_texts(paths: Iterable[Path]) -> Iterator[str]:
    """Texts of plain files, and of the field `text` in `.jsonl` files; either may be gzipped (`.gz`)."""
    for path in paths:
        open_file = gzip.open if path.suffix == ".gz" else open
        try:
            with open_file(path, "rt", encoding="utf-8", newline="") as file:
                if path.name.removesuffix(".gz").endswith(".jsonl"):
                    yield from (_text_of(line, path, number) for number, line in enumerate(file, 1) if line.strip())
                else:
                    while lines := file.readlines(_BLOCK):
                        yield "".join(lines)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise DataError(f"{path} cannot be read as UTF-8 text: {reason}.") from error


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number} is not JSON: {error}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f'{path}, line {number} has no field "text"; each line is an object with the text in it.')
    return str(row["text"])


def _clean(texts: Iterable[str]) -> Iterator[str]:
    """The texts composed, and cut inside of pieces that are too long to be words of any language."""
    for raw in texts:
        text = nfc(join_surrogates(raw))
        start = 0
        for run in _LONG_PIECE.finditer(text):
            for end in range(run.start() + _MAX_PIECE, run.end(), _MAX_PIECE):
                yield text[start:end]
                start = end
        yield text[start:]
