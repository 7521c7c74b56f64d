"""Servers started for a measurement: until they answer, what they cost, and their end. Only Linux counts costs."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from kiloq.errors import KiloqError

_CLOCK_TICKS = 100  # USER_HZ, what /proc counts in on every Linux


class ServerProcess:
    """A server on a free port of this machine; `command` has {port} where it belongs. End it with `stop`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        ready: str = "/v1/models",  # a GET that says 200 once the server can answer
        environment: Mapping[str, str] | None = None,
        start_seconds: float = 300,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the server runs
        self._process = subprocess.Popen(
            [word.replace("{port}", str(port)) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
        )
        try:
            self._wait(ready, time.monotonic() + start_seconds)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """Ask it to end, and end it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _wait(self, ready: str, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise KiloqError(f"the server ended with status {self._process.returncode}: {self._last_words()}")
            try:
                with urllib.request.urlopen(f"{self.url}{ready}", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise KiloqError(f"the server does not answer {self.url}{ready}: {self._last_words()}")

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return " / ".join(lines[-3:]) or "it said nothing"


def kiloq_server(model: Path | str | None, *, quantize: str | None = None, flags: Sequence[str] = ()) -> ServerProcess:
    """`kiloq serve` of a checkpoint, in this Python."""
    command = [sys.executable, "-m", "kiloq", "serve", "--port", "{port}", *flags]
    command += [] if model is None else ["-m", str(model)]
    command += [] if quantize is None else ["--quantize", quantize]
    return ServerProcess(command, start_seconds=3600)


def cpu_seconds(pid: int) -> float | None:
    """Processor time that a process has taken, all threads together."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS  # proc(5): utime and stime, the 14th and 15th of all


def memory_bytes(pid: int) -> tuple[int, int] | None:
    """Resident now, and at most since the process began."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    now, peak = (int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak
