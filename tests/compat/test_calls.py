"""Calls as people write them for the original and for transformers: argument orders, harmless names, devices, types."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kiloq
from kiloq import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, make_context, snapshot_download
from kiloq.compat import CausalLM, QwenTokenizer
from kiloq.errors import CheckpointError, ConfigError, KiloqError, RequestError

GREEDY = {"do_sample": False, "max_new_tokens": 6}
HISTORY = [(f"question {i} " + "x1" * 10, "yes") for i in range(14)]


def _chat(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    model.chat(tokenizer, "q", HISTORY, "s", max_new_tokens=1)


def _chat_stream(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    list(model.chat_stream(tokenizer, "q", HISTORY, "s", max_new_tokens=1))


@pytest.mark.parametrize("ask", [_chat, _chat_stream])
@pytest.mark.parametrize("window", [100, 400, 490])  # 400 is the model's own
def test_the_window_of_the_settings_decides_how_many_rounds_stay(
    model: CausalLM, tokenizer: QwenTokenizer, window: int, ask: Callable[[CausalLM, QwenTokenizer], None]
) -> None:
    assert model.generation_config.max_window_size == 400
    model.generation_config.max_window_size = window
    ask(model, tokenizer)
    lengths = [len(make_context(tokenizer, "q", HISTORY, "s", max_window_size=size)[1]) for size in (window, 10**9)]
    assert window - 50 < lengths[0] < window < lengths[1]
    assert model.llm.engine.stats.computed_tokens == lengths[0]


def test_a_window_beyond_the_context_leaves_room_for_the_answer(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    model.generation_config.max_window_size = 6144
    assert model.chat(tokenizer, "q", HISTORY * 2, "s")[0]


def test_all_names_of_the_first_readme_come_from_the_package() -> None:
    for name in ("snapshot_download", "make_context", "decode_tokens", "get_stop_words_ids"):
        assert name in kiloq.__all__
        assert getattr(kiloq, name) is getattr(kiloq.compat, name)


def test_snapshot_download_takes_a_revision_and_a_cache(chat_folder: Path, tmp_path: Path) -> None:
    assert snapshot_download(str(chat_folder), "v1.0", cache_dir=tmp_path) == str(chat_folder)
    with pytest.raises(CheckpointError, match="owner/name"):
        snapshot_download("nothing like it", "v1.0", tmp_path)


def test_loaders_take_a_cache(chat_folder: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(chat_folder, cache_dir=tmp_path)
    GenerationConfig.from_pretrained(chat_folder, cache_dir=str(tmp_path))
    AutoModelForCausalLM.from_pretrained(chat_folder, cache_dir=tmp_path, low_cpu_mem_usage=True, code_revision="x")


def test_decoding_takes_the_arguments_of_transformers(tokenizer: QwenTokenizer) -> None:
    ids = tokenizer.encode("ab<|endoftext|>", add_special_tokens=False)
    assert tokenizer.decode(ids, True) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == "ab"
    assert tokenizer.batch_decode([ids], True, clean_up_tokenization_spaces=None) == ["ab"]
    assert tokenizer.tokenize("<|im_start|>", set()) != ["<|im_start|>"]
    assert tokenizer.encode("ab", return_tensors="pt").tolist() == [tokenizer.encode("ab")]
    assert tokenizer("ab", return_token_type_ids=False).input_ids == tokenizer.encode("ab")


def test_chat_takes_its_arguments_in_the_originals_order(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    settings = GenerationConfig(chat_format="chatml", do_sample=False, max_new_tokens=3)
    response, history = model.chat(tokenizer, "x", [("a", "b")], "system", False, None, [[5, 6]], settings)
    assert history == [("a", "b")]
    assert response == model.chat(tokenizer, "x", [("a", "b")], "system", generation_config=settings)[0]
    assert model.chat(tokenizer, "x", None, "system", stream=False, generation_config=settings)[1][0][0] == "x"
    with pytest.raises(RequestError, match="chat_stream"):
        model.chat(tokenizer, "x", None, stream=True)
    streamed = list(model.chat_stream(tokenizer, "x", None, "system", [[5, 6]], None, settings))
    assert streamed[-1].strip() == model.chat(tokenizer, "x", None, "system", generation_config=settings)[0]


def test_generate_takes_its_settings_second(model: CausalLM) -> None:
    ids = torch.tensor([[7, 8, 9]])
    settings = GenerationConfig(do_sample=False, max_new_tokens=4)
    assert model.generate(ids, settings).equal(model.generate(input_ids=ids, generation_config=settings))


def test_a_call_takes_names_that_change_nothing_and_refuses_the_others(model: CausalLM) -> None:
    ids = torch.tensor([[7, 8, 9]])
    plain = model(ids).logits
    more = model(input_ids=ids, use_cache=False, return_dict=True, output_attentions=False, past_key_values=None)
    assert more.logits.equal(plain)
    with pytest.raises(ConfigError, match="output_attentions=True"):
        model(ids, output_attentions=True)
    with pytest.raises(ConfigError, match="return_dict=False"):
        model(ids, return_dict=False)
    with pytest.raises(ConfigError, match="Did you mean 'attention_mask'"):
        model(ids, attention_masks=torch.ones_like(ids))


@pytest.mark.parametrize(
    ("loader", "wish", "words"),
    [
        (AutoModelForCausalLM, {"device_mp": "cpu"}, "Did you mean 'device_map'"),
        (AutoModelForCausalLM, {"torch_dtyp": "auto"}, "Did you mean 'torch_dtype'"),
        (AutoModelForCausalLM, {"load_in_4bit": True}, "'load_in_4bit'"),
        (AutoModelForCausalLM, {"device_map": "nonsense"}, "'nonsense'"),
        (AutoModelForCausalLM, {"torch_dtype": torch.int8}, "'int8'"),
        (AutoTokenizer, {"paddingside": "left"}, "Did you mean 'padding_side'"),
    ],
)
def test_a_loaders_unknown_name_or_value_is_one_clear_error(
    chat_folder: Path, loader: type, wish: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        loader.from_pretrained(chat_folder, **wish)


def test_the_tokenizers_unknown_names_are_clear_errors(tokenizer: QwenTokenizer) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'skip_special_tokens'"):
        tokenizer.decode([1], skip_special_token=True)
    with pytest.raises(ConfigError, match="Did you mean 'padding'"):
        tokenizer("a", paddin=True)
    with pytest.raises(ConfigError, match="Did you mean 'allowed_special'"):
        tokenizer.encode("a", allow_special=set())


def test_a_model_changes_its_type_in_place(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    answer = model.chat(tokenizer, "x", None, **GREEDY)[0]
    for convert, dtype in (
        (model.bfloat16, torch.bfloat16),
        (model.half, torch.float16),
        (model.float, torch.float32),
        (lambda: model.to(torch.bfloat16), torch.bfloat16),
        (lambda: model.to("cpu", torch.float32), torch.float32),
        (lambda: model.to(dtype=torch.float16, device="cpu"), torch.float16),
    ):
        assert convert() is model
        assert model.dtype == dtype
        assert isinstance(model.chat(tokenizer, "x", None, **GREEDY)[0], str)
    weights = AutoModelForCausalLM.from_pretrained(model.llm.folder).llm.model.state_dict()
    model.float().llm.model.load_state_dict(weights)
    assert model.cpu().to("cpu").chat(tokenizer, "x", None, **GREEDY)[0] == answer


def test_a_model_does_not_move_while_it_answers(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    stream = model.chat_stream(tokenizer, "x", None, **GREEDY)
    next(stream)
    with pytest.raises(KiloqError, match="being made"):
        model.half()
    assert inspect.isgenerator(stream)
    stream.close()
    assert model.half().dtype == torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_a_clear_error(model: CausalLM, chat_folder: Path) -> None:
    for move in (model.cuda, lambda: model.to("cuda:1"), lambda: model.to(0)):
        with pytest.raises(ConfigError, match="no CUDA device"):
            move()
    with pytest.raises(ConfigError, match="no CUDA device"):
        AutoModelForCausalLM.from_pretrained(chat_folder, device_map="cuda")
    with pytest.raises(ConfigError, match="'int8'"):
        model.to(torch.int8)
