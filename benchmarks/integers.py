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

import torch
from real_deit import PREPROCESSING, SHARED, cosine, float_deit, interval, row, run
from rich.console import Console

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
console = Console(stderr=True)


def main() -> None:
    """Quantize by every variant, lower it, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--variants", nargs="*", default=VARIANTS)
    arguments = parser.parse_args()
    model = float_deit()
    photographs = subset(load_listing(SHARED / "images" / "photos_eval"), arguments.images, 0)
    evaluation = batches(photographs, PREPROCESSING, 50)
    labels = torch.cat([label for _, label in evaluation])
    reference = run(model, evaluation)
    columns = (
        "recipe", "top-1: integers", "float64 simulation", "float32 simulation",
        "integers - float32 simulation, 95 %", "integers - float, 95 %",
        "agreement: integers, float64", "integers, float32", "float64, float32", "integers, float",
        "same logits: integers, float64", "cosine: integers, float", "flipped codes", "worst site",
    )  # fmt: skip
    print(row(columns))
    print("|---" * len(columns) + "|")
    print(row(("float", f"{compare(reference, None, labels).top1:.1f}", *[""] * (len(columns) - 2))), flush=True)
    for variant in arguments.variants:
        recipe, *bits = variant.split()
        with console.status(variant):
            listing = subset(load_listing(SHARED / "images" / "photos_calibration"), 1000, 0)
            data = batches(listing, PREPROCESSING, 100)
            quantized = vitquant.quantize(model, recipe, data, bits=bits[0] if bits else None)
            program = vitquant.lower(quantized)
            integers = run(interpreted(program), evaluation)
            single, double = run(quantized, evaluation), run(ExactSimulation(quantized), evaluation).float()
            fed = [images for images, _ in batches(photographs[:_FED], PREPROCESSING, 8)]
            flips = [each for each in flipped_codes(quantized, program, fed) if each.made_by == RESCALING]
        figures = {name: compare(logits, reference, labels) for name, logits in
                   (("integers", integers), ("double", double), ("single", single))}  # fmt: skip
        correct = [logits.argmax(1) == labels for logits in (integers, single)]
        worst = max(flips, key=lambda each: each.share)
        share = sum(each.flipped for each in flips) / sum(each.codes for each in flips)
        print(
            row(
                (
                    variant,
                    *(f"{figures[name].top1:.1f}" for name in ("integers", "double", "single")),
                    interval(paired_interval(*correct)),
                    interval(figures["integers"].top1_difference_interval),
                    f"{compare(integers, double, labels).agreement:.1f}",
                    f"{compare(integers, single, labels).agreement:.1f}",
                    f"{compare(double, single, labels).agreement:.1f}",
                    f"{figures['integers'].agreement:.1f}",
                    f"{100 * torch.isclose(integers, double, rtol=1e-5).all(1).double().mean().item():.1f}",
                    f"{cosine(integers, reference):.4f}",
                    f"{share:.1e}",
                    f"{worst.share:.1e} {worst.value}",
                )
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
