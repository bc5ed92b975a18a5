"""A quantized model as an integer program: the same codes, and no floating point."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vitquant
from vitquant.errors import CalibrationError, LoweringError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.lowering import lower
from vitquant.model import QuantizedModel
from vitquant.model.simulation import ExactSimulation
from vitquant.parity import flipped_codes
from vitquant.program.instructions import LayerNorm, Linear, Lookup, Product, Requantize
from vitquant.program.ranges import prove_ranges
from vitquant.quantizers import build_quantizer
from vitquant.recipe import load_recipe
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.on_images import interpreted
from vitquant.runtime.products import exact_int64
from vitquant.spec import PerAxis, QParams

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}


def quantized(name, recipe, **given):
    torch.manual_seed(0)
    if name == "vit":
        model = timm.models.vision_transformer.VisionTransformer(**VIT)
    else:
        model = timm.models.swin_transformer.SwinTransformer(**SWIN, num_classes=10)
    return vitquant.quantize(model.eval(), recipe, [torch.randn(8, 3, 32, 32) for _ in range(2)], **given)


class NoFloat(TorchDispatchMode):
    """Fails on any operation that gives or takes floating point."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            assert not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()), func
        return result


RECIPES = ["fq-vit", "fq-vit+uniform-probs+uniform-norm-inputs", "fq-vit+wide-residual"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_program_computes_the_codes_of_the_simulation_without_floating_point(name, recipe):
    model = quantized(name, recipe)
    program = lower(model)
    images = torch.randn(5, 3, 32, 32)
    codes = model.quantizers["patch_embed:input"].encode(images)
    written = {each.site: each.output for each in program.instructions if isinstance(each, Requantize)}
    integers, simulated = {}, {}
    taps = {register: lambda x, name=name: integers.__setitem__(name, x) for name, register in written.items()}
    with NoFloat():
        logits = Interpreter(program, exact_int64)(codes, taps)
    value = model.index.value("blocks.0.norm2:input").name
    with torch.no_grad():
        model.run(images, {value: lambda x: simulated.__setitem__(value, model.quantizers[value].encode(x))})
    # Sums of float32 and of integers round apart now and then; an untrained model makes much of it in later blocks.
    flipped = (integers["blocks.0.residual1"].flatten() != simulated[value].flatten()).double().mean()
    assert flipped < 0.01
    assert torch.equal(Interpreter(program)(codes), logits)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_every_value_lies_in_its_proved_range(name):
    program = lower(quantized(name, "fq-vit"))
    ranges, seen = prove_ranges(program), {}
    taps = {
        each.output: lambda x, name=each.output: seen.__setitem__(name, (int(x.min()), int(x.max())))
        for each in program.instructions
    }
    first = program.registers["input"]
    for codes in (
        torch.zeros(1, *first.shape[1:], dtype=torch.int64),
        torch.full((1, *first.shape[1:]), 255),
        torch.randint(0, 256, (2, *first.shape[1:])),
    ):
        Interpreter(program)(codes, taps)
        assert seen
        assert all(ranges[name][0] <= low and high <= ranges[name][1] for name, (low, high) in seen.items())
    assert len(seen) == len(program.instructions)


POWERS = [
    ("log2", "w8a8s4", "minmax"),
    ("log_sqrt2", "w8a8s4", "unit"),
    ("log_sqrt2", "w8a8s5", "unit"),
    ("log_sqrt2", "w8a8s5", "minmax"),
]


@pytest.mark.parametrize(("scheme", "bits", "observer"), POWERS)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_powers_of_either_base_and_any_first_one_are_computed_in_integers(name, scheme, bits, observer):
    settings = [f"attention-probs.scheme={scheme}", f"attention-probs.observer={observer}"]
    model = quantized(name, "fq-vit", bits=bits, settings=settings)
    program, images = lower(model), torch.randn(6, 3, 32, 32)
    codes = model.quantizers["patch_embed:input"].encode(images)
    with NoFloat():
        logits = Interpreter(program, exact_int64)(codes)
    assert torch.equal(Interpreter(program)(codes), logits)
    with torch.no_grad():
        assert torch.equal(interpreted(program)(images).argmax(1), ExactSimulation(model)(images).argmax(1))
    probs = model.quantizers["blocks.0.attn.context:probs"]
    assert (float(probs.scale) == 1) is (observer == "unit")
    flips = {each.value: each for each in flipped_codes(model, program, [images])}
    assert flips
    assert all(each.kept for each in flips.values())
    assert flips["blocks.0.attn.context:probs"].flipped == 0
    register = program.registers[program.codes["blocks.0.attn.context:probs"]]
    assert register.type == ("u4" if bits.endswith("s4") else "u8")
    here = [each for each in program.instructions if each.site == "blocks.0.attn.context"]
    registers = 2 if scheme == "log_sqrt2" else 1
    assert sum(isinstance(each, Product) for each in here) == registers
    assert [len(each.inputs) for each in here if isinstance(each, Requantize)] == [registers]


@pytest.mark.parametrize(("scheme", "bits", "fit"), [("log2", "w8a8s5", "s4"), ("log_sqrt2", "w8a8", "s5")])
def test_more_powers_than_numerators_hold_are_refused_with_the_bits_that_fit(scheme, bits, fit):
    settings = [f"attention-probs.scheme={scheme}"]
    model = quantized("vit", "fq-vit", bits=bits, settings=settings, simulated=True)
    with pytest.raises(LoweringError, match=rf"blocks\.0\.attn\.softmax: .* bits: .*\({fit} in --bits\)"):
        lower(model)


def test_a_sum_that_could_overflow_is_refused():
    program = lower(quantized("vit", "fq-vit"))
    weight = next(each.weight for each in program.instructions if isinstance(each, Linear))
    constants = {**program.constants, weight: program.constants[weight] * 2**25}
    with pytest.raises(LoweringError, match=r"blocks\.0\.attn\.qkv.*do not fit s32"):
        prove_ranges(replace(program, constants=constants))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_flipped_codes_are_counted_where_they_arise(name):
    model = quantized(name, "fq-vit")
    program, images = lower(model), torch.randn(6, 3, 32, 32)
    flips = {each.value: each for each in flipped_codes(model, program, [images])}
    assert {each.made_by for each in flips.values()} == {"rescaling", "layer_norm", "softmax", "activation"}
    assert flips.keys() == program.codes.keys() - {"patch_embed:input"} - {
        value.name for value in model.values if -1 not in value.shape
    }
    assert all(each.kept for each in flips.values())
    assert sum(each.flipped for each in flips.values()) < 1e-4 * sum(each.codes for each in flips.values())
    # A rescaling that is one code off shows at its own site only.
    step = (
        next(each for each in program.instructions if each.output == program.codes["blocks.0.attn.proj:input"])
        if (name == "vit")
        else next(each for each in program.instructions if isinstance(each, Requantize))
    )
    shifted = {**program.constants, step.addend: program.constants[step.addend] + (1 << step.shift)}
    broken = [each for each in flipped_codes(model, replace(program, constants=shifted), [images]) if not each.kept]
    assert [program.codes[each.value] for each in broken] == [step.output]


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_codes_of_twin_steps_are_counted_as_codes(name):
    """A register has levels in their place."""
    model = quantized(name, "repq-vit+twin-steps+fully-integer+wide-residual", bits="w6a6s5")
    program, images = lower(model), torch.randn(6, 3, 32, 32)
    flips = {each.value: each for each in flipped_codes(model, program, [images])}
    assert all(each.kept for each in flips.values())
    value = "blocks.0.attn.proj:input"
    assert model.quantizers[value].spec.to_dict()["scheme"] == "twin_uniform"
    assert program.registers[program.codes[value]].type == "u8"
    levels = next(each for each in program.instructions if each.output == program.codes[value])
    assert isinstance(levels, Lookup)
    table = program.constants[levels.table]
    cut = replace(program, constants={**program.constants, levels.table: table.clamp(max=int(table[100]))})
    broken = [each for each in flipped_codes(model, cut, [images]) if not each.kept]
    assert [each.value for each in broken] == [value]


def test_the_residual_stream_has_16_bits_where_the_recipe_says_so():
    program = lower(quantized("vit", "fq-vit+wide-residual"))
    types = {name: program.registers[register].type for name, register in program.codes.items()}
    assert types["blocks.1.norm1:input"] == types["blocks.0.residual1:rhs"] == "s16"
    assert types["blocks.0.attn.qkv:input"] == "u8"
    norm = next(each for each in program.instructions if isinstance(each, LayerNorm))
    assert norm.largest == 2**16 - 1


def test_weights_of_4_bits_are_held_two_to_a_byte():
    program = lower(quantized("vit", "fq-vit", bits="w4a8s4"))
    weight = next(each.weight for each in program.instructions if isinstance(each, Linear))
    assert program.registers[weight].type == "s4"
    held = dict(zip(program.constants, Interpreter(program).buffers(), strict=True))
    assert held[weight].dtype is torch.uint8
    assert 2 * held[weight].numel() == program.constants[weight].numel()


def changed(name, change):
    """A tiny ViT by fq-vit whose quantizer of that value was changed."""
    model = quantized("vit", "fq-vit")
    spec, quantizer = change(model.quantizers[name])
    model.insert({name: build_quantizer(spec, quantizer)})
    return model


def per_channel(quantizer):
    spec = replace(quantizer.spec, granularity=PerAxis(-1))
    return spec, QParams(quantizer.scale.expand(32).clone(), quantizer.zero_point.expand(32).clone())


def of_each_input(quantizer):
    return replace(quantizer.spec, granularity=PerAxis(1)), QParams(quantizer.scale, quantizer.zero_point)


def without_scale(quantizer):
    return quantizer.spec, QParams(torch.zeros(()), quantizer.zero_point)


def of_16_bits(quantizer):
    return replace(quantizer.spec, bits=16), QParams(quantizer.scale / 256, quantizer.zero_point * 256)


@pytest.mark.parametrize(
    ("value", "change", "message"),
    [
        ("blocks.0.attn.qkv:input", per_channel, r"blocks\.0\.attn\.qkv: its input has 32 scales, .* use per = tensor"),
        ("patch_embed:input", per_channel, r"patch_embed:input: the image has several scales; use per = tensor"),
        ("blocks.0.attn.proj:weight", of_each_input, r"attn\.proj: its weight's scales are not those of its outputs"),
        (
            "blocks.0.attn.scores:query",
            without_scale,
            r"blocks\.0\.attn\.scores:query: a scale .* not positive; cal",
        ),
        ("blocks.0.attn.scores:key", of_16_bits, r"blocks\.0\.attn\.scores: its operand is u16, .* 8 bits or less"),
    ],
)
def test_quantizers_that_no_product_can_read_are_refused(value, change, message):
    with pytest.raises(LoweringError, match=message):
        lower(changed(value, change))


def test_an_uncalibrated_model_is_refused():
    captured = capture(timm.models.vision_transformer.VisionTransformer(**VIT).eval(), torch.randn(2, 3, 32, 32))
    recipe = load_recipe("fq-vit")
    with pytest.raises(CalibrationError, match=r"is not calibrated"):
        lower(QuantizedModel(CapturedModel(captured, (3, 32, 32)), recipe, recipe.bits))


def test_a_model_whose_logits_stay_in_float_is_refused():
    model = quantized("vit", "fq-vit", settings=["activations.float=true"], simulated=True)
    with pytest.raises(LoweringError, match=r"its input is not quantized; let the recipe quantize it|float"):
        lower(model)


def test_what_stays_in_float_is_refused_by_name():
    with pytest.raises(LoweringError, match=r"blocks\.0\.norm1"):
        lower(quantized("vit", "minmax"))
