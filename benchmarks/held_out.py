"""Choose between variants of a recipe without looking at evaluation data.

    python benchmarks/held_out.py "repq-vit+fully-integer w8a8s5" "fq-vit w8a8s4" [--draws 3]
    python benchmarks/held_out.py omse "omse weights.observer=omse" --simulated --calibration 500 --draws 5

Real DeiT-Tiny. Each draw puts the 1,000 calibration photographs in another order: the first of them calibrate, as
many as the recipe asks for, and the last 500 are held out; on those the variants are compared with the float model (no
labels are used). A variant is a recipe, then bits, then settings as `vitquant quantize --set` takes them. What lowers
is run as the integer program, the rest, and all with `--simulated`, as the float32 simulation. Prints agreement and
cosine as mean (smallest..largest) over the draws, the paired difference of each to the first, seconds to quantize and
megabytes saved. `--results DIR` keeps every run as it ends; `--workers N|ray` computes several side by side.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import cache

from real_deit import PREPROCESSING, SHARED, asked, cosine, float_deit, quantized, row, run, spread
from runs import Found, add_options, runs_of
from torch import Tensor

from vitquant.engines import default_engine
from vitquant.model.saved import stored_bytes
from vitquant.tasks.classification import compare
from vitquant.tasks.images import ImageBatches, Item, batches, load_listing, subset

HELD_OUT = 500


@dataclass(frozen=True)
class Job:
    """One run: a variant, the draw, the most images to calibrate on, whether what lowers is simulated, too."""

    variant: str
    draw: int
    calibration: int
    simulated: bool


def main() -> None:
    """Quantize every variant on every draw and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--calibration", type=int, help="images to calibrate on; the recipe's number when not given")
    parser.add_argument("--simulated", action="store_true", help="the float32 simulation of what lowers, too")
    add_options(parser)
    given = parser.parse_args()
    jobs = [
        Job(variant, draw, given.calibration or asked(variant).images, given.simulated)
        for draw in range(given.draws)
        for variant in dict.fromkeys(given.variants)
    ]
    measured = runs_of(_measure, jobs, given)
    found = {variant: [measured[job] for job in jobs if job.variant == variant] for variant in given.variants}
    columns = ("variant", "runs in", "agreement", "cosine", "agreement - first", "cosine - first", "seconds", "MB")
    print(row(columns))
    print("|---" * len(columns) + "|")
    first = found[given.variants[0]]
    for variant, results in found.items():
        cells = [variant, results[0]["runs in"]]
        for measure, digits in (("agreement", 1), ("cosine", 4)):
            cells.append(spread([each[measure] for each in results], digits))
        for measure, digits in (("agreement", 1), ("cosine", 4)):
            pairs = zip(results, first, strict=True)
            cells.append(spread([each[measure] - other[measure] for each, other in pairs], digits))
        cells += [spread([each["seconds"] for each in results], 0), f"{results[0]['megabytes']:.2f}"]
        print(row(cells))


@cache
def _order(draw: int) -> list[Item]:
    listing = load_listing(SHARED / "images" / "photos_calibration")
    return list(subset(listing, len(listing), draw))


@cache
def _held_out(draw: int) -> tuple[ImageBatches, Tensor]:
    """The photographs that are held out, and the float model's logits of them."""
    images = batches(_order(draw)[-HELD_OUT:], PREPROCESSING, 50)
    return images, run(float_deit(), images)


def _measure(job: Job) -> Found:
    order, (held_out, reference) = _order(job.draw), _held_out(job.draw)
    started = time.perf_counter()
    model = quantized(float_deit(), job.variant, order[: min(job.calibration, len(order) - HELD_OUT)])
    seconds = time.perf_counter() - started
    runs_in, engine, _ = ("simulated", model, "") if job.simulated else default_engine(model)
    logits = run(engine, held_out)
    return {
        "runs in": runs_in,
        "agreement": compare(logits, reference, reference.argmax(1)).agreement,
        "cosine": cosine(logits, reference),
        "seconds": seconds,
        "megabytes": sum(stored_bytes(model).values()) / 1e6,
    }


if __name__ == "__main__":
    from held_out import main  # see runs.py

    main()
