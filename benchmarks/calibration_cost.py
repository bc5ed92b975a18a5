"""What calibration costs beside the float forward passes it needs.

    python benchmarks/calibration_cost.py [--batches 10] [--recipes minmax ...]

DeiT-Tiny on random images in batches of 100. Float batches and calibration batches alternate, so that a busy
machine slows both; the ratio is of medians. Prints the table of docs/results.md. Needs no data.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import timm
import torch

from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.methods.calibrate import CalibrateSettings, calibrate
from vitquant.methods.context import Context
from vitquant.model import QuantizedModel
from vitquant.recipe import available


class Alternating:
    """Batches of images; before each one the float model is timed, and between them whatever calibration does."""

    def __init__(self, model: torch.nn.Module, batches: int, batch: int) -> None:
        self.model, self.batches, self.batch = model, batches, batch
        self.float_seconds: list[float] = []
        self.calibration_seconds: list[float] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.batches):
            images = torch.randn(self.batch, 3, 224, 224, generator=generator)
            started = time.perf_counter()
            self.model(images)
            self.float_seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            yield images
            self.calibration_seconds.append(time.perf_counter() - started)


def main() -> None:
    """Time every recipe's calibration and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument(
        "--recipes", nargs="*", default=[recipe.name for recipe in available() if len(recipe.methods) == 1]
    )
    arguments = parser.parse_args()
    model = timm.create_model("deit_tiny_patch16_224").eval()
    example = torch.randn(2, 3, 224, 224)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batches of {arguments.batch}")
    print("| recipe | float s per batch | calibration s per batch | ratio | finishing, s |")
    print("|---|---|---|---|---|")
    for recipe in available():
        if recipe.name not in arguments.recipes:
            continue
        quantized = QuantizedModel(CapturedModel(capture(model, example), (3, 224, 224)), recipe, recipe.bits)
        data = Alternating(model, arguments.batches, arguments.batch)
        started = time.perf_counter()
        with torch.inference_mode():
            calibrate(quantized, Context(data), CalibrateSettings())
        finishing = time.perf_counter() - started - sum(data.float_seconds) - sum(data.calibration_seconds)
        plain, observed = statistics.median(data.float_seconds), statistics.median(data.calibration_seconds)
        print(f"| {recipe.name} | {plain:.2f} | {observed:.2f} | {observed / plain:.2f} | {finishing:.1f} |")


if __name__ == "__main__":
    main()
