"""Laws of the pool: every item once, whoever calls."""

import ctypes
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from kiloq.ops import cpu
from kiloq.ops.structs import declare


@pytest.fixture
def pool():
    """The library with its own number of threads restored."""
    if not cpu.LIBRARY.is_file():
        pytest.skip("no kernels here")
    library = ctypes.CDLL(str(cpu.LIBRARY))
    declare(library)
    before = library.kq_threads()
    yield library
    library.kq_set_threads(before)


def visits(library, count: int, grain: int) -> np.ndarray:
    found = np.zeros(max(count, 1), np.int32)
    library.kq_visit(count, grain, found.ctypes.data)
    return found[:count]


def test_every_item_is_visited_once(pool):
    for threads in (1, 2, 3, 7):
        pool.kq_set_threads(threads)
        for count in (0, 1, 2, 15, 16, 17, 1000):
            for grain in (-1, 1, 3, 16, 1000, 5000):  # -1: kShrinking
                assert (visits(pool, count, grain) == 1).all(), (threads, count, grain)


def test_many_short_jobs_in_a_row_lose_nothing(pool):
    pool.kq_set_threads(4)
    found = np.zeros(5, np.int32)
    for _ in range(5000):
        pool.kq_visit(5, 1, found.ctypes.data)
    assert (found == 5000).all()


# A process of its own: where a worker takes a piece of a job that is still being written, too much is counted as done,
# and the caller waits for ever. Nothing but calls stands between two jobs, for gaps hide it.
CHANGING = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
visit = library.kq_visit
visit.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
counts = (2, 3, 5, 200)
for threads in (4, 8):
    library.kq_set_threads(threads)
    visits = [(ctypes.c_int32 * count)() for count in counts]
    jobs = [(len(found), 1, ctypes.addressof(found)) for found in visits]
    for done in range(1, 40_001):
        for job in jobs:
            visit(*job)
        if done % 100 == 0:
            assert all(set(found) == {done} for found in visits), (threads, done)
"""


def test_jobs_of_changing_length_back_to_back_lose_and_repeat_nothing(pool):
    subprocess.run([sys.executable, "-c", CHANGING, str(cpu.LIBRARY)], check=True, timeout=120)


def test_callers_of_several_threads_take_turns(pool):
    pool.kq_set_threads(3)
    results = []

    def call() -> None:
        results.extend(int((visits(pool, count, 7) != 1).sum()) for count in range(200))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 800
    assert not any(results)


def test_a_forked_child_has_a_pool_of_its_own(pool):
    pool.kq_set_threads(3)
    visits(pool, 100, 1)
    child = os.fork()
    if child == 0:
        os._exit(0 if (visits(pool, 500, 1) == 1).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (visits(pool, 100, 1) == 1).all()


def test_a_process_forks_while_another_thread_computes(pool):
    pool.kq_set_threads(2)
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            visits(pool, 300, 1)

    busy = threading.Thread(target=compute)
    busy.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                os._exit(0 if (visits(pool, 50, 1) == 1).all() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        busy.join()


def test_threads_may_change_between_calls(pool):
    for threads in (4, 1, 2, 0, 3):
        pool.kq_set_threads(threads)
        assert pool.kq_threads() == max(threads, 1)
        assert (visits(pool, 64, 1) == 1).all()
