"""`--seed`: what a server draws for requests without a seed of their own."""

from typing import Any

import openai

ASKED: Any = {"model": "Qwen", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 12}


def drawn(url: str) -> list[str | None]:
    """Answers to the first questions that a server gets."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answers = [client.chat.completions.create(**ASKED, temperature=1.5) for _ in range(3)]
    return [answer.choices[0].message.content for answer in answers]


def test_servers_of_one_seed_draw_the_same_and_no_answer_twice(start_server: Any) -> None:
    first, again, other = (
        drawn(start_server("qwen1", "--max-context", "512", *flags).openai)
        for flags in (("--seed", "5"), ("--seed", "5", "--quiet"), ("--seed", "6"))
    )
    assert first == again
    assert len({*first, *other}) == 6
