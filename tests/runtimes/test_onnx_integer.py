"""Integer programs as ONNX models: the interpreter's codes in ONNX Runtime, optimized or not, and in onnx.reference."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

import vitquant
from vitquant.errors import ExportError, LoweringError
from vitquant.exports.onnx_integer import builder
from vitquant.exports.onnx_integer.model import FORMAT, onnx_integer_model
from vitquant.files import write_file
from vitquant.integer.exponential import exact_exponential
from vitquant.lowering import lower
from vitquant.parity.examine import adversarial_codes
from vitquant.program import instructions as p
from vitquant.quantizers import build_quantizer
from vitquant.quantizers.quantizer import Quantizer
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.on_images import interpreted, quantization_from, quantization_of
from vitquant.runtime.onnxruntime import OnnxModel
from vitquant.runtime.products import exact_int64
from vitquant.spec import PerAxis, PerHead, QParams
from vitquant.tasks.images import batches, load_listing, subset
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.zoo import ModelSource, create, pinned

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
FAMILIES = {
    "vit": lambda: timm.models.vision_transformer.VisionTransformer(**VIT),
    "deit": lambda: timm.models.deit.VisionTransformerDistilled(**VIT),
    "swin": lambda: timm.models.swin_transformer.SwinTransformer(**SWIN, num_classes=10),
}
UNIFORM = "fq-vit+uniform-probs"
ASYMMETRIC = ("weights.symmetric=false",)
ROOTS = ("attention-probs.scheme=log_sqrt2",)
OBSERVED = ("attention-probs.observer=minmax",)
CASES = [
    ("vit", "fq-vit", "w8a8s4", ()),
    ("vit", UNIFORM, "w8a8", ()),
    ("vit", f"{UNIFORM}+uniform-norm-inputs", "w8a8", ()),
    ("vit", "fq-vit", "w4a8s4", ()),
    ("vit", "fq-vit", "w4a4s4", ()),
    ("vit", "fq-vit", "w4a8s4", ASYMMETRIC),
    ("vit", "fq-vit", "w8a8s4", ("integer-operations.softmax=published",)),
    ("vit", UNIFORM, "w8a8", ("activations.signed=true", "network-input.signed=true")),
    ("vit", "fq-vit", "w8a8s4", OBSERVED),
    ("vit", "fq-vit", "w8a8s5", ROOTS),
    ("vit", "fq-vit", "w4a8s4", (*ROOTS, *OBSERVED)),
    ("swin", "fq-vit", "w8a8s5", (*ROOTS, *OBSERVED)),
    ("deit", "fq-vit", "w8a8s4", ASYMMETRIC),
    ("swin", "fq-vit", "w8a8s4", ()),
    ("swin", UNIFORM, "w8a8", ()),
    ("swin", f"{UNIFORM}+uniform-norm-inputs", "w8a8", ASYMMETRIC),
    ("swin", "fq-vit", "w4a4s4", ("integer-operations.softmax=published",)),
]


@cache
def quantized(family, recipe="fq-vit", bits="w8a8s4", settings=()):
    torch.manual_seed(0)
    data = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    return vitquant.quantize(FAMILIES[family]().eval(), recipe, data, bits=bits, settings=list(settings))


@pytest.fixture(scope="module")
def vit_program():
    return lower(quantized("vit"))


def same_everywhere(program, *images):
    """That one file gives the interpreter's codes for all of these in three runtimes; the model."""
    model = onnx_integer_model(program)
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    runtimes = {
        "optimized": OnnxModel(content, threads=1),
        "as it stands": OnnxModel(content, optimize=False, threads=1),
        "reference": referee(model),
    }
    interpreter = Interpreter(program, exact_int64)
    for codes in images:
        expected = interpreter(codes)
        for name, run in runtimes.items():
            assert torch.equal(run(codes), expected), f"{name}, batch {len(codes)}"
    return model


def referee(model):
    evaluator = ReferenceEvaluator(model)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)

    def run(codes):
        return torch.from_numpy(np.asarray(evaluator.run(None, {"images": codes.numpy().astype(dtype)})[0], np.int64))

    return run


def codes_of(program, batch):
    first = program.registers[program.input]
    low, high = first.limits
    return torch.randint(low, high + 1, (batch, *first.shape[1:]))


