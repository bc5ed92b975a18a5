"""A named submodule is captured and put back: backbones of detectors, and parts of modules that users write."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from architectures import vary
from torch import nn
from torch.utils import _pytree as pytree
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.feature_extraction import create_feature_extractor

import vitquant
from vitquant.errors import CalibrationError, CaptureError, ModelError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel


def images(count: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Backbone(nn.Module):
    """Tokens of a small transformer as a map, (batch, 16, 4, 4), and a coarser one."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.strides = [8, 16]
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(
        self, x: torch.Tensor, scale: float = 1.0, mask: torch.Tensor | None = None, **more: object
    ) -> dict[str, torch.Tensor]:
        patches = self.patches(x) * scale
        found = self.layer(patches.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, patches.shape[2:])
        return OrderedDict(fine=found, coarse=nn.functional.avg_pool2d(found, 2))

    def of_half(self, x: torch.Tensor, **constants: Any) -> dict[str, torch.Tensor]:
        return self(x / 2, **constants)


class Detector(nn.Module):
    """Its backbone has two names. How it is called is given; the images change in place afterwards."""

    def __init__(self, call: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.backbone, self.call = Backbone(), call
        self.extra = nn.ModuleDict({"same": self.backbone})
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        found = self.call(self, x)["fine"]
        x.mul_(2)
        return self.head(found.flatten(2).mean(2))


def once(model: Any, x: torch.Tensor) -> Any:
    return model.backbone(x)


def twice(model: Any, x: torch.Tensor) -> Any:
    return {"fine": model.backbone(x)["fine"] + model.extra["same"](x.flip(3))["fine"]}


def by_defaults(model: Any, x: torch.Tensor) -> Any:
    return model.backbone(x=x, scale=1.0, mask=None)


def by_a_method(model: Any, x: torch.Tensor) -> Any:
    return model.backbone.of_half(x, mask=None)


CALLS = {"once": once, "twice": twice, "by defaults": by_defaults, "by a method": by_a_method}


def detector(call: Callable[[Any, torch.Tensor], Any] = once) -> Any:
    return made(lambda: Detector(call))


@functools.cache
def shared() -> vitquant.QuantizedModel:
    """Nobody changes it."""
    return quantized(detector(), "backbone", [images(4)])


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    return model


def quantized(model: nn.Module, name: str, data: Any, recipe: str = "minmax") -> vitquant.QuantizedModel:
    part = model.get_submodule(name)
    return vitquant.quantize(part, recipe, vitquant.inputs_of(model, name, data), simulated=True)


def tensors(output: object) -> list[torch.Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def same(left: object, right: object) -> bool:
    pairs = zip(tensors(left), tensors(right), strict=True)
    return type(left) is type(right) and all(torch.equal(a, b) for a, b in pairs)


def replaced(model: nn.Module, name: str, by: nn.Module, given: Any) -> Any:
    """What the whole gives with the output of a submodule replaced, by PyTorch's own means."""

    def answer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return by(args[0] if args else next(iter(kwargs.values())))

    handle = model.get_submodule(name).register_forward_hook(answer, with_kwargs=True)
    with torch.no_grad():
        output = model(given)
    handle.remove()
    return output


def run(model: nn.Module, given: Any) -> Any:
    with torch.no_grad():
        return model(given)


# --- models of libraries ---------------------------------------------------------------------------------


class Maps(nn.Module):
    """A timm transformer as torchvision's detectors want a backbone."""

    def __init__(self) -> None:
        super().__init__()
        tiny = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 32, "patch_size": 8}
        self.body = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **tiny)
        self.out_channels = 16

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return OrderedDict(zip("01", self.body(x), strict=True))


def faster_rcnn() -> nn.Module:
    anchors = AnchorGenerator(((8,), (16,)), ((1.0,), (1.0,)))
    few = {"rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 10, "box_score_thresh": 0.0}
    return FasterRCNN(Maps(), 3, rpn_anchor_generator=anchors, fixed_size=(32, 32), **few)


def upernet() -> nn.Module:
    part = transformers.SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, image_size=32, patch_size=2,
        out_features=["stage1", "stage2"],
    )  # fmt: skip
    whole = {"hidden_size": 16, "num_labels": 3, "pool_scales": [1, 2], "use_auxiliary_head": False}
    return transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=part, **whole))


