"""FQ-ViT on the real DeiT-Tiny, beside the official code's rows.

    python benchmarks/fq_vit.py [--seeds 3] [--variants "fq-vit" "fq-vit choose-factors.batches=last" ...]

Data: ../shared, 1,000 calibration photographs in batches of 100 and 500 evaluation photographs. A variant is a
recipe, then settings as `vitquant quantize --set` takes them, or bits. Prints the table of docs/fq-vit.md: beside the
float model, and beside the official code's logits where it has such a row. About three minutes a variant on two cores.
"""

from __future__ import annotations

import argparse

import torch
from real_deit import PREPROCESSING, SHARED, cosine, float_deit, interval, official_logits, row, run, spread
from rich.console import Console

import vitquant
from vitquant.tasks.classification import compare
from vitquant.tasks.images import batches, load_listing, subset

OFFICIAL = {
    "fq-vit-published w8a8s4": "fqvit_minmax_ptf_lis_884",
    "fq-vit-published+uniform-probs w8a8": "fqvit_minmax_ptf_888",
    "fq-vit-published+uniform-probs+uniform-norm-inputs w8a8": "fqvit_minmax_888",
    "fq-vit w8a8s4": "fqvit_minmax_ptf_lis_884",
    "fq-vit+uniform-probs w8a8": "fqvit_minmax_ptf_888",
    "fq-vit+uniform-probs+uniform-norm-inputs w8a8": "fqvit_minmax_888",
}
console = Console(stderr=True)


def main() -> None:
    """Quantize by every variant and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="draws of the calibration order")
    parser.add_argument("--variants", nargs="*", default=list(OFFICIAL))
    arguments = parser.parse_args()
    model = float_deit()
    evaluation = batches(load_listing(SHARED / "images" / "photos_eval"), PREPROCESSING, 100)
    labels = torch.cat([label for _, label in evaluation])
    reference = run(model, evaluation)
    columns = (
        "recipe", "top-1", "agreement", "cosine", "top-1 - float, 95 %",
        "official top-1", "agreement", "cosine", "agreement with official", "cosine with official",
    )  # fmt: skip
    print(row(columns))
    print("|---" * len(columns) + "|")
    print(row(("float", f"{compare(reference, None, labels).top1:.1f}", *[""] * (len(columns) - 2))))
    for variant in arguments.variants:
        recipe, *rest = variant.split()
        bits = next((word for word in rest if "=" not in word), None)
        outputs = []
        for seed in range(arguments.seeds):
            listing = subset(load_listing(SHARED / "images" / "photos_calibration"), 1000, seed)
            with console.status(f"{variant}, order {seed}"):
                data = batches(listing, PREPROCESSING, 100)
                settings = [word for word in rest if "=" in word]
                quantized = vitquant.quantize(model, recipe, data, bits=bits, settings=settings)
                outputs.append(run(quantized, evaluation))
        results = [compare(logits, reference, labels) for logits in outputs]
        cells = [
            variant,
            spread([result.top1 for result in results], 1),
            spread([result.agreement for result in results], 1),
            spread([cosine(logits, reference) for logits in outputs], 4),
            interval(results[0].top1_difference_interval),
        ]
        if variant in OFFICIAL:
            official = official_logits(OFFICIAL[variant])
            theirs = compare(official, reference, labels)
            cells += [
                f"{theirs.top1:.1f}",
                f"{theirs.agreement:.1f}",
                f"{cosine(official, reference):.4f}",
                spread([compare(logits, official, labels).agreement for logits in outputs], 1),
                spread([cosine(logits, official) for logits in outputs], 4),
            ]
        print(row([*cells, *[""] * (len(columns) - len(cells))]), flush=True)


if __name__ == "__main__":
    main()
