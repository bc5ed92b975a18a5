"""What the search of scales by evolution gains on the real DeiT-Tiny.

    python benchmarks/evolution.py VARIANT... [--images 256] [--seeds 3] [--results FILE.jsonl] [--work DIR]

A variant is a recipe with the method `evolve-scales`, then bits, then settings as `vitquant quantize --set` takes them:
"evol-q w4a8 evolve-scales.passes=3". Each seed draws the calibration photographs, and 200 other ones for which the loss
is measured before and after the search, and it is the seed of the search. The recipe without the method is the base.
What lowers is evaluated as the integer program, on 500 photographs of `photos_eval` and 1,000 of `imagenette_eval`.
Prints a table: mean (smallest..largest) over the seeds, the base and the search beside the float model.

With `--results` every run is kept in a file as it ends, and what the file holds is not run again; with `--work` a
search that was interrupted continues. A reduced search (256 images, 3 passes) takes 20 minutes on one thread of an
Intel Xeon, the evaluation of a model eight.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from real_deit import EVALUATION, PREPROCESSING, SHARED, EvaluationSet, cosine, float_deit, requested_variant, row, run
from real_deit import spread as spread_of
from rich.console import Console

import vitquant
from vitquant.engines import default_engine
from vitquant.objectives.output_loss import OUTPUT_LOSSES
from vitquant.tasks.classification import compare
from vitquant.tasks.images import Item, batches, load_listing, subset

METHOD = "evolve-scales"
HELD_OUT = 200
BATCH = 100
console = Console(stderr=True)


def main() -> None:
    """Search with every variant and seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="keeps every run, one JSON object a line")
    parser.add_argument("--work", type=Path, help="keeps the state of searches")
    arguments = parser.parse_args()
    known = {} if arguments.results is None else _read(arguments.results)
    model = float_deit()
    listing = load_listing(SHARED / "images" / "photos_calibration")
    sets: list[EvaluationSet] = []
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        order = subset(listing, len(listing), seed)
        calibration, held_out = order[: arguments.images], order[-HELD_OUT:]
        for variant in arguments.variants:
            for name in (_base(variant), variant):
                key = json.dumps({"variant": name, "seed": seed, "images": arguments.images})
                if key not in known:
                    sets = sets or [EvaluationSet.of(model, each) for each in EVALUATION]
                    work = None if arguments.work is None else arguments.work / sha256(key.encode()).hexdigest()[:16]
                    with console.status(f"seed {seed}: {name}"):
                        known[key] = _measure(model, name, calibration, held_out, sets, seed, work)
                    _keep(arguments.results, key, known[key])
                rows = found.setdefault(name, [])
                if len(rows) <= seed:
                    rows.append(known[key])
    columns = ["variant", "loss before", "loss after", "loss, other images"]
    columns += [f"{measure}, {name}" for name in EVALUATION for measure in ("top-1", "agreement", "cosine")]
    print(row([*columns, "search, s"]))
    print("|---" * (len(columns) + 1) + "|")
    for name, rows in found.items():
        cells = [name, _cell(rows, "before", 4), _cell(rows, "after", 4), _cell(rows, "held out", 4)]
        for each in EVALUATION:
            cells += [_cell(rows, f"{each} top-1", 1), _cell(rows, f"{each} agreement", 1)]
            cells += [_cell(rows, f"{each} cosine", 4)]
        print(row([*cells, _cell(rows, "seconds", 0)]))


def _base(variant: str) -> str:
    """The variant without the search: `evolve-scales` is left out of its recipe."""
    return " ".join(word for word in variant.split() if not word.startswith(f"{METHOD}.")) + f" without {METHOD}"


def _measure(
    model: torch.nn.Module,
    variant: str,
    calibration: Sequence[Item],
    held_out: Sequence[Item],
    sets: Sequence[EvaluationSet],
    seed: int,
    work: Path | None,
) -> dict[str, Any]:
    searched = not variant.endswith(f" without {METHOD}")
    recipe, bits = requested_variant(variant.removesuffix(f" without {METHOD}"))
    if not searched:
        recipe = replace(recipe, methods=tuple(method for method in recipe.methods if method.name != METHOD))
    data = batches(calibration, PREPROCESSING, BATCH)
    started = time.perf_counter()
    quantized = vitquant.quantize(model, recipe, data, bits=str(bits), seed=seed, simulated=True, work=work)
    result: dict[str, Any] = {"seconds": time.perf_counter() - started}
    for record in quantized.records:
        if record.method == METHOD:
            result["record"] = dict(record.summary)
            result["before"], result["after"] = (
                record.summary["loss before"],
                record.summary["loss after each pass"][-1],
            )
    _, engine, _ = default_engine(quantized)
    others = batches(held_out, PREPROCESSING, BATCH)
    outputs = run(engine, others).split(BATCH), run(model, others).split(BATCH)
    losses = [OUTPUT_LOSSES["infonce"](*pair) for pair in zip(*outputs, strict=True)]
    result["held out"] = torch.cat(losses).mean().item()
    for name, evaluation in zip(EVALUATION, sets, strict=True):
        logits = run(engine, evaluation.images)
        scores = compare(logits, evaluation.reference, evaluation.labels)
        result[f"{name} top-1"], result[f"{name} agreement"] = scores.top1, scores.agreement
        result[f"{name} cosine"] = cosine(logits, evaluation.reference)
    return result


def _cell(rows: Sequence[dict[str, Any]], key: str, digits: int) -> str:
    values = [each[key] for each in rows if key in each]
    return spread_of(values, digits) if values else ""


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["key"]: line["result"] for line in lines}


def _keep(path: Path | None, key: str, result: dict[str, Any]) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"key": key, "result": result}) + "\n")


if __name__ == "__main__":
    main()
