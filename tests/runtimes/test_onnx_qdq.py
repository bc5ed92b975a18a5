"""Quantized models as QDQ ONNX: what is in the file, and that ONNX Runtime computes the simulation with it."""

from __future__ import annotations

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vitquant
from vitquant.errors import CalibrationError, ExportError
from vitquant.exports.qdq.operators import quantizer_operator
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.model import QuantizedModel
from vitquant.model.saved import digest
from vitquant.quantizers import build_quantizer
from vitquant.spec import Log2, LogSqrt2, PerAxis, PowerOfTwoFactor, QParams, QuantSpec, TwinUniform
from vitquant.tasks.classification import logits_of

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from exported_models import (  # noqa: E402
    exported,
    photos,
    timm_swin,
    timm_vit,
    torchvision_swin,
    torchvision_vit,
    trained,
    transformers_deit,
    transformers_swin,
    transformers_vit,
)
from onnx import TensorProto, numpy_helper  # noqa: E402

from vitquant.exports.qdq.model import FORMAT, SIGNED, WITHOUT_VNNI, onnx_qdq_model  # noqa: E402
from vitquant.exports.qdq.rewriting import rewrite  # noqa: E402
from vitquant.runtime.onnxruntime import OnnxModel  # noqa: E402

law = settings(max_examples=60, deadline=None)
OPSET = 21
ALL, NONE = ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def session(proto, level, options=None):
    settings = ort.SessionOptions()
    settings.graph_optimization_level, settings.intra_op_num_threads, settings.log_severity_level = level, 1, 3
    for key, value in (options or {}).items():
        settings.add_session_config_entry(key, value)
    return ort.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def run(proto, images, level=ALL, options=None):
    return torch.from_numpy(session(proto, level, options).run(None, {"images": images.numpy()})[0])


def simulated(quantized, images):
    with torch.no_grad():
        return logits_of(quantized(images))


def with_outputs(proto, *names):
    """The model that gives the named tensors instead of logits."""
    other = copy.deepcopy(proto)
    del other.graph.output[:]
    other.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    return other


def cosine(left, right):
    return torch.cosine_similarity(left, right, dim=1).min().item()


def initializers(proto):
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def nodes(proto, operator):
    return [node for node in proto.graph.node if node.op_type == operator]


# One quantizer in a file: laws.


class Reshaped(nn.Module):
    """A quantizer's operator on rows of a flat tensor."""

    def __init__(self, operator, columns):
        super().__init__()
        self.operator, self.columns = operator, columns

    def forward(self, x):
        return self.operator(x.reshape(-1, self.columns)).reshape(-1)


