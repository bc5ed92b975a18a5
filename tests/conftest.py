"""Fixtures for all tests."""

import os
from collections.abc import Callable
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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run one command in this process: exit code, stdout, stderr."""
    from vitquant.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return run


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `slow.txt` names."""
    lines = (Path(__file__).parent / "slow.txt").read_text().splitlines()
    named = {line for line in lines if line and not line.startswith("#")}
    for item in items:
        if item.nodeid in named:
            item.add_marker(pytest.mark.slow)
    whole = not any("::" in each for each in config.args)
    collected = {item.nodeid for item in items}
    files = {each.partition("::")[0] for each in collected}
    if gone := [each for each in sorted(named - collected) if whole and each.partition("::")[0] in files]:
        raise pytest.UsageError(f"tests/slow.txt names what is not there: {gone[0]} and {len(gone) - 1} more")
