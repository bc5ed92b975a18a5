"""Recipes on the real DeiT-Tiny, beside the official code's rows.

    python benchmarks/recipes.py VARIANT... [--seeds 3] [--simulated]

A variant is a recipe, then bits, then settings as `vitquant quantize --set` takes them: "repq-vit w4a4",
"fq-vit choose-factors.batches=last"; or all that one page of docs/ has: `fq-vit`, `repq-vit`, `vt-ptq`,
`vt-ptq-ablation` and `w4a4` with nothing behind it stand for the variants in PAGES. Data: ../shared; as many
calibration photographs as the recipe asks for, the first of the order that a seed gives (seed 0 is the official runs'
list), and 500 evaluation photographs. What lowers is evaluated as the integer program, the rest, and all with
`--simulated`, as the float32 simulation. Prints a table: each draw beside the float model, with the paired 95 %
interval of the first, and the official code's logits where it has such a row, with the paired interval of top-1 minus
its. Two to six minutes a variant and draw on two cores.
"""

from __future__ import annotations

import argparse

import torch
from real_deit import PREPROCESSING, SHARED, cosine, float_deit, interval, official_logits, row, run, spread
from rich.console import Console

import vitquant
from vitquant.engines import default_engine
from vitquant.recipe import load_recipe
from vitquant.tasks.classification import compare
from vitquant.tasks.images import batches, load_listing, subset

PAGES = {
    "fq-vit": [
        "fq-vit-published w8a8s4",
        "fq-vit-published+uniform-probs w8a8",
        "fq-vit-published+uniform-probs+uniform-norm-inputs w8a8",
        "fq-vit w8a8s4",
        "fq-vit+uniform-probs w8a8",
        "fq-vit+uniform-probs+uniform-norm-inputs w8a8",
    ],
    "repq-vit": [
        "repq-vit w8a8",
        "repq-vit w6a6",
        "repq-vit w4a4",
        "repq-vit+fully-integer w8a8s5",
        "repq-vit+fully-integer w6a6s5",
        "repq-vit+fully-integer w4a4",
    ],
    "w4a4": [
        "repq-vit+fully-integer w8a8s5",
        "repq-vit+fully-integer w4a8s5",
        "repq-vit+fully-integer w8a4s5",
        "repq-vit+fully-integer w8a8s4",
        "repq-vit+fully-integer w4a4",
        "repq-vit+power-of-two-factor w4a4",
        "repq-vit+searched-scales w4a4",
        "repq-vit+searched-scales+fully-integer w4a4",
        "fq-vit w4a4",
    ],
    "vt-ptq": ["vt-ptq w8a8", "vt-ptq w6a6", "vt-ptq w4a4"],
    "vt-ptq-ablation": [
        f"vt-ptq {bits}{ranking}{correction}"
        for bits in ("w8a8", "w6a6", "w4a4")
        for ranking in (" search-scales.gamma=0", "")
        for correction in (" search-scales.bias_correction=false", "")
    ],
}
OFFICIAL = {
    "fq-vit-published w8a8s4": "fqvit_minmax_ptf_lis_884",
    "fq-vit-published+uniform-probs w8a8": "fqvit_minmax_ptf_888",
    "fq-vit-published+uniform-probs+uniform-norm-inputs w8a8": "fqvit_minmax_888",
    "fq-vit w8a8s4": "fqvit_minmax_ptf_lis_884",
    "fq-vit+uniform-probs w8a8": "fqvit_minmax_ptf_888",
    "fq-vit+uniform-probs+uniform-norm-inputs w8a8": "fqvit_minmax_888",
    "repq-vit w8a8": "repq_w8a8",
    "repq-vit w6a6": "repq_w6a6",
    "repq-vit w4a4": "repq_w4a4",
    "repq-vit+fully-integer w8a8s5": "repq_w8a8",
    "repq-vit+fully-integer w6a6s5": "repq_w6a6",
    "repq-vit+fully-integer w4a4": "repq_w4a4",
    "vt-ptq w8a8": "baseptq_w8a8",
    "vt-ptq w6a6": "baseptq_w6a6",
}
console = Console(stderr=True)


def main() -> None:
    """Quantize by every variant and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--seeds", type=int, default=1, help="draws of the calibration photographs")
    parser.add_argument("--simulated", action="store_true", help="evaluate the float32 simulation of what lowers, too")
    arguments = parser.parse_args()
    model = float_deit()
    evaluation = batches(load_listing(SHARED / "images" / "photos_eval"), PREPROCESSING, 50)
    labels = torch.cat([label for _, label in evaluation])
    reference = run(model, evaluation)
    columns = (
        "recipe", "runs in", "top-1", "agreement", "cosine", "top-1 - float, 95 %",
        "official top-1", "agreement", "cosine", "top-1 - official, 95 %", "agreement with official",
        "cosine with official",
    )  # fmt: skip
    print(row(columns))
    print("|---" * len(columns) + "|")
    print(row(("float", "float32", f"{compare(reference, None, labels).top1:.1f}", *[""] * (len(columns) - 3))))
    for variant in [each for given in arguments.variants for each in PAGES.get(given, [given])]:
        outputs, runs_in = [], ""
        for seed in range(arguments.seeds):
            with console.status(f"{variant}, draw {seed}"):
                quantized = _quantized(model, variant, seed)
                runs_in, engine, _ = ("simulated", quantized, "") if arguments.simulated else default_engine(quantized)
                outputs.append(run(engine, evaluation))
        results = [compare(logits, reference, labels) for logits in outputs]
        cells = [
            variant,
            runs_in,
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
                interval(compare(outputs[0], official, labels).top1_difference_interval),
                spread([compare(logits, official, labels).agreement for logits in outputs], 1),
                spread([cosine(logits, official) for logits in outputs], 4),
            ]
        print(row([*cells, *[""] * (len(columns) - len(cells))]), flush=True)


def _quantized(model: torch.nn.Module, variant: str, seed: int) -> vitquant.QuantizedModel:
    name, *rest = variant.split()
    bits = next((word for word in rest if "=" not in word), None)
    calibration = load_recipe(name).calibration
    listing = subset(load_listing(SHARED / "images" / "photos_calibration"), calibration.images, seed)
    settings = [word for word in rest if "=" in word]
    return vitquant.quantize(
        model, name, batches(listing, PREPROCESSING, calibration.batch), bits=bits, settings=settings
    )


if __name__ == "__main__":
    main()
