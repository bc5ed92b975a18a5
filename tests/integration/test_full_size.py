"""The plain recipe by name on full-size models of every library, with random weights: runs, saves, reloads.

make test-slow
"""

import json

import pytest
import torch
from PIL import Image

from vitquant.cli import main
from vitquant.loading import load
from vitquant.tasks.classification import logits_of

NAMES = [
    "timm:deit_small_patch16_224",
    "timm:vit_base_patch16_224",
    "timm:swin_tiny_patch4_window7_224",
    "transformers:deit",
    "transformers:swin",
    "torchvision:vit_b_16",
    "torchvision:swin_t",
]


@pytest.fixture
def photographs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for label in range(2):
        folder = tmp_path / "photographs" / str(label)
        folder.mkdir(parents=True)
        for number in range(2):
            pixels = torch.randint(0, 256, (256, 256, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return tmp_path / "photographs"


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    return json.loads(printed.out)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_quantize_evaluate_inspect_reload(name, photographs, tmp_path, capsys):
    out = tmp_path / "out"
    calibration = ("--calibration", photographs, "--images", 4, "--batch", 2)
    run(capsys, "quantize", name, "--weights", "random", *calibration, "--output", out, "--json")
    result = run(capsys, "evaluate", out, "--data", photographs, "--json")
    assert result["images"] == 4
    assert result["agreement"] is not None
    operations = run(capsys, "inspect", out, "--json")["operations"]
    assert {"scores", "context", "residual", "layer_norm", "softmax"} <= {operation["kind"] for operation in operations}
    first, again = load(out), load(out)
    images = torch.randn(2, *first.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        left, right = (logits_of(model(images)) for model in (first, again))
    assert torch.equal(left, right)
