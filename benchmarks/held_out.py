"""Choose between variants of a recipe without looking at evaluation data.

    python benchmarks/held_out.py omse "omse weights.observer=omse" [--draws 5]

Real DeiT-Tiny. Each draw halves the 1,000 calibration photographs at random: one half calibrates, and on the other
the variants are compared with the float model (no labels are used). A variant is a recipe, then settings as
`vitquant quantize --set` takes them. Prints agreement and cosine as mean (smallest..largest) over the draws, and the
paired difference of each to the first.
"""

from __future__ import annotations

import argparse

import torch
from real_deit import PREPROCESSING, SHARED, cosine, float_deit, row, run, spread
from rich.console import Console

import vitquant
from vitquant.tasks.images import batches, load_listing, subset

console = Console(stderr=True)


def main() -> None:
    """Quantize every variant on every draw and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    model = float_deit()
    listing = load_listing(SHARED / "images" / "photos_calibration")
    agreements: dict[str, list[float]] = {variant: [] for variant in arguments.variants}
    cosines: dict[str, list[float]] = {variant: [] for variant in arguments.variants}
    for draw in range(arguments.draws):
        order = subset(listing, len(listing), draw)
        middle = len(order) // 2
        held_out = batches(order[middle:], PREPROCESSING, 100)
        reference = run(model, held_out)
        for variant in arguments.variants:
            recipe, *settings = variant.split()
            with console.status(f"draw {draw}: {variant}"):
                quantized = vitquant.quantize(
                    model, recipe, batches(order[:middle], PREPROCESSING, 100), settings=settings
                )
                logits = run(quantized, held_out)
            agreements[variant].append(100 * float((logits.argmax(1) == reference.argmax(1)).double().mean()))
            cosines[variant].append(cosine(logits, reference))
            console.print(f"draw {draw} {variant}: agreement {agreements[variant][-1]:.1f} {cosines[variant][-1]:.4f}")
    columns = ("variant", "agreement", "cosine", "agreement - first", "cosine - first")
    print(row(columns))
    print("|---" * len(columns) + "|")
    first = arguments.variants[0]
    for variant in arguments.variants:
        cells = [
            variant,
            spread(agreements[variant], 1),
            spread(cosines[variant], 4),
            spread(differences(agreements[variant], agreements[first]), 1),
            spread(differences(cosines[variant], cosines[first]), 4),
        ]
        print(row(cells), flush=True)


def differences(values: list[float], others: list[float]) -> list[float]:
    """Draw by draw."""
    return torch.tensor(values, dtype=torch.float64).sub(torch.tensor(others, dtype=torch.float64)).tolist()


if __name__ == "__main__":
    main()
