"""Accuracy of plain W8A8 by each observer on the real DeiT-Tiny, beside the official FQ-ViT code's rows.

    python benchmarks/observers.py [--seeds 3]

Data: ../shared, 1,000 calibration photographs in batches of 100 and 500 evaluation photographs. Prints the
table of docs/results.md. About 12 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json

import torch
from real_deit import PREPROCESSING, SHARED, cosine, float_deit, interval, official_logits, row, run, spread
from rich.console import Console

import vitquant
from vitquant.tasks.classification import compare, paired_interval
from vitquant.tasks.images import batches, load_listing, subset

OFFICIAL = {
    "minmax": "fqvit_minmax_888",
    "moving-average": "fqvit_ema_888",
    "percentile": "fqvit_percentile_888",
    "omse": "fqvit_omse_888",
}
console = Console(stderr=True)


def main() -> None:
    """Quantize by every observer and seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the calibration order")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="as vitquant quantize --set")
    parser.add_argument("--recipes", nargs="*", default=list(OFFICIAL))
    arguments = parser.parse_args()
    model = float_deit()
    evaluation = batches(load_listing(SHARED / "images" / "photos_eval"), PREPROCESSING, 100)
    labels = torch.cat([label for _, label in evaluation])
    reference = run(model, evaluation)
    columns = (
        "recipe", "top-1", "agreement", "cosine", "top-1 - float, 95 %",
        "official top-1", "agreement", "cosine", "top-1 - official, 95 %",
    )  # fmt: skip
    print(row(columns))
    print("|---" * len(columns) + "|")
    print(row(("float", f"{compare(reference, None, labels).top1:.1f}", *[""] * (len(columns) - 2))))
    for recipe in arguments.recipes:
        results, cosines, ours = [], [], None
        for seed in range(arguments.seeds):
            listing = subset(load_listing(SHARED / "images" / "photos_calibration"), 1000, seed)
            with console.status(f"{recipe}, order {seed}"):
                data = batches(listing, PREPROCESSING, 100)
                quantized = vitquant.quantize(model, recipe, data, settings=arguments.settings)
                logits = run(quantized, evaluation)
            ours = logits if ours is None else ours
            results.append(compare(logits, reference, labels))
            cosines.append(cosine(logits, reference))
            console.print(json.dumps({"recipe": recipe, "order": seed, "cosine": cosines[-1], **vars(results[-1])}))
        assert ours is not None
        official = official_logits(OFFICIAL[recipe])
        their = compare(official, reference, labels)
        difference = paired_interval(ours.argmax(1) == labels, official.argmax(1) == labels)
        cells = [
            recipe,
            spread([result.top1 for result in results], 1),
            spread([result.agreement for result in results], 1),
            spread(cosines, 4),
            interval(results[0].top1_difference_interval),
            f"{their.top1:.1f}",
            f"{their.agreement:.1f}",
            f"{cosine(official, reference):.4f}",
            interval(difference),
        ]
        print(row(cells), flush=True)


if __name__ == "__main__":
    main()