@functools.cache
def quantizer_sessions(quantizer, columns=1):
    program = torch.onnx.export(
        Reshaped(quantizer_operator("x", quantizer, 2), columns).eval(),
        (torch.zeros(2 * columns),),
        dynamo=True,
        dynamic_shapes=({0: columns * torch.export.Dim("rows", min=1)},),
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    rewrite(program.model.graph)
    onnx.checker.check_model(program.model_proto, full_check=True)
    return [session(program.model_proto, level, SIGNED) for level in (ALL, NONE)]


def assert_same(quantizer, values, columns=1):
    expected = quantizer(values.view(-1, columns)).flatten()
    for runtime in quantizer_sessions(quantizer, columns):
        found = torch.from_numpy(runtime.run(None, {"images": values.numpy()})[0])
        assert torch.equal(found, expected), (values[found != expected][:5], found[found != expected][:5])


def uniform(bits, signed, scale=0.0371):
    spec = QuantSpec(bits, signed=signed, symmetric=signed)
    zero = 0 if signed else (1 << bits) // 3
    return build_quantizer(spec, QParams(torch.tensor(scale), torch.tensor(zero)))


UNIFORM = {
    f"{'s' if signed else 'u'}{bits}": uniform(bits, signed) for bits in (2, 3, 4, 6, 8, 10, 16) for signed in (0, 1)
}
POWERS = {
    f"{kind.__name__}{bits}{'+zero' if separate else ''}@{scale}": build_quantizer(
        QuantSpec(bits, scheme=kind(separate_zero=separate)), QParams(torch.tensor(scale))
    )
    for kind in (Log2, LogSqrt2)
    for bits, separate, scale in (
        (2, False, 1.0),
        (3, True, 1.0),
        (4, False, 1.0),
        (4, True, 1.0),
        (4, False, 0.37),
        (5, False, 0.37),
    )
}
FACTORED = build_quantizer(
    QuantSpec(8, granularity=PerAxis(-1), scheme=PowerOfTwoFactor(4)),
    QParams(torch.tensor(0.0123), torch.tensor(97), torch.tensor([0, 3, 1, 2])),
)
TWINS = {
    (bits, shift, zero): build_quantizer(
        QuantSpec(bits, scheme=TwinUniform(shift)), QParams(torch.tensor(0.0371), torch.tensor(zero))
    )
    for bits, shift, zero in ((6, 2, 4), (6, 2, 33), (4, 3, 15), (2, 1, 0))
}
FLOATS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


@pytest.mark.parametrize("name", UNIFORM)
def test_a_uniform_quantizer_is_exact_on_levels_halves_and_beyond_its_ends(name):
    quantizer = UNIFORM[name]
    low, high = quantizer.range()
    steps = torch.arange(-300.0, 300.0, 0.5)
    around = torch.cat(
        [(steps + offset) * quantizer.scale for offset in (0, low / quantizer.scale, high / quantizer.scale)]
    )
    above, below = (torch.nextafter(around, torch.tensor(end)) for end in (math.inf, -math.inf))
    assert_same(quantizer, torch.cat([around, above, below, torch.tensor([-1e30, 1e30, 0.0])]))


@law
@given(st.sampled_from(sorted(UNIFORM)), FLOATS)
def test_a_uniform_quantizer_is_exact_on_any_value(name, values):
    assert_same(UNIFORM[name], torch.tensor(values))


@pytest.mark.parametrize("name", TWINS)
def test_twin_steps_are_exact_on_levels_halves_and_beyond_their_ends(name):
    around = torch.arange(-400.0, 400.0, 0.5) * TWINS[name].scale
    above, below = (torch.nextafter(around, torch.tensor(end)) for end in (math.inf, -math.inf))
    assert_same(TWINS[name], torch.cat([around, above, below, torch.tensor([-1e30, 1e30, 0.0])]))


@pytest.mark.parametrize("name", POWERS)
def test_powers_are_exact_at_every_level_and_threshold(name):
    quantizer = POWERS[name]
    places = torch.cat([torch.exp2(-torch.arange(0, 34, 0.25)), torch.tensor([0.0, -1.0, 1.5, 1e30])])
    places = places * quantizer.scale
    nearest = [places]
    for end in (math.inf, -math.inf):
        one = torch.nextafter(places, torch.tensor(end))
        nearest += [one, torch.nextafter(one, torch.tensor(end))]
    assert_same(quantizer, torch.cat(nearest))


@law
@given(st.sampled_from(sorted(POWERS)), st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=40))
def test_powers_are_exact_on_any_value(name, values):
    assert_same(POWERS[name], torch.tensor(values))


@law
@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4))
def test_power_of_two_factors_are_exact(values):
    assert_same(FACTORED, torch.tensor(values), columns=4)


def test_several_scales_of_an_activation_are_refused():
    spec = QuantSpec(8, granularity=PerAxis(-1))
    quantizer = build_quantizer(spec, QParams(torch.ones(3), torch.zeros(3)))
    with pytest.raises(ExportError, match="norm:input has 3 scales"):
        quantizer_operator("norm:input", quantizer, 3)


# Whole models.

PAIRS = [
    (timm_vit, "minmax", None),
    (timm_vit, "fq-vit", None),
    (timm_vit, "fq-vit", "w4a4s4"),
    (timm_swin, "fq-vit", "w4a8s4"),
    (transformers_vit, "percentile", None),
    pytest.param(torchvision_swin, "fq-vit+uniform-probs", "w8a8", marks=pytest.mark.slow),
]
EVERY_MODEL = [
    timm_vit, timm_swin, transformers_vit, transformers_deit, transformers_swin, torchvision_vit, torchvision_swin
]  # fmt: skip
EVERY_RECIPE = [
    ("minmax", None), ("omse", None), ("percentile", None), ("fq-vit", None), ("fq-vit", "w4a8s4"),
    ("fq-vit", "w4a4s4"), ("fq-vit+uniform-probs", "w8a8"), ("minmax", "w6a6"), ("fq-vit+twin-steps", "w6a6s4"),
]  # fmt: skip


def assert_agrees(make, recipe, bits, settings=()):
    """The same grids all the way, up to codes that flip."""
    quantized, proto = exported(make, recipe, bits, settings)
    images = photos(5, seed=1)
    expected = simulated(quantized, images)
    early = "blocks.0.norm2:input"
    value = quantized.index.value(early).name
    seen = {}
    with torch.no_grad():
        quantized.run(images, {value: lambda x: seen.setdefault(value, quantized.quantizers[value](x))})
    for level in (ALL, NONE):
        found = run(with_outputs(proto, tensor_of(proto, value)), images, level)
        flipped = (found != seen[value]).double().mean().item()
        # One code that flips in the embedding is a row of 48 here; at 4 bits, integer softmax is further from float.
        assert flipped < (0.1 if bits == "w4a4s4" else 0.02)
        # A flipped code is a sixteenth of a tensor's range at 4 bits, and these weights are random.
        assert cosine(run(proto, images, level), expected) > (0.95 if bits == "w4a4s4" else 0.99)


