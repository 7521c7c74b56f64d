"""Seconds from starting `kiloq chat` to the first byte of its answer, cold processes one after another.

python docs/measurements/first_token.py [runs]
"""

import subprocess
import sys
from time import perf_counter

for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
    start = perf_counter()
    chat = subprocess.Popen(
        [sys.executable, "-m", "kiloq", "chat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write("你好\n".encode())
    chat.stdin.close()
    assert chat.stdout.read(1)
    print(f"{perf_counter() - start:.2f} s")
    chat.wait()
