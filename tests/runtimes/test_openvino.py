"""Quantized models in OpenVINO: files that are whole or absent, and the simulation computed from them."""

from __future__ import annotations

import math
import os
import resource
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

from vitquant.errors import ExportError
from vitquant.exports.qdq.operators import StoredCodes, quantizer_operator
from vitquant.quantizers import build_quantizer
from vitquant.spec import Log2, LogSqrt2, PerAxis, PowerOfTwoFactor, QParams, QuantSpec

onnx = pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

from exported_models import exported, photos, timm_swin, timm_vit  # noqa: E402

from vitquant.exports.openvino import write_openvino  # noqa: E402
from vitquant.exports.qdq.rewriting import rewrite  # noqa: E402
from vitquant.runtime.onnxruntime import OnnxModel  # noqa: E402
from vitquant.runtime.openvino import OpenVinoModel  # noqa: E402


def written(proto, folder):
    write_openvino(proto, folder / "ir")
    return OpenVinoModel(folder / "ir", threads=1)


@pytest.mark.parametrize(
    ("make", "recipe", "bits"),
    [
        (timm_vit, "minmax", None),
        (timm_vit, "fq-vit", "w4a8s4"),
        (timm_vit, "fq-vit", "w4a4s4"),
        (timm_swin, "fq-vit", None),
    ],
)
def test_openvino_computes_the_simulation(make, recipe, bits, tmp_path):
    quantized, proto = exported(make, recipe, bits)
    runtime = written(proto, tmp_path)
    images = photos(5, seed=1)
    with torch.no_grad():
        expected = quantized(images)
    assert runtime(images[:0]).shape == OnnxModel(proto.SerializeToString())(images[:0]).shape == (0, 7)
    for size in (5, 2, 1):
        found = runtime(images[:size])
        assert (found.dtype, found.shape) == (torch.float32, (size, 7))
        cosine = torch.cosine_similarity(found, expected[:size], dim=1).min()
        assert cosine > (0.95 if bits == "w4a4s4" else 0.999)


SIGNALLED = """
import os, signal, sys
from vitquant.runtime.openvino import OpenVinoModel

first, second = OpenVinoModel(sys.argv[1]), OpenVinoModel(sys.argv[1])
del first
del second
signal.signal(signal.SIGCHLD, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGCHLD)
"""