def tensor_of(proto, operand):
    """The tensor that holds a quantized value; behind the factors, where there are any."""
    readers = [node for node in proto.graph.node if operand in node.input]
    scaled = [node for node in readers if node.op_type == "Mul" and len(readers) == 1]
    return scaled[0].output[0] if scaled else operand


@pytest.mark.parametrize(("make", "recipe", "bits"), PAIRS)
def test_onnx_runtime_computes_the_simulation(make, recipe, bits):
    assert_agrees(make, recipe, bits)


def test_onnx_runtime_computes_the_simulation_with_powers_of_the_root_of_two():
    assert_agrees(timm_vit, "fq-vit", "w8a8s5", ("attention-probs.scheme=log_sqrt2",))


@pytest.mark.slow
@pytest.mark.parametrize("make", EVERY_MODEL)
@pytest.mark.parametrize(("recipe", "bits"), EVERY_RECIPE)
def test_onnx_runtime_computes_the_simulation_of_every_model_and_recipe(make, recipe, bits):
    assert_agrees(make, recipe, bits)


@pytest.mark.parametrize(
    ("make", "recipe", "bits"), [PAIRS[0], PAIRS[3], pytest.param(*PAIRS[2], marks=pytest.mark.slow)]
)
def test_weights_are_integers_that_decode_to_the_simulations(make, recipe, bits):
    quantized, proto = exported(make, recipe, bits)
    stored, found = initializers(proto), 0
    wanted = TensorProto.INT4 if quantized.bits.weights <= 4 else TensorProto.INT8
    for name, quantizer in quantized.quantizers.items():
        value = quantized.index.value(name)
        if value.parameter is None or not name.endswith(":weight"):
            continue
        (node,) = [node for node in nodes(proto, "DequantizeLinear") if node.output[0] == name]
        codes, scale, zero = (stored[given] for given in node.input)
        assert codes.data_type == zero.data_type == wanted
        axis = {a.name: a.i for a in node.attribute}["axis"]
        shape = [1] * len(codes.dims)
        shape[axis] = -1
        numbers = [torch.from_numpy(numpy_helper.to_array(t).astype(np.float32)) for t in (codes, zero, scale)]
        decoded = (numbers[0] - numbers[1].view(shape)) * numbers[2].view(shape)
        expected = quantizer(quantized.parameter(value).detach())
        is_layer = expected.ndim == 2
        assert axis == (1 if is_layer else 0)
        assert torch.equal(decoded, expected.t() if is_layer else expected)
        assert not any(math.prod(t.dims) == codes.dims[0] * math.prod(codes.dims[1:]) for t in floats(proto))
        found += 1
    assert found >= 10


def floats(proto):
    return [tensor for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT]


def test_the_file_is_standard_and_says_what_it_is():
    quantized, proto = exported(timm_vit, "fq-vit", "w4a4s4")
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts == {
        "vitquant.format": FORMAT,
        "vitquant.version": vitquant.__version__,
        "vitquant.recipe": "fq-vit",
        "vitquant.bits": "w4a4",
        "vitquant.model": digest(quantized),
        "vitquant.digest": facts["vitquant.digest"],
        "vitquant.session_options": "{}",
        "vitquant.session_options.without_vnni": json.dumps(WITHOUT_VNNI),
    }
    assert {(entry.domain, entry.version) for entry in proto.opset_import} == {("", OPSET)}
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    (images,), (logits,) = proto.graph.input, proto.graph.output
    sizes = [[d.dim_param or d.dim_value for d in t.type.tensor_type.shape.dim] for t in (images, logits)]
    assert sizes == [["batch", 3, 64, 64], ["batch", 7]]
    assert len(nodes(proto, "QuantizeLinear")) == sum(
        quantized.index.value(name).parameter is None and "probs" not in name for name in quantized.quantizers
    )
    # 4-bit activations fill u4: nothing is clipped.
    types = {entry.name: entry.type.tensor_type.elem_type for entry in proto.graph.value_info}
    assert types["blocks.0.attn.qkv:input.codes"] == TensorProto.UINT4
    assert not nodes(proto, "Clip")