@pytest.mark.parametrize(("family", "recipe", "bits", "settings"), CASES)
def test_an_exported_model_gives_the_codes_of_the_interpreter(family, recipe, bits, settings):
    program = lower(quantized(family, recipe, bits, settings))
    one = codes_of(program, 1)
    low, high = program.registers[program.input].limits
    assert len(Interpreter(program)(codes_of(program, 5)).unique()) > 4  # or equality would say little
    same_everywhere(
        program, one, codes_of(program, 2), codes_of(program, 5), torch.full_like(one, low), torch.full_like(one, high)
    )


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_no_tensor_is_floating_point_and_every_operator_is_standard(family):
    model = onnx_integer_model(lower(quantized(family)))
    assert [each.domain for each in model.opset_import] == [""]
    assert model.opset_import[0].version <= 26
    assert not model.functions
    known = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    described = [*known.value_info, *known.input, *known.output]
    types = {each.name: each.type.tensor_type.elem_type for each in described}
    types |= {each.name: each.data_type for each in known.initializer}
    written = [name for node in known.node for name in node.output]
    assert set(written) <= set(types)
    integers = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.UINT32, TensorProto.INT64}
    assert set(types.values()) <= integers | {TensorProto.UINT64, TensorProto.BOOL, TensorProto.UINT4}


def test_sizes_that_are_equal_have_one_name():
    """Without names ONNX Runtime takes minutes to plan a real model's memory; with wrong ones it plans it wrong."""
    program = lower(quantized("swin"))
    shapes = {
        each.name: [size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim]
        for each in onnx_integer_model(program).graph.value_info
    }
    assert {each.output for each in program.instructions if isinstance(each, p.Reshape)} == set(shapes)
    seen = {}
    taps = {name: lambda x, name=name: seen.__setitem__(name, list(x.shape)) for name in shapes}
    Interpreter(program)(codes_of(program, 3), taps)
    sizes = {"batch": 3, "4*batch": 12}
    assert {size for shape in shapes.values() for size in shape if isinstance(size, str)} == set(sizes)
    assert {name: [sizes.get(size, size) for size in shape] for name, shape in shapes.items()} == seen


def test_weights_of_4_bits_are_stored_in_4_bits():
    program = lower(quantized("vit", bits="w4a8s4"))
    stored = {tuple(each.dims): each for each in onnx_integer_model(program).graph.initializer}
    for name, register in program.registers.items():
        if register.type == "s4" and len(register.shape) == 2:
            weight = stored[register.shape[::-1]]
            assert weight.data_type == TensorProto.UINT4
            assert len(weight.raw_data) == program.constants[name].numel() // 2


def test_what_codes_mean_is_in_the_metadata(vit_program, tmp_path):
    write_file(tmp_path / "vit.onnx", onnx_integer_model(vit_program).SerializeToString())
    model = OnnxModel(tmp_path / "vit.onnx", threads=1)
    said = {name.removeprefix("vitquant."): text for name, text in model.metadata.items()}
    assert json.loads(said["input"]) == vit_program.facts["input"]
    assert json.loads(said["outputs"]) == vit_program.facts["outputs"]
    assert (said["recipe"], said["bits"]) == ("fq-vit", "w8a8s4")
    assert (said["format"], said["version"]) == (FORMAT, vitquant.__version__)
    assert all(name.startswith("vitquant.") for name in model.metadata)
    assert quantization_from(model.metadata, model.outputs) == quantization_of(vit_program)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_no_images_have_no_logits(family):
    program = lower(quantized(family))
    first = program.registers[program.input]
    images, codes = torch.zeros(0, *first.shape[1:]), torch.zeros(0, *first.shape[1:], dtype=torch.int64)
    classes = program.registers[program.outputs["output"]].shape[1]
    assert interpreted(program)(images).shape == (0, classes)
    for float_io, given in ((False, codes), (True, images)):
        model = OnnxModel(onnx_integer_model(program, float_io).SerializeToString(), threads=1)
        assert model(given).shape == (0, classes)
        assert model(given).dtype == given.dtype


@pytest.mark.parametrize(("optimize", "level"), [(True, "ORT_ENABLE_ALL"), (False, "ORT_DISABLE_ALL")])
def test_optimizations_are_on_or_off_as_asked(vit_program, optimize, level):
    model = OnnxModel(onnx_integer_model(vit_program).SerializeToString(), optimize, threads=1)
    assert model._session.get_session_options().graph_optimization_level.name == level


