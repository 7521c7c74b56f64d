from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kiloq.chat import QWEN1, QWEN2_5, Message, ToolCall
from kiloq.checkpoint import GenerationDefaults
from kiloq.errors import CheckpointError, ConfigError, DataError
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer
from kiloq.train.contract import check_contract, check_saved, first_samples
from kiloq.train.conversations import Conversation
from kiloq.train.losses import IGNORE
from kiloq.train.pretrain import ShapeConfig, qwen1_config
from kiloq.train.run_folder import export
from kiloq.train.samples import Mask, Sample, Samples
from kiloq.train.texts import Document

CALL = Message(role="assistant", content="look", tool_calls=(ToolCall(name="f", arguments="{}"),))
TALK = Conversation(
    (
        Message(role="user", content="hi"),
        CALL,
        Message(role="tool", content="4"),
        Message(role="assistant", content="four"),
        Message(role="user", content="and?"),
        Message(role="assistant", content="five"),
    ),
    (),
    "here",
)


@pytest.fixture
def generation(tokenizer: Tokenizer) -> GenerationDefaults:
    stops = (tokenizer.im_end_id, tokenizer.end_of_text_id)
    return GenerationDefaults(stop_ids=stops, pad_id=stops[1], chat_format="chatml", max_window=512)


def check(samples: list[Sample], tokenizer: Tokenizer, generation: GenerationDefaults) -> list[str]:
    return check_contract(samples, tokenizer, generation, vocab_size=tokenizer.size)


@pytest.mark.parametrize("mask", ["assistant", "qwen1"])
def test_what_the_formats_render_keeps_the_contract(
    tokenizer: Tokenizer, generation: GenerationDefaults, mask: Mask
) -> None:
    call_again = replace(TALK, messages=(*TALK.messages[:3], *TALK.messages[4:]))  # a result that nobody comments
    shown = replace(TALK, messages=(TALK.messages[0], replace(CALL, trained=False), *TALK.messages[2:]))
    for fmt in (QWEN1, QWEN2_5):
        samples = Samples(tokenizer, fmt, seq_len=512, mask=mask)
        made = [*samples.read([TALK, call_again, shown]), *samples.document(Document("plain", "here"))]
        (note,) = check(made, tokenizer, generation)
        assert (
            note
            == f"each answer is trained to end with <|im_end|> ({tokenizer.im_end_id}), at which the saved model stops"
        )


def test_an_end_that_is_not_trained_is_an_error(tokenizer: Tokenizer, generation: GenerationDefaults) -> None:
    (sample,) = Samples(tokenizer, QWEN2_5, seq_len=512).read([TALK])
    targets = np.where(sample.targets == tokenizer.im_end_id, IGNORE, sample.targets)
    with pytest.raises(DataError, match=r"sample 1: 3 trained turns do not end with a trained <\|im_end\|>"):
        check([Sample(sample.ids, targets)], tokenizer, generation)


def test_a_model_that_would_not_stop_is_refused(tokenizer: Tokenizer, generation: GenerationDefaults) -> None:
    samples = Samples(tokenizer, QWEN2_5, seq_len=512).read([TALK])
    with pytest.raises(ConfigError, match=r"stop only at <\|endoftext\|> \(256\)"):
        check(samples, tokenizer, replace(generation, stop_ids=(tokenizer.end_of_text_id,)))


def test_ids_beyond_the_embedding_are_refused(tokenizer: Tokenizer, generation: GenerationDefaults) -> None:
    samples = Samples(tokenizer, QWEN2_5, seq_len=512).read([TALK])
    with pytest.raises(ConfigError, match=r"holds id 258, but the model's embedding has 258 rows"):
        check_contract(samples, tokenizer, generation, vocab_size=258)


def test_few_trained_tokens_are_a_warning_and_none_is_an_error(
    tokenizer: Tokenizer, generation: GenerationDefaults
) -> None:
    asked = Conversation((Message(role="user", content="x" * 400), Message(role="assistant", content="y")), (), "here")
    (sample,) = Samples(tokenizer, QWEN1, seq_len=512).read([asked])
    assert check([sample], tokenizer, generation)[1].startswith("warning: only 0.4 % of 4")
    nothing = Sample(sample.ids, np.full_like(sample.targets, IGNORE))
    with pytest.raises(DataError, match=r"of 4\d\d tokens in 1 samples none is trained"):
        check([nothing], tokenizer, generation)


def test_samples_are_shown_as_coloured_tokens_or_in_a_line(tokenizer: Tokenizer) -> None:
    samples = Samples(tokenizer, QWEN2_5, seq_len=512).read([TALK] * 5)
    lines = list(first_samples(samples, tokenizer, whole=False))
    assert len(lines) == 3
    assert lines[0].endswith("trained, the last of them '><|im_end|>four<|im_end|>five<|im_end|>'")
    shown = "\n".join(first_samples(samples, tokenizer, whole=True))
    assert "a|s|s|i|s|t|a|n|t|\\n\n\033[32mf\033[0m|\033[32mi\033[0m" in shown


def test_a_saved_model_that_does_not_stop_is_found(
    tmp_path: Path, tokenizer: Tokenizer, generation: GenerationDefaults
) -> None:
    model = Transformer(qwen1_config(ShapeConfig(hidden_size=16, num_layers=1, num_heads=2), tokenizer.size))
    model.init_weights(torch.Generator().manual_seed(0))
    export(tmp_path / "m", model, tokenizer, generation)
    check_saved(tmp_path / "m")
    raw = replace(generation, chat_format="raw", stop_ids=(tokenizer.end_of_text_id,))
    export(tmp_path / "m", model, tokenizer, raw)
    with pytest.raises(CheckpointError, match=r"stops at \(256,\), and not at 258"):
        check_saved(tmp_path / "m")
