"""Whether runtimes compute what the simulation does, on the real DeiT-Tiny.

    python benchmarks/qdq_agreement.py [RECIPE[@BITS] ...] [--images 100] [--threads 1]

For each recipe: calibrated on 100 photographs, exported as QDQ ONNX and OpenVINO IR, and run on photographs of
`photos_eval`. Top-1 agreement with the simulation (share of images of the same class), the smallest cosine of an
image's logits with the simulation's and their mean, the worst difference of a logit, and milliseconds per image (batch
1, best of the run). The row of the simulation in float64 is what another order of the same sums does: no runtime can be
asked for more. Rows without barriers have the file's barriers taken out: what the fusions would do. Prints the table of
docs/onnx-qdq.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import torch
from real_deit import PREPROCESSING, SHARED, float_deit, row
from torch import Tensor

import vitquant
from vitquant.errors import ExportError
from vitquant.exports.openvino import write_openvino
from vitquant.exports.qdq import onnx_qdq_model
from vitquant.model.simulation import ExactSimulation
from vitquant.runtime.openvino import OpenVinoModel
from vitquant.tasks.classification import logits_of
from vitquant.tasks.images import batches, load_listing, subset

Runner = Callable[[Tensor], Tensor]
RECIPES = ["minmax", "fq-vit", "fq-vit+uniform-probs@w8a8", "fq-vit@w4a8s4"]


def main() -> None:
    """Export, run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = float_deit()
    calibration = subset(load_listing(SHARED / "images" / "photos_calibration"), 100, 0)
    evaluation = load_listing(SHARED / "images" / "photos_eval")[: arguments.images]
    images = torch.cat([batch for batch, _ in batches(evaluation, PREPROCESSING, 50)])
    print(row(("recipe", "runtime", "agreement, %", "mean cosine", "smallest", "worst difference", "ms per image")))
    print("|---" * 7 + "|")
    for given in arguments.recipes:
        recipe, _, bits = given.partition("@")
        quantized = vitquant.quantize(model, recipe, batches(calibration, PREPROCESSING, 50), bits=bits or None)

        expected, milliseconds = run(simulation(quantized), images)
        print(row((given, "simulation", "", "", "", "", f"{milliseconds:.1f}")), flush=True)
        found, milliseconds = run(simulation(ExactSimulation(quantized)), images)
        figures = (*compare(found.float(), expected), f"{milliseconds:.1f}")
        print(row((given, "simulation in float64", *figures)), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for name, runner in runners(quantized, Path(folder), arguments.threads).items():
                found, milliseconds = run(runner, images)
                print(row((given, name, *compare(found, expected), f"{milliseconds:.1f}")), flush=True)


def simulation(quantized: torch.nn.Module) -> Runner:
    """The model itself."""

    def simulate(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return logits_of(quantized(images))

    return simulate


def runners(quantized: vitquant.QuantizedModel, folder: Path, threads: int) -> dict[str, Runner]:
    """Every runtime that takes the exported model."""
    proto = onnx_qdq_model(quantized)
    bare = without_barriers(proto)
    write_openvino(proto, folder / "ir")
    everything = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    nothing = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found: dict[str, Runner] = {
        "ONNX Runtime": session(proto, everything, threads),
        "ONNX Runtime, not optimized": session(proto, nothing, threads),
        "OpenVINO": OpenVinoModel(folder / "ir", threads=threads),
        "ONNX Runtime, without barriers": session(bare, everything, threads),
    }
    onnx.save(bare, folder / "bare.onnx")
    try:
        found["OpenVINO, without barriers"] = OpenVinoModel(folder / "bare.onnx", threads=threads)
    except ExportError as error:
        print(f"OpenVINO, without barriers: {error}")
    return found


def session(proto: onnx.ModelProto, level: onnxruntime.GraphOptimizationLevel, threads: int) -> Runner:
    """An ONNX Runtime session with the options that the file asks for."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    for key, value in json.loads(facts["vitquant.session_options"]).items():
        options.add_session_config_entry(key, value)
    created = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(created.run(None, {"images": images.numpy()})[0])


def without_barriers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the Abs behind softmax and the Max behind the convolution."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    for node in [node for node in bare.graph.node if node.op_type in ("Abs", "Max")]:
        for reader in bare.graph.node:
            for index, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[index] = node.input[0]
        bare.graph.node.remove(node)
    return bare


def run(runner: Runner, images: Tensor) -> tuple[Tensor, float]:
    """The logits of every image, one image at a time, and the milliseconds of the fastest."""
    logits, best = [], float("inf")
    for image in images.split(1):
        start = time.perf_counter()
        logits.append(runner(image))
        best = min(best, 1000 * (time.perf_counter() - start))
    return torch.cat(logits), best


def compare(found: Tensor, expected: Tensor) -> tuple[str, ...]:
    """Agreement in percent, mean and smallest cosine, worst difference."""
    agreement = (found.argmax(1) == expected.argmax(1)).double().mean().item()
    cosines = torch.cosine_similarity(found, expected, dim=1)
    worst = (found - expected).abs().max().item()
    return f"{100 * agreement:.0f}", f"{cosines.mean():.4f}", f"{cosines.min():.4f}", f"{worst:.2f}"


if __name__ == "__main__":
    main()
