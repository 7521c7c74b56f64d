"""The door most people use: text and conversations through a checkpoint on disk."""

import gc
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from kiloq.chat import Message
from kiloq.checkpoint import convert_checkpoint, open_checkpoint
from kiloq.engine import LLM, SamplingParams
from kiloq.errors import CheckpointError, NumericsError, RequestError

VOCAB = 20  # alternatives asked for
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, dtype="float32", device="cpu", max_batch=4)


def idle(llm: LLM) -> bool:
    llm.engine.step()
    llm.engine.check_integrity()
    stats = llm.engine.stats
    return not llm.engine.has_work and stats.blocks_available == stats.blocks


def test_generate_continues_text_and_ids_in_order(llm: LLM, lab) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompts = ["one", "two and more", "three"]
    results = llm.generate(prompts, params)
    assert [result.prompt_ids for result in results] == [tuple(prompt.encode()) for prompt in prompts]
    for result in results:
        ids = list(result.prompt_ids)
        for _ in range(6):
            ids.append(int(lab.model("v1").logits(torch.tensor(ids))[-1].argmax()))
        assert list(result.choices[0].token_ids) == ids[-6:]
        assert result.text == llm.tokenizer.decode(ids[-6:], skip_special=True)
        assert result.usage.total_tokens == len(ids)
    assert llm.generate("one", params)[0].text == results[0].text
    assert llm.generate([list(b"one")], params)[0].text == results[0].text


def test_more_prompts_than_run_at_once_keep_their_order(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2, seed=1)
    prompts = [f"prompt {i}" for i in range(40)]
    assert [bytes(result.prompt_ids).decode() for result in llm.generate(prompts, params)] == prompts


def test_the_models_own_defaults_apply_without_params(checkpoint: Path) -> None:
    one, other = (LLM(checkpoint, dtype="float32", device="cpu") for _ in range(2))
    params = SamplingParams.for_model(other.generation)
    assert (params.max_tokens, params.top_p) == (24, 0.8)  # what the folder's generation_config.json says
    assert one.generate("abc") == other.generate("abc", params)


@pytest.mark.parametrize("stop", [(), ("e",), ("xy", "ab")])
def test_stream_and_chat_give_the_same_text(llm: LLM, stop: tuple[str, ...]) -> None:
    bias = {ord(letter): 20.0 for letter in "abcdexyz"}
    params = SamplingParams(max_tokens=60, seed=5, stop=stop, logit_bias=bias, n=2, logprobs=1, ignore_eos=True)
    result = llm.chat(QUESTION, params)
    pieces = list(llm.stream(QUESTION, params))
    for index, choice in enumerate(result.choices):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == choice.text
        assert sum((piece.token_ids for piece in own), ()) == choice.token_ids
        logprobs = [sampled.logprob for piece in own for sampled in piece.logprobs]
        assert logprobs == pytest.approx([sampled.logprob for sampled in choice.logprobs], abs=1e-4)
        assert (own[-1].finish_reason, own[-1].stop_id) == (choice.finish_reason, choice.stop_id)
        assert all(piece.text for piece in own[:-1]), "an empty piece before the last"
    assert next(piece.usage for piece in pieces if piece.usage).completion_tokens == result.usage.completion_tokens
    assert idle(llm)


def test_the_second_turn_computes_only_its_new_tokens(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, seed=2, ignore_eos=True)
    first = llm.chat(QUESTION, params)
    answer = Message(role="assistant", content=first.text, token_ids=first.choices[0].token_ids)
    second = llm.chat([*QUESTION, answer, {"role": "user", "content": "and?"}], params)
    shared = first.prompt_ids + first.choices[0].token_ids
    assert second.prompt_ids[: len(shared)] == shared
    # The last token was drawn but never computed, and only whole blocks are kept. The NTK factor must be the same.
    assert second.usage.cached_tokens == (len(shared) - 1) // 16 * 16


def test_a_turn_ends_at_its_control_token(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, seed=0, logit_bias={llm.tokenizer.im_end_id: 100.0})
    (choice,) = llm.chat(QUESTION, params).choices
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("", (), "stop")
    assert choice.stop_id == llm.tokenizer.im_end_id


def test_several_conversations_answer_in_order(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, seed=3, ignore_eos=True)
    conversations = [[{"role": "user", "content": f"{i}"}] for i in range(3)]
    together = llm.chat(conversations, params)
    assert [result.text for result in together] == [llm.chat(one, params).text for one in conversations]


def test_old_rounds_leave_a_conversation_that_is_too_long(llm: LLM) -> None:
    talk = [Message(role="user" if i % 2 == 0 else "assistant", content=f"turn {i:02} " + "x" * 20) for i in range(13)]
    result = llm.chat(talk, SamplingParams(max_tokens=50, seed=0))
    text = llm.tokenizer.decode(result.prompt_ids)
    assert "turn 12" in text
    assert "turn 00" not in text
    assert len(result.prompt_ids) + 50 <= llm.engine.max_context


