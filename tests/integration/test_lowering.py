"""A quantized model as an integer program: the same codes, and no floating point."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vitquant
from vitquant.errors import LoweringError
from vitquant.lowering import lower
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
    simulated = model.quantizers["output:input"].encode(model(images)).long()
    with NoFloat():
        logits = Interpreter(program, exact_int64)(codes)
    # Sums of float32 and of integers round apart now and then, and what follows is no longer the same input.
    assert (logits - simulated).abs().max() <= 3
    assert (logits - simulated).abs().double().mean() < 0.4
    assert torch.equal(Interpreter(program)(codes), logits)


def test_what_stays_in_float_is_refused_by_name():
    with pytest.raises(LoweringError, match=r"blocks\.0\.norm1"):
        lower(quantized("vit", "minmax"))