def test_a_file_takes_any_batch():
    _, proto = exported(timm_swin, "fq-vit", "w4a8s4")
    images, runtime = photos(5, seed=1), session(proto, ALL)
    whole = runtime.run(None, {"images": images.numpy()})[0]
    for size in (1, 2):
        part = runtime.run(None, {"images": images[:size].numpy()})[0]
        assert part.shape == (size, 7)
        assert cosine(torch.from_numpy(part), torch.from_numpy(whole[:size])) > 0.99


def test_the_model_is_left_as_it_is():
    quantized, _ = exported(timm_vit, "fq-vit")
    images = photos(2, seed=1)
    before, code, expected = (
        copy.deepcopy(quantized.state_dict()),
        quantized.graph_module.code,
        simulated(quantized, images),
    )
    names = list(quantized.quantizers)
    onnx_qdq_model(quantized)
    after = quantized.state_dict()
    assert before.keys() == after.keys()
    assert before
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (quantized.graph_module.code, list(quantized.quantizers)) == (code, names)
    assert torch.equal(simulated(quantized, images), expected)


def test_what_cannot_be_exported_is_refused():
    quantized, _ = exported(timm_vit, "minmax")
    halved = vitquant.quantize(trained(timm_vit()).bfloat16(), "minmax", [photos(2).bfloat16()])
    with pytest.raises(ExportError, match=r"torch\.bfloat16; quantize the model in float32"):
        onnx_qdq_model(halved)
    captured = CapturedModel(capture(trained(timm_vit()), photos(2)), (3, 64, 64))
    bare = QuantizedModel(captured, quantized.recipe, quantized.bits)
    with pytest.raises(CalibrationError, match="is not calibrated"):
        onnx_qdq_model(bare)


# What the runtime does wrong.


class QuantizedSoftmax(nn.Module):
    """Softmax between two quantizers, as attention has it."""

    def __init__(self, scale):
        super().__init__()
        self.scores, self.probs = uniform(8, False, 2e-4), uniform(8, False, scale)
        self.probs.zero_point.zero_()
        self.operators = nn.ModuleList(
            quantizer_operator(name, quantizer, 3) for name, quantizer in (("s", self.scores), ("p", self.probs))
        )

    def forward(self, x):
        first, last = self.operators if torch.onnx.is_in_onnx_export() else (self.scores, self.probs)
        return last(torch.softmax(first(x), -1).transpose(1, 2))


@pytest.mark.parametrize("scale", [1 / 255, 3.6e-5, 3.2e-5, 2e-5])
def test_a_softmax_of_tiny_probabilities_is_not_lost(scale):
    """QLinearSoftmax gives zeros below exp(-5) / 197 = 3.4e-5, and flips codes above."""
    module, x = (
        QuantizedSoftmax(scale).eval(),
        0.01 * torch.randn(2, 3, 197, generator=torch.Generator().manual_seed(0)),
    )
    program = torch.onnx.export(
        module, (x,), dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"], verbose=False
    )
    rewrite(program.model.graph)
    found, expected = run(program.model_proto, x), module(x)
    assert expected.max() > 0
    assert ((found - expected).abs() > 0.5 * scale).double().mean() < 1e-3  # another exp, and codes that flip by it


def test_the_option_for_processors_without_vnni_runs():
    quantized, proto = exported(timm_vit, "minmax")
    images = photos(2, seed=1)
    assert cosine(run(proto, images, options=WITHOUT_VNNI), simulated(quantized, images)) > 0.99


SYMMETRIC = [
    f"{rule}.{key}=true"
    for rule in ("activations", "attention-probs", "residual", "norm-inputs", "network-input")
    for key in ("signed", "symmetric")
]


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
def test_symmetric_activations_keep_the_rules_of_tensorrt(bits):
    quantized = vitquant.quantize(trained(timm_vit()), "minmax", [photos(4)], bits=bits, settings=SYMMETRIC)
    proto = onnx_qdq_model(quantized)
    stored = initializers(proto)
    for node in (*nodes(proto, "QuantizeLinear"), *nodes(proto, "DequantizeLinear")):
        zero, is_weight = stored[node.input[2]], ":weight" in node.input[2]
        assert not numpy_helper.to_array(zero).astype(np.int8).any()
        assert zero.data_type == (TensorProto.INT4 if is_weight and bits == "w4a8" else TensorProto.INT8)
        assert is_weight or not zero.dims
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    options = json.loads(facts["vitquant.session_options"])
    assert (proto.opset_import[0].version, options) == ((20, {}) if bits == "w8a8" else (21, SIGNED))
    images = photos(3, seed=1)
    for level in (ALL, NONE):
        assert cosine(run(proto, images, level, options), simulated(quantized, images)) > 0.99
    given = OnnxModel(proto.SerializeToString(), threads=1)._session.get_session_options()
    assert {key: given.get_session_config_entry(key) for key in options} == options
