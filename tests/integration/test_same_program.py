"""One saved model gives the same program, byte for byte, on every processor and with every supported torch.

The models and the digests lie in `tests/saved_models/`; `python tests/helpers/saved_models.py write` makes them again
after a change of what is saved or of what programs are. `make test-processors` runs laws, numerics and this file as
other processors would.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import saved_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import vitquant
from vitquant.zoo import ModelSource
from vitquant.zoo.build import architecture

DIGESTS = json.loads(saved_models.DIGESTS.read_text())

# What torch need not round correctly, and what it sums in an order of its own.
ROUNDED_APART = {
    "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh", "erf",
    "erfc", "sigmoid", "silu", "gelu", "mish", "softplus", "elu", "selu", "celu", "log_sigmoid", "log_sigmoid_forward",
    "hardswish", "hardsigmoid", "pow", "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "sum", "mean",
    "var", "std", "prod", "cumsum", "linalg_vector_norm", "softmax", "_softmax", "layer_norm", "native_layer_norm",
    "batch_norm", "native_batch_norm", "conv2d", "convolution", "upsample_bilinear2d", "upsample_bicubic2d",
}  # fmt: skip


class OtherProcessor(TorchDispatchMode):
    """A processor on which everything that may be rounded apart is, by far more than processors do.

    A unit in the last place of float64 seldom shows in a multiplier of 31 bits, or in codes.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in ROUNDED_APART:
            return found
        return tree_map_only(torch.Tensor, lambda x: x * (1 - 2**-9) if x.is_floating_point() else x, found)


def test_the_committed_digests_are_of_the_models_that_are_there():
    assert DIGESTS.keys() == saved_models.MODELS.keys()
    assert {path.name for path in saved_models.FOLDER.iterdir() if path.is_dir()} == {
        saved_models.folder(name).name for name in DIGESTS
    }
    recipes = {recipe for _, _, recipe in saved_models.MODELS.values()}
    assert {"fq-vit", "repq-vit+fully-integer", "default"} <= recipes
    assert len(set(DIGESTS.values())) == len(DIGESTS)


@cache
def loaded(name):
    """A saved model, on one that was built on the other processor."""
    source, arguments, _ = saved_models.MODELS[name]
    with OtherProcessor():
        built = architecture(ModelSource(source, arguments, weights="random"))
    return vitquant.load(saved_models.folder(name), built)


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_a_saved_model_gives_the_committed_program_here_and_on_another_processor(name):
    model = loaded(name)
    assert saved_models.digest_of(model) == DIGESTS[name]
    with OtherProcessor():
        assert saved_models.digest_of(model) == DIGESTS[name]


@pytest.mark.parametrize(
    ("guard", "name"),
    [
        ("vitquant.lowering.affine", "levit fq-vit"),  # the root of batch norm
        ("vitquant.lowering.context", "siglip fq-vit"),  # a product of parameters
        ("vitquant.integer_modules.activation", "vit fq-vit"),  # GELU
    ],
)
def test_without_correct_rounding_that_processor_gives_another_program(guard, name, monkeypatch):
    model = loaded(name)
    monkeypatch.setattr(f"{guard}.CorrectRounding", nullcontext)
    with OtherProcessor():
        assert saved_models.digest_of(model) != DIGESTS[name]


OLDEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
}
OTHERS = [{"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ATEN_CPU_CAPABILITY": "default"}]


@pytest.mark.parametrize("environment", [OLDEST, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
def test_other_processors_that_this_machine_can_play_give_the_same_programs(environment):
    script = Path(saved_models.__file__)
    paths = os.pathsep.join([str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **environment, "PYTHONPATH": paths}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(ran.stdout.splitlines()[-1]) == DIGESTS
