"""Fixtures for all tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights and photographs beside the repository; what needs them is skipped without."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "weights" / "deit_tiny_patch16_224.safetensors").is_file():
        pytest.skip(f"no weights and photographs in {folder}")
    return folder
