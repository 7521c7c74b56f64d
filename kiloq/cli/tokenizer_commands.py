"""`kiloq tokenizer`: train, expand and inspect vocabularies. The work is done in kiloq.tokenizer."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from kiloq.cli.options import Json, Model
from kiloq.errors import TokenizerError

if TYPE_CHECKING:
    from kiloq.tokenizer import Tokenizer

app = App(name="tokenizer", help="Train, expand and inspect vocabularies.")

Output = Annotated[Path, Parameter(name=["--output", "-o"], help="The .tiktoken file to write.")]


@app.command(help_prologue="Example: `kiloq tokenizer train texts/*.jsonl.gz --vocab-size 8000 -o mini.tiktoken`")
def train(
    files: Annotated[list[Path], Parameter(help="Plain text, or .jsonl with a field `text`; .gz is read too.")],
    /,
    *,
    vocab_size: Annotated[int, Parameter(help="Ids in all: the pieces and 208 special tokens.")],
    output: Output,
) -> None:
    """Learn a byte-level vocabulary from text."""
    from kiloq.tokenizer.train import read_texts, train_tokenizer

    start = time.monotonic()
    ranks = train_tokenizer(read_texts(files), vocab_size, output=output)
    _say(f"learned {len(ranks):,} pieces in {time.monotonic() - start:,.0f} s  {output}")


@app.command(help_prologue="Example: `kiloq tokenizer expand words.txt -m Qwen/Qwen-7B -o qwen_extra.tiktoken`")
def expand(
    words: Annotated[Path, Parameter(help="One word a line, with a tab and its count.")],
    /,
    *,
    model: Model = None,
    output: Output,
    start_id: Annotated[int | None, Parameter(help="The first new id; default: the first free one.")] = None,
) -> None:
    """Learn pieces that make words one token each; the file goes beside the vocabulary as its extra vocabulary."""
    from kiloq.tokenizer.expand import expand_vocabulary, read_words
    from kiloq.tokenizer.formats import dump_ranks, write_files

    if output.suffix != ".tiktoken":
        raise TokenizerError(f"the pieces would be written to {output}; its name must end in .tiktoken.")
    expansion = expand_vocabulary(_load(model), read_words(words), start_id=start_id)
    write_files(output.parent, {output.name: dump_ranks(expansion.ranks)})
    for reason, left_out in (("cut by the pattern", expansion.cut), ("a token already", expansion.known)):
        if left_out:
            more = ", ..." if len(left_out) > 5 else ""
            _say(f"left out {len(left_out):,} ({reason}): {', '.join(left_out[:5])}{more}")
    _say(f"learned {expansion.num_new:,} pieces  {output}")


@app.command(help_prologue='Example: `kiloq tokenizer inspect "你好, world"`')
def inspect(
    text: Annotated[str, Parameter(allow_leading_hyphen=True, help="The text; `-` reads it from standard input.")],
    /,
    *,
    model: Model = None,
    extra_vocab: Annotated[Path | None, Parameter(help="A file that `expand` wrote.")] = None,
    allow_special: Annotated[
        bool, Parameter(negative="", help="Read names such as <|im_end|> as control tokens.")
    ] = False,
    json_: Json = False,
) -> None:
    """Show the pieces of a text: id, bytes and text of each, and how well it compresses."""
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    tokenizer = _load(model, extra_vocab)
    ids = tokenizer.encode(text, allowed_special="all" if allow_special else ())
    pieces = [(token_id, tokenizer.token_bytes(token_id)) for token_id in ids]
    rows = [{"id": i, "bytes": piece.hex(" "), "text": piece.decode("utf-8", "replace")} for i, piece in pieces]
    num_bytes = sum(len(piece) for _, piece in pieces)
    totals = {"tokens": len(ids), "bytes": num_bytes, "bytes_per_token": round(num_bytes / max(1, len(ids)), 3)}
    if json_:
        print(json.dumps({"pieces": rows, **totals}, ensure_ascii=False))
        return
    width = max((len(str(row["bytes"])) for row in rows), default=0)
    for row in rows:
        print(f"{row['id']:>7}  {row['bytes']:<{width}}  {json.dumps(row['text'], ensure_ascii=False)}")
    print(f"{len(ids):,} tokens, {num_bytes:,} bytes, {totals['bytes_per_token']:.2f} bytes per token")


def _load(model: str | None, extra_vocab: Path | None = None) -> "Tokenizer":
    from kiloq.tokenizer import Tokenizer

    if model is not None and Path(model).expanduser().exists():
        return Tokenizer.load(Path(model).expanduser(), extra_vocab=extra_vocab)
    from kiloq.checkpoint.hub import bundled, resolve

    return Tokenizer.load(bundled() if model is None else resolve(model), extra_vocab=extra_vocab)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
