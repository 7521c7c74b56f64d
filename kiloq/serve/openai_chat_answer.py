"""A whole answer of /v1/chat/completions: the deltas of its choices, joined. Knows the wire format, not the model."""

from collections.abc import Sequence
from dataclasses import dataclass

from kiloq.chat import Delta, ToolCall, join
from kiloq.engine import Usage
from kiloq.engine.sampler import Sampled
from kiloq.tokenizer import Tokenizer

from .dialogue import AnswerDelta, Dialogue

Json = dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """Whether calls are told as functions, their older name, and whether the request named the one to call."""

    is_legacy: bool = False
    is_named: bool = False


async def whole_answer(dialogue: Dialogue, *, choices: int, style: Style, logprobs: Tokenizer | None) -> Json:
    """`choices` and `usage` of the response, when the last answer has ended."""
    parts: list[list[AnswerDelta]] = [[] for _ in range(choices)]
    usage: Usage | None = None
    async for deltas in dialogue:
        for delta in deltas:
            parts[delta.index].append(delta)
            usage = delta.usage or usage
    assert usage is not None, "the answers ended without usage"
    return {
        "choices": [
            {
                "index": index,
                "message": message_of([one.delta for one in answer], style),
                "logprobs": logprobs and logprobs_of([s for one in answer for s in one.logprobs], logprobs),
                "finish_reason": ending_of(answer[-1], style),
            }
            for index, answer in enumerate(parts)
        ],
        "usage": usage_of(usage, dialogue.reasoning_tokens),
    }


def message_of(deltas: Sequence[Delta], style: Style) -> Json:
    """The message that some deltas add up to."""
    reply = join(deltas)
    calls = reply.tool_calls
    message: Json = {
        "role": "assistant",
        "content": reply.content if reply.content or not calls else None,
        "refusal": None,
    }
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if calls and style.is_legacy:
        message["function_call"] = _function(calls[0])  # the older form has room for one
    elif calls:
        message["tool_calls"] = [{"id": call.id, "type": "function", "function": _function(call)} for call in calls]
    return message


def ending_of(last: AnswerDelta, style: Style) -> str | None:
    """`finish_reason`: a call that the request itself named ends with "stop", as OpenAI has it."""
    if last.finish_reason != "tool_calls":
        return last.finish_reason
    return "stop" if style.is_named else "function_call" if style.is_legacy else "tool_calls"


def logprobs_of(tokens: Sequence[Sampled], tokenizer: Tokenizer) -> Json:
    """Log probabilities of some content's tokens."""
    return {"content": token_logprobs(tokens, tokenizer), "refusal": None}


def token_logprobs(tokens: Sequence[Sampled], tokenizer: Tokenizer) -> list[Json]:
    """Each token with its text, its bytes and its most likely rivals."""
    return [
        {
            **_token(one.token_id, one.logprob or 0.0, tokenizer),
            "top_logprobs": [_token(token_id, logprob, tokenizer) for token_id, logprob in one.top_logprobs],
        }
        for one in tokens
    ]


def usage_of(usage: Usage, reasoning_tokens: int) -> Json:
    """Tokens of a request with their details."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def _function(call: ToolCall) -> Json:
    return {"name": call.name, "arguments": call.arguments}


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> Json:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}
