"""What an iteration of image synthesis costs, beside what has to be computed, and the memory of the density.

    python benchmarks/synthesis_cost.py [--images 32] [--iterations 5] [--threads 2]

The real DeiT-Tiny (Data: ../shared), psaq-vit's objective. The floor is the sum of
- the model: contexts and logits of the images, and the gradient of the images from given gradients of these;
- the density: as many exponentials as there are points and pairs of patches, in the forward and in the backward pass,
  at the speed of exponentials in the processor's cache.
Prints seconds, the median over the iterations; and by how much the peak of a process's memory rises for the entropy of
one attention and its gradient, by the direct formula and by `patch_entropy`. A minute on two cores.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from real_deit import PREPROCESSING, float_deit, row
from torch import Tensor
from torch.nn import functional

from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.objectives.patch_similarity import BANDWIDTH, POINTS, patch_entropy
from vitquant.synthesis.patch_similarity import Draws, Objective, PatchSimilaritySettings, optimize

PATCHES, CHANNELS, AT_ONCE = 196, 64, 8
IN_CACHE = 2**16  # numbers


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    memory = {name: _peak(name, given.images) for name in ("direct", "patch_entropy")}
    model = CapturedModel(capture(float_deit(), torch.zeros(2, 3, 224, 224)), (3, 224, 224)).requires_grad_(False)
    settings = PatchSimilaritySettings(iterations=given.iterations, jitter=(15,), warmup=1)
    objective = Objective.of(model, settings, "output")
    draws = Draws.of(0, range(given.images), (3, 224, 224), 1000, settings)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (PREPROCESSING.mean, PREPROCESSING.std))
    limits = (0 - mean) / std, (1 - mean) / std
    times: list[float] = []

    def record(what: str, done: int, total: int) -> None:
        times.append(time.perf_counter())

    optimize(objective, draws, limits, AT_ONCE, progress=record)
    iteration = statistics.median(after - before for before, after in pairwise(times))
    passes = _median(lambda: _passes(objective, draws.start), given.iterations)
    attentions = len(objective.features.sites)
    exponentials = 2 * given.images * attentions * POINTS * PATCHES * (PATCHES - 1) // 2
    numbers = torch.randn(IN_CACHE).neg_().abs_().neg_()
    density = _median(lambda: numbers.exp(), 200) * exponentials / IN_CACHE
    print(row(("part", "seconds", "share of the floor")))
    print("|---|---|---|")
    floor = passes + density
    for name, seconds in (("model", passes), ("density", density), ("floor", floor), ("an iteration", iteration)):
        print(row((name, f"{seconds:.3f}", f"{seconds / floor:.2f}")))
    print()
    print(row(("entropy of one attention", "MB")))
    print("|---|---|")
    for name, peak in memory.items():
        print(row((name, f"{peak:.0f}")))


def _passes(objective: Objective, start: Tensor) -> None:
    """Contexts and logits of all images, and the gradient of the images."""
    for part in start.split(AT_ONCE):
        images = part.clone().requires_grad_(True)
        outputs = objective.segment(images)
        torch.autograd.grad(outputs, images, [torch.ones_like(each) for each in outputs])


def _median(call: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times + 1):  # the first allocates
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def _peak(name: str, images: int) -> float:
    """By how many MB the peak memory of a process of its own rises."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_entropy_of_one_attention, args=(name, images, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def _entropy_of_one_attention(name: str, images: int, queue: multiprocessing.Queue) -> None:
    entropy = {"direct": _direct, "patch_entropy": patch_entropy}[name]
    entropy(torch.randn(1, 1, 4, 4, requires_grad=True)).sum().backward()  # what the first call loads
    features = torch.randn(images, 1, PATCHES, CHANNELS, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entropy(features).sum().backward()
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def _direct(features: Tensor) -> Tensor:
    """The entropy as it is written, with a number for every image, point and ordered pair."""
    unit = functional.normalize(features, dim=-1)
    pairs = (unit @ unit.mT).flatten(1)
    low, high = pairs.detach().aminmax(dim=1)
    at = torch.lerp(low[:, None], high[:, None], torch.linspace(0, 1, POINTS))
    kernels = (-0.5 * ((at[..., None] - pairs[:, None]) / BANDWIDTH) ** 2).exp() / (BANDWIDTH * math.sqrt(2 * math.pi))
    density = kernels.mean(2) + 1e-4
    return -torch.trapezoid(density * density.log(), at)


if __name__ == "__main__":
    main()
