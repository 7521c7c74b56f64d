"""The command table and the exit codes. Knows no command's insides: each is imported when it is called."""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from kiloq.cli.options import ModelOptions, SamplingOptions, System, refuse_option
from kiloq.cli.terminal import mend_streams
from kiloq.errors import KiloqError

# name: (where it lives, what it does, an example that works). The help page of `kiloq` shows this table
# without importing anything; each command's own page opens with its example.
COMMANDS = {
    "chat": ("kiloq.cli.chat:chat", "Talk with a model.", "kiloq chat"),
    "generate": (
        "kiloq.cli.generate:generate",
        "Answer a file of prompts: JSON lines in, JSON lines out.",
        "kiloq generate prompts.jsonl -o answers.jsonl",
    ),
    "serve": (
        "kiloq.cli.serve:serve",
        "Serve a model to OpenAI and DashScope clients, and a web page.",
        "kiloq serve -m Qwen/Qwen3-0.6B --quantize int8",
    ),
    "web": ("kiloq.cli.web:web", "Talk with a model in the browser.", "kiloq web -m Qwen/Qwen3-0.6B --quantize int8"),
    "info": ("kiloq.cli.info:info", "Parameters, bytes per token and memory of a model.", "kiloq info Qwen/Qwen-7B"),
    "doctor": ("kiloq.cli.doctor:doctor", "What this machine can do, and what stands in its way.", "kiloq doctor"),
    "download": (
        "kiloq.cli.convert_commands:download",
        "Fetch a model, so that it works offline later.",
        "kiloq download Qwen/Qwen3-0.6B",
    ),
    "convert": (
        "kiloq.cli.convert_commands:convert",
        "Write a checkpoint in another layout, or merge an adapter into it.",
        "kiloq convert Qwen/Qwen-1_8B-Chat out --to qwen2",
    ),
    "quantize": (
        "kiloq.cli.quantize:quantize",
        "Make a model smaller and faster: 4 or 8 bits a weight.",
        "kiloq quantize -m Qwen/Qwen3-0.6B --bits 4 -o qwen3-int4",
    ),
}
# Groups of commands, each with pages of its own.
GROUPS = {
    "tokenizer": (
        "kiloq.cli.tokenizer_commands:app",
        "Train, expand and inspect vocabularies.",
        'kiloq tokenizer inspect "Hello, 世界"',
    ),
    "eval": ("kiloq.cli.eval_commands:app", "Measure how good a model is.", "kiloq eval perplexity novel.txt"),
    "bench": (
        "kiloq.cli.bench:app",
        "Speed and memory of a model on this machine.",
        "kiloq bench speed --shape qwen2.5-0.5b --precision int4",
    ),
    "train": ("kiloq.cli.train_commands:app", "Train a model from a recipe.", "kiloq train sft recipes/mini/sft.toml"),
}

USAGE_ERROR = 2
INTERRUPTED = 128 + 2  # what a shell reports for a program ended by SIGINT
BROKEN_PIPE = 128 + 13


def build_app() -> App:
    from kiloq import __version__

    app = App(
        name="kiloq",
        version=__version__,
        usage='kiloq "Why is the sky blue?"\n       kiloq COMMAND [OPTIONS] ...\n',
        help="Qwen language models on your own machine.",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for name, (path, summary, example) in COMMANDS.items():
        app.command(path, name=name, help=summary, help_prologue=f"Example: `{example}`")
    for name, (path, summary, example) in GROUPS.items():
        app.command(path, name=name, help=f"{summary}\n\nExample: `{example}`")
    app.default(ask)
    return app


def ask(
    *question: Annotated[
        str, Parameter(help="What to ask; `-` reads it from standard input.", allow_leading_hyphen=True)
    ],
    model: ModelOptions = ModelOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    system: System = None,
) -> None:
    """One question, one answer; without a question, this page."""
    if not question:
        build_app().help_print([])
        return
    for word in question:
        refuse_option(word)
    text = " ".join(question)
    # A mistyped command must not wake a model and be answered as a question.
    near = get_close_matches(text, [*COMMANDS, *GROUPS], n=1, cutoff=0.75)
    if near:
        raise CycloptsError(
            msg=f'there is no command "{text}"; did you mean "{near[0]}"? A question may come through a pipe: '
            f"echo {text} | kiloq -"
        )
    from kiloq.cli.ask import answer

    answer(text, model=model, sampling=sampling, system=system)


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line; the exit code. Results go to stdout, everything else to stderr."""
    mend_streams()
    try:
        result = build_app()(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as error:
        print(f"kiloq: {error} See `kiloq --help`.", file=sys.stderr)
        return USAGE_ERROR
    except KiloqError as error:
        print(f"kiloq: {_visible(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`, `less`) has seen enough. Python flushes stdout once more at exit; give it nowhere to fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return result if isinstance(result, int) else 0


def _visible(text: str) -> str:
    """A message may quote a file that someone else wrote: codes that steer a terminal are shown, not sent."""
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)
