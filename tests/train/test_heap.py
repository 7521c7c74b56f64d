"""Memory that steps free: kept for the next one while a run goes, given back after it."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, torch
from kiloq.train.heap import keeping_freed

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def size_after_a_tensor_of_256_mib():
    torch.ones(64 << 20)
    return resident()

torch.ones(1)
begin = resident()
plain = size_after_a_tensor_of_256_mib()
with keeping_freed():
    kept = size_after_a_tensor_of_256_mib()
print(json.dumps([round((size - begin) / 2**20) for size in (plain, kept, resident())]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of the C library of Linux")
def test_freed_memory_stays_within_and_goes_back_after() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    plain, kept, after = json.loads(done.stdout)
    assert plain < 64
    assert kept > 240
    assert after < 64