# Float at both ends


@pytest.mark.parametrize("signed", [(), ("activations.signed=true", "network-input.signed=true")])
def test_float_images_become_the_codes_of_the_quantizer(signed):
    model = quantized("vit", settings=signed)
    program = lower(model)
    quantizer: Quantizer = model.quantizers["patch_embed:input"]
    step, (low, high) = quantizer.step, quantizer.range()
    # Exact halves of a step, which round to even, one float beside each, far outside, and photographs.
    halves = (torch.arange(-300, 300) + 0.5) * step
    values = torch.cat([
        halves, halves.nextafter(torch.tensor(9e9)), halves.nextafter(torch.tensor(-9e9)), torch.tensor([1e6, -1e6]),
        low[None], high[None], torch.linspace(3 * low, 3 * high, 3 * 32 * 32),
    ])  # fmt: skip
    images = torch.cat([values, torch.randn(6 * 3 * 32 * 32 - len(values)) * 2]).view(6, 3, 32, 32)
    onnx_model = onnx_integer_model(program, float_io=True)
    onnx.checker.check_model(onnx_model, full_check=True)
    content = onnx_model.SerializeToString()
    expected = Interpreter(program)(quantizer.encode(images))
    facts = program.facts["outputs"]["output"]
    logits = (expected - facts["zero_point"]).float() * torch.tensor(facts["scale"])
    for optimize in (True, False):
        assert torch.equal(OnnxModel(content, optimize, threads=1)(images), logits)
    (found,) = ReferenceEvaluator(onnx_model).run(None, {"images": images.numpy()})
    assert found.dtype == np.float32
    assert np.array_equal(found, logits.numpy())
    # onnx.reference takes ratios for int32: what lies further out is right in ONNX Runtime only.
    images[0].view(-1)[:4] = torch.tensor([1e30, -1e30, torch.inf, -torch.inf])
    assert torch.equal(_quantized_only(onnx_model)(images), quantizer.encode(images).to(torch.int64))


def _quantized_only(model):
    """The first operator of a model alone."""
    front = model.graph.node[0]
    assert front.op_type == "QuantizeLinear"
    constants = [each for each in model.graph.initializer if each.name in front.input]
    zero = next(each for each in constants if each.name == front.input[2])
    codes = onnx.helper.make_tensor_value_info(front.output[0], zero.data_type, [None] * 4)
    graph = onnx.helper.make_graph([front], "front", model.graph.input, [codes], constants)
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return OnnxModel(alone.SerializeToString(), threads=1)


def test_float_images_beyond_codes_that_do_not_fill_a_byte_are_clipped():
    program = lower(quantized("vit", settings=("network-input.bits=6",)))
    assert program.facts["input"]["high"] == 63
    images = torch.randn(2, 3, 32, 32) * 9
    content = onnx_integer_model(program, float_io=True).SerializeToString()
    assert torch.equal(OnnxModel(content, threads=1)(images), interpreted(program)(images))


def test_float_logits_have_the_scales_of_their_classes(vit_program):
    output = {**vit_program.facts["outputs"]["output"], "scale": [0.01 * (number + 1) for number in range(10)]}
    program = replace(vit_program, facts={**vit_program.facts, "outputs": {"output": output}})
    content = onnx_integer_model(program, float_io=True).SerializeToString()
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(OnnxModel(content, threads=1)(images), interpreted(program)(images))


def test_float_logits_of_4_bits_are_those_of_the_program():
    program = lower(quantized("vit", bits="w4a4s4"))
    assert program.registers[program.outputs["output"]].type == "u4"
    content = onnx_integer_model(program, float_io=True).SerializeToString()
    images = torch.randn(3, 3, 32, 32)
    for optimize in (True, False):
        assert torch.equal(OnnxModel(content, optimize, threads=1)(images), interpreted(program)(images))


def test_images_of_4_bits_stay_codes(vit_program):
    registers = {**vit_program.registers, vit_program.input: p.Register("u4", (-1, 3, 32, 32))}
    with pytest.raises(ExportError, match=r"u4, and ONNX quantizes float to bytes; export it without --float-io"):
        onnx_integer_model(replace(vit_program, registers=registers), float_io=True)


