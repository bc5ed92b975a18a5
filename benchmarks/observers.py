"""Accuracy of plain W8A8 by each observer on the real DeiT-Tiny, beside the official FQ-ViT code's rows.

    python benchmarks/observers.py [--seeds 3]

Data: ../shared, 1,000 calibration photographs in batches of 100 and 500 evaluation photographs. Prints the
table of docs/results.md. About 12 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import vitquant
from vitquant.tasks.classification import compare, logits_of, paired_interval
from vitquant.tasks.images import batches, load_listing, subset
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.zoo import ModelSource, create

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "deit_tiny_patch16_224.safetensors"
OFFICIAL = {
    "minmax": "fqvit_minmax_888",
    "moving-average": "fqvit_ema_888",
    "percentile": "fqvit_percentile_888",
    "omse": "fqvit_omse_888",
}
# The one the official runs used; timm's own configuration of DeiT-Tiny crops to 0.9 instead.
PREPROCESSING = Preprocessing(
    input_size=(3, 224, 224),
    interpolation="bicubic",
    crop_pct=0.875,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
console = Console(stderr=True)


def main() -> None:
    """Quantize by every observer and seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the calibration order")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="as vitquant quantize --set")
    parser.add_argument("--recipes", nargs="*", default=list(OFFICIAL))
    arguments = parser.parse_args()
    model = create(ModelSource("timm:deit_tiny_patch16_224", weights=str(WEIGHTS)))
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
        stored = np.load(SHARED / "reference" / "logits" / f"{OFFICIAL[recipe]}.npz")["logits"]
        official = torch.from_numpy(stored).float()
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


def row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def cosine(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The mean cosine of each image's logits with the float model's."""
    return torch.cosine_similarity(logits, reference, dim=1).mean().item()


def run(model: torch.nn.Module, evaluation: object) -> torch.Tensor:
    """The logits of every evaluation image."""
    with torch.inference_mode():
        return torch.cat([logits_of(model(images)) for images, _ in evaluation])


def spread(values: list[float], digits: int) -> str:
    """Mean, and the smallest and largest value when there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def interval(limits: tuple[float, float]) -> str:
    """An interval in percentage points."""
    return f"{limits[0]:+.1f} to {limits[1]:+.1f}"


if __name__ == "__main__":
    main()
