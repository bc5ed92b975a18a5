"""Recipes on the real DeiT-Tiny, beside the official code's rows.

    python benchmarks/recipes.py VARIANT... [--seeds 3] [--simulated] [--results DIR] [--workers N|ray]

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
from dataclasses import dataclass

from real_deit import (
    EVALUATION,
    SCORES,
    SHARED,
    asked,
    cosine,
    evaluation_sets,
    float_deit,
    interval,
    official_logits,
    quantized,
    row,
    run,
    score_cells,
    spread,
)
from runs import Found, add_options, runs_of

from vitquant.engines import default_engine
from vitquant.model.saved import stored_bytes
from vitquant.tasks.classification import compare
from vitquant.tasks.images import load_listing, subset

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
OFFICIAL_SET = "photos_eval"  # on which the official logits are


@dataclass(frozen=True)
class Job:
    """One run: a variant, the draw of its calibration photographs, whether what lowers is simulated, too."""

    variant: str
    seed: int
    simulated: bool


def main() -> None:
    """Quantize by every variant and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--seeds", type=int, default=1, help="draws of the calibration photographs")
    parser.add_argument("--simulated", action="store_true", help="evaluate the float32 simulation of what lowers, too")
    add_options(parser)
    given = parser.parse_args()
    variants = dict.fromkeys(each for asked in given.variants for each in PAGES.get(asked, [asked]))
    draws = {each: [Job(each, seed, given.simulated) for seed in range(given.seeds)] for each in variants}
    found = runs_of(_measure, [job for jobs in draws.values() for job in jobs], given)
    columns = (
        "recipe", "runs in", *[f"{measure}, {name}" for name in EVALUATION for measure in SCORES], "seconds", "MB",
        "official top-1", "agreement", "cosine", "top-1 - official, 95 %", "agreement with official",
        "cosine with official",
    )  # fmt: skip
    print(row(columns))
    print("|---" * len(columns) + "|")
    floats = [cell for each in evaluation_sets().values() for cell in (f"{each.top1:.1f}", "", "", "")]
    print(row(("float", "float32", *floats, *[""] * (len(columns) - len(floats) - 2))))
    for variant, jobs in draws.items():
        results = [found[job] for job in jobs]
        cells = [variant, results[0]["runs in"]]
        for name in EVALUATION:
            cells += score_cells([each[name] for each in results])
        cells += [spread([each["seconds"] for each in results], 0), f"{results[-1]['megabytes']:.2f}"]
        if variant in OFFICIAL:
            cells += _beside_official(OFFICIAL[variant], [each["official"] for each in results])
        print(row([*cells, *[""] * (len(columns) - len(cells))]))


def _measure(job: Job) -> Found:
    listing = load_listing(SHARED / "images" / "photos_calibration")
    started = time.perf_counter()
    model = quantized(float_deit(), job.variant, subset(listing, asked(job.variant).images, job.seed))
    found: Found = {"seconds": time.perf_counter() - started, "megabytes": sum(stored_bytes(model).values()) / 1e6}
    found["runs in"], engine, _ = ("simulated", model, "") if job.simulated else default_engine(model)
    for name, evaluation in evaluation_sets().items():
        logits = run(engine, evaluation.images)
        found[name] = evaluation.scores(logits)
        if name == OFFICIAL_SET and job.variant in OFFICIAL:
            official = official_logits(OFFICIAL[job.variant])
            beside = compare(logits, official, evaluation.labels)
            found["official"] = {
                "interval": list(beside.top1_difference_interval),
                "agreement": beside.agreement,
                "cosine": cosine(logits, official),
            }
    return found


def _beside_official(name: str, draws: list[Found]) -> list[str]:
    theirs = evaluation_sets()[OFFICIAL_SET].scores(official_logits(name))
    return [
        f"{theirs['top-1']:.1f}",
        f"{theirs['agreement']:.1f}",
        f"{theirs['cosine']:.4f}",
        interval(draws[0]["interval"]),
        spread([each["agreement"] for each in draws], 1),
        spread([each["cosine"] for each in draws], 4),
    ]


if __name__ == "__main__":
    from recipes import main  # see runs.py

    main()
