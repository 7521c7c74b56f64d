"""A checkpoint folder of a named shape with random weights and a made-up vocabulary, for whatever reads checkpoints."""

import os
import random
from itertools import product
from pathlib import Path

import torch

from kiloq.checkpoint import save_checkpoint
from kiloq.checkpoint.generation import GenerationDefaults
from kiloq.checkpoint.weights import empty_model, parameter_shapes
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.formats import dump_ranks
from kiloq.tokenizer.vocabulary import NUM_SPECIALS, Vocabulary, qwen_specials

from .random_weights import RandomMatrices
from .shapes import shape_config

_MOST_RANKS = 151_643  # of Qwen's own vocabulary


def kept_random_checkpoint(shape: str) -> Path:
    """The folder of such a checkpoint in the user's cache, where its packed matrices are kept too; made once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "kiloq" / "random" / shape.lower()
    if not folder.exists():
        write_random_checkpoint(folder, shape)
    return folder


def write_random_checkpoint(folder: Path, shape: str, *, seed: int = 0) -> None:
    """Write a new folder with weights in bf16. What it says is noise; sizes, files and prompts are as in real ones."""
    config = shape_config(shape)
    generator = torch.Generator().manual_seed(seed)
    draw = RandomMatrices(generator)
    state = {}
    for name, size in parameter_shapes(empty_model(config)).items():
        if len(size) == 2:
            matrix = draw(*size, "bf16")
            assert isinstance(matrix, torch.Tensor)
            state[name] = matrix
        elif name.endswith("bias"):
            state[name] = torch.empty(size).normal_(0, 0.1, generator=generator).bfloat16()
        else:  # the gains of norms
            state[name] = torch.ones(size, dtype=torch.bfloat16)
    tokenizer = Tokenizer(made_up_vocabulary(min(_MOST_RANKS, config.vocab_size - NUM_SPECIALS), seed))
    save_checkpoint(
        folder,
        model_state=state,
        config=config,
        tokenizer=tokenizer,
        generation=GenerationDefaults(
            stop_ids=(tokenizer.im_end_id, tokenizer.end_of_text_id),
            pad_id=tokenizer.end_of_text_id,
            chat_format="chatml",
            max_window=config.max_length,
            temperature=0.0,
        ),
    )


def made_up_vocabulary(size: int, seed: int = 0) -> Vocabulary:
    """Bytes, syllables, all pairs of syllables and, in a random order, threes: about five bytes a token."""
    syllables = ["".join(pair) for pair in product("bcdfghjklmnpqrstvwxz", "aeiouy")]
    pairs = [first + second for first, second in product(syllables, repeat=2)]
    # A three is the merge of a pair and a syllable, whichever pair merges first: byte pair encoding needs such a way.
    chance = random.Random(seed)
    chosen = chance.sample(range(len(pairs) * len(syllables)), size)
    threes = [pairs[n // len(syllables)] + syllables[n % len(syllables)] for n in chosen]
    pieces = [bytes([i]) for i in range(256)] + [text.encode() for text in (*syllables, *pairs, *threes)]
    ranks = {piece: rank for rank, piece in enumerate(pieces[:size])}
    return Vocabulary(
        name="made-up",
        ranks=ranks,
        special=qwen_specials(size),
        files={
            "qwen.tiktoken": dump_ranks(ranks),
            "tokenizer_config.json": b'{"tokenizer_class": "QWenTokenizer"}\n',
        },
    )
