"""`kiloq eval`: how good a model is. Thin: the work is in kiloq.evals."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from kiloq.cli.options import Json, Model
from kiloq.cli.terminal import say

app = App(name="eval", help="Measure how good a model is.")


@app.command(help_prologue="Example: `kiloq eval perplexity novel.txt -m Qwen/Qwen3-0.6B --quantize int8`")
def perplexity(
    texts: Annotated[list[Path], Parameter(help="Plain text, or .jsonl with a field `text`; .gz is read too.")],
    /,
    *,
    model: Model = None,
    quantize: Annotated[str | None, Parameter(help="int4 or int8: round the weights at load.")] = None,
    dtype: Annotated[str, Parameter(help="float32, bfloat16, float16, or auto (as stored).")] = "auto",
    window: Annotated[int, Parameter(help="Tokens that see each other.")] = 512,
    max_tokens: Annotated[int | None, Parameter(help="Only the beginning of the text.")] = None,
    json_: Json = False,
) -> None:
    """How well a model foretells a text: the lower, the better. Texts of a file are laid end to end."""
    from kiloq.checkpoint import bundled, load_model, open_checkpoint
    from kiloq.evals.perplexity import perplexity
    from kiloq.tokenizer.train import read_texts

    checkpoint = open_checkpoint(bundled() if model is None else model)
    tokenizer = checkpoint.tokenizer
    ids = [token for text in read_texts(texts) for token in (*tokenizer.encode(text), tokenizer.end_of_text_id)]
    loaded = load_model(checkpoint, dtype=dtype, quantization=quantize)
    found = perplexity(loaded, ids[:max_tokens], window=window)
    if json_:
        print(json.dumps({"perplexity": found.value, "tokens": found.tokens, "window": window}))
    else:
        say(f"{found.tokens:,} tokens in windows of {window:,}")
        print(f"{found.value:.4f}")
