"""What a pass of the search of scales costs, beside a search that runs the whole model for every candidate.

    python benchmarks/evolution_cost.py [--images 40]

The real DeiT-Tiny by the recipe evol-q (Data: ../shared), one pass over its twelve blocks with three children each. The
naive search evaluates the parent and each child of a block by the whole model. The floor is what has to be computed:
for every child the part of the model from its block on, and once per pass the inputs of all blocks. Prints, for the
floor, this search and the naive one, the floating-point operations in whole forward passes of the model, and seconds;
the seconds of the floor are its forward passes times those of one. Six minutes on two cores, most of them to
calibrate and to count.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from real_deit import PREPROCESSING, SHARED, float_deit, row
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import vitquant
from vitquant.graph.parts import in_parts
from vitquant.graph.segments import IMAGES
from vitquant.methods.context import Context
from vitquant.methods.recomputed import suffix
from vitquant.methods.scale_evolution import EvolveScalesSettings, evolve_scales
from vitquant.objectives.output_loss import infonce
from vitquant.recipe import load_recipe
from vitquant.tasks.images import batches, load_listing

CHILDREN = 3


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40)
    count = parser.parse_args().images
    items = load_listing(SHARED / "images" / "photos_calibration")[:count]
    images = torch.cat([batch for batch, _ in batches(items, PREPROCESSING, count)])
    recipe = load_recipe("evol-q")
    settings = next(method.settings for method in recipe.methods if method.name == "evolve-scales")
    kept = tuple(each for each in recipe.methods if each.name in ("calibrate", "choose-factors"))
    model = vitquant.quantize(float_deit(), replace(recipe, methods=kept), [images], simulated=True)
    teacher = copy.deepcopy(model)
    context = Context([images], teacher=_Float(teacher))  # type: ignore[arg-type]
    options = EvolveScalesSettings(**{**settings, "passes": 1, "cycles": CHILDREN, "keep_moments": False})
    outputs = [site.name for site in model.sites if site.kind == "output"]
    whole = model.segment(IMAGES, outputs)

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return in_parts(whole, [images], count)[0]

    def naive() -> None:
        reference = forward()
        for _ in range(len(model.index.blocks) * (1 + CHILDREN)):
            infonce(forward(), reference).mean()

    def floor() -> None:
        with torch.inference_mode():
            numbers = sorted(model.index.blocks)
            parts = {number: suffix(model, number) for number in numbers}
            prefixes = in_parts(model.segment(IMAGES, [parts[number].inputs[0] for number in numbers]), [images], count)
            for number, prefix in zip(numbers, prefixes, strict=True):
                for _ in range(CHILDREN):
                    in_parts(parts[number], [prefix], count)

    forward()  # the first call allocates
    of_one, seconds = _flops(forward), _seconds(forward)
    print(row(("search", "forward passes", "share of naive", "seconds", "share of naive")))
    print("|---|---|---|---|---|")
    work = {"naive": naive, "this search": lambda: evolve_scales(copy.deepcopy(model), context, options)}
    passes = {name: _flops(call) / of_one for name, call in work.items()}
    took = {name: _seconds(call) for name, call in work.items()}
    least = _flops(floor) / of_one
    rows = [("floor", least, least * seconds), *((name, passes[name], took[name]) for name in reversed(work))]
    for name, forwards, time_taken in rows:
        shares = forwards / passes["naive"], time_taken / took["naive"]
        print(row((name, f"{forwards:.1f}", f"{shares[0]:.2f}", f"{time_taken:.1f}", f"{shares[1]:.2f}")))


class _Float:
    """A quantized model as the float model that it was made from."""

    def __init__(self, model: vitquant.QuantizedModel) -> None:
        self.model, self.sites = model, model.sites

    def segment(self, inputs: str, outputs: list[str]) -> Any:
        return self.model.segment(inputs, outputs, quantized=False)


class _Operations(TorchDispatchMode):
    """Counts floating-point operations of products, also where gradients are off, where FlopCounterMode fails."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            inner = func.decompose(*args, **kwargs)
        if inner is not NotImplemented:
            return inner
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return result


def _flops(call: Callable[[], Any]) -> int:
    with _Operations() as counter:
        call()
    return counter.total


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
