"""Latency of the real DeiT-Tiny by FQ-ViT as an integer ONNX model, beside float32 and the interpreter.

    OMP_NUM_THREADS=1 python benchmarks/onnx_latency.py [--runs 10] [--batches 1 8] [--threads 1 2]

Data: ../shared, 25 calibration photographs; speed does not depend on them. Prints a Markdown table in milliseconds a
batch: the 10th percentile, which other load on the machine disturbs least, and (the median). What is compared runs in
turns, so that a noisy minute is everybody's. The integer ONNX is a format to check runtimes by, not a fast one: every
rescaling is a dozen operators on 64-bit integers. A few minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
import torch
from real_deit import PREPROCESSING, SHARED, float_deit, row
from rich.console import Console

import vitquant
from vitquant.exports.onnx_integer import onnx_integer_model
from vitquant.lowering import lower
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.onnxruntime import OnnxModel
from vitquant.tasks.images import batches, load_listing, subset

console = Console(stderr=True)


def main() -> None:
    """Measure every runtime at every batch and number of threads, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="of each, in turns")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    model = float_deit()
    with console.status("quantizing and exporting"):
        listing = subset(load_listing(SHARED / "images" / "photos_calibration"), 25, 0)
        program = lower(vitquant.quantize(model, "fq-vit", batches(listing, PREPROCESSING, 25)))
        integer = timed("export", lambda: onnx_integer_model(program).SerializeToString())
        real = float_onnx(model)
    interpreter = Interpreter(program)
    print(row(("batch", "threads", *NAMES)))
    print("|---" * (2 + len(NAMES)) + "|")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        runs: list[Callable[[torch.Tensor], torch.Tensor]] = [
            timed(f"loading, {threads} threads", lambda n=threads: OnnxModel(integer, threads=n)),
            OnnxModel(integer, optimize=False, threads=threads),
            OnnxModel(real, threads=threads),
            model,
            interpreter,
        ]
        for batch in arguments.batches:
            codes = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
            given = [codes, codes, codes.float() / 64 - 2, codes.float() / 64 - 2, codes]
            with console.status(f"batch {batch}, {threads} threads"):
                taken = measure(runs, given, arguments.runs)
            cells = [f"{np.percentile(each, 10):.1f} ({np.median(each):.1f})" for each in taken]
            print(row((str(batch), str(threads), *cells)), flush=True)


NAMES = (
    "integer ONNX", "integer ONNX, not optimized", "float32, ONNX Runtime", "float32, PyTorch", "interpreter",
)  # fmt: skip


def measure(runs: list[Callable[[torch.Tensor], object]], given: list[torch.Tensor], count: int) -> np.ndarray:
    """Milliseconds: (runs, count)."""
    taken = np.zeros((len(runs), count))
    with torch.inference_mode():
        for turn in range(-2, count):  # two to warm up
            for index, (run, images) in enumerate(zip(runs, given, strict=True)):
                start = time.perf_counter()
                run(images)
                taken[index, turn] = 1000 * (time.perf_counter() - start)
    return taken


def float_onnx(model: torch.nn.Module) -> bytes:
    """The float model as torch exports it."""
    buffer = io.BytesIO()
    images = torch.randn(2, 3, 224, 224)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(buffer)
    return buffer.getvalue()


def timed(what: str, work: Callable):
    """What `work` returns; says how long it took."""
    start = time.perf_counter()
    result = work()
    console.print(f"{what}: {time.perf_counter() - start:.2f} s")
    return result


if __name__ == "__main__":
    main()
