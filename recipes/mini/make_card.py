"""The figures of the model card: held-out perplexity, sample dialogues, loss curves; and the card's tables.

python recipes/mini/make_card.py --run runs/mini --models kiloq/assets/mini --record recipes/mini/record

The skill table comes from make_skills.py. Tables are put between the marks that MODEL_CARD.md has for them.
"""

import argparse
import json
import math
import random
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from make_skills import as_table
from minigen.react import tool
from ngram import Trigram

from kiloq import LLM, SamplingParams
from kiloq.chat import Reply, parse_reply
from kiloq.checkpoint import load_dense, open_checkpoint
from kiloq.model import Transformer
from kiloq.tokenizer import Tokenizer

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh", "ko")
STAGES = {"base": "pre-training", "chat": "fine-tuning", "dpo": "preferences"}
Row = dict[str, Any]  # an object of a JSONL file


def main() -> None:
    """Reads the run's folder and the exported models, writes what the card shows beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True, help="where the figures go")
    parser.add_argument("--before", type=Path, help="an earlier base model of the same vocabulary, to compare with")
    parser.add_argument("--only", choices=["perplexity", "dialogues", "curves", "tables"])
    args = parser.parse_args()
    if args.only in (None, "perplexity"):
        perplexity(args.run, [args.models / "kiloq-mini", *([args.before] if args.before else [])], args.record)
    if args.only in (None, "dialogues"):
        dialogues(args.models, args.record)
    if args.only in (None, "curves"):
        curves(args.run, args.record)
    if args.only in (None, "tables"):
        tables(args.models / "MODEL_CARD.md", args.record)


def perplexity(run: Path, folders: list[Path], record: Path) -> None:
    """Base models against a trigram model trained on the same documents, per language and kind of text."""
    checkpoints = [open_checkpoint(folder) for folder in folders]
    tokenizer = checkpoints[0].tokenizer
    models = dict(zip(("model", "first edition"), (load_dense(c, dtype="float32") for c in checkpoints), strict=False))
    documents = [document(row, tokenizer) for lang in LANGUAGES for row in json_rows(run / f"train.{lang}.jsonl")]
    baseline = Trigram(documents, tokenizer.size)
    scores: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for lang in LANGUAGES:
        # The run itself watched every other document; these are the ones that nothing ever looked at.
        for row in list(json_rows(run / f"heldout.{lang}.jsonl"))[1::2]:
            kind = "generated" if row["source"].startswith("kiloq-") else "books, poems, documentation"
            add_document(scores[f"{lang}, {kind}"], document(row, tokenizer), tokenizer, models, baseline)
    table = {name: finished(score) for name, score in scores.items()}
    write_json(record / "perplexity.json", table)
    for name, line in table.items():
        print(f"{name:34} {line}")


def add_document(
    score: dict[str, float], ids: list[int], tokenizer: Tokenizer, models: dict[str, Transformer], baseline: Trigram
) -> None:
    """All models predict the same tokens: all but the first of each piece of at most the trained length."""
    length = models["model"].config.rope.original_length
    for piece in (ids[i : i + length] for i in range(0, len(ids), length)):
        if len(piece) < 2:
            continue
        tokens = torch.tensor(piece)
        for name, model in models.items():
            with torch.inference_mode():
                loss = torch.nn.functional.cross_entropy(model.logits(tokens)[:-1], tokens[1:], reduction="sum")
            score[name] += loss.item()
        score["trigram"] -= float(baseline.log_probabilities(piece).sum())
        score["tokens"] += len(piece) - 1
        score["bytes"] += len(tokenizer.decode_bytes(piece[1:]))


def finished(score: dict[str, float]) -> dict[str, float]:
    """Perplexity per token, and bits per byte, which any tokenizer can be compared by."""
    line: dict[str, float] = {"tokens": int(score["tokens"])}
    for name in (one for one in score if one not in ("tokens", "bytes")):
        line[f"{name} perplexity"] = round(math.exp(score[name] / score["tokens"]), 2)
        line[f"{name} bits per byte"] = round(score[name] / math.log(2) / score["bytes"], 3)
    return line


def dialogues(models: Path, record: Path) -> None:
    """The conversations of dialogues.toml with the shipped settings and seed 0, as they came out."""
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
        results = list(talk.get("results", ()))
        for ask in talk["ask"]:
            messages.append({"role": "user", "content": ask})
            lines += [f"> {ask}", ""]
            reply = answer(llm, messages, tools, lines)
            if reply.tool_calls and results:
                messages.append({"role": "tool", "content": results[0]})
                lines += [f"*Tool: {results.pop(0)}*", ""]
                answer(llm, messages, tools, lines)
    (record / "dialogues.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def answer(llm: LLM, messages: list[dict[str, object]], tools: list[dict[str, object]], lines: list[str]) -> Reply:
    """The next turn, added to the conversation and to the page."""
    params = SamplingParams.for_model(llm.generation, seed=0, max_tokens=200)
    text = llm.chat(messages, params, tools=tools).text
    reply = parse_reply(text, llm.format, tools=bool(tools))
    functions = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
    calls = [{"id": "call_0", "type": "function", "function": function} for function in functions]
    messages.append({"role": "assistant", "content": reply.content} | ({"tool_calls": calls} if calls else {}))
    lines += [text.strip().replace("\n", "  \n"), ""]
    return reply


def curves(run: Path, record: Path) -> None:
    """Training and held-out loss of the stages over tokens."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [(name, title) for name, title in STAGES.items() if (run / name / "log.jsonl").exists()]
    figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 4), squeeze=False)
    for axis, (stage, title) in zip(axes[0], stages, strict=True):
        log = list(json_rows(run / stage / "log.jsonl"))
        train = [(row["tokens"] / 1e6, row["loss"]) for row in log if "loss" in row]
        axis.plot(*zip(*train, strict=True), linewidth=0.8, color="0.6", label="training")
        tokens_at = {row["step"]: row["tokens"] / 1e6 for row in log if "tokens" in row}
        for name in sorted({key for row in log for key in row if key.startswith("eval/")}):
            held = [(tokens_at[row["step"]], row[name]) for row in log if name in row and row["step"] in tokens_at]
            if held:
                axis.plot(*zip(*held, strict=True), marker="o", markersize=3, label=f"held out, {name[5:]}")
        axis.set(xlabel="million tokens", ylabel="loss", title=f"kiloq-mini: {title}")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(record / "loss.png", dpi=110)


def tables(card: Path, record: Path) -> None:
    """Puts the tables of perplexity and skills into the card, each between its two marks."""
    scores = json.loads((record / "skills.json").read_text(encoding="utf-8"))
    lines = json.loads((record / "perplexity.json").read_text(encoding="utf-8"))
    text = card.read_text(encoding="utf-8")
    for name, table in {"perplexity": perplexity_table(lines), "skills": as_table(scores)}.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}{table}\n{end}{rest.split(end)[1]}"
    card.write_text(text, encoding="utf-8")


def perplexity_table(lines: dict[str, dict[str, float]]) -> str:
    """Markdown: a line for each language and kind of text."""
    models = [key.removesuffix(" perplexity") for key in next(iter(lines.values())) if key.endswith(" perplexity")]
    units = ("perplexity", "bits per byte")
    rows = [["text", "tokens", *(f"{model}, {unit}" for unit in units for model in models)]]
    rows.append(["---"] * len(rows[0]))
    for name, line in lines.items():
        figures = [str(line[f"{model} {unit}"]) for unit in units for model in models]
        rows.append([name, f"{line['tokens']:,}", *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
