"""How far the integer program of the real DeiT-Tiny is from its simulation.

    python benchmarks/integers.py [--images 500] [--variants "fq-vit" "fq-vit+uniform-probs w8a8" ...]

Data: ../shared, 1,000 calibration photographs in batches of 100; evaluated on 500 others. A variant is a recipe and,
if not its own, bits. Prints the tables of docs/integers.md: top-1 beside float; agreement of the integer program with
the simulation in float64 and in float32, and of these two with each other; and the codes that rescaling flips beside
the float64 simulation when both are fed the same codes, over all sites and at the worst one (on 32 images). About seven
minutes a variant on two cores.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from real_deit import PREPROCESSING, SHARED, float_deit, interval, row, run, scores
from runs import Found, add_options, runs_of

import vitquant
from vitquant.model.simulation import ExactSimulation
from vitquant.parity import RESCALING, flipped_codes
from vitquant.runtime.on_images import interpreted
from vitquant.tasks.classification import compare, paired_interval
from vitquant.tasks.images import batches, load_listing, subset

VARIANTS = [
    "fq-vit",
    "fq-vit+uniform-probs w8a8",
    "fq-vit+wide-residual",
    "fq-vit w4a8s4",
    "fq-vit w4a4s4",
]
_FED = 32  # images for which codes are compared site by site


@dataclass(frozen=True)
class Job:
    """One run: a recipe and, if not its own, bits; the number of images to evaluate on."""

    variant: str
    images: int


def main() -> None:
    """Quantize by every variant, lower it, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--variants", nargs="*", default=VARIANTS)
    add_options(parser)
    given = parser.parse_args()
    found = runs_of(_measure, [Job(variant, given.images) for variant in dict.fromkeys(given.variants)], given)
    columns = (
        "recipe", "top-1: integers", "float64 simulation", "float32 simulation",
        "integers - float32 simulation, 95 %", "integers - float, 95 %",
        "agreement: integers, float64", "integers, float32", "float64, float32", "integers, float",
        "same logits: integers, float64", "cosine: integers, float", "flipped codes", "worst site",
    )  # fmt: skip
    print(row(columns))
    print("|---" * len(columns) + "|")
    floats = {each["integers"]["float top-1"] for each in found.values()}
    print(row(("float", *(f"{top1:.1f}" for top1 in floats), *[""] * (len(columns) - 2))))
    for job, each in found.items():
        print(
            row(
                (
                    job.variant,
                    *(f"{each[name]['top-1']:.1f}" for name in ("integers", "float64", "float32")),
                    interval(each["integers - float32"]),
                    interval(each["integers"]["interval"]),
                    f"{each['integers, float64']:.1f}",
                    f"{each['integers, float32']:.1f}",
                    f"{each['float64, float32']:.1f}",
                    f"{each['integers']['agreement']:.1f}",
                    f"{each['same logits']:.1f}",
                    f"{each['integers']['cosine']:.4f}",
                    f"{each['flipped']:.1e}",
                    f"{each['worst']:.1e} {each['worst site']}",
                )
            )
        )


def _measure(job: Job) -> Found:
    model = float_deit()
    photographs = subset(load_listing(SHARED / "images" / "photos_eval"), job.images, 0)
    evaluation = batches(photographs, PREPROCESSING, 50)
    labels, reference = torch.cat([label for _, label in evaluation]), run(model, evaluation)
    recipe, *bits = job.variant.split()
    data = batches(subset(load_listing(SHARED / "images" / "photos_calibration"), 1000, 0), PREPROCESSING, 100)
    quantized = vitquant.quantize(model, recipe, data, bits=bits[0] if bits else None)
    program = vitquant.lower(quantized)
    integers = run(interpreted(program), evaluation)
    single, double = run(quantized, evaluation), run(ExactSimulation(quantized), evaluation).float()
    fed = [images for images, _ in batches(photographs[:_FED], PREPROCESSING, 8)]
    flips = [each for each in flipped_codes(quantized, program, fed) if each.made_by == RESCALING]
    worst = max(flips, key=lambda each: each.share)
    pairs = {
        "integers, float64": (integers, double),
        "integers, float32": (integers, single),
        "float64, float32": (double, single),
    }
    return {
        **{
            name: scores(logits, reference, labels)
            for name, logits in (("integers", integers), ("float64", double), ("float32", single))
        },
        **{name: compare(*pair, labels).agreement for name, pair in pairs.items()},
        "integers - float32": list(paired_interval(*[each.argmax(1) == labels for each in (integers, single)])),
        "same logits": 100 * torch.isclose(integers, double, rtol=1e-5).all(1).double().mean().item(),
        "flipped": sum(each.flipped for each in flips) / sum(each.codes for each in flips),
        "worst": worst.share,
        "worst site": worst.value,
    }


if __name__ == "__main__":
    from integers import main  # see runs.py

    main()
