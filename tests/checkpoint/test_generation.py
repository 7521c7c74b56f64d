"""Generation defaults: what published files mean, and one error for every ill-typed key."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kiloq.checkpoint import GenerationDefaults
from kiloq.errors import CheckpointError
from kiloq.model import ModelConfig
from kiloq.model.config import Family
from kiloq.tokenizer import Tokenizer

Read = Callable[..., GenerationDefaults]


@pytest.fixture
def read(tmp_path: Path, tokenizer: Tokenizer, make_config: Callable[..., ModelConfig]) -> Read:
    """Defaults of a folder with this generation_config.json (None: without) and more keys in config.json."""

    def make(family: Family, generation: dict[str, object] | None, **config: object) -> GenerationDefaults:
        (tmp_path / "config.json").write_text(json.dumps(make_config(family).to_hf() | config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return GenerationDefaults.from_files(tmp_path, tokenizer)

    return make


@pytest.mark.parametrize(("model", "chat_format"), [("Qwen-7B-Chat", "chatml"), ("Qwen-7B", "raw")])
def test_the_published_v1_files(model: str, chat_format: str, shared_data: Path) -> None:
    vocabulary = Tokenizer.load(shared_data / "tokenizer" / "qwen.tiktoken")
    defaults = GenerationDefaults.from_files(shared_data / "tokenizer" / model, vocabulary)
    assert defaults == GenerationDefaults(
        stop_ids=(151645, 151644, 151643) if chat_format == "chatml" else (151643,),
        pad_id=151643,
        chat_format=chat_format,
        max_window=6144,
        max_tokens=512,
        temperature=1.0,
        top_k=0,
        top_p=0.8,
        repetition_penalty=1.0,
    )


def test_a_qwen2_chat_model_stops_at_its_own_list(read: Read, tokenizer: Tokenizer) -> None:
    ends = [tokenizer.im_end_id, tokenizer.end_of_text_id]
    defaults = read("qwen2", {"eos_token_id": ends, "do_sample": True, "top_k": 20, "temperature": 0.7})
    assert defaults.stop_ids == tuple(ends)
    assert (defaults.chat_format, defaults.top_k, defaults.temperature) == ("chatml", 20, 0.7)
    assert defaults.max_window == 256


def test_a_qwen2_base_model_is_raw(read: Read, tokenizer: Tokenizer) -> None:
    defaults = read("qwen2", {"eos_token_id": tokenizer.end_of_text_id, "do_sample": False, "top_p": 0.5})
    assert (defaults.chat_format, defaults.temperature) == ("raw", 0.0)


def test_without_generation_config_the_end_comes_from_config_json(read: Read, tokenizer: Tokenizer) -> None:
    defaults = read("qwen3", None, eos_token_id=tokenizer.im_end_id)
    assert (defaults.stop_ids, defaults.chat_format) == ((tokenizer.im_end_id,), "chatml")


def test_without_any_word_the_end_comes_from_the_tokenizer(read: Read, tokenizer: Tokenizer) -> None:
    defaults = read("qwen2", None)
    assert (defaults.stop_ids, defaults.pad_id) == ((tokenizer.end_of_text_id,), tokenizer.end_of_text_id)
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.max_tokens) == (1.0, 0, 1.0, None)


def test_unknown_keys_and_nulls_pass(read: Read) -> None:
    assert read("qwen2", {"decay_bound": "x", "factual_nucleus_sampling": [], "top_k": None}).top_k == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "151643"),
        ("eos_token_id", [1, True]),
        ("eos_token_id", -1),
        ("pad_token_id", 1.5),
        ("stop_words_ids", [1]),
        ("stop_words_ids", [[1, 2]]),
        ("chat_format", "alpaca"),
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("top_k", -2),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("max_window_size", True),
        ("do_sample", 1),
    ],
)
def test_an_ill_typed_key_is_an_error_that_names_file_and_key(key: str, value: object, read: Read) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} is "):
        read("qwen", {key: value})


def test_an_ill_typed_end_in_config_json_names_that_file(read: Read) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id is 'x'"):
        read("qwen2", None, eos_token_id="x")


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chat_format", ["chatml", "raw"])
def test_what_is_written_is_read_back(
    family: Family, temperature: float, chat_format: str, read: Read, tokenizer: Tokenizer
) -> None:
    turn_ends = (tokenizer.im_end_id, tokenizer.im_start_id) if chat_format == "chatml" else ()
    sampling: dict[str, float] = {"top_k": 5, "top_p": 0.9} if temperature else {}
    defaults = GenerationDefaults(
        stop_ids=(*turn_ends, tokenizer.end_of_text_id, 7),
        pad_id=3,
        chat_format=chat_format,
        max_window=99,
        max_tokens=11,
        temperature=temperature,
        repetition_penalty=1.05,
        **sampling,
    )
    assert read(family, defaults.to_json(family, tokenizer)) == defaults
