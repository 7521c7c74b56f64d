"""The Quickstart of Qwen's first README after changing only the import, and the faults that must not come back."""

import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kiloq import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, SamplingParams
from kiloq.compat import CausalLM, QwenTokenizer, decode_tokens, get_stop_words_ids, make_context, snapshot_download
from kiloq.errors import ConfigError, KiloqError, RequestError

QUESTIONS = ["你好", "tell me a story", "안녕하세요"]


def test_quickstart_chat(chat_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(chat_folder, device_map="auto", trust_remote_code=True).eval()
    model.generation_config = GenerationConfig.from_pretrained(chat_folder, trust_remote_code=True)
    response, history = model.chat(tokenizer, QUESTIONS[0], history=None)
    response, history = model.chat(tokenizer, QUESTIONS[1], history=history)
    response, history = model.chat(tokenizer, QUESTIONS[2], history=history)
    assert [question for question, _ in history] == QUESTIONS
    assert history[-1][1] == response


def test_quickstart_quantised_cache(chat_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        chat_folder,
        device_map="auto",
        trust_remote_code=True,
        use_cache_quantization=True,
        use_cache_kernel=True,
        use_flash_attn=False,
    )
    assert model.llm.engine.kv_dtype == torch.int8
    response, history = model.chat(tokenizer, QUESTIONS[0], history=None, do_sample=False)
    assert history == [(QUESTIONS[0], response)]
    with pytest.raises(ConfigError, match="use_cache_quantisation"):
        AutoModelForCausalLM.from_pretrained(chat_folder, use_cache_quantisation=True)


def test_quickstart_base_model(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(base_folder, device_map="auto", trust_remote_code=True).eval()
    inputs = tokenizer("蒙古国的首都是乌兰巴托\n冰岛的首都是", return_tensors="pt")
    inputs = inputs.to(model.device)
    pred = model.generate(**inputs)
    assert pred.cpu()[0][: inputs.input_ids.shape[1]].equal(inputs.input_ids[0])
    assert tokenizer.decode(pred.cpu()[0], skip_special_tokens=True).startswith("蒙古国的首都是乌兰巴托\n冰岛的首都是")


def test_quickstart_batch(chat_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        chat_folder, pad_token="<|extra_0|>", eos_token="<|endoftext|>", padding_side="left", trust_remote_code=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        chat_folder, pad_token_id=tokenizer.pad_token_id, device_map="auto", trust_remote_code=True
    ).eval()
    model.generation_config = GenerationConfig.from_pretrained(chat_folder, pad_token_id=tokenizer.pad_token_id)
    model.generation_config.do_sample = False
    batch_raw_text = []
    for question in QUESTIONS:
        raw_text, _ = make_context(
            tokenizer,
            question,
            system="You are a helpful assistant.",
            max_window_size=model.generation_config.max_window_size,
            chat_format=model.generation_config.chat_format,
        )
        batch_raw_text.append(raw_text)
    batch_input_ids = tokenizer(batch_raw_text, padding="longest")
    batch_input_ids = torch.LongTensor(batch_input_ids["input_ids"]).to(model.device)
    batch_out_ids = model.generate(
        batch_input_ids, return_dict_in_generate=False, generation_config=model.generation_config
    )
    padding_lens = [batch_input_ids[i].eq(tokenizer.pad_token_id).sum().item() for i in range(batch_input_ids.size(0))]
    batch_response = [
        decode_tokens(
            batch_out_ids[i][padding_lens[i] :],
            tokenizer,
            raw_text_len=len(batch_raw_text[i]),
            context_length=(batch_input_ids[i].size(0) - padding_lens[i]),
            chat_format="chatml",
            verbose=False,
            errors="replace",
        )
        for i in range(len(QUESTIONS))
    ]
    assert len(set(padding_lens)) > 1
    assert batch_response == [model.chat(tokenizer, question, history=None)[0] for question in QUESTIONS]


def test_a_downloaded_folder_is_loaded_as_it_is(chat_folder: Path) -> None:
    model_dir = snapshot_download(str(chat_folder))
    assert len(AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)) > 256


def test_a_stream_gives_the_answer_so_far_and_ends_with_what_chat_says(
    model: CausalLM, tokenizer: QwenTokenizer
) -> None:
    texts = list(model.chat_stream(tokenizer, "你好", history=None, do_sample=False))
    assert all(longer.startswith(shorter) and longer != shorter for shorter, longer in pairwise(texts))
    response, _ = model.chat(tokenizer, "你好", history=None, do_sample=False)
    assert texts[-1].strip() == response


def test_a_second_turn_computes_only_its_new_tokens(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    long_question = "tell me " * 40
    _, history = model.chat(tokenizer, long_question, history=None)
    before = model.llm.engine.stats.computed_tokens
    model.chat(tokenizer, "more", history=history, max_new_tokens=1)
    assert model.llm.engine.stats.computed_tokens - before < 60  # a block, the answer and the question


def test_chat_leaves_the_callers_history_and_stop_list_alone(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    history, stops = [["a", "b"]], [[5, 6]]
    _, longer = model.chat(tokenizer, "c", history=history, stop_words_ids=stops)
    assert history == [["a", "b"]]
    assert stops == [[5, 6]]
    assert longer[0] == ("a", "b")
    assert model.chat(tokenizer, "c", history=history, append_history=False)[1] == [("a", "b")]


def test_a_stop_word_ends_the_answer_and_stays_in_it(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    plain = {"do_sample": False, "repetition_penalty": 1.0}
    whole, _ = model.chat(tokenizer, "x", **plain)
    ids = (
        model.llm.chat([{"role": "user", "content": "x"}], SamplingParams(temperature=0, max_tokens=12))
        .choices[0]
        .token_ids
    )
    assert tokenizer.decode(ids).strip() == whole
    word = list(ids[3:5])
    end = whole.find(tokenizer.decode(word)) + len(tokenizer.decode(word))
    assert model.chat(tokenizer, "x", stop_words_ids=[word], **plain)[0] == whole[:end].strip()
    assert model.chat(tokenizer, "x", stop_words_ids=[[ids[2]]], **plain)[0] == tokenizer.decode(ids[:3]).strip()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_continues_as_it_does_alone(model: CausalLM, chat_folder: Path, side: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_folder, padding_side=side, pad_token="<|extra_0|>")
    texts = ["a", "a longer prompt 你好", "1234567" * 12]  # the last one is beyond the trained length of 64
    batch = tokenizer(texts, padding="longest", return_tensors="pt")
    together = model.generate(**batch, do_sample=False, use_cache=True)
    for i, text in enumerate(texts):
        alone = model.generate(torch.tensor([tokenizer.encode(text)]), do_sample=False)[0]
        new = alone[len(tokenizer.encode(text)) :]
        width = batch.input_ids.shape[1]
        assert together[i, width : width + len(new)].equal(new)


def test_several_answers_per_prompt_are_rows_of_their_own(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    inputs = tokenizer(["a", "b"], return_tensors="pt")
    out = model.generate(**inputs, num_return_sequences=3, max_new_tokens=4)
    assert out.shape[0] == 6
    assert out[:, 0].tolist() == [*[inputs.input_ids[0, 0]] * 3, *[inputs.input_ids[1, 0]] * 3]


def test_logits_and_loss_of_padded_rows_are_those_of_the_rows_alone(model: CausalLM, tokenizer: QwenTokenizer) -> None:
    ids = torch.tensor([[7, 8, 9, 10], [0, 0, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    out = model(ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100))
    torch.testing.assert_close(out.logits[0], model(ids[:1]).logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.logits[1, 2:], model(ids[1:, 2:]).logits[0], atol=1e-5, rtol=0)
    # The row alone has no token before its first one to predict it from, and so no loss for it.
    alone = [(model(ids[:1]).logits[0], ids[0]), (model(ids[1:, 2:]).logits[0], ids[1, 2:])]
    terms = [-logits[:-1].log_softmax(-1).gather(1, row[1:, None]) for logits, row in alone]
    assert out.loss is not None
    assert out.loss.item() == pytest.approx(torch.cat(terms).mean().item(), abs=1e-5)
    assert len(torch.cat(terms)) == 4


@settings(max_examples=60, deadline=None)
@given(data=st.data(), window=st.integers(1, 120))
def test_the_context_fits_the_window_with_its_question(
    tokenizer: QwenTokenizer, data: st.DataObject, window: int
) -> None:
    texts = st.text(alphabet="ab \n好e\u0301", max_size=8)
    history = data.draw(st.lists(st.tuples(texts, texts), max_size=4))
    query, system = data.draw(texts), data.draw(texts)
    raw_text, ids = make_context(tokenizer, query, history, system, max_window_size=window)
    kept = next(
        (n for n in range(len(history), 0, -1) if len(_context(tokenizer, query, history[-n:], system)) < window), 0
    )
    assert ids == _context(tokenizer, query, history[len(history) - kept :], system)
    assert raw_text.endswith(f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n")


def _context(tokenizer: QwenTokenizer, query: str, history: list[tuple[str, str]], system: str) -> list[int]:
    return make_context(tokenizer, query, history, system, max_window_size=10**9)[1]


def test_text_in_decomposed_form_is_not_erased(tokenizer: QwenTokenizer) -> None:
    query = unicodedata.normalize("NFD", "é" * 30)
    raw_text, ids = make_context(tokenizer, query, system="s")
    answer = tokenizer.encode("the answer")
    end = [tokenizer.im_end_id, tokenizer.eod_id]
    text, reason = decode_tokens(
        [*ids, *answer, *end], tokenizer, len(raw_text), len(ids), "chatml", return_end_reason=True
    )
    assert (text, reason) == ("the answer", "Gen '<|im_end|>'")
    assert decode_tokens([*ids, *answer], tokenizer, 0, len(ids), "chatml") == "the answer"
    assert decode_tokens([*ids, *answer, tokenizer.eod_id, 5], tokenizer, 0, len(ids), "raw") == "the answer"


def test_stop_words_of_both_formats(tokenizer: QwenTokenizer) -> None:
    assert get_stop_words_ids("chatml", tokenizer) == [[tokenizer.im_end_id], [tokenizer.im_start_id]]
    assert get_stop_words_ids("raw", tokenizer) == [tokenizer.encode("Human:"), [tokenizer.eod_id]]
    assert make_context(tokenizer, "abc", chat_format="raw") == ("abc", tokenizer.encode("abc"))
    with pytest.raises(RequestError, match="chat_format is 'x'"):
        get_stop_words_ids("x", tokenizer)


def test_special_names_in_text_follow_the_callers_wish(tokenizer: QwenTokenizer) -> None:
    text = "a<|endoftext|>b<|extra_0|>"
    extra = tokenizer.tokenizer.special_tokens["<|extra_0|>"]
    assert [i for i in tokenizer.encode(text) if i >= tokenizer.eod_id] == [tokenizer.eod_id, extra]
    assert [i for i in tokenizer(text, allowed_special=set()).input_ids if i >= tokenizer.eod_id] == []
    assert extra not in tokenizer.encode(text, allowed_special={"<|endoftext|>"})
    with pytest.raises(ValueError, match="disallowed"):
        tokenizer.encode(text, allowed_special=set(), disallowed_special=("<|endoftext|>",))
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "ab"
    assert tokenizer.tokenize("<|im_start|>")[0] == "<|im_start|>"
    assert b"".join(tokenizer.tokenize("你好")) == "你好".encode()


def test_broken_bytes_decode_as_asked(tokenizer: QwenTokenizer) -> None:
    byte = tokenizer.convert_tokens_to_ids(b"\xe5")
    assert tokenizer.decode(byte) == "\ufffd"
    assert tokenizer.decode([byte], errors="ignore") == ""
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(torch.tensor([byte]), errors="strict")


def test_padding_goes_to_the_side_that_was_asked(chat_folder: Path) -> None:
    for side, expected in (("left", [[0, 1], [1, 1]]), ("right", [[1, 0], [1, 1]])):
        tokenizer = AutoTokenizer.from_pretrained(chat_folder, padding_side=side, pad_token="<|extra_1|>")
        out = tokenizer(["a", "a1"], padding=True)
        assert out.attention_mask == expected
        assert tokenizer.pad_token == "<|extra_1|>"
    with pytest.raises(RequestError, match="padding='longest'"):
        tokenizer(["a", "a1"], return_tensors="pt")


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"bf16": True, "fp16": True}, "bfloat16 and float16"),
        ({"load_in_9bit": True}, "'load_in_9bit'"),
        ({"device_map": {"a": "cpu", "b": "cuda:0"}}, "2 devices"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(chat_folder: Path, wish: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AutoModelForCausalLM.from_pretrained(chat_folder, **wish)


def test_the_type_of_the_weights_follows_the_flags(chat_folder: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(chat_folder, bf16=True).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(chat_folder, torch_dtype=torch.float32).dtype == torch.float32


def test_unknown_settings_are_answered_with_the_nearest_name(
    model: CausalLM, tokenizer: QwenTokenizer, chat_folder: Path
) -> None:
    with pytest.raises(RequestError, match="Did you mean 'temperature'"):
        model.chat(tokenizer, "x", temprature=1.0)
    with pytest.raises(RequestError, match="Did you mean 'top_p'"):
        GenerationConfig.from_pretrained(chat_folder, topp=0.5)
    with pytest.raises(AttributeError):
        model.generation_config.topp = 1
    with pytest.raises(KiloqError, match="top_p is 2"):
        model.chat(tokenizer, "x", top_p=2)


def test_generation_settings_survive_a_round_trip(model: CausalLM, tmp_path: Path, chat_folder: Path) -> None:
    model.save_pretrained(tmp_path / "copy", max_shard_size="1MB")
    assert GenerationConfig.from_pretrained(tmp_path / "copy") == GenerationConfig.from_pretrained(chat_folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    for (name, old), new in zip(
        model.llm.model.state_dict().items(), again.llm.model.state_dict().values(), strict=True
    ):
        assert old.equal(new), name


def test_a_base_model_does_not_chat(base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with pytest.raises(RequestError, match="Load a -Chat model"):
        model.chat(AutoTokenizer.from_pretrained(base_folder), "hi")
