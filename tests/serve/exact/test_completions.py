"""/v1/completions as OpenAI's client sees it, against the engine itself run in this process."""

from collections import defaultdict
from typing import Any

import httpx
import openai
import pytest

from kiloq import LLM, SamplingParams
from kiloq.tokenizer import Tokenizer

PROMPTS = ["Once upon a time", "The capital of France is", "你好，"]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def greedy_texts(llm: LLM) -> list[str]:
    params = SamplingParams.for_model(llm.generation, temperature=0, max_tokens=12)
    return [result.text for result in llm.generate(PROMPTS, params)]


def _streamed(client: openai.OpenAI, **asked: Any) -> dict[int, dict[str, Any]]:
    """Each choice put together from its chunks."""
    choices: dict[int, dict[str, Any]] = defaultdict(lambda: {"text": "", "finish_reason": None, "logprobs": None})
    for chunk in client.completions.create(model="Qwen", stream=True, **asked):
        assert chunk.object == "text_completion"
        for choice in chunk.choices:
            whole = choices[choice.index]
            assert whole["finish_reason"] is None, "a chunk came after the last one"
            whole["text"] += choice.text
            whole["finish_reason"] = choice.finish_reason
            if choice.logprobs is not None:
                lists = choice.logprobs.model_dump()
                old = whole["logprobs"] or {name: [] for name in lists}
                whole["logprobs"] = {name: old[name] + lists[name] for name in lists}
    return dict(choices)


@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists of ids"])
def test_every_form_of_prompt_gives_the_engines_own_text(
    client: openai.OpenAI, tokenizer: Tokenizer, greedy_texts: list[str], form: str
) -> None:
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    prompt: Any = {"text": PROMPTS[0], "texts": PROMPTS, "ids": ids[0], "lists of ids": ids}[form]
    answer = client.completions.create(model="Qwen", prompt=prompt, **GREEDY)
    count = 1 if form in ("text", "ids") else len(PROMPTS)
    assert [choice.index for choice in answer.choices] == list(range(count))
    assert [choice.text for choice in answer.choices] == greedy_texts[:count]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, ids[:count]))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 2},
        {"echo": True},
        {"logprobs": 3},
        {"logprobs": 0, "echo": True, "n": 2},
        {"logprobs": 2, "echo": True, "max_tokens": 0},
        {"stop": ["e", "的"], "logprobs": 1},
        {"ignore_eos": True, "max_tokens": 40, "logprobs": 1},
    ],
    ids=str,
)
def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI, more: dict[str, Any]) -> None:
    extra = {name: more.pop(name) for name in ["ignore_eos"] if name in more}
    asked: dict[str, Any] = {"prompt": PROMPTS, "seed": 7, "temperature": 1.2, "max_tokens": 10, "extra_body": extra}
    asked |= more
    whole = client.completions.create(model="Qwen", **asked)
    streamed = _streamed(client, **asked)
    assert sorted(streamed) == [choice.index for choice in whole.choices] == list(range(len(whole.choices)))
    for choice in whole.choices:
        told = choice.model_dump()
        got = streamed[choice.index]
        assert (got["text"], got["finish_reason"]) == (told["text"], told["finish_reason"])
        if got["logprobs"] is None:
            assert told["logprobs"] is None
            continue
        for name in ("tokens", "text_offset"):
            assert got["logprobs"][name] == told["logprobs"][name]
        assert got["logprobs"]["token_logprobs"] == pytest.approx(told["logprobs"]["token_logprobs"], abs=1e-3)


def test_default_length_is_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="Qwen", prompt="Hello", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_choices_of_a_prompt_are_together_and_differ_by_their_own_seed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12, "seed": 3, "echo": True}
    answer = client.completions.create(model="Qwen", prompt=PROMPTS, n=3, **asked)
    assert [choice.index for choice in answer.choices] == list(range(9))
    texts = [choice.text for choice in answer.choices]
    for number, prompt in enumerate(PROMPTS):
        own = texts[3 * number : 3 * number + 3]
        assert all(text.startswith(prompt) for text in own)
        assert len(set(own)) > 1


