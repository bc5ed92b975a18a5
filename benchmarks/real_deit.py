"""The real DeiT-Tiny and its photographs, as the benchmarks that measure accuracy use them.

Data: ../shared. Its preprocessing is the one of the official runs; timm's own configuration of DeiT-Tiny crops to
0.9 instead.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vitquant
from vitquant.recipe import Bits, Recipe, requested
from vitquant.recipe.recipe import Calibration
from vitquant.tasks.classification import compare, logits_of
from vitquant.tasks.images import Item, batches, load_listing
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.zoo import ModelSource, create

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "deit_tiny_patch16_224.safetensors"
PREPROCESSING = Preprocessing(
    input_size=(3, 224, 224),
    interpolation="bicubic",
    crop_pct=0.875,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
EVALUATION = {"photos_eval": PREPROCESSING, "imagenette_eval": replace(PREPROCESSING, crop_pct=1.0)}
SCORES = ("top-1", "agreement", "cosine", "top-1 - float, 95 %")  # on each of them


@cache
def float_deit() -> torch.nn.Module:
    """DeiT-Tiny with its trained weights."""
    return create(ModelSource("timm:deit_tiny_patch16_224", weights=str(WEIGHTS)))


def quantized(model: torch.nn.Module, variant: str, calibration: Sequence[Item]) -> vitquant.QuantizedModel:
    """The model by a variant: a recipe, then bits, then settings as `vitquant quantize --set` takes them."""
    recipe, bits = requested_variant(variant)
    size = min(recipe.calibration.batch, len(calibration))
    data = batches(calibration, PREPROCESSING, size)
    # What lowers runs in integers all the same.
    return vitquant.quantize(model, recipe, data, bits=str(bits), simulated=True)


def asked(variant: str) -> Calibration:
    """How many calibration images a variant asks for."""
    return requested_variant(variant)[0].calibration


def requested_variant(variant: str) -> tuple[Recipe, Bits]:
    name, *rest = variant.split()
    bits = next((word for word in rest if "=" not in word), None)
    return requested(name, bits, [word for word in rest if "=" in word])


def official_logits(name: str) -> torch.Tensor:
    """The logits that an official run gave on `photos_eval`, in the order of its labels.csv."""
    return torch.from_numpy(np.load(SHARED / "reference" / "logits" / f"{name}.npz")["logits"]).float()


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


def interval(limits: Sequence[float], digits: int = 1) -> str:
    """An interval in percentage points."""
    return f"{limits[0]:+.{digits}f} to {limits[1]:+.{digits}f}"


@dataclass(frozen=True)
class EvaluationSet:
    """Labelled images in batches, and what the float model makes of them."""

    images: Iterable[tuple[torch.Tensor, torch.Tensor]]
    labels: torch.Tensor
    reference: torch.Tensor

    @classmethod
    def of(cls, model: torch.nn.Module, images: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> EvaluationSet:
        return cls(images, torch.cat([label for _, label in images]), run(model, images))

    @property
    def top1(self) -> float:
        return compare(self.reference, None, self.labels).top1

    def scores(self, logits: torch.Tensor) -> dict[str, Any]:
        """What `score_cells` takes, of one draw."""
        return scores(logits, self.reference, self.labels)


@cache
def evaluation_sets() -> dict[str, EvaluationSet]:
    """The sets of `EVALUATION`, photographs that nothing is chosen by."""
    listings = {name: load_listing(SHARED / "images" / name) for name in EVALUATION}
    return {
        name: EvaluationSet.of(float_deit(), batches(each, EVALUATION[name], 50)) for name, each in listings.items()
    }


def scores(logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """`SCORES` of one draw and top-1 of the float model, as plain values."""
    found = compare(logits, reference, labels)
    return {
        "top-1": found.top1,
        "agreement": found.agreement,
        "cosine": cosine(logits, reference),
        "interval": list(found.top1_difference_interval),
        "float top-1": found.float_top1,
    }


def score_cells(draws: Sequence[dict[str, Any]], digits: int = 1) -> list[str]:
    """`SCORES` over several draws, the interval of the first."""
    return [
        spread([each["top-1"] for each in draws], digits),
        spread([each["agreement"] for each in draws], digits),
        spread([each["cosine"] for each in draws], 4),
        interval(draws[0]["interval"], digits),
    ]
