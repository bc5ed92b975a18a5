"""DeiT-Tiny quantized at 224 pixels and captured again at other sizes, beside what is calibrated there.

PYTHONPATH=src python benchmarks/image_size.py --images 300 --recipe "default w8a8" --recipe "fq-vit w8a8s4"

Data: ../shared: calibration photographs; `imagenette_eval` and `photos_eval`, the first --images of each. Integers
throughout; three draws of calibration images. A table in Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from real_deit import EVALUATION, SHARED, WEIGHTS, cosine, interval, row, run, spread

import vitquant
from vitquant.engines import default_engine
from vitquant.image_folders import CalibrationImages
from vitquant.recipe import Bits, Recipe, requested
from vitquant.tasks.classification import compare
from vitquant.tasks.images import batches, load_listing, subset
from vitquant.zoo import ModelSource, create

SIZES = (192, 224, 256)
DRAWS = (0, 1, 2)
HEADERS = ("set", "recipe", "pixels", "float top-1", "scales of", "top-1", "agreement", "cosine", "top-1 - float, 95 %")


def _calibrated(
    model: torch.nn.Module, recipe: Recipe, bits: Bits, chosen: CalibrationImages, size: int
) -> vitquant.QuantizedModel:
    steps = replace(EVALUATION["photos_eval"], input_size=(3, size, size))
    return vitquant.quantize(model, recipe, chosen.batches(steps), bits=str(bits))


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--recipe", action="append", help="and bits")
    asked = parser.parse_args()
    arguments = {"dynamic_img_size": True}
    model = create(ModelSource("timm:deit_tiny_patch16_224", arguments, weights=str(WEIGHTS)))
    print(row(HEADERS))
    print(row("-" * len(HEADERS)), flush=True)
    references: dict[tuple[str, int], torch.Tensor] = {}
    for text in asked.recipe or ["default w8a8"]:
        name, bits = text.split()
        recipe, widths = requested(name, bits)
        logits: dict[tuple[str, int, str], list[torch.Tensor]] = {}
        for draw in DRAWS:
            chosen = CalibrationImages.chosen(SHARED / "images" / "photos_calibration", recipe, seed=draw)
            at_224 = _calibrated(model, recipe, widths, chosen, 224)
            for size in SIZES:
                there = {"224": at_224 if size == 224 else vitquant.at_image_size(at_224, model, size)}
                if size != 224:
                    there[str(size)] = _calibrated(model, recipe, widths, chosen, size)
                for data, steps in EVALUATION.items():
                    items = subset(load_listing(SHARED / "images" / data), asked.images, seed=0)
                    stream = batches(items, replace(steps, input_size=(3, size, size)), 25)
                    if (data, size) not in references:
                        references[data, size] = run(model, stream)
                    for scales, quantized in there.items():
                        engine, computed, _ = default_engine(quantized)
                        assert engine == "integer"
                        logits.setdefault((data, size, scales), []).append(run(computed, stream))
        for (data, size, scales), found in sorted(logits.items()):
            items = subset(load_listing(SHARED / "images" / data), asked.images, seed=0)
            labels, reference = torch.tensor([item.label for item in items]), references[data, size]
            results = [compare(each, reference, labels) for each in found]
            cells = [
                data, text, str(size), f"{results[0].float_top1:.1f}", scales,
                spread([each.top1 for each in results], 1), spread([each.agreement for each in results], 1),
                spread([cosine(each, reference) for each in found], 4), interval(results[0].top1_difference_interval),
            ]  # fmt: skip
            print(row(cells), flush=True)


if __name__ == "__main__":
    main()
