"""The pages on Python, submodules and image sizes run as they stand, on the embedded model and small ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vitquant
from vitquant.demo import embedded

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS, SUBMODULES, SIZES = (
    re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.S)
    for page in ("python.md", "submodules.md", "image-size.md")
)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    given, refused, *rest = BLOCKS
    assert "timm.create_model" in given  # what is downloaded is here what the package carries
    train, test = ([(x, y) for x, y in embedded.batches(each, size)[:2]] for each, size in (("train", 4), ("test", 16)))
    names: dict[str, Any] = {"model": embedded.model(), "calibration": train, "test": test, "torch": torch}
    with pytest.raises(vitquant.VitquantError, match="no rule or method 'calibrate-nothing'"):
        exec(refused, names)
    for block in rest:
        exec(block, names)
    assert names["result"].engine == "integer"
    assert names["logits"].shape == (16, 10)
    assert not names["report"].broken
    assert {path.name for path in tmp_path.iterdir()} == {"out", "model.onnx", "model.program"}
    with torch.no_grad():
        images = test[0][0]
        assert torch.equal(names["loaded"](images), names["quantized"](images))
    assert "blocks.0.attn.scores:query" in capsys.readouterr().out


def test_the_page_on_submodules_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    classes, given, *rest = SUBMODULES
    names: dict[str, Any] = {}
    exec(classes, names)
    tiny = "pretrained=False, out_channels=16, depth=12, embed_dim=16, num_heads=2, patch_size=8, img_size=224"
    small = given.replace("pretrained=True, img_size=224", tiny).replace("224", "32").replace("range(8)", "range(2)")
    assert small.count("32, 32") == 1
    exec(small, names)
    for block in rest:
        exec(block, names)
    with torch.no_grad():
        found, expected = (names["quantized"](names["batches"][1]), names["detector"](names["batches"][1]))
    assert len(found) == len(expected) == 4
    assert [name for name, _ in names["quantized"].backbone.body.named_children()] == ["captured"]
    assert capsys.readouterr().out.count("torch.Size") == 2


def test_the_page_on_image_sizes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = SIZES
    sizes = "pretrained=False, img_size=32, depth=2, embed_dim=48, num_heads=3"
    small = block.replace("pretrained=True", sizes).replace("256", "48")
    names: dict[str, Any] = {"timm": timm, "vitquant": vitquant, "calibration": [torch.randn(4, 3, 32, 32)]}
    exec(small, names)
    loaded = vitquant.load("out-48", names["model"])
    with torch.no_grad():
        assert loaded(torch.randn(2, 3, 48, 48)).shape == (2, 1000)


def test_every_public_function_is_on_a_page() -> None:
    functions = [name for name in vitquant.__all__ if name.islower() and name not in ("float_model", "compare")]
    assert all(f"vitquant.{name}(" in "".join(BLOCKS + SUBMODULES + SIZES) for name in functions)
