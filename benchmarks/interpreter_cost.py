"""What exactness costs: seconds an image of the real DeiT-Tiny by FQ-ViT, float, simulated and in integers.

    python benchmarks/interpreter_cost.py [--runs 5] [--batch 25]

Data: ../shared, 25 calibration photographs; speed does not depend on them. Prints a Markdown table: the fastest and the
median of some runs in turns, on a quiet machine. The int64 definition runs once, on two images. About two minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from real_deit import PREPROCESSING, SHARED, float_deit, row

import vitquant
from vitquant.model.simulation import ExactSimulation
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.products import exact_int64
from vitquant.tasks.images import batches, load_listing, subset


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=25)
    arguments = parser.parse_args()
    model = float_deit()
    listing = subset(load_listing(SHARED / "images" / "photos_calibration"), 25, 0)
    quantized = vitquant.quantize(model, "fq-vit", batches(listing, PREPROCESSING, 25))
    program = vitquant.lower(quantized)
    images = next(iter(batches(subset(listing, 25, 0), PREPROCESSING, 25)))[0][: arguments.batch]
    assert quantized.image_quantizer is not None
    codes = quantized.image_quantizer.encode(images)
    forms: dict[str, tuple[Callable[[Any], Any], torch.Tensor]] = {
        "float model": (model, images),
        "simulation": (quantized, images),
        "simulation in float64": (ExactSimulation(quantized), images),
        "interpreter": (Interpreter(program), codes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode():
        for _ in range(arguments.runs + 1):
            for name, (form, given) in forms.items():
                seconds[name].append(timed(form, given))
        definition = timed(Interpreter(program, exact_int64), codes[:2])
    print(row(("seconds an image", "fastest", "median")))
    print("|---" * 3 + "|")
    for name, values in seconds.items():
        print(row((name, f"{min(values[1:]):.4f}", f"{statistics.median(values[1:]):.4f}")))
    print(row(("int64 definition", f"{definition:.2f}", "")))
    print(f"\n{torch.get_num_threads()} threads, batch {len(images)}, torch {torch.__version__}")


def timed(form: Callable[[Any], Any], given: torch.Tensor) -> float:
    """Seconds for each image."""
    started = time.perf_counter()
    form(given)
    return (time.perf_counter() - started) / len(given)


if __name__ == "__main__":
    main()
