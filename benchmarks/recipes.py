"""Recipes on the real DeiT-Tiny, beside the official code's rows.

    python benchmarks/recipes.py VARIANT... [--seeds 3] [--simulated]

A variant is a recipe, then bits, then settings as `vitquant quantize --set` takes them: "repq-vit w4a4",
"fq-vit choose-factors.batches=last"; or all that one table of docs/ has: `observers`, `default`, `fq-vit`, `repq-vit`,
`vt-ptq`, `vt-ptq-ablation` and `w4a4` with nothing behind it stand for the variants in PAGES. Data: ../shared; as many
calibration photographs as the recipe asks for, the first of the order that a seed gives (seed 0 is the official runs'
list); 500 photographs of `photos_eval` and 1,000 of `imagenette_eval`, which are cropped already. What lowers is
evaluated as the integer program, the rest, and all with `--simulated`, as the float32 simulation. Prints a table: each
draw beside the float model on both sets, with the paired 95 % interval of the first, the seconds to quantize and the
megabytes saved; and for `photos_eval` the official code's logits where it has such a row, with the paired interval of
top-1 minus its. Three to ten minutes a variant and draw on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from real_deit import (
    EVALUATION,
    SCORES,
    SHARED,
    EvaluationSet,
    asked,
    cosine,
    float_deit,
    interval,
    official_logits,
    quantized,
    row,
    run,
    spread,
)
from rich.console import Console

from vitquant.engines import default_engine
from vitquant.model.saved import stored_bytes
from vitquant.tasks.classification import compare
from vitquant.tasks.images import Item, load_listing, subset

PAGES = {
    "fq-vit": [
        "fq-vit-published w8a8s4",
        "fq-vit-published+uniform-probs w8a8",
        "fq-vit-published+uniform-probs+uniform-norm-inputs w8a8",
        "fq-vit w8a8s4",
        "fq-vit+uniform-probs w8a8",
        "fq-vit+uniform-probs+uniform-norm-inputs w8a8",
    ],
    "observers": ["minmax", "moving-average", "percentile", "omse"],
    "default": ["default w8a8", "default w6a6", "default w4a8", "default w4a4"],
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
    "minmax": "fqvit_minmax_888",
    "moving-average": "fqvit_ema_888",
    "percentile": "fqvit_percentile_888",
    "omse": "fqvit_omse_888",
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
    sets = [EvaluationSet.of(model, name) for name in EVALUATION]
    columns = (
        "recipe", "runs in", *[f"{measure}, {name}" for name in EVALUATION for measure in SCORES], "seconds", "MB",
        "official top-1", "agreement", "cosine", "top-1 - official, 95 %", "agreement with official",
        "cosine with official",
    )  # fmt: skip
    print(row(columns))
    print("|---" * len(columns) + "|")
    floats = [cell for each in sets for cell in (f"{each.top1:.1f}", "", "", "")]
    print(row(("float", "float32", *floats, *[""] * (len(columns) - len(floats) - 2))))
    for variant in [each for given in arguments.variants for each in PAGES.get(given, [given])]:
        outputs: list[list[torch.Tensor]] = [[] for _ in sets]
        seconds, megabytes, runs_in = [], 0.0, ""
        for seed in range(arguments.seeds):
            with console.status(f"{variant}, draw {seed}"):
                started = time.perf_counter()
                model_of_variant = quantized(model, variant, _calibration(variant, seed))
                seconds.append(time.perf_counter() - started)
                megabytes = sum(stored_bytes(model_of_variant).values()) / 1e6
                name, engine, _ = default_engine(model_of_variant)
                runs_in, engine = ("simulated", model_of_variant) if arguments.simulated else (name, engine)
                for logits, evaluation in zip(outputs, sets, strict=True):
                    logits.append(run(engine, evaluation.images))
        cells = [variant, runs_in]
        for logits, evaluation in zip(outputs, sets, strict=True):
            cells += evaluation.cells(logits)
        cells += [spread(seconds, 0), f"{megabytes:.2f}"]
        if variant in OFFICIAL:
            cells += _beside_official(outputs[0], sets[0], official_logits(OFFICIAL[variant]))
        print(row([*cells, *[""] * (len(columns) - len(cells))]), flush=True)


def _beside_official(outputs: list[torch.Tensor], evaluation: EvaluationSet, official: torch.Tensor) -> list[str]:
    theirs = compare(official, evaluation.reference, evaluation.labels)
    return [
        f"{theirs.top1:.1f}",
        f"{theirs.agreement:.1f}",
        f"{cosine(official, evaluation.reference):.4f}",
        interval(compare(outputs[0], official, evaluation.labels).top1_difference_interval),
        spread([compare(logits, official, evaluation.labels).agreement for logits in outputs], 1),
        spread([cosine(logits, official) for logits in outputs], 4),
    ]


def _calibration(variant: str, seed: int) -> Sequence[Item]:
    return subset(load_listing(SHARED / "images" / "photos_calibration"), asked(variant).images, seed)


if __name__ == "__main__":
    main()
