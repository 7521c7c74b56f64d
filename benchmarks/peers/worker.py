"""The conversation between run.py and one contender, in JSON lines. Standard library only: it runs in every venv.

A contender offers run(prompts, new_tokens) -> [seconds]: the first is from the prompts to the first tokens, each
further one is a step that gives every prompt one token more. Sampling is greedy and end-of-text is ignored.
"""

import json
import os
import resource
import sys
from collections.abc import Callable

Run = Callable[[list[list[int]], int], list[float]]


def serve(versions: dict[str, str], run: Run) -> None:
    """Answer requests from standard input until it ends. Whatever else prints to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run([list(range(1, 33))], 3)  # first touch: weights are paged in, code is compiled
    print(json.dumps({"ready": True, "versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = run(request["prompts"], request["new_tokens"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), file=answers, flush=True)