def test_signals_are_handled_after_models_are_gone_in_the_order_they_came(tmp_path):
    """With a core for each model the process of this test ends with a segmentation fault."""
    _, proto = exported(timm_vit, "minmax")
    write_openvino(proto, tmp_path / "ir")
    run = subprocess.run([sys.executable, "-c", SIGNALLED, tmp_path / "ir"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "handled\n"), run.stderr


def test_results_are_kept_when_the_model_runs_again(tmp_path):
    _, proto = exported(timm_vit, "minmax")
    runtime = written(proto, tmp_path)
    first = runtime(photos(2, seed=1))
    kept = first.clone()
    runtime(photos(2, seed=2))
    assert torch.equal(first, kept)


def test_an_ir_is_the_onnx_file_bit_for_bit(tmp_path):
    _, proto = exported(timm_vit, "fq-vit", "w4a8s4")
    onnx.save(proto, tmp_path / "model.onnx")
    images = photos(2, seed=1)
    assert torch.equal(written(proto, tmp_path)(images), OpenVinoModel(tmp_path / "model.onnx", threads=1)(images))


# One quantizer in a file.

ENDS = (math.inf, -math.inf)


def run_module(module, example, folder, values):
    program = torch.onnx.export(
        module.eval(), (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=21,
        input_names=["images"], output_names=["logits"], verbose=False,
    )  # fmt: skip
    rewrite(program.model.graph)
    path = folder / "model.onnx"
    onnx.save(program.model_proto, path)
    return OpenVinoModel(path)(values)


@pytest.mark.parametrize(
    ("bits", "signed", "zero"), [(4, 0, 6), (4, 1, 0), (6, 0, 20), (6, 1, 0), (8, 0, 86), (8, 1, 0)]
)
def test_uniform_levels_halves_and_ends_are_exact(bits, signed, zero, tmp_path):
    spec = QuantSpec(bits, signed=bool(signed), symmetric=bool(signed))
    quantizer = build_quantizer(spec, QParams(torch.tensor(0.0625), torch.tensor(zero)))  # every quotient is exact
    values = (torch.arange(-400.0, 400.0, 0.5) * 0.0625).view(2, -1)
    assert torch.equal(run_module(quantizer_operator("x", quantizer, 2), values, tmp_path, values), quantizer(values))


def test_halves_go_the_other_way_where_the_zero_point_is_odd(tmp_path):
    """OpenVINO adds the zero point before it rounds to even; docs/onnx-qdq.md. Nothing else differs."""
    quantizer = build_quantizer(QuantSpec(8), QParams(torch.tensor(0.0625), torch.tensor(85)))
    steps = torch.arange(-400.0, 400.0, 0.25)
    values = (steps * 0.0625).view(2, -1)
    found = run_module(quantizer_operator("x", quantizer, 2), values, tmp_path, values)
    assert not torch.equal(found, quantizer(values))
    wrong = (found != quantizer(values)).flatten()
    assert bool((steps[wrong] % 1 == 0.5).all())
    assert (found - quantizer(values)).abs().max() == 0.0625


@pytest.mark.parametrize("scheme", [Log2(), Log2(separate_zero=True), LogSqrt2(), LogSqrt2(separate_zero=True)])
def test_powers_are_exact_at_every_level_and_threshold(scheme, tmp_path):
    quantizer = build_quantizer(QuantSpec(4, scheme=scheme), QParams(torch.tensor(1.0)))
    places = torch.cat([torch.exp2(-torch.arange(0, 20, 0.25)), torch.tensor([0.0, -1.0, 1.5])])
    values = torch.cat([places, *(torch.nextafter(places, torch.tensor(end)) for end in ENDS)]).view(3, -1)
    assert torch.equal(run_module(quantizer_operator("x", quantizer, 2), values, tmp_path, values), quantizer(values))


def test_power_of_two_factors_are_exact(tmp_path):
    spec = QuantSpec(8, granularity=PerAxis(-1), scheme=PowerOfTwoFactor(4))
    params = QParams(torch.tensor(0.0625), torch.tensor(96), torch.tensor([0, 3, 1, 2]))
    quantizer = build_quantizer(spec, params)
    values = (torch.arange(-2000.0, 2000.0) * 0.03125).view(-1, 4)
    assert torch.equal(run_module(quantizer_operator("x", quantizer, 2), values, tmp_path, values), quantizer(values))


# What the runtime does wrong.


class Patches(nn.Module):
    """A patch embedding as graphs have it: quantized convolution, a class token in front, one quantizer for all."""

    def __init__(self, bias, token):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 3, 4, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(8, generator=generator)) if bias else None
        self.token = nn.Parameter(torch.randn(1, 1, 8, generator=generator)) if token else None
        spec, weights = QuantSpec(8), QuantSpec(8, signed=True, symmetric=True, granularity=PerAxis(0))
        scales = self.weight.detach().abs().amax((1, 2, 3)) / 127.5
        self.quantizers = nn.ModuleDict({
            "image": build_quantizer(spec, QParams(torch.tensor(0.03), torch.tensor(118))),
            "weight": build_quantizer(weights, QParams(scales, torch.zeros(8))),
            "tokens": build_quantizer(spec, QParams(torch.tensor(0.2), torch.tensor(110))),
        })  # fmt: skip
        self.operators = nn.ModuleDict({
            "image": quantizer_operator("image", self.quantizers["image"], 4),
            "weight": StoredCodes("weight", self.quantizers["weight"], self.weight.detach()),
            "tokens": quantizer_operator("tokens", self.quantizers["tokens"], 3),
        })  # fmt: skip

    def forward(self, x):
        exporting = torch.onnx.is_in_onnx_export()
        parts = self.operators if exporting else self.quantizers
        weight = parts["weight"]() if exporting else parts["weight"](self.weight)
        patches = torch.conv2d(parts["image"](x), weight, self.bias, 4).flatten(2).transpose(1, 2)
        if self.token is not None:
            patches = torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
        return parts["tokens"](patches)


@pytest.mark.parametrize(("bias", "token"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_convolution_keeps_its_bias_when_its_quantizer_is_moved_to_it(bias, token, tmp_path):
    module, images = Patches(bias, token), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(images)
        found = run_module(module, images, tmp_path, images)
    assert (found != expected).double().mean() < 0.002  # sums in another order: codes that flip


# Files.


def test_an_ir_has_the_mode_that_the_umask_gives(tmp_path):
    _, proto = exported(timm_vit, "minmax")
    before = os.umask(0o027)
    try:
        write_openvino(proto, tmp_path / "ir")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"ir": 0o750, "model.xml": 0o640, "model.bin": 0o640, "digest.json": 0o640}


def test_an_ir_is_not_replaced_unless_forced(tmp_path):
    _, proto = exported(timm_vit, "minmax")
    target = tmp_path / "deep" / "ir"
    write_openvino(proto, target)
    assert {file.name for file in target.iterdir()} == {"model.xml", "model.bin", "digest.json"}
    assert [folder.name for folder in target.parent.iterdir()] == ["ir"]
    assert '"minmax"' in (target / "model.xml").read_text()
    before = (target / "model.bin").read_bytes()
    with pytest.raises(ExportError, match="is not empty"):
        write_openvino(proto, target)
    write_openvino(proto, target, force=True)
    assert (target / "model.bin").read_bytes() == before
    assert [folder.name for folder in target.parent.iterdir()] == ["ir"]


def test_what_is_no_ir_is_never_replaced(tmp_path):
    _, proto = exported(timm_vit, "minmax")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ExportError, match="holds no OpenVINO model"):
        write_openvino(proto, tmp_path / "mine", force=True)
    with pytest.raises(ExportError, match="is a file"):
        write_openvino(proto, tmp_path / "mine" / "thesis.txt", force=True)
    with pytest.raises(ExportError, match="cannot be written"):
        write_openvino(proto, tmp_path / "mine" / "thesis.txt" / "ir")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    _, proto = exported(timm_vit, "minmax")
    target = tmp_path / "ir"
    write_openvino(proto, target)
    before = (target / "model.xml").read_bytes()

    def fail(model, path, **options):
        path.write_text("half")
        raise RuntimeError("no words")

    monkeypatch.setattr(openvino, "save_model", fail)
    with pytest.raises(ExportError, match="could not be written: OpenVINO says: no words"):
        write_openvino(proto, target, force=True)
    assert (target / "model.xml").read_bytes() == before
    assert [folder.name for folder in tmp_path.iterdir()] == ["ir"]


@pytest.mark.parametrize("most", [1000, 150_000])
def test_a_disk_that_is_full_is_said_in_the_system_s_words_and_leaves_nothing(tmp_path, most):
    _, proto = exported(timm_vit, "minmax")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(ExportError, match=r"ir could not be written: File too large$"):
            write_openvino(proto, tmp_path / "ir")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"model\.onnx is missing"):
        OpenVinoModel(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="is no ONNX model"):
        OpenVinoModel(tmp_path / "model.onnx")
    (tmp_path / "model.xml").write_bytes(b"no model")
    with pytest.raises(ExportError, match="OpenVINO refuses"):
        OpenVinoModel(tmp_path / "model.xml")
    _, proto = exported(timm_vit, "minmax")
    runtime = written(proto, tmp_path)
    with pytest.raises(ExportError, match=r"takes float32 images \[\?,3,64,64\]; these are torch.float64"):
        runtime(photos(1).double())
    with pytest.raises(ExportError, match=r"these are torch.float32 \(1, 3, 32, 64\)"):
        runtime(photos(1)[:, :, :32])


@pytest.mark.parametrize("name", ["model.xml", "model.bin", "digest.json"])
def test_a_directory_that_was_altered_is_refused(tmp_path, name):
    _, proto = exported(timm_vit, "minmax")
    write_openvino(proto, tmp_path / "ir")
    OpenVinoModel(tmp_path / "ir")
    file = tmp_path / "ir" / name
    content = file.read_bytes()
    for altered in (content[:-9] + b"7" * 9, b"", None):
        if altered is None:
            file.unlink()
        else:
            file.write_bytes(altered)
        with pytest.raises(ExportError, match=r"export it again|not valid JSON|is missing"):
            OpenVinoModel(tmp_path / "ir")
