"""What VT-PTQ's search costs beside its products alone: one block of DeiT-Tiny, one round, no model and no data needed.

    python benchmarks/search_floor.py [--images 8] [--candidates 100] [--threads 1]

For each operand: the multiply-accumulates of the products that score all of its candidates, as `objectives` counts
them; the time that these take in plain matrix products of the same shapes on this machine (the floor); the time of the
search; and what the products would be if every candidate's output were computed. A minute on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from real_deit import row
from torch import Tensor

from vitquant.objectives.correlation import LinearOutput
from vitquant.objectives.product_output import ProductOutput, Ranking
from vitquant.quantizers import Quantizer, build_quantizer
from vitquant.spec import QParams, QuantSpec

TOKENS, WIDTH, HEADS = 197, 192, 3
LAYERS = {"qkv": (WIDTH, 3 * WIDTH), "proj": (WIDTH, WIDTH), "fc1": (WIDTH, 4 * WIDTH), "fc2": (4 * WIDTH, WIDTH)}


@dataclass(frozen=True)
class Cost:
    """Of one operand: products (rows, depth, columns, how often), the search, and the products written plainly."""

    name: str
    products: tuple[tuple[int, int, int, int], ...]
    search: Callable[[], Tensor]
    plain: int


def main() -> None:
    """Time every operand and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(row(("operand", "10^9 products", "floor, s", "search, s", "ratio", "10^9 written plainly")))
    print("|---" * 6 + "|")
    totals = [0.0] * 4
    with torch.inference_mode():
        for cost in (
            *_layers(arguments.images, arguments.candidates),
            *_attention(arguments.images, arguments.candidates),
        ):
            macs = sum(m * k * n * times for m, k, n, times in cost.products)
            floor, search = sum(map(_product_seconds, cost.products)), _seconds(cost.search)
            totals = [a + b for a, b in zip(totals, (macs, floor, search, cost.plain), strict=True)]
            print(_row(cost.name, macs, floor, search, cost.plain), flush=True)
    print(_row("block", *totals))


def _row(name: str, macs: float, floor: float, search: float, plain: float) -> str:
    return row(
        (name, f"{macs / 1e9:.2f}", f"{floor:.3f}", f"{search:.3f}", f"{search / floor:.2f}", f"{plain / 1e9:.2f}")
    )


def _layers(images: int, count: int) -> list[Cost]:
    found = []
    for name, (inputs, outputs) in LAYERS.items():
        x, weight = torch.randn(images, TOKENS, inputs), torch.randn(outputs, inputs) / inputs**0.5
        output = LinearOutput(x, weight, torch.randn(outputs))
        on_x, on_weight, bias = _candidates(x, count), _candidates(weight, count), torch.randn(outputs)
        middle, plain = count // 2, images * TOKENS * inputs * outputs * count
        of_inputs = ((TOKENS, inputs, min(inputs, outputs), images * count),)
        of_weights = (
            (inputs, outputs, inputs, count),
            (images, inputs * (inputs + outputs), count, 1),
            (TOKENS, inputs, inputs + outputs, images),
        )
        found += [
            Cost(f"{name}:input", of_inputs, partial(output.of_inputs, on_x, on_weight[middle], bias), plain),
            Cost(f"{name}:weight", of_weights, partial(output.of_weights, on_x[middle], on_weight, bias), plain),
        ]
    return found


def _attention(images: int, count: int) -> list[Cost]:
    depth, pairs, times = WIDTH // HEADS, Ranking().pairs, images * HEADS * count
    query, key = torch.randn(images, 1, HEADS, TOKENS, depth), torch.randn(images, 1, HEADS, depth, TOKENS)
    probs, value = (3 * query @ key / depth).softmax(-1), torch.randn(images, 1, HEADS, TOKENS, depth)
    scores, context = ProductOutput(query, key, depth**-0.5, Ranking()), ProductOutput(probs, value, None, Ranking())
    plain = times * TOKENS * TOKENS * depth
    ranked = (
        (depth, depth, TOKENS, times),
        (pairs, depth, TOKENS, times),
    )  # the Gram matrix, and the map's differences
    of_context = ((depth, TOKENS, TOKENS, times),)
    return [
        _operand("scores:query", ranked, scores, query, key, plain, True),
        _operand("scores:key", ranked, scores, query, key, plain, False),
        _operand("context:probs", of_context, context, probs, value, plain, True),
        _operand("context:value", of_context, context, probs, value, plain, False),
    ]


def _operand(
    name: str,
    products: tuple[tuple[int, int, int, int], ...],
    output: ProductOutput,
    left: Tensor,
    right: Tensor,
    plain: int,
    on_the_left: bool,
) -> Cost:
    count = products[0][3] // (len(left) * HEADS)
    lefts, rights = _candidates(left, count), _candidates(right, count)
    chosen = (lefts, rights[:1]) if on_the_left else (lefts[:1], rights)
    return Cost(name, products, partial(output.of_operands, *chosen), plain)


def _candidates(x: Tensor, count: int) -> list[Quantizer]:
    scale, zero = x.abs().max() / 127.5, torch.zeros((), dtype=torch.int32)
    spec = QuantSpec(8, signed=True, symmetric=True)
    return [build_quantizer(spec, QParams(scale * m, zero)) for m in torch.linspace(0.5, 1.2, count)]


def _product_seconds(product: tuple[int, int, int, int]) -> float:
    """The time of so many float32 products, from a few of them."""
    rows, depth, columns, times = product
    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    repeats = max(1, min(times, int(2e9 / (rows * depth * columns))))
    return times / repeats * _seconds(lambda: [a @ b for _ in range(repeats)])


def _seconds(work: Callable[[], object]) -> float:
    """The shorter of two runs, after one to warm up."""
    work()
    times = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