def test_a_question_that_is_too_long_is_refused_with_the_numbers(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"limit is 256"):
        llm.stream([{"role": "user", "content": "x" * 300}], SamplingParams(max_tokens=10))
    with pytest.raises(RequestError, match=r"prompts\[1\].*limit is 256"):
        llm.generate(["short", "x" * 300], SamplingParams(max_tokens=10))
    with pytest.raises(RequestError, match=r"prompts\[0\] is 7"):
        llm.generate([7])
    assert idle(llm)


def test_closing_or_dropping_a_stream_frees_its_blocks(llm: LLM) -> None:
    params = SamplingParams(max_tokens=50, seed=1, ignore_eos=True)
    begun = llm.stream("abc", params)
    next(begun)
    begun.close()
    assert idle(llm)
    llm.stream("abc", params).close()
    assert idle(llm)
    dropped = llm.stream("abc", params)
    next(dropped)
    del dropped
    gc.collect()
    assert idle(llm)


def test_streams_read_in_turns_do_not_disturb_each_other(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, seed=4, ignore_eos=True)
    alone = ["".join(piece.text for piece in llm.stream(prompt, params)) for prompt in ("first", "second")]
    one, two = llm.stream("first", params), llm.stream("second", params)
    texts = ["", ""]
    for pieces in zip_longest(one, two):
        for i, piece in enumerate(pieces):
            texts[i] += piece.text if piece else ""
        llm.generate("between", SamplingParams(max_tokens=1))
    assert texts == alone


def test_completed_answers_come_with_their_numbers_and_errors_in_place(llm: LLM) -> None:
    def prompts():
        for i in range(30):
            yield ([], SamplingParams()) if i == 7 else (list(b"abc"), SamplingParams(max_tokens=1 + i % 5, seed=i))

    outcomes = dict(llm.as_completed(prompts()))
    assert sorted(outcomes) == list(range(30))
    assert isinstance(outcomes.pop(7), RequestError)
    for i, outcome in outcomes.items():
        alone = llm.generate([list(b"abc")], SamplingParams(max_tokens=1 + i % 5, seed=i))[0]
        assert outcome.choices == alone.choices


def test_many_refused_prompts_in_a_row_do_not_end_the_others(llm: LLM) -> None:
    one = SamplingParams(max_tokens=1)
    for refused in (1, 4 * llm.engine.max_batch, 50):
        prompts = [([], one)] * refused + [(list(b"abc"), one)] * 2
        assert sorted(number for number, _ in llm.as_completed(prompts)) == list(range(refused + 2))
    assert idle(llm)


def test_an_answer_whose_events_were_taken_elsewhere_is_an_error_not_an_endless_wait(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True)

    def prompts():
        yield list(b"abc"), params
        llm.generate("another", params)  # its steps bring the first answer too
        yield list(b"abd"), params

    assert sorted(number for number, _ in llm.as_completed(prompts())) == [0, 1]
    waiting = llm.stream("abc", params)
    while llm.engine.has_work:
        llm.engine.step()
    with pytest.raises(AssertionError, match="taken elsewhere"):
        next(waiting)
    assert idle(llm)


def test_broken_weights_are_an_error_not_a_crash(checkpoint: Path) -> None:
    llm = LLM(checkpoint, dtype="float32", device="cpu")
    llm.engine._runner._model.norm.weight[3] = torch.nan
    with pytest.raises(NumericsError, match="finite"):
        llm.generate("abc")
    with pytest.raises(NumericsError, match="finite"):
        list(llm.stream("abc"))
    assert idle(llm)


def test_bfloat16_answers_too(checkpoint: Path) -> None:
    llm = LLM(checkpoint, dtype="bfloat16", device="cpu")
    prompts = ["abc", "a longer prompt than the other, of more than one block"]
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=VOCAB)
    precise = LLM(checkpoint, dtype="float32", device="cpu")
    for result, exact in zip(llm.generate(prompts, params), precise.generate(prompts, params), strict=True):
        rough, true = (dict(one.choices[0].logprobs[0].top_logprobs) for one in (result, exact))
        both = rough.keys() & true.keys()
        assert len(both) > VOCAB // 2
        assert max(abs(rough[token_id] - true[token_id]) for token_id in both) < 0.1


def test_parameters_are_read_without_torch() -> None:
    code = "import sys, kiloq.engine.params, kiloq.engine; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_whose_template_is_not_chatml_still_continues_text(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "distilled"
    convert_checkpoint(open_checkpoint(checkpoint), folder, family="qwen2")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    llm = LLM(folder, device="cpu")
    assert llm.generate("abc", SamplingParams(max_tokens=2, ignore_eos=True))[0].usage.completion_tokens == 2
    with pytest.raises(CheckpointError, match="not ChatML"):
        llm.chat(QUESTION)
