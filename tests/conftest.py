"""What all tests share: where the optional reference data lies, and one thread, so that results repeat."""

import os
from pathlib import Path

import pytest

# One thread: equal results on every machine, and spinning threads would fight over busy cores (tiny models need none).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real vocabularies and texts that are too restricted or too large to commit."""
    folder = Path(os.environ.get("KILOQ_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"reference data is not at {folder}; set KILOQ_SHARED_DATA to a copy")
    return folder