def test_stop_cuts_the_text_and_its_tokens(client: openai.OpenAI, greedy_texts: list[str]) -> None:
    stop = greedy_texts[0][5:8]
    answer = client.completions.create(model="Qwen", prompt=PROMPTS[0], stop=stop, logprobs=1, **GREEDY)
    choice = answer.choices[0]
    assert choice.text == greedy_texts[0][: greedy_texts[0].index(stop)]
    assert choice.finish_reason == "stop"
    assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_lie_in_the_text_at_their_offsets(client: openai.OpenAI, tokenizer: Tokenizer, prompt: str) -> None:
    answer = client.completions.create(model="Qwen", prompt=prompt, echo=True, logprobs=2, **GREEDY)
    choice = answer.choices[0]
    assert choice.text.startswith(prompt)
    lists = choice.logprobs
    assert len({len(values) for values in lists.model_dump().values()}) == 1
    assert lists.token_logprobs[0] is None
    assert lists.top_logprobs[0] is None
    assert len(lists.tokens) >= len(tokenizer.encode(prompt))
    for token, offset in zip(lists.tokens, lists.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    for token, logprob, top in list(zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob <= max(top.values()) <= 0
        assert 2 <= len(top) <= 3 or any(name.startswith("bytes:") for name in top)


def test_a_text_is_as_likely_as_a_prompt_as_it_was_as_an_answer(client: openai.OpenAI) -> None:
    made = client.completions.create(model="Qwen", prompt=PROMPTS[0], echo=True, logprobs=0, **GREEDY)
    ids = _tokens(client, PROMPTS[0]) + _tokens(client, made.choices[0].text[len(PROMPTS[0]) :])
    scored = client.completions.create(model="Qwen", prompt=ids, echo=True, logprobs=0, max_tokens=0)
    known, again = made.choices[0].logprobs, scored.choices[0].logprobs
    assert known is not None
    assert again is not None
    assert again.tokens == known.tokens[: len(again.tokens)], "the answer was cut into other tokens than it was made of"
    assert again.token_logprobs[1:] == pytest.approx(known.token_logprobs[1 : len(again.tokens)], abs=2e-2)
    assert scored.choices[0].finish_reason == "length"
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0


def test_best_of_shows_the_likeliest(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": PROMPTS[0], "temperature": 1.5, "max_tokens": 8, "seed": 11, "logprobs": 0}
    every = client.completions.create(model="Qwen", n=6, **asked)
    best = client.completions.create(model="Qwen", n=2, best_of=6, **asked)

    def mean(choice: Any) -> float:
        values = choice.logprobs.token_logprobs
        return float(sum(values) / max(len(values), 1))

    ranked = sorted(every.choices, key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage == every.usage


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "Qwen", "prompt": PROMPTS, "temperature": 0, "max_tokens": 5}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert all(chunk.choices for chunk in client.completions.create(**asked, stream=True))


def test_several_prompts_are_streamed_together(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": PROMPTS[:2], "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    order = [
        choice.index
        for chunk in client.completions.create(model="Qwen", stream=True, **asked)
        for choice in chunk.choices
    ]
    assert order.index(1) < len(order) - 1 - order[::-1].index(0), "the second prompt waited for the first to end"


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [[1, 2], []]}, "prompt[1]"),
    ({"prompt": [1, -2]}, "prompt[1]"),
    ({"prompt": [10**40]}, "prompt[0]"),
    ({"prompt": [[1], [1, 9_999_999]]}, "prompt[1][1]"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": ["a"] * 3000}, "prompt"),
    ({"prompt": ["a"] * 100, "n": 2}, "prompt"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "logprobs": 6}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
    ({"prompt": "a", "echo": "yes"}, "echo"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "logit_bias": {"9999999": 1}}, "logit_bias"),
    ({"prompt": "a", "guided_regex": "("}, "guided_regex"),
]


# Options of a stream are a mistake only without one.
@pytest.mark.parametrize(
    ("body", "named", "stream"),
    [
        (body, named, stream)
        for body, named in MISTAKES
        for stream in (False, True)
        if not (stream and "stream_options" in body)
    ],
    ids=str,
)
def test_a_mistake_is_a_400_that_names_its_field(server: Any, body: dict[str, Any], named: str, stream: bool) -> None:
    body = {"model": "Qwen", "stream": stream, **body}
    answer = httpx.post(f"{server.openai}/completions", json=body, timeout=30, trust_env=False)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert named in error["message"]
    assert error["param"], error


@pytest.mark.parametrize(
    "more",
    [{}, {"echo": True, "logprobs": 1, "max_tokens": 0}, {"stream": True}],
    ids=str,
)
def test_a_prompt_that_is_too_long_is_told_before_anything_else(client: openai.OpenAI, more: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        client.completions.create(model="Qwen", prompt=["a", "long " * 20_000], **more)
    assert caught.value.code == "context_length_exceeded"


def _tokens(client: openai.OpenAI, text: str) -> list[int]:
    url = str(client.base_url).replace("/v1/", "/tokenize")
    ids: list[int] = httpx.post(url, json={"prompt": text}, trust_env=False).json()["tokens"]
    return ids
