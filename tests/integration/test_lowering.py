"""A quantized model as an integer program: the same codes, and no floating point."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vitquant
from vitquant.errors import LoweringError
from vitquant.lowering import lower
from vitquant.program.instructions import Linear, Requantize
from vitquant.program.ranges import prove_ranges
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.products import exact_int64

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}


def quantized(name, recipe):
    torch.manual_seed(0)
    if name == "vit":
        model = timm.models.vision_transformer.VisionTransformer(**VIT)
    else:
        model = timm.models.swin_transformer.SwinTransformer(**SWIN, num_classes=10)
    return vitquant.quantize(model.eval(), recipe, [torch.randn(8, 3, 32, 32) for _ in range(2)])


class NoFloat(TorchDispatchMode):
    """Fails on any operation that gives or takes floating point."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in (*args, *(result if isinstance(result, tuple | list) else (result,))):
            assert not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()), func
        return result


@pytest.mark.parametrize("recipe", ["fq-vit", "fq-vit+uniform-probs+uniform-norm-inputs"])
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
    value = model.value("blocks.0.norm2:input").name
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
        assert all(ranges[name][0] <= low and high <= ranges[name][1] for name, (low, high) in seen.items())
    assert len(seen) == len(program.instructions)


def test_a_sum_that_could_overflow_is_refused():
    program = lower(quantized("vit", "fq-vit"))
    weight = next(each.weight for each in program.instructions if isinstance(each, Linear))
    constants = {**program.constants, weight: program.constants[weight] * 2**25}
    with pytest.raises(LoweringError, match=r"blocks\.0\.attn\.qkv.*do not fit s32"):
        prove_ranges(replace(program, constants=constants))


def test_what_stays_in_float_is_refused_by_name():
    with pytest.raises(LoweringError, match=r"blocks\.0\.norm1"):
        lower(quantized("vit", "minmax"))
