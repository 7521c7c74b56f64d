"""The figures of the model card: held-out perplexity, answers to held-out questions, sample dialogues and loss curves.

python recipes/mini/make_card.py --run runs/mini --models kiloq/assets/mini --record recipes/mini/record
"""

import argparse
import json
import math
import random
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from minigen.react import tool
from ngram import Trigram

from kiloq import LLM, SamplingParams
from kiloq.checkpoint import load_dense, open_checkpoint
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh", "ko")
Row = dict[str, Any]  # an object of a JSONL file


def main() -> None:
    """Reads the run's folder and the exported models, writes what the card shows beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True, help="where the figures go")
    parser.add_argument("--only", choices=["perplexity", "questions", "dialogues", "curves"])
    args = parser.parse_args()
    parts = {"perplexity": perplexity, "questions": questions, "dialogues": dialogues, "curves": curves}
    for name, part in parts.items():
        if args.only in (None, name):
            part(args.run, args.models, args.record)


def perplexity(run: Path, models: Path, record: Path) -> None:
    """The base model against a trigram model trained on the same documents, per language and kind of text."""
    checkpoint = open_checkpoint(models / "kiloq-mini")
    tokenizer, model = checkpoint.tokenizer, load_dense(checkpoint, dtype="float32")
    documents = [document(row, tokenizer) for lang in LANGUAGES for row in json_rows(run / f"train.{lang}.jsonl")]
    baseline = Trigram(documents, tokenizer.size)
    scores: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for lang in LANGUAGES:
        # The run itself watched every other document; these are the ones that nothing ever looked at.
        for row in list(json_rows(run / f"heldout.{lang}.jsonl"))[1::2]:
            kind = "generated" if row["source"].startswith("kiloq-") else "books, poems, documentation"
            add_document(scores[f"{lang}, {kind}"], document(row, tokenizer), tokenizer, model, baseline)
    table = {name: finished(score) for name, score in scores.items()}
    write_json(record / "perplexity.json", table)
    for name, line in table.items():
        print(f"{name:34} {line}")


def add_document(
    score: dict[str, float], ids: list[int], tokenizer: Tokenizer, model: Transformer, baseline: Trigram
) -> None:
    """Both models predict the same tokens: all but the first of each piece of at most the trained length."""
    length = model.config.rope.original_length
    for piece in (ids[i : i + length] for i in range(0, len(ids), length)):
        if len(piece) < 2:
            continue
        tokens = torch.tensor(piece)
        with torch.inference_mode():
            loss = torch.nn.functional.cross_entropy(model.logits(tokens)[:-1], tokens[1:], reduction="sum")
        score["model"] += loss.item()
        score["trigram"] -= float(baseline.log_probabilities(piece).sum())
        score["tokens"] += len(piece) - 1
        score["bytes"] += len(tokenizer.decode_bytes(piece[1:]))


def finished(score: dict[str, float]) -> dict[str, float]:
    """Perplexity per token, and bits per byte, which any tokenizer can be compared by."""
    return {
        "tokens": int(score["tokens"]),
        "model perplexity": round(math.exp(score["model"] / score["tokens"]), 2),
        "trigram perplexity": round(math.exp(score["trigram"] / score["tokens"]), 2),
        "model bits per byte": round(score["model"] / math.log(2) / score["bytes"], 3),
        "trigram bits per byte": round(score["trigram"] / math.log(2) / score["bytes"], 3),
    }


def questions(run: Path, models: Path, record: Path) -> None:
    """Greedy answers to held-out conversations with a known last answer: how many contain it, by topic."""
    llm = LLM(models / "kiloq-mini-chat", max_batch=32)
    params = SamplingParams.for_model(llm.generation, temperature=0, repetition_penalty=1.0, max_tokens=120)
    asked = sorted((row for row in json_rows(run / "heldout_chat.jsonl") if row.get("expect")), key=has_tools)
    plain = [row["messages"][:-1] for row in asked if not has_tools(row)]
    results = llm.chat(plain, params)
    for row in asked[len(plain) :]:
        results.append(llm.chat(row["messages"][:-1], params, tools=row["tools"]))
    right: dict[str, list[int]] = defaultdict(list)
    for row, result in zip(asked, results, strict=True):
        correct = contains(result.text, str(row["expect"]))
        for name in (row["topic"].split("/")[0], f"language {row['lang']}", "all"):
            right[name].append(int(correct))
    table = {name: {"asked": len(marks), "right": sum(marks)} for name, marks in sorted(right.items())}
    write_json(record / "questions.json", table)
    for name, line in table.items():
        print(f"{name:24} {line['right']:5} of {line['asked']:5}  {line['right'] / line['asked']:.0%}")


def contains(answer: str, expected: str) -> bool:
    """Whether the expected words stand in the answer; a number must not be part of a longer one."""
    return re.search(rf"(?<!\d){re.escape(expected)}(?!\d)", answer, re.IGNORECASE) is not None


def has_tools(row: Row) -> bool:
    """Whether the conversation offers tools."""
    return bool(row.get("tools"))


def dialogues(run: Path, models: Path, record: Path) -> None:
    """Thirty conversations with the shipped settings and seed 0, as they came out."""
    llm = LLM(models / "kiloq-mini-chat")
    lines = [
        "# Sample dialogues of kiloq-mini-chat",
        "",
        "Made by `recipes/mini/make_card.py`, seed 0, not selected.",
        "",
    ]
    for number, talk in enumerate(tomllib.loads((HERE / "dialogues.toml").read_text(encoding="utf-8"))["talk"], 1):
        tools = [tool(random.Random(0), "en", name) for name in talk.get("tools", ())]
        messages: list[dict[str, object]] = []
        lines += [f"## {number}", ""]
        if "system" in talk:
            messages.append({"role": "system", "content": talk["system"]})
            lines += [f"*System: {talk['system']}*", ""]
        if tools:
            lines += [f"*Tools: {', '.join(talk['tools'])}*", ""]
        for ask in talk["ask"]:
            messages.append({"role": "user", "content": ask})
            params = SamplingParams.for_model(llm.generation, seed=0, max_tokens=200)
            answer = llm.chat(messages, params, tools=tools).text
            messages.append({"role": "assistant", "content": answer})
            quoted = answer.strip().replace("\n", "  \n")
            lines += [f"> {ask}", "", quoted, ""]
    (record / "dialogues.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def curves(run: Path, models: Path, record: Path) -> None:
    """Training and held-out loss of both stages over tokens."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=False)
    for axis, (stage, title) in zip(axes, {"base": "pre-training", "chat": "fine-tuning"}.items(), strict=True):
        log = list(json_rows(run / stage / "log.jsonl"))
        train = [(row["tokens"] / 1e6, row["loss"]) for row in log if "loss" in row]
        axis.plot(*zip(*train, strict=True), linewidth=0.8, color="0.6", label="training")
        tokens_at = {row["step"]: row["tokens"] / 1e6 for row in log if "tokens" in row}
        for name in sorted({key for row in log for key in row if key.startswith("eval/")}):
            held = [(tokens_at[row["step"]], row[name]) for row in log if name in row and row["step"] in tokens_at]
            axis.plot(*zip(*held, strict=True), marker="o", markersize=3, label=f"held out, {name[5:]}")
        axis.set(xlabel="million tokens", ylabel="loss (nats per token)", title=f"kiloq-mini: {title}")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(record / "loss.png", dpi=110)


def document(row: Row, tokenizer: Tokenizer) -> list[int]:
    """A document as the training run saw it."""
    return [*tokenizer.encode(row["text"]), tokenizer.end_of_text_id]


def json_rows(path: Path) -> Iterator[Row]:
    """Objects of a JSONL file; split at "\\n" alone, since texts may hold other line separators."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            yield json.loads(line)


def write_json(path: Path, table: object) -> None:
    """Readable and stable."""
    path.write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
