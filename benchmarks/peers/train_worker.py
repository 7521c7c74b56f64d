"""The conversation between finetune_peers.py and one contender, in JSON lines. Standard library only.

A contender's training loop calls `stepped` after every optimiser step; it returns when the next step may begin.
"""

import json
import os
import sys
import time
from pathlib import Path

PLAN = json.loads(Path(sys.argv[1]).read_text())
"""What is trained: {"model": folder, "data": file, "loss": "sft" | "dpo", "lora": bool, "setting": ..., "lr": ...}"""

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever else prints to stdout goes to stderr


def peak_bytes() -> int:
    """The most that this process has held in memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


class Turns:
    """Lets the loop run as many steps as are asked for, and answers with what they took."""

    def __init__(self) -> None:
        self.born, self.losses = time.perf_counter(), []
        self.left, self.began = 1, time.perf_counter()  # the first step compiles and allocates

    def stepped(self, loss: float) -> None:
        """After each step. Ends the process when nothing more is asked."""
        self.losses.append(loss)
        self.left -= 1
        if self.left:
            return
        seconds = time.perf_counter() - self.began
        answer = {"seconds": seconds, "losses": self.losses, "peak_bytes": peak_bytes()}
        print(json.dumps(answer), file=_answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self.left, self.losses, self.began = json.loads(line)["steps"], [], time.perf_counter()
