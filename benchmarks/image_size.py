"""DeiT-Tiny quantized at 224 pixels and captured again at other sizes, beside what is calibrated there.

PYTHONPATH=src python benchmarks/image_size.py --images 300 --recipe "default w8a8" --recipe "fq-vit w8a8s4"

Data: ../shared: calibration photographs; `imagenette_eval` and `photos_eval`, the first --images of each. Integers
throughout; three draws of calibration images. A table in Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from real_deit import EVALUATION, SCORES, SHARED, WEIGHTS, row, run, score_cells, scores
from runs import Found, add_options, runs_of

import vitquant
from vitquant.engines import default_engine
from vitquant.image_folders import CalibrationImages
from vitquant.recipe import Bits, Recipe, requested
from vitquant.tasks.images import batches, load_listing, subset
from vitquant.zoo import ModelSource, create

SIZES = (192, 224, 256)
DRAWS = (0, 1, 2)
HEADERS = ("set", "recipe", "pixels", "float top-1", "scales of", *SCORES)


@dataclass(frozen=True)
class Job:
    """One run: a recipe and bits, the draw of its calibration images, the number of images to evaluate on."""

    recipe: str
    draw: int
    images: int


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--recipe", action="append", help="and bits")
    add_options(parser)
    given = parser.parse_args()
    recipes = dict.fromkeys(given.recipe or ["default w8a8"])
    jobs = {recipe: [Job(recipe, draw, given.images) for draw in DRAWS] for recipe in recipes}
    found = runs_of(_measure, [job for draws in jobs.values() for job in draws], given)
    print(row(HEADERS))
    print(row("-" * len(HEADERS)))
    for recipe, draws in jobs.items():
        results = [found[job] for job in draws]
        for data in sorted(EVALUATION):
            for size in map(str, SIZES):
                for scales in sorted(results[0][data][size]):
                    each = [result[data][size][scales] for result in results]
                    print(row([data, recipe, size, f"{each[0]['float top-1']:.1f}", scales, *score_cells(each)]))


def _measure(job: Job) -> Found:
    model = create(ModelSource("timm:deit_tiny_patch16_224", {"dynamic_img_size": True}, weights=str(WEIGHTS)))
    recipe, bits = requested(*job.recipe.split())
    chosen = CalibrationImages.chosen(SHARED / "images" / "photos_calibration", recipe, seed=job.draw)
    at_224 = _calibrated(model, recipe, bits, chosen, 224)
    found: Found = {data: {} for data in EVALUATION}
    for size in SIZES:
        there = {"224": at_224 if size == 224 else vitquant.at_image_size(at_224, model, size)}
        if size != 224:
            there[str(size)] = _calibrated(model, recipe, bits, chosen, size)
        for data, steps in EVALUATION.items():
            items = subset(load_listing(SHARED / "images" / data), job.images, seed=0)
            stream = batches(items, replace(steps, input_size=(3, size, size)), 25)
            labels, reference = torch.tensor([item.label for item in items]), run(model, stream)
            found[data][str(size)] = {}
            for scales, quantized in there.items():
                engine, computed, _ = default_engine(quantized)
                assert engine == "integer"
                found[data][str(size)][scales] = scores(run(computed, stream), reference, labels)
    return found


def _calibrated(
    model: torch.nn.Module, recipe: Recipe, bits: Bits, chosen: CalibrationImages, size: int
) -> vitquant.QuantizedModel:
    steps = replace(EVALUATION["photos_eval"], input_size=(3, size, size))
    return vitquant.quantize(model, recipe, chosen.batches(steps), bits=str(bits))


if __name__ == "__main__":
    from image_size import main  # see runs.py

    main()
