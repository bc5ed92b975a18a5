"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

# Tests are many and tensors are small: a second thread would only spin, here and in what tests start.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights and photographs beside the repository; what needs them is skipped without."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "weights" / "deit_tiny_patch16_224.safetensors").is_file():
        pytest.skip(f"no weights and photographs in {folder}")
    return folder
