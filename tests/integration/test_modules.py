"""A quantized model is a module like another: it travels, is captured and is cast as torch's tools do it."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading

import pytest
import timm
import torch
from architectures import TRANSFORMERS, from_transformers, vary
from torch import nn
from torch._ops import OpOverload
from torch.nn.utils import parametrize

import vitquant
from vitquant.errors import CalibrationError, CaptureError, ModelError
from vitquant.integer_modules import IntegerOperation
from vitquant.model import QuantizedModel
from vitquant.model.saved import digest
from vitquant.runtime.interpreter import Interpreter

BATCH = torch.export.Dim("batch")
SWIN = {"depths": (1, 2), "embed_dim": 16, "num_heads": (2, 4), "img_size": 32, "patch_size": 2, "window_size": 4}
MODELS = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2, img_size=32, num_classes=5
    ),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **SWIN),
    "transformers": from_transformers("ViT", **{**TRANSFORMERS, "num_hidden_layers": 1}),
}
RECIPES = (
    "minmax", "moving-average", "percentile", "omse", "fq-vit", "fq-vit-published", "repq-vit", "vt-ptq",
    "minmax+searched-scales", "repq-vit+fully-integer", "repq-vit+searched-scales", "vt-ptq+wide-residual",
    "repq-vit+twin-steps+fully-integer",
)  # fmt: skip


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def logits(output: object) -> torch.Tensor:
    return getattr(output, "logits", output).detach()


@functools.cache
def shared(family: str, recipe: str) -> QuantizedModel:
    """Nobody changes it."""
    torch.manual_seed(0)
    model = MODELS[family]()
    vary(model)
    return vitquant.quantize(model.eval(), recipe, [images(4)])


@pytest.fixture
def model() -> QuantizedModel:
    """One to change, with softmax, LayerNorm and activation on codes."""
    return copy.deepcopy(shared("vit", "fq-vit"))


def exported(model: nn.Module, *, grad: bool = False) -> nn.Module:
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (images(2),), dynamic_shapes=({0: BATCH},))
    operators = {node.target.namespace for node in program.graph.nodes if isinstance(node.target, OpOverload)}
    assert operators == {"aten"}  # nothing of vitquant is needed to run it
    return program.module()


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)  # type: ignore[return-value]


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
    "export": exported,
    "export with gradients": lambda model: exported(model, grad=True),
    "compile": compiled,
    "share_memory": lambda model: copy.deepcopy(model).share_memory(),
    "train": lambda model: copy.deepcopy(model).train(),
    "double and float": lambda model: copy.deepcopy(model).double().float(),
}


@pytest.mark.parametrize(
    ("family", "recipe", "how"),
    [
        *(("vit", "fq-vit", how) for how in COPIES),
        *(("vit", "repq-vit+twin-steps", how) for how in ("export", "export with gradients", "compile")),
        ("transformers", "minmax", "pickle"),
        ("transformers", "minmax", "export"),
    ],
)
def test_the_same_bits_come_out(family: str, recipe: str, how: str) -> None:
    model, x = shared(family, recipe), images(5, seed=1)
    with torch.no_grad():
        expected, found = model(x), COPIES[how](model)(x)
    assert type(found) is type(expected)
    assert torch.equal(logits(found), logits(expected))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", MODELS)
def test_the_same_bits_come_out_for_every_recipe(family: str, recipe: str) -> None:
    model, x = shared(family, recipe), images(5, seed=1)
    expected = logits(model(x))
    for how, made in COPIES.items():
        assert torch.equal(logits(made(model)(x)), expected), how


def on_images(model: QuantizedModel, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return logits(model(x))


def test_another_process_computes_the_same() -> None:
    model, x = shared("vit", "fq-vit"), images(3, seed=1)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(on_images, (model, x)).get(
            timeout=300
        )  # a process that cannot begin would be waited for
    assert torch.equal(found, on_images(model, x))


def test_a_pickled_model_is_the_whole_model() -> None:
    model = shared("transformers", "fq-vit")
    loaded = pickle.loads(pickle.dumps(model))
    assert digest(loaded) == digest(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert [n.name for n in loaded.graph_module.graph.nodes] == [n.name for n in model.graph_module.graph.nodes]
    assert vitquant.lower(loaded).instructions == vitquant.lower(model).instructions
    quantizer = next(iter(loaded.integer_operations.values())).source
    assert any(quantizer is each for each in loaded.quantizers.values())  # the graph's own, and no copy


def test_exports_of_a_loaded_state_have_its_constants(model: QuantizedModel) -> None:
    """Without a call between, that would derive the constants again."""
    other, x = copy.deepcopy(model), images(3, seed=1)
    with torch.no_grad():
        for quantizer in other.quantizers.values():
            quantizer.scale.mul_(1.5)
        for parameter in other.parameters():
            parameter.mul_(1.25)
    expected = on_images(other, x)
    assert not torch.equal(on_images(model, x), expected)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(exported(model)(x)), expected)
    assert torch.equal(on_images(model, x), expected)


@pytest.mark.parametrize("changed", ["scale", "zero_point", "weight"])
def test_whoever_changes_a_scale_or_a_parameter_changes_the_operations(model: QuantizedModel, changed: str) -> None:
    x = images(3, seed=1)
    on_images(model, x)
    with torch.no_grad():
        for operation in model.integer_operations.values():
            if changed == "scale":
                operation.result.scale.mul_(2.0)
            elif changed == "zero_point" and operation.result.zero_point is not None:
                operation.result.zero_point.add_(3)
        if changed == "weight":
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.mul_(1.5)
    fresh = pickle.loads(pickle.dumps(model))
    for operation in fresh.integer_operations.values():
        operation.connect(operation.source, operation.result)  # forgets what it holds
    assert torch.equal(on_images(model, x), on_images(fresh, x))


def test_constants_are_derived_once(model: QuantizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def derive(self: IntegerOperation, *_: object) -> dict[str, torch.Tensor]:
        raise AssertionError(f"{self.kind} derives its constants again")

    for operation in model.integer_operations.values():
        monkeypatch.setattr(type(operation), "derive", derive)
    on_images(model, images(2))


def test_operations_that_were_never_prepared_are_not_compiled() -> None:
    operation = copy.deepcopy(shared("vit", "fq-vit").integer_operations["blocks.0.attn.softmax"])
    operation.connect(operation.source, operation.result)
    with pytest.raises(CalibrationError, match="call the model once before"):
        torch.export.export(operation, (torch.zeros(1, 2, 5, 5),))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_casts_that_round_are_refused_and_change_nothing(model: QuantizedModel, cast: object) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for each in (model, nn.Sequential(model)):
        with pytest.raises(ModelError, match=r"computes in float32.*before quantizing"):
            cast(each)  # type: ignore[operator]
    after = model.state_dict()
    assert all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]) for name, tensor in after.items()
    )


def test_a_double_that_single_precision_cannot_hold_stays_double(model: QuantizedModel) -> None:
    model.double()
    assert {quantizer.scale.dtype for quantizer in model.quantizers.values()} == {torch.float32}
    with torch.no_grad():
        next(model.parameters()).add_(1e-12)
    with pytest.raises(ModelError, match="computes in float64"):
        model.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(dtype: torch.dtype) -> None:
    model, x = shared("vit", "fq-vit"), images(3, seed=1)
    program = vitquant.lower(model)
    codes = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    expected = on_images(model, x), Interpreter(program)(codes)
    halved = on_images(model, x.to(dtype).float())
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(on_images(model, x), expected[0])
        assert torch.equal(on_images(model, x.to(dtype)), halved)
        assert torch.equal(Interpreter(program)(codes), expected[1])


def test_quantizing_under_autocast_gives_the_same_model() -> None:
    torch.manual_seed(0)
    float_model = MODELS["vit"]().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = vitquant.quantize(float_model, "minmax", [images(4)])
    assert digest(inside) == digest(vitquant.quantize(float_model, "minmax", [images(4)]))


def test_torchscript_is_refused_in_a_line(model: QuantizedModel) -> None:
    for trace in (lambda: torch.jit.trace(model, images(2)), lambda: torch.jit.script(model)):
        with pytest.raises(CaptureError, match=r"^torch.jit.trace would fix.*torch.export.export\([^\n]*$"):
            trace()


def test_meta_tensors_have_shapes(model: QuantizedModel) -> None:
    assert logits(model.to("meta")(images(3).to("meta"))).shape == (3, 5)


def test_functional_calls_and_parametrizations(model: QuantizedModel) -> None:
    x = images(3, seed=1)
    expected = on_images(model, x)
    tensors = {
        name: 1.0 * tensor if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    assert torch.equal(logits(torch.func.functional_call(model, tensors, (x,))), expected)
    name = next(name for name, tensor in model.named_parameters() if tensor.ndim == 2)
    path, _, leaf = name.rpartition(".")
    parametrize.register_parametrization(model.get_submodule(path), leaf, nn.Identity())
    assert torch.equal(on_images(model, x), expected)


@pytest.mark.parametrize("recipe", ["fq-vit", "repq-vit+fully-integer"])  # equally spaced levels, and both logarithms
def test_functional_gradients_are_those_of_autograd(recipe: str) -> None:
    model, x = shared("vit", recipe), images(2, seed=1)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).sum(), leaf)
    assert expected.any()
    assert torch.equal(torch.func.grad(lambda given: model(given).sum())(x), expected)


def test_threads_and_inference_mode_give_the_same_bits(model: QuantizedModel) -> None:
    x = images(3, seed=1)
    expected, found = on_images(model, x), []
    fresh = pickle.loads(pickle.dumps(model))
    for operation in fresh.integer_operations.values():
        operation.connect(operation.source, operation.result)

    def run() -> None:
        with torch.inference_mode():
            found.append(logits(fresh(x)).clone())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(each, expected) for each in found)
    assert torch.equal(logits(exported(fresh)(x)), expected)  # what inference mode made is no inference tensor
