"""Choose between variants of a recipe without looking at evaluation data.

    python benchmarks/held_out.py "repq-vit+fully-integer w8a8s5" "fq-vit w8a8s4" [--draws 3] [--results FILE.jsonl]
    python benchmarks/held_out.py omse "omse weights.observer=omse" --simulated --calibration 500 --draws 5

Real DeiT-Tiny. Each draw puts the 1,000 calibration photographs in another order: the first of them calibrate, as
many as the recipe asks for, and the last 500 are held out; on those the variants are compared with the float model (no
labels are used). A variant is a recipe, then bits, then settings as `vitquant quantize --set` takes them. What lowers
is run as the integer program, the rest, and all with `--simulated`, as the float32 simulation. Prints agreement and
cosine as mean (smallest..largest) over the draws, the paired difference of each to the first, seconds to quantize and
megabytes saved.

With `--results` every run is kept in a file as it ends, and what the file holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from real_deit import PREPROCESSING, SHARED, asked, cosine, float_deit, quantized, row, run, spread
from rich.console import Console

from vitquant.engines import default_engine
from vitquant.model.saved import stored_bytes
from vitquant.tasks.images import batches, load_listing, subset

HELD_OUT = 500
console = Console(stderr=True)


def main() -> None:
    """Quantize every variant on every draw and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--calibration", type=int, help="images to calibrate on; the recipe's number when not given")
    parser.add_argument("--simulated", action="store_true", help="the float32 simulation of what lowers, too")
    parser.add_argument("--results", type=Path, help="keeps every run, one JSON object a line")
    arguments = parser.parse_args()
    known = {} if arguments.results is None else _read(arguments.results)
    model = float_deit()
    listing = load_listing(SHARED / "images" / "photos_calibration")
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in arguments.variants}
    for draw in range(arguments.draws):
        order = subset(listing, len(listing), draw)
        held_out = batches(order[-HELD_OUT:], PREPROCESSING, 50)
        reference = None
        for variant in arguments.variants:
            count = arguments.calibration or asked(variant).images
            key = {"variant": variant, "draw": draw, "calibration": count, "simulated": arguments.simulated}
            result = known.get(json.dumps(key))
            if result is None:
                reference = run(model, held_out) if reference is None else reference
                with console.status(f"draw {draw}: {variant}"):
                    calibration = order[: min(count, len(order) - HELD_OUT)]
                    result = _measured(model, variant, calibration, held_out, reference, arguments.simulated)
                if arguments.results is not None:
                    with arguments.results.open("a") as file:
                        file.write(json.dumps({"key": key, "result": result}) + "\n")
            found[variant].append(result)
            console.print(f"draw {draw} {variant}: {result}")
    columns = ("variant", "runs in", "agreement", "cosine", "agreement - first", "cosine - first", "seconds", "MB")
    print(row(columns))
    print("|---" * len(columns) + "|")
    first = found[arguments.variants[0]]
    for variant, results in found.items():
        cells = [variant, results[0]["runs in"]]
        for measure, digits in (("agreement", 1), ("cosine", 4)):
            cells.append(spread([each[measure] for each in results], digits))
        for measure, digits in (("agreement", 1), ("cosine", 4)):
            pairs = zip(results, first, strict=True)
            cells.append(spread([each[measure] - other[measure] for each, other in pairs], digits))
        cells += [spread([each["seconds"] for each in results], 0), f"{results[0]['megabytes']:.2f}"]
        print(row(cells), flush=True)


def _read(results: Path) -> dict[str, dict[str, Any]]:
    lines = results.read_text().splitlines() if results.exists() else []
    return {json.dumps(each["key"]): each["result"] for each in map(json.loads, lines)}


def _measured(
    model: torch.nn.Module, variant: str, calibration: Any, held_out: Any, reference: torch.Tensor, simulated: bool
) -> dict[str, Any]:
    started = time.perf_counter()
    result = quantized(model, variant, calibration)
    seconds = time.perf_counter() - started
    runs_in, engine, _ = ("simulated", result, "") if simulated else default_engine(result)
    logits = run(engine, held_out)
    return {
        "runs in": runs_in,
        "agreement": 100 * (logits.argmax(1) == reference.argmax(1)).double().mean().item(),
        "cosine": cosine(logits, reference),
        "seconds": seconds,
        "megabytes": sum(stored_bytes(result).values()) / 1e6,
    }


if __name__ == "__main__":
    main()