def depth_anything() -> nn.Module:
    part = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
        reshape_hidden_states=False, out_features=["stage1", "stage2"],
    )  # fmt: skip
    whole = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [2, 1], "fusion_hidden_size": 8}
    config = transformers.DepthAnythingConfig(
        backbone_config=part,
        patch_size=7,
        reassemble_hidden_size=32,
        head_hidden_size=8,
        depth_estimation_type="metric",
        **whole,
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def features() -> nn.Module:
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    return Tokens(create_feature_extractor(vit, {"encoder": "tokens"}))


class Tokens(nn.Module):
    """The mean of a feature extractor's tokens."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)["tokens"].mean(1)


PHOTOGRAPHS = list(images(2).sigmoid())
LIBRARIES = {
    "torchvision's detector": (faster_rcnn, "backbone.body", PHOTOGRAPHS, PHOTOGRAPHS),
    "transformers' segmentation": (upernet, "backbone", {"pixel_values": images(2), "labels": 0}, images(2)),
    "transformers' depth": (depth_anything, "backbone", (images(2, size=28), 0), images(2, size=28)),
    "a graph module": (features, "body", images(2), images(2)),
}


@pytest.mark.parametrize("which", LIBRARIES)
def test_backbones_of_libraries(which: str, tmp_path: Path) -> None:
    build, name, batch, given = LIBRARIES[which]
    model, data = made(build), [batch]
    before, expected = copy.deepcopy(model.state_dict()), run(model, given)
    part, example = model.get_submodule(name), next(iter(vitquant.inputs_of(model, name, data)))
    _, *shape = example.shape
    captured = CapturedModel(capture(part, example), tuple(shape))
    for left, right in zip(
        tensors(run(vitquant.put_back(model, name, captured), given)), tensors(expected), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    by = quantized(model, name, data)
    whole = vitquant.put_back(model, name, by)
    assert same(run(whole, given), replaced(model, name, by, given))
    assert not same(run(whole, given), expected)
    by.save(tmp_path / "out")
    loaded = vitquant.load(tmp_path / "out", model=part)
    assert same(run(vitquant.put_back(model, name, loaded), given), run(whole, given))
    assert same(list(model.state_dict().values()), list(before.values()))
    assert same(run(model, given), expected)


def test_batches_of_a_detector() -> None:
    """As a list of images, as a collated batch with targets, and as images of other sizes, which it resizes."""
    model, targets = made(faster_rcnn), ({"boxes": 0}, {"boxes": 0})
    larger = [image.repeat_interleave(2, dim=1) for image in PHOTOGRAPHS]
    data = [PHOTOGRAPHS, (tuple(PHOTOGRAPHS), targets), larger]
    first, second, third = vitquant.inputs_of(model, "backbone", data)
    assert torch.equal(first, second)
    assert first.shape == third.shape == (2, 3, 32, 32)


# --- how a submodule is called ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", CALLS)
def test_a_whole_with_its_part_replaced(how: str) -> None:
    model, by, x = detector(CALLS[how]), shared(), images(3, seed=1)
    whole = vitquant.put_back(model, "extra.same", by)
    assert same(run(whole, x), replaced(model, "backbone", by, x))
    assert whole.extra["same"] is whole.backbone


@pytest.mark.parametrize("how", CALLS)
def test_inputs_are_what_each_call_gets(how: str) -> None:
    model, data, seen = detector(CALLS[how]), [images(3, seed=1), images(2, seed=2)], []
    handle = model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["x"]).clone()), with_kwargs=True
    )
    for batch in data:
        run(model, batch)
    handle.remove()
    inputs = vitquant.inputs_of(model, "backbone", data)
    assert same(list(inputs), seen)
    assert same(list(inputs), seen)


def test_a_pass_ends_at_the_only_call() -> None:
    model, heads = detector(), []
    model.head.register_forward_hook(lambda *_: heads.append(1))
    assert len(list(vitquant.inputs_of(model, "backbone", [images(2)] * 3))) == 3
    assert len(heads) == 1


def test_one_batch_at_a_time() -> None:
    read = []
    data = (read.append(seed) or images(2, seed) for seed in range(3))
    inputs = vitquant.inputs_of(detector(), "backbone", data)
    assert iter(inputs) is inputs  # so that what reads twice refuses it
    assert read == []
    next(iter(inputs))
    assert read == [0]
    with pytest.raises(CalibrationError, match="can be read once only"):
        vitquant.quantize(detector().backbone, "repq-vit", inputs, simulated=True)


def test_the_model_is_left_as_it_is() -> None:
    model = detector().train()
    model.head.eval()
    modes = [part.training for part in model.modules()]
    state = copy.deepcopy(model.state_dict())
    list(vitquant.inputs_of(model, "backbone", [images(2)]))
    with pytest.raises(CaptureError):
        list(vitquant.inputs_of(model, "backbone", [images(2)[:, :2]]))
    whole = vitquant.put_back(model, "backbone", shared())
    whole.register_forward_hook(lambda *_: None)
    whole.backbone.register_forward_hook(lambda *_: None)
    whole.backbone.strides.append(32)
    whole.eval().double()
    assert [part.training for part in model.modules()] == modes
    assert same(list(model.state_dict().values()), list(state.values()))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert model.backbone.strides == [8, 16]
    assert next(shared().parameters()).dtype == torch.float32


# --- what was put back -----------------------------------------------------------------------------------


def test_what_others_read_is_there_and_the_float_part_is_gone() -> None:
    model = detector()
    whole: Any = vitquant.put_back(model, "backbone", shared())
    assert type(whole.backbone) is Backbone
    assert (whole.backbone.out_channels, whole.backbone.strides) == (16, [8, 16])
    assert [name for name, _ in whole.backbone.named_children()] == ["captured"]
    assert not hasattr(whole.backbone, "layer")
    assert all(name.startswith(("backbone.captured.", "extra.same.captured.", "head.")) for name in whole.state_dict())


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "double and float": lambda model: copy.deepcopy(model).double().float(),
    "train": lambda model: copy.deepcopy(model).train(),
    "DataParallel": nn.DataParallel,
    "compile": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "export": lambda model: torch.export.export(
        model, (images(2),), dynamic_shapes=((({0: torch.export.Dim("batch")}),))
    ).module(),
}


@pytest.mark.parametrize("how", COPIES)
def test_the_same_bits_come_out(how: str) -> None:
    whole, x = vitquant.put_back(detector(by_defaults), "backbone", shared()), images(3, seed=1)
    assert same(run(COPIES[how](whole), x), run(whole, x))


def test_copies_share_nothing() -> None:
    whole, x = vitquant.put_back(detector(), "backbone", shared()), images(3, seed=1)
    other, expected = copy.deepcopy(whole), run(whole, x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not same(run(other, x), expected)
    assert same(run(whole, x), expected)
    other.load_state_dict(whole.state_dict())
    assert same(run(other, x), expected)


@pytest.mark.parametrize("wrap", [lambda part: torch.compile(part, backend="eager"), nn.DataParallel])
def test_a_wrapped_part(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = detector()
    model.backbone = wrap(model.backbone)
    assert same(list(vitquant.inputs_of(model, "backbone", [images(4)])), [images(4)])
    whole: Any = vitquant.put_back(model, "backbone", shared())
    assert type(whole.backbone) is Backbone
    assert whole.extra["same"] is whole.backbone
    assert same(run(whole, images(3)), run(vitquant.put_back(detector(), "backbone", shared()), images(3)))


def test_a_part_compiled_in_place_computes_as_it_was_quantized() -> None:
    model = detector()
    model.backbone.compile(backend="eager")
    whole = vitquant.put_back(model, "backbone", shared())
    assert same(run(whole, images(3)), run(vitquant.put_back(detector(), "backbone", shared()), images(3)))


def test_hooks_of_the_part_are_captured_once() -> None:
    model, x = detector(), images(4)
    model.backbone.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    assert same(list(vitquant.inputs_of(model, "backbone", [x])), [x])
    captured = CapturedModel(capture(model.backbone, x), (3, 32, 32))
    torch.testing.assert_close(run(vitquant.put_back(model, "backbone", captured), x), run(model, x))


def test_two_parts() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = Backbone(), Backbone()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x)["fine"] + self.right(x)["fine"]

    model, x = made(Both), images(2)
    left = quantized(model, "left", [x])
    whole = vitquant.put_back(model, "left", left)
    right = quantized(whole, "right", [x])
    whole = vitquant.put_back(whole, "right", right)
    assert same(run(whole, x), run(left, x)["fine"] + run(right, x)["fine"])


# --- constants of the call -------------------------------------------------------------------------------


def test_an_argument_that_was_made_the_default() -> None:
    model, x = detector(lambda self, x: self.backbone(x, scale=3.0, more="all")), images(3)
    part = model.backbone
    part.forward = functools.partial(part.forward, scale=3.0, more="all")
    by = quantized(model, "backbone", [x])
    whole = vitquant.put_back(model, "backbone", by)
    assert same(run(whole, x), replaced(model, "backbone", by, x))
    assert not same(run(by, x), run(shared(), x))
    whole.call = once
    assert same(run(whole, x), replaced(model, "backbone", by, x))
    whole.call = by_defaults
    with pytest.raises(CaptureError, match=r"backbone is called with scale=1\.0, which is not its default"):
        run(whole, x)


def test_a_config_says_what_the_default_is() -> None:
    model, x = made(upernet), images(2)
    with pytest.raises(CaptureError, match=r"output_hidden_states=True, .*\.config\.output_hidden_states = True$"):
        list(vitquant.inputs_of(_asking(model), "backbone", [x]))
    model.backbone.config.output_hidden_states = True
    by = quantized(_asking(model), "backbone", [x])
    whole = vitquant.put_back(model, "backbone", by)
    assert len(run(_asking(whole), x).hidden_states) == len(run(_asking(model), x).hidden_states) == 3
    whole.backbone.config.output_hidden_states = whole.config.output_hidden_states = False  # of what was captured: no
    with pytest.raises(CaptureError, match="backbone is called with output_hidden_states=False"):
        run(whole, x)


class _Asking(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.whole = model.backbone, model

    def forward(self, x: torch.Tensor) -> Any:
        return self.whole(x, output_hidden_states=True)


def _asking(model: Any) -> nn.Module:
    return _Asking(model).eval()


# --- refusals --------------------------------------------------------------------------------------------

MASKED = "backbone is given a tensor beside the images, mask; name a part of it that takes images alone"


class Nested:
    """As DETR has it."""

    def __init__(self, tensors: torch.Tensor) -> None:
        self.tensors = tensors


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda model, x: {"fine": x.repeat(1, 6, 1, 1)[:, :16]},
            "the model never calls backbone, or only methods or ",
        ),
        (lambda model, x: model.backbone.forward(x), "name one of its parts, such as backbone.patches, backbone.layer"),
        (lambda model, x: model.backbone(x, mask=x > 0), MASKED),
        (lambda model, x: model.backbone(x, 1.0, x > 0), MASKED),
        (lambda model, x: model.backbone(x, scale=torch.ones(())), MASKED.replace("mask", "scale")),
        (lambda model, x: model.backbone(x, mask=[x]), MASKED),
        (lambda model, x: model.backbone(x, 2), "backbone is called with scale=2, which is not its default, and is"),
        (lambda model, x: model.backbone(x, True), "functools.partial(part.forward, scale=True)"),
        (
            lambda model, x: model.backbone(x, level=None),
            "backbone is called with level=None, which is not its default",
        ),
        (
            lambda model, x: model.backbone(Nested(x)),
            "what backbone is given first is of type Nested, not a float tensor",
        ),
        (lambda model, x: model.backbone([x]), "what backbone is given first is of type list, not a float tensor"),
        (
            lambda model, x: model.backbone(mask=x),
            "backbone is called otherwise than its forward is written: missing a required argument: 'x'",
        ),
        (
            lambda model, x: model.backbone(x > 0),
            "a tensor of 4 dimensions and torch.bool, not a float tensor (batch, ",
        ),
        (
            lambda model, x: model.backbone(x[0]),
            "a tensor of 3 dimensions and torch.float32, not a float tensor (batch, ",
        ),
        (
            lambda model, x: model.absent(x),
            "the model refuses a batch, a tensor of [2, 3, 32, 32]: 'Detector' object has",
        ),
    ],
)
def test_calls_that_cannot_be_captured(call: Callable[[Any, torch.Tensor], Any], line: str) -> None:
    accepting = detector(call)
    accepting.backbone.register_forward_hook(lambda *_: OrderedDict(fine=torch.zeros(2, 16, 4, 4)))
    accepting.backbone.forward = _accepting(accepting.backbone.forward)
    with pytest.raises(CaptureError, match=re.escape(line)) as refusal:
        list(vitquant.inputs_of(accepting, "backbone", [images(2)]))
    assert "\n" not in str(refusal.value)


def _accepting(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of the same signature that computes on nothing, so that what is refused is refused by us."""
    return functools.wraps(forward)(lambda *args, **kwargs: OrderedDict(fine=torch.zeros(2, 16, 4, 4)))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("backbon", "the model has no submodule 'backbon'; the nearest are backbone"),
        ("backbone.layers", "the model has no submodule 'backbone.layers'; the nearest are backbone.layer, "),
        ("backbone.out_channels", "the model has no submodule 'backbone.out_channels'; the nearest are "),
        ("", "the model has no submodule ''; the nearest are backbone, extra, head"),
    ],
)
def test_names_that_are_none(name: str, line: str) -> None:
    for verb in (
        lambda: vitquant.inputs_of(detector(), name, []),
        lambda: vitquant.put_back(detector(), name, shared()),
    ):
        with pytest.raises(ModelError, match=re.escape(line)):
            verb()


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (images(2), "the calibration data is one Tensor: give a list of batches, [data]"),
        ([["a.jpg", "b.jpg"]], "a batch for the whole model is a tensor, a list of images (channels, height, width), "),
        ([{"images": images(2)}], "or a mapping with pixel_values; got dict"),
        ([[images(2)[0], images(2)[1, :1]]], "the model refuses a batch, a tensor of [3, 32, 32]: "),
    ],
)
def test_data_that_is_none(data: Any, line: str) -> None:
    with pytest.raises((CalibrationError, CaptureError), match=re.escape(line)):
        list(vitquant.inputs_of(made(lambda: Detector(by_three)), "backbone", data))


def by_three(model: Any, x: torch.Tensor) -> Any:
    if x.ndim != 4:
        raise ValueError("give a batch\nof images")
    return model.backbone(x)


def test_other_refusals() -> None:
    model = detector()
    with pytest.raises(ModelError, match=r"^what is put back is a Linear; give what vitquant.quantize returned$"):
        vitquant.put_back(model, "backbone", nn.Linear(1, 1))  # type: ignore[arg-type]
    whole = vitquant.put_back(model, "backbone", shared())
    with pytest.raises(ModelError, match="the model is quantized already"):
        vitquant.put_back(whole, "backbone", shared())
    with pytest.raises(CaptureError, match="the model was captured for images of 3x32x32, these are 3x48x48; resize"):
        run(whole, images(2, size=48))
    model.memory = model.head.weight * 2
    with pytest.raises(ModelError, match=r"^the model cannot be copied: Only Tensors created explicitly"):
        vitquant.put_back(model, "backbone", shared())
    with pytest.raises(ModelError, match=r"^the model is of type str, not a torch.nn.Module$"):
        vitquant.inputs_of("timm:vit", "backbone", [])  # type: ignore[arg-type]
