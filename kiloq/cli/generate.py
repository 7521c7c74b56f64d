"""`kiloq generate`: a file of prompts through the engine, many at a time. Knows no file formats and no batching."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from kiloq.chat import Message
from kiloq.cli.batch_file import AnswerFile, Answers, AnswerStream, Job, JobId, read_jobs
from kiloq.cli.options import ModelOptions, SamplingOptions, refuse_option
from kiloq.cli.terminal import progress, say
from kiloq.engine import SamplingParams
from kiloq.errors import DataError, KiloqError, RequestError

if TYPE_CHECKING:
    from kiloq.engine import LLM, Result
    from kiloq.engine.readers import Prompt

Fault = Callable[[Job, KiloqError], None]


def generate(
    prompts: Annotated[
        str,
        Parameter(
            help='JSON lines with "prompt" (continued as it stands) or "messages" (answered), and if wanted "id" and '
            "sampling such as temperature or max_tokens; `-` is standard input.",
            allow_leading_hyphen=True,
        ),
    ],
    /,
    *,
    output: Annotated[
        Path | None,
        Parameter(
            name=["--output", "-o"],
            help="Where the answers go; the same command again continues a broken run. Default: standard output.",
        ),
    ] = None,
    model: ModelOptions = ModelOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    system: Annotated[
        str | None, Parameter(name=["--system", "-s"], help="The system prompt of conversations that bring none.")
    ] = None,
    batch_size: Annotated[int, Parameter(help="How many answers are made at the same time.")] = 16,
    skip_bad: Annotated[bool, Parameter(negative="", help="Leave faulty lines out instead of stopping.")] = False,
) -> None:
    """Answer a file of prompts, in their order."""
    refuse_option(prompts)
    if batch_size < 1:
        raise RequestError(f"--batch-size is {batch_size}; it must be at least 1.")
    jobs = read_input(prompts, skip_bad=skip_bad)
    given = sampling.given()
    digests = {job.id: job_digest(job, given, system, model.model) for job in jobs}
    answers: Answers = AnswerStream(sys.stdout.buffer, jobs) if output is None else AnswerFile(output, digests)

    def fault(job: Job, error: KiloqError) -> None:
        if not skip_bad:
            raise DataError(f"{prompts}:{job.line}: {error} (--skip-bad leaves such lines out.)") from error
        say(f"skipped {prompts}:{job.line}: {error}")
        answers.skip(job.id)

    with closing(answers):
        left = [job for job in jobs if job.id not in answers.done]
        if len(left) < len(jobs):
            say(f"{len(jobs) - len(left):,} answers are in {output} already; {len(left):,} are left.")
        if left:
            llm = model.load(max_batch=batch_size)
            answer_all(llm, left, answers, fault, digests=digests, sampling=given, system=system)
        answers.finish()


def read_input(prompts: str, *, skip_bad: bool) -> list[Job]:
    """The jobs of a file or of standard input; all of it is checked before a model is loaded."""
    try:
        if prompts == "-":
            jobs, faults = read_jobs(sys.stdin.buffer, "-")
        else:
            with Path(prompts).expanduser().open("rb") as file:
                jobs, faults = read_jobs(file, prompts)
    except OSError as error:
        raise DataError(f"cannot read the prompts {prompts}: {error.strerror}.") from error
    except RuntimeError as error:  # ~name of nobody
        raise DataError(f"cannot read the prompts {prompts}: {error}") from error
    if faults and not skip_bad:
        more = f" So are {len(faults) - 1:,} more lines." if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more} Mend it, or pass --skip-bad.")
    for fault in faults:
        say(f"skipped {fault}")
    return jobs


def answer_all(
    llm: "LLM",
    jobs: Sequence[Job],
    answers: Answers,
    fault: Fault,
    *,
    digests: Mapping[JobId, str],
    sampling: Mapping[str, object],
    system: str | None,
) -> None:
    """Write an answer for every job as it comes, and tell how fast it went."""
    asked: list[Job] = []  # by the number that the engine knows them by

    def prompts() -> "Iterator[Prompt]":
        for job in jobs:
            try:
                prompt = prompt_of(llm, job, sampling, system)
            except RequestError as error:
                fault(job, error)
            else:
                asked.append(job)
                yield prompt

    start, tokens, done = perf_counter(), 0, 0
    with progress(len(jobs)) as advance:
        for number, outcome in llm.as_completed(prompts()):
            if isinstance(outcome, KiloqError):
                fault(asked[number], outcome)
            else:
                answers.write(answer_row(asked[number], digests[asked[number].id], outcome))
                tokens += outcome.usage.completion_tokens
                done += 1
            advance()
    seconds = perf_counter() - start
    say(f"{done:,} answers  {tokens:,} tokens  {seconds:,.1f} s  {tokens / seconds:,.0f} tok/s")


def prompt_of(llm: "LLM", job: Job, sampling: Mapping[str, object], system: str | None) -> "Prompt":
    """A job's ids and sampling: its own wishes come before the command's, and those before the model's."""
    params = SamplingParams.for_model(llm.generation, **{**sampling, **job.sampling})
    if job.prompt is not None:
        return llm.tokenizer.encode(job.prompt), params
    return llm.prompt_of(conversation(job, system), params)


def conversation(job: Job, system: str | None) -> list[Message]:
    """A job's messages, behind the command's system prompt if they bring none."""
    bare = system is not None and bool(job.messages) and job.messages[0].role != "system"
    return [*([Message(role="system", content=system)] if system is not None and bare else []), *job.messages]


def job_digest(job: Job, sampling: Mapping[str, object], system: str | None, model: str | None) -> str:
    """Sixteen digits for all that an answer depends on; what a model brings itself is in its name."""
    asked = {**sampling, **job.sampling}
    params = SamplingParams.for_model(SamplingParams(), **asked)  # one spelling: 0 and 0.0 ask for the same
    everything = {
        "prompt": job.prompt,
        "messages": [asdict(message) for message in conversation(job, system)],
        "sampling": {name: getattr(params, name) for name in asked},
        "model": model,
    }
    canonical = json.dumps(everything, sort_keys=True)
    return blake2b(canonical.encode(), digest_size=8).hexdigest()


def answer_row(job: Job, digest: str, result: "Result") -> dict[str, object]:
    """One line of the output: the first answer, and all of them when a job wants several."""
    choices = [
        {"text": choice.text, "finish_reason": choice.finish_reason}
        | ({} if choice.logprobs is None else {"logprobs": [one.logprob for one in choice.logprobs]})
        for choice in result.choices
    ]
    usage = {"prompt_tokens": result.usage.prompt_tokens, "completion_tokens": result.usage.completion_tokens}
    return {"id": job.id, "job": digest, **choices[0], **usage, **({"choices": choices} if len(choices) > 1 else {})}
