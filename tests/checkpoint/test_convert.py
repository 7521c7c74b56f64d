"""v1 in the Qwen2 layout: the same numbers, ids and prompts when transformers reads it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from kiloq.chat.chatml import QWEN1, chat_format_for, render
from kiloq.chat.messages import Message
from kiloq.checkpoint import convert_checkpoint, load_dense, open_checkpoint
from kiloq.checkpoint.fast_tokenizer import chatml_template, write_fast_tokenizer
from kiloq.errors import CheckpointError
from kiloq.model import Transformer
from kiloq.model.rope_config import RopeConfig
from kiloq.tokenizer import Tokenizer

Write = Callable[..., tuple[Path, Transformer]]


def test_logits_ids_and_stops_stay_the_same(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = write("qwen")
    (folder / "LICENSE").write_text("terms")
    source = open_checkpoint(folder)
    convert_checkpoint(source, tmp_path / "out", family="qwen2")
    assert "the trained length of 64 tokens" in caplog.text

    out = open_checkpoint(tmp_path / "out")
    assert (out.config.family, out.config.max_length, out.config.logn_length) == ("qwen2", 64, None)
    assert out.generation.stop_ids == source.generation.stop_ids
    assert out.generation.max_window == 64
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert not list((tmp_path / "out").glob("*.tiktoken"))

    ids = torch.randint(0, source.tokenizer.size, (64,), generator=torch.Generator().manual_seed(3))
    expected = load_dense(source).logits(ids)
    assert torch.equal(load_dense(out).logits(ids), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(theirs(ids[None]).logits[0], expected, atol=1e-5, rtol=0)


def test_dtype_of_the_result_can_be_chosen(write: Write, tmp_path: Path) -> None:
    folder, _ = write("qwen")
    convert_checkpoint(open_checkpoint(folder), tmp_path / "out", family="qwen2", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_model_that_stretches_nothing_keeps_its_length(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = write("qwen", rope=RopeConfig(rotary_dim=8, original_length=64, theta=1e6), logn_length=None)
    convert_checkpoint(open_checkpoint(folder), tmp_path / "out", family="qwen2")
    assert open_checkpoint(tmp_path / "out").config.max_length == 256
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 1e6
    assert caplog.text == ""


def test_what_the_layout_cannot_say_is_refused(write: Write, tmp_path: Path) -> None:
    half, _ = write("qwen", rope=RopeConfig(rotary_dim=4, original_length=64))
    third, _ = write("qwen3")
    for folder, word in ((half, "rotary_pct"), (third, "qwen3")):
        with pytest.raises(CheckpointError, match=word):
            convert_checkpoint(open_checkpoint(folder), tmp_path / "out", family="qwen2")
    assert not (tmp_path / "out").exists()


def test_the_chat_template_renders_what_we_render(write: Write, tmp_path: Path) -> None:
    folder, _ = write("qwen")
    convert_checkpoint(open_checkpoint(folder), tmp_path / "out", family="qwen2")
    tokenizer = Tokenizer.load(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = chat_format_for("qwen2", tmp_path / "out")
    assert (ours.default_system, ours.tool_style) == (QWEN1.default_system, "react")
    talk = [("user", "你好"), ("assistant", 'Hi, it\'s "me".'), ("user", "the cat\n\n")]
    for messages in (talk, [("system", "be {{ kind }}"), *talk], talk[:1]):
        for prompt in (True, False):
            rendered = render(
                [Message(role=role, content=text) for role, text in messages],
                tokenizer,
                ours,
                add_generation_prompt=prompt,
            )
            dicts = [{"role": role, "content": text} for role, text in messages]
            encoded = theirs.apply_chat_template(dicts, add_generation_prompt=prompt, return_dict=False)
            if not prompt:
                encoded = encoded[: len(rendered.ids)]  # the template ends the last turn with a newline
            assert encoded == rendered.ids


class Pair:
    """Our tokenizer and the one that transformers builds from the files we write."""

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        write_fast_tokenizer(
            folder, tokenizer, max_length=64, eos_token="<|im_end|>", chat_template=chatml_template("x")
        )
        self.ours = tokenizer
        self.theirs: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)

    def agree(self, text: str) -> None:
        ids = self.ours.encode(text, allowed_special="all")
        assert self.theirs(text)["input_ids"] == ids
        assert self.theirs.decode(ids) == self.ours.decode(ids)


@pytest.fixture(scope="session")
def small(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tokenizer, tmp_path_factory.mktemp("fast"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.text() | st.sampled_from(["<|im_start|>", "<|im_end|>", "<|extra_7|>", "the cat", " 你好", "\n"]))
)
def test_transformers_encodes_with_our_files_as_we_do(parts: list[str], small: Pair) -> None:
    small.agree("".join(parts))


def test_every_special_token_has_the_same_id(small: Pair) -> None:
    for name, token_id in small.ours.special_tokens.items():
        assert small.theirs.convert_tokens_to_ids(name) == token_id
        assert small.theirs.decode([token_id], skip_special_tokens=True) == ""
    assert len(small.theirs) == small.ours.size


def test_our_own_reader_understands_the_files(small: Pair, tmp_path: Path) -> None:
    write_fast_tokenizer(
        tmp_path, small.ours, max_length=64, eos_token="<|im_end|>", chat_template=chatml_template("x")
    )
    again = Tokenizer.load(tmp_path)
    assert again.vocabulary.ranks == small.ours.vocabulary.ranks
    assert again.special_tokens == small.ours.special_tokens
    assert again.control_ids == small.ours.control_ids


@pytest.mark.slow
def test_the_real_vocabulary_agrees_on_the_reference_strings(shared_data: Path, tmp_path: Path) -> None:
    pair = Pair(Tokenizer.load(shared_data / "tokenizer" / "qwen.tiktoken"), tmp_path)
    strings = (shared_data / "tokenizer" / "ggml-vocab-qwen2.gguf.inp").read_text("utf-8")
    for text in strings.split("\n__ggml_vocab_test__\n"):
        pair.agree(text)
    pair.agree('print("<|endoftext|>")<|im_start|>user\n한국어 토크나이저<|im_end|>')
