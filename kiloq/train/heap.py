"""What the C library does with memory that a step has freed. Knows no tensor."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt(3): M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX.
_TRIM, _THRESHOLD, _MAPS = -1, -3, -4
_LARGEST = 32 << 20  # the most that glibc takes for the second


@contextmanager
def keeping_freed() -> Iterator[None]:
    """Within, what is freed stays with the process for the next step, and is given back at the end. Linux with glibc;
    elsewhere nothing changes.

    glibc maps every tensor above 32 MB anew and unmaps it when it is freed, and returns the end of its heap above
    64 MB: each page is then zeroed at its first touch in every step, which for the gradient of a vocabulary of 151,936
    takes longer than to compute it.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MAPS, 0)
    libc.mallopt(_TRIM, -1)
    try:
        yield
    finally:
        # Where glibc's own rule ends once a tensor of 32 MB was freed; a value that was set turns that rule off.
        libc.mallopt(_MAPS, 65_536)
        libc.mallopt(_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM, 2 * _LARGEST)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