# Single instructions: what lowering does not write today, or not in every form


def single(instruction, output, first=("u8", (-1, 4, 6, 7)), **constants):
    """A program of one instruction; constants are (type, values)."""
    registers = {"x": p.Register(*first), "y": p.Register(*output)}
    registers |= {name: p.Register(type, tuple(values.shape)) for name, (type, values) in constants.items()}
    values = {name: values for name, (_, values) in constants.items()}
    return p.IntegerProgram("x", {"output": "y"}, registers, values, (instruction,))


@pytest.mark.parametrize("type", ["s8", "s4", "u8", "u4", "s16"])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation", "groups"),
    [
        ((4, 4), (4, 4), (0, 0), (1, 1), 1),
        ((3, 3), (1, 1), (1, 1), (1, 1), 4),
        ((3, 2), (2, 1), (1, 0), (1, 1), 2),
        ((2, 3), (1, 2), (2, 3), (3, 2), 1),
    ],
)
def test_convolutions(type, size, stride, padding, dilation, groups):
    low, high = p.type_limits(type)
    weight = (type, torch.randint(low, high + 1, (8, 4 // groups, *size)))
    bias = ("s32", torch.randint(-(2**20), 2**20, (8,)))
    zero = (type, torch.randint(low, high + 1, (8, 1, 1, 1)))
    for weight_zero, input_zero in ((None, 131), ("zero", 255)):
        instruction = p.Convolution(
            "y", "conv", "x", "weight", "bias", input_zero, weight_zero, stride, padding, dilation, groups
        )
        program = single(instruction, ("s32", (-1, 8, -1, -1)), weight=weight, bias=bias, zero=zero)
        if weight_zero and type == "s16":  # their difference has 17 bits
            with pytest.raises(ExportError, match="conv: an operand has 32 bits"):
                onnx_integer_model(program)
            continue
        same_everywhere(program, torch.randint(0, 256, (1, 4, 6, 7)), torch.full((2, 4, 6, 7), 255))


@pytest.mark.parametrize("kind", ["u8", "s8", "u4", "s4", "u16", "s16"])
@pytest.mark.parametrize("type", ["u8", "s8", "s4", "u16", "s16"])
def test_linear_of_every_type(kind, type):
    low, high = p.type_limits(type)
    weight = torch.randint(low, high + 1, (5, 6))
    weight[0], weight[1] = low, high
    zero = torch.randint(low, high + 1, (5, 1))
    first, last = p.type_limits(kind)
    for weight_zero, name in (("zero", "bias"), (None, None)):
        instruction = p.Linear("y", "linear", "x", "weight", name, first + 3, weight_zero)
        # Six products of 16 bits would leave s32, which no proved program does.
        smaller = 64 if "16" in kind and "16" in type else 1
        given = {
            "weight": (type, weight // smaller),
            "zero": (type, zero // smaller),
            "bias": ("s32", torch.arange(5) - 2),
        }
        program = single(instruction, ("s32", (-1, 3, 5)), (kind, (-1, 3, 6)), **given)
        codes = torch.randint(first, last + 1, (2, 3, 6))
        codes[0, 0], codes[0, 1] = first, last
        same_everywhere(program, codes)


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16"])
def test_products_of_two_registers_and_elementwise_ones(kind):
    first, last = p.type_limits(kind)
    codes = torch.randint(first, last + 1, (2, 3, 4, 4))
    codes[0, 0], codes[0, 1] = first, last
    for instruction in (p.Product("y", "scores", "x", "x", 7, 5), p.Multiply("y", "gate", "x", "x", 7, 5)):
        program = single(instruction, ("s32", (-1, 3, 4, 4)), (kind, (-1, 3, 4, 4)))
        same_everywhere(program, codes // 8 if "16" in kind else codes)  # so that 32 bits hold the sums


def test_multiply_repeats_sizes_of_one_and_may_need_64_bits():
    scale = ("s32", torch.tensor([[-(2**31)], [2**31 - 1], [3], [-1]]))
    instruction = p.Multiply("y", "gate", "x", "scale", 200, -9)
    program = single(instruction, ("s64", (-1, 4, 3)), ("u8", (-1, 4, 3)), scale=scale)
    same_everywhere(program, torch.randint(0, 256, (3, 4, 3)))


@pytest.mark.parametrize(
    ("instruction", "shape"),
    [
        (p.Reshape("y", "m", "x", (-1, 7, 24)), (-1, 7, 24)),
        (p.Permute("y", "m", "x", (2, 0, 3, 1)), (6, -1, 7, 4)),
        (p.Slice("y", "m", "x", 3, 1, 6, 2), (-1, 4, 6, 3)),
        (p.Slice("y", "m", "x", 1, 2, 3, 1), (-1, 1, 6, 7)),
        (p.Roll("y", "m", "x", (2, -3), (1, 3)), (-1, 4, 6, 7)),
        (p.Roll("y", "m", "x", (6, 9), (2, 3)), (-1, 4, 6, 7)),
        (p.Pad("y", "m", "x", (1, 2, 0, 3), 77), (-1, 4, 9, 10)),
        (p.Pad("y", "m", "x", (0, 1), -3), (-1, 4, 6, 8)),
        (p.Sum("y", "m", "x", (2, 3), False, 31), (-1, 4)),
        (p.Sum("y", "m", "x", (1,), True, -2), (-1, 1, 6, 7)),
    ],
)
@pytest.mark.parametrize("type", ["u8", "s8", "s32"])
def test_moves_and_sums(instruction, shape, type):
    if isinstance(instruction, p.Pad) and type == "u8":
        instruction = replace(instruction, value=abs(instruction.value))
    output = ("s32" if isinstance(instruction, p.Sum) else type, shape)
    program = single(instruction, output, (type, (-1, 4, 6, 7)))
    low, high = (-(2**20), 2**20) if type == "s32" else p.type_limits(type)
    same_everywhere(program, torch.randint(low, high, (1, 4, 6, 7)), torch.randint(low, high, (3, 4, 6, 7)))


def test_what_is_joined_is_repeated_for_every_image():
    token = ("u8", torch.randint(0, 256, (1, 4, 6, 2)))
    program = single(p.Concat("y", "tokens", ("token", "x", "token"), 3), ("u8", (-1, 4, 6, 11)), token=token)
    images = [torch.randint(0, 256, (batch, 4, 6, 7)) for batch in (1, 2, 5)]
    same_everywhere(program, *images)


@pytest.mark.parametrize("shift", [1, 20, 31, 32, 45, 61])
@pytest.mark.parametrize("type", ["u8", "s8", "u16", "s16", "s4"])
def test_requantize_up_to_the_last_bit_of_64(shift, type):
    low, high = p.type_limits(type)
    # x * multiplier + addend reaches both ends of 64 bits for the extremes of x, and ends of codes in between.
    multiplier = torch.tensor([2**31 - 1, -(2**31) + 1, 1, 0])
    addend = torch.tensor([2**62, -(2**62), (low << min(shift, 40)) - 5, min((high + 1) << shift, 2**62) - 1])
    instruction = p.Requantize("y", "r", ("x", "x"), ("multiplier", "multiplier"), "addend", shift, low, high)
    constants = {"multiplier": ("s64", multiplier), "addend": ("s64", addend)}
    program = single(instruction, (type, (-1, 4)), ("s32", (-1, 4)), **constants)
    extremes = torch.tensor([[2**29] * 4, [-(2**29)] * 4, [0] * 4, [5] * 4, [-5] * 4])
    same_everywhere(program, extremes, torch.randint(-(2**29), 2**29, (200, 4)))


@pytest.mark.parametrize("shape", [(), (7,), (6, 1), (4, 1, 1), (4, 1, 7), (6, 7), (1, 4, 6, 7)])
def test_multipliers_vary_by_tensor_channel_row_or_head(shape):
    """Of two inputs, one of which every channel shares; the addend in yet another way."""
    constants = {
        "m": ("s32", torch.randint(-(2**31), 2**31, shape)), "n": ("s32", torch.randint(-(2**31), 2**31, (7,))),
        "other": ("s16", torch.randint(-(2**15), 2**15, (4, 6, 7))),
        "a": ("s64", torch.randint(-(2**48), 2**48, (6, 1))),
    }  # fmt: skip
    instruction = p.Requantize("y", "r", ("x", "other"), ("m", "n"), "a", 40, -100, 127)
    program = single(instruction, ("s8", (-1, 4, 6, 7)), ("s16", (-1, 4, 6, 7)), **constants)
    same_everywhere(program, *(torch.randint(-(2**15), 2**15, (batch, 4, 6, 7)) for batch in (1, 3)))


def test_scales_by_head_and_by_row_give_the_codes_of_the_interpreter():
    torch.manual_seed(0)
    model = vitquant.quantize(FAMILIES["vit"]().eval(), "fq-vit", [torch.randn(8, 3, 32, 32)])
    tokens = 17
    for name, granularity, count in (
        ("attn.scores:query", PerHead(), 2),
        ("attn.scores:key", PerAxis(-1), tokens),
        ("attn.context:value", PerHead(), 2),
        ("attn.proj:input", PerAxis(-2), tokens),
    ):
        old = model.quantizers[f"blocks.0.{name}"]
        spec = replace(old.spec, granularity=granularity, signed=True, symmetric=True)
        scales = QParams(old.scale * torch.linspace(1, 3, count), torch.zeros(count, dtype=torch.int32))
        model.insert({f"blocks.0.{name}": build_quantizer(spec, scales)})
    program = lower(model)
    shapes = {
        tuple(program.constants[m].shape)
        for i in program.instructions
        if isinstance(i, p.Requantize)
        for m in i.multipliers
    }
    assert {(1, 2, 1, tokens), (1, tokens, 32)} <= shapes
    same_everywhere(program, codes_of(program, 1), codes_of(program, 3))


@pytest.mark.parametrize("shape", [None, (7,), (1, 6, 7), (4, 1, 1), (1, 4, 6, 7)])
def test_softmax_of_signed_codes_with_any_mask(shape):
    table = exact_exponential(0.05)
    constants = {"values": ("u16", table.values), "octaves": ("s32", table.octaves)}
    if shape is not None:
        constants["hidden"] = ("u8", torch.randint(0, 2, shape))
    hidden = None if shape is None else "hidden"
    images = [torch.randint(-128, 128, (batch, 4, 6, 7)) for batch in (1, 3)]
    images.append(torch.tensor([-128, 127])[torch.randint(0, 2, (2, 4, 6, 7))])
    for instruction, type in (
        (p.SoftmaxToLevels("y", "s", "x", hidden, "values", "octaves", 2**31 - 9, 23, -100, -90, 127), "s8"),
        (p.SoftmaxToPowers("y", "s", "x", hidden, "values", "octaves", 16, 1, 0, False), "u8"),
        (p.SoftmaxToPowers("y", "s", "x", hidden, "values", "octaves", 16, 1, 0, True), "u8"),
        (p.SoftmaxToPowers("y", "s", "x", hidden, "values", "octaves", 15, 1, -9000, False), "u4"),
        (p.SoftmaxToPowers("y", "s", "x", hidden, "values", "octaves", 31, 2, 0, False), "u8"),
        (p.SoftmaxToPowers("y", "s", "x", hidden, "values", "octaves", 31, 2, -(2**17), False), "u8"),
        (p.SoftmaxToPowers("y", "s", "x", hidden, "values", "octaves", 32, 2, 5000, False), "u8"),
    ):
        same_everywhere(single(instruction, (type, (-1, 4, 6, 7)), ("s8", (-1, 4, 6, 7)), **constants), *images)


@pytest.mark.parametrize("factors", [None, "factors"])
def test_layer_norm_of_signed_codes(factors):
    constants = {
        "factors": ("u8", torch.randint(0, 4, (24,))),
        "multiplier": ("s32", torch.randint(-(2**31) + 1, 2**31 - 1, (24,))),
        "addend": ("s64", torch.randint(-(2**45), 2**45, (24,))),
    }
    instruction = p.LayerNorm("y", "n", "x", factors, -7, 1, 2040, "multiplier", "addend", 42, -100, 90)
    program = single(instruction, ("s8", (-1, 5, 24)), ("s8", (-1, 5, 24)), **constants)
    constant = torch.full((1, 5, 24), 12)
    same_everywhere(program, torch.randint(-128, 128, (3, 5, 24)), constant)


@pytest.mark.parametrize(("type", "lowest"), [("s8", -128), ("u8", 0), ("s4", -8), ("u16", 0)])
@pytest.mark.parametrize("written", ["s8", "u16", "s32"])
def test_lookup_of_every_code(type, lowest, written):
    low, high = p.type_limits(type)
    least, most = p.type_limits(written)
    table = (written, torch.randint(least, most + 1, (high - low + 1,)))
    program = single(
        p.Lookup("y", "t", "x", "table", lowest),
        (written, (-1, high - low + 1)),
        (type, (-1, high - low + 1)),
        table=table,
    )
    same_everywhere(program, torch.arange(low, high + 1)[None])


# Refusals


def test_sums_of_64_bits_and_operands_of_32_are_refused(vit_program):
    linear = next(each for each in vit_program.instructions if isinstance(each, p.Linear))
    for name, type, reason in ((linear.output, "s64", "64 bits"), (linear.input, "s32", "operand has 32 bits")):
        registers = {**vit_program.registers, name: replace(vit_program.registers[name], type=type)}
        with pytest.raises(ExportError, match=rf"blocks\.0\.attn\.qkv: .*{reason}"):
            onnx_integer_model(replace(vit_program, registers=registers))


def test_a_roll_along_the_batch_is_refused():
    with pytest.raises(LoweringError, match="m: roll takes axes"):
        onnx_integer_model(single(p.Roll("y", "m", "x", (1,), (0,)), ("u8", (-1, 4, 6, 7))))


def test_a_model_that_is_too_large_for_one_file_is_refused(vit_program, monkeypatch):
    monkeypatch.setattr(builder, "LARGEST_MODEL", builder._ROOM + 20_000)
    with pytest.raises(ExportError, match=r"blocks\.\d.*more than 2 GB"):
        onnx_integer_model(vit_program)


def test_what_is_not_for_a_model_is_refused_in_one_line(vit_program, tmp_path):
    model = OnnxModel(onnx_integer_model(vit_program).SerializeToString(), threads=1)
    for images, reason in (
        (torch.randn(1, 3, 32, 32), "takes uint8 images"),
        (torch.full((1, 3, 32, 32), 256), "go from 256 to 256"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "cannot be run"),
    ):
        with pytest.raises(ExportError, match=reason) as error:
            model(images)
        assert "\n" not in str(error.value)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for name in ("broken.onnx", "absent.onnx"):
        with pytest.raises(ExportError, match=rf"{name} cannot be run by ONNX Runtime: \S") as error:
            OnnxModel(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"pip install 'vitquant\[onnx\]'"):
        OnnxModel(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "vitquant.exports.onnx_integer.builder")
    with pytest.raises(ExportError, match=r"pip install 'vitquant\[onnx\]'"):
        importlib.import_module("vitquant.exports.onnx_integer.builder")


# The real DeiT-Tiny


def with_trained_weights(name):
    def build(shared):
        return create(pinned(ModelSource(name, weights=str(shared / "weights/deit_tiny_patch16_224.safetensors"))))

    return build


def swin(shared):
    return create(ModelSource("timm:swin_tiny_patch4_window7_224", weights="random"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "bits"), [("fq-vit", "w8a8s4"), ("fq-vit", "w4a8s4"), ("fq-vit+uniform-probs+wide-residual", "w8a8")]
)
@pytest.mark.parametrize(
    "build",
    [with_trained_weights("timm:deit_tiny_patch16_224"), with_trained_weights("timm:vit_tiny_patch16_224"), swin],
    ids=["deit", "vit", "swin with random weights"],
)
def test_on_photographs_and_on_codes_that_none_has_every_bit_is_the_same(shared, build, recipe, bits):
    def photographs(name, count):
        return batches(subset(load_listing(shared / "images" / name), count, 0), Preprocessing(), 16)

    model = vitquant.quantize(build(shared), recipe, photographs("photos_calibration", 25), bits=bits)
    program = lower(model)
    codes = [model.image_quantizer.encode(images) for images, _ in photographs("photos_eval", 64)]
    codes += adversarial_codes(program).values()
    exported = onnx_integer_model(program)
    content = exported.SerializeToString()
    interpreter = Interpreter(program)
    for optimize in (True, False):
        run = OnnxModel(content, optimize, threads=1)
        assert all(torch.equal(run(batch), interpreter(batch)) for batch in codes)
    assert torch.equal(referee(exported)(codes[0][:2]), interpreter(codes[0][:2]))
