"""Fixtures for tests of the command line."""

import pytest
import torch
from command_line import quantize_words, sensitivity_words, state_dict
from PIL import Image
from safetensors.torch import save_file

from vitquant.cli import main


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with images of 10 classes, weights of a tiny ViT, and that ViT quantized."""
    folder = tmp_path_factory.mktemp("cli")
    generator = torch.Generator().manual_seed(0)
    for index in range(20):
        path = folder / "images" / f"class_{index % 10}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (80, 72, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(path)
    save_file(state_dict(), folder / "weights.safetensors")
    command = quantize_words(folder / "images", folder / "out", weights=folder / "weights.safetensors")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--quiet"])
    assert ended.value.code == 0
    return folder


@pytest.fixture(scope="module")
def sensitivities(workshop):
    """What `vitquant sensitivity` wrote of the tiny ViT."""
    with pytest.raises(SystemExit) as ended:
        main([*sensitivity_words(workshop, "--bits", "w6a6", "--output", workshop / "sensitivity"), "--quiet"])
    assert ended.value.code == 0
    return workshop / "sensitivity" / "sensitivity.json"


@pytest.fixture
def refused(run, tmp_path):
    """Run a command that must be refused in one line with exit code 2, leaving `tmp_path` as it was."""

    def refused(*words):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return err

    return refused
