"""A conversation of several turns: what of each prompt was in the cache, and the wait for the first token.

python benchmarks/serve_turns.py [-m CHECKPOINT] [--quantize int4] [--turns 4] [--tokens 100] [-o NAME.json]
Beside every turn the same prompt to a server that has not seen it: its first word is another one.
"""

import argparse
import json
import random
import statistics
import time
import urllib.request
from pathlib import Path

from kiloq.bench.machine import describe_machine
from kiloq.bench.serve_load import random_text
from kiloq.bench.serve_process import kiloq_server
from kiloq.bench.tables import markdown

Message = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", dest="model")
    parser.add_argument("--quantize")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--conversations", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    server = kiloq_server(options.model, quantize=options.quantize)
    try:
        answer(server.url, [{"role": "user", "content": "warm up"}], 4)
        talks = [conversation(server.url, options, number) for number in range(options.conversations)]
    finally:
        server.stop()
    rows = [
        [str(turn + 1), *(f"{statistics.median(talk[turn][key] for talk in talks):,.0f}" for key in talks[0][0])]
        for turn in range(options.turns)
    ]
    print(markdown(["turn", *talks[0][0]], rows))
    if options.output is not None:
        record = {
            "machine": describe_machine(),
            "settings": {**vars(options), "output": None, "model": Path(options.model or "bundled").name},
            "conversations": talks,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")


def conversation(url: str, options: argparse.Namespace, seed: int) -> list[dict[str, float]]:
    chance = random.Random(seed)
    messages: list[Message] = []
    turns = []
    for turn in range(options.turns):
        messages.append({"role": "user", "content": random_text(chance, options.words)})
        text, wait, usage = answer(url, messages, options.tokens)
        opening = {"role": "user", "content": f"{seed} {turn} {messages[0]['content']}"}
        _, wait_unseen, _ = answer(url, [opening, *messages[1:]], 1)
        messages.append({"role": "assistant", "content": text})
        turns.append(
            {
                "prompt tokens": usage["prompt_tokens"],
                "cached": usage["prompt_tokens_details"]["cached_tokens"],
                "first token ms": 1e3 * wait,
                "unseen ms": 1e3 * wait_unseen,
            }
        )
    return turns


def answer(url: str, messages: list[Message], tokens: int) -> tuple[str, float, dict]:
    """Text, seconds to the first token, usage."""
    body = {"model": "qwen-turbo", "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "speculation": "none"}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    begin, wait, text, usage = time.perf_counter(), 0.0, "", {}
    with urllib.request.urlopen(request) as stream:
        for line in stream:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                wait = wait or (time.perf_counter() - begin if piece else 0.0)
                text += piece
    return text, wait, usage


if __name__ == "__main__":
    main()
