"""The contract of `capture`, over a zoo of tiny architectures with random weights."""

import copy
import dataclasses
import re

import pytest
import timm
import torch
import torchvision
import transformers
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn
from torch.utils import _pytree as pytree

from vitquant.capture import capture
from vitquant.errors import CaptureError, ModelError, VitquantError

CLASSES = 5
PLAIN = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
STAGES = {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4), "img_size": 64, "window_size": 4}
TRANSFORMERS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip
TRANSFORMERS_SWIN = {
    "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64, "num_labels": CLASSES,
}  # fmt: skip


# --- the user's own modules --------------------------------------------------------------------------


class Patches(nn.Module):
    """Images to (batch, 16, 32) tokens."""

    def __init__(self, width=32):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 8, 8)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class EncoderNet(nn.Module):
    """`nn.TransformerEncoder`, as the user configures it."""

    def __init__(self, **layer):
        super().__init__()
        self.patches, self.batch_first = Patches(), layer.get("batch_first", False)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, **layer), 2)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images):
        tokens = self.patches(images)
        if self.batch_first:
            return self.head(self.encoder(tokens).mean(1))
        return self.head(self.encoder(tokens.transpose(0, 1)).mean(0))


class AttentionNet(nn.Module):
    """`nn.MultiheadAttention` that gives its maps back as well."""

    def __init__(self, batch_first):
        super().__init__()
        self.patches, self.batch_first = Patches(), batch_first
        self.attention = nn.MultiheadAttention(32, 2, batch_first=batch_first)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images):
        tokens = self.patches(images)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        result, maps = self.attention(tokens, tokens, tokens, need_weights=True)
        return {"logits": self.head((tokens + result).mean(1 if self.batch_first else 0)), "maps": maps}


class Handwritten(nn.Module):
    """Attention in plain code, with the batch size read by `len`."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads, self.patches = heads, Patches(width)
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        batch = len(x)
        x = self.patches(x)
        q, k, v = self.qkv(self.norm(x)).reshape(batch, x.shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        probs = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.proj((probs @ v).transpose(1, 2).reshape(batch, x.shape[1], -1))
        return self.head(x.mean(1))


class Einsum(nn.Module):
    """Attention by `torch.einsum`."""

    def __init__(self):
        super().__init__()
        self.patches, self.qkv, self.head = Patches(), nn.Linear(32, 96), nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.patches(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        probs = torch.einsum("bihd,bjhd->bhij", q, k).div(4).softmax(-1)
        return self.head((x + torch.einsum("bhij,bjhd->bihd", probs, v).flatten(2)).mean(1))


class BatchNormed(nn.Module):
    """A convolutional stem with batch-norm, dropout, and layers whose running statistics stay as they are."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.5)
        self.head = nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, CLASSES))

    def forward(self, x):
        return self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class Untidy(nn.Module):
    """Tied weights, unused parameters, buffers of every sort, and tensors made in forward."""

    def __init__(self):
        super().__init__()
        self.net = Handwritten()
        self.first, self.second = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(3, 3)
        self.empty = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("scale", torch.rand(CLASSES))
        self.register_buffer("shift", torch.rand(CLASSES), persistent=False)
        self.register_buffer("never_read", torch.arange(3))

    def forward(self, x):
        logits = self.second(self.first(self.net(x))) * self.scale + self.shift
        return logits, [torch.arange(CLASSES) + logits, None]


# --- the zoo -----------------------------------------------------------------------------------------


def from_timm(name, **arguments):
    return lambda: timm.create_model(name, num_classes=CLASSES, **arguments)


def from_transformers(name, **arguments):
    kind = getattr(transformers, f"{name}ForImageClassification")
    return lambda: kind(getattr(transformers, f"{name}Config")(**arguments))


def mvit():
    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 1), embed_dim=16, num_heads=1), img_size=32, num_classes=CLASSES)


ZOO = {
    "timm deit": (from_timm("deit_tiny_patch16_224", **PLAIN), 32),
    "timm deit distilled": (from_timm("deit_tiny_distilled_patch16_224", **PLAIN), 32),
    "timm vit": (from_timm("vit_tiny_patch16_224", qk_norm=True, init_values=0.1, **PLAIN), 32),
    "timm dinov2 with registers": (from_timm("vit_small_patch14_reg4_dinov2", **{**PLAIN, "img_size": 28}), 28),
    "timm siglip": (from_timm("vit_base_patch16_siglip_224", **PLAIN), 32),
    "timm beit": (from_timm("beit_base_patch16_224", **PLAIN), 32),
    "timm cait": (from_timm("cait_xxs24_224", **PLAIN), 32),
    "timm eva02": (from_timm("eva02_tiny_patch14_224", **{**PLAIN, "img_size": 28}), 28),
    "timm xcit": (from_timm("xcit_nano_12_p16_224", cls_attn_layers=1, **PLAIN), 32),
    "timm swin": (from_timm("swin_tiny_patch4_window7_224", **STAGES), 64),
    "timm swinv2": (from_timm("swinv2_tiny_window8_256", **{**STAGES, "depths": (1, 1)}), 64),
    "timm levit": (
        from_timm("levit_128s", embed_dim=(16, 32), depth=(1, 1), num_heads=(2, 2), key_dim=8, img_size=32),
        32,
    ),
    "timm tiny_vit": (
        from_timm("tiny_vit_5m_224", embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), window_sizes=(4, 4)),
        32,
    ),
    "timm pvt_v2": (
        from_timm("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2)),
        64,
    ),
    "timm mvitv2": (mvit, 32),
    "timm crossvit": (
        from_timm("crossvit_tiny_240", embed_dim=(16, 32), depth=((1, 1, 0),), num_heads=(2, 2), img_size=120),
        120,
    ),
    "transformers vit": (from_transformers("ViT", **TRANSFORMERS), 32),
    "transformers deit": (from_transformers("DeiT", **TRANSFORMERS), 32),
    "transformers beit": (
        from_transformers("Beit", use_relative_position_bias=True, out_indices=[1], **TRANSFORMERS),
        32,
    ),
    "transformers dinov2": (from_transformers("Dinov2", **TRANSFORMERS), 32),
    "transformers swin": (from_transformers("Swin", **TRANSFORMERS_SWIN), 64),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES),
        32,
    ),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES),
        64,
    ),
    "encoder post-norm relu": (EncoderNet, 32),
    "encoder pre-norm gelu batch-first": (
        lambda: EncoderNet(norm_first=True, activation="gelu", batch_first=True),
        32,
    ),
    "encoder post-norm relu batch-first": (lambda: EncoderNet(batch_first=True), 32),
    "encoder pre-norm gelu": (lambda: EncoderNet(norm_first=True, activation="gelu"), 32),
    "attention maps": (lambda: AttentionNet(batch_first=False), 32),
    "attention maps batch-first": (lambda: AttentionNet(batch_first=True), 32),
    "handwritten, len of the batch": (Handwritten, 32),
    "einsum": (Einsum, 32),
    "batch-norm": (BatchNormed, 32),
    "untidy": (Untidy, 32),
}


@pytest.fixture(scope="module", params=ZOO)
def zoo(request):
    """A model, what was captured of it, and its image size."""
    build, size = ZOO[request.param]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    return model, capture(model, torch.randn(2, 3, size, size)), size


def vary(model):
    """Random values everywhere, lest a zero-initialized layer hides what is behind it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                module.running_var *= 0.5 + torch.rand_like(module.running_var)


@torch.no_grad()
def difference(captured, model, images):
    """The largest difference of an output, over the largest output; infinite when they differ in anything else."""
    left, right = pytree.tree_leaves(captured(images)), pytree.tree_leaves(model(images))
    if len(left) != len(right) or any(type(one) is not type(other) for one, other in zip(left, right, strict=True)):
        return float("inf")
    tensors = [(one, other) for one, other in zip(left, right, strict=True) if isinstance(other, torch.Tensor)]
    assert all(one.shape == other.shape and one.dtype == other.dtype for one, other in tensors)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in tensors)


# --- the contract ------------------------------------------------------------------------------------


def test_gives_the_float_model_at_any_batch(zoo):
    model, captured, size = zoo
    for batch in (1, 2, 5):
        assert difference(captured, model, torch.randn(batch, 3, size, size)) < 2e-6


def test_has_the_models_tensors(zoo):
    model, captured, _ = zoo
    expected, found = model.state_dict(), captured.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    mine, theirs = dict(captured.named_parameters()), dict(model.named_parameters())
    assert mine.keys() == theirs.keys()  # tied ones are still tied
    assert all(mine[key].requires_grad == theirs[key].requires_grad for key in theirs)


def test_shares_no_memory_with_the_model(zoo):
    model, captured, _ = zoo

    def storages(module):
        tensors = [*module.parameters(), *module.buffers()]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}

    assert storages(captured).isdisjoint(storages(model))


def test_gives_the_librarys_own_output(zoo):
    model, captured, size = zoo
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found, expected = captured(images), model(images)
    assert type(found) is type(expected)
    if isinstance(expected, transformers.utils.ModelOutput):
        assert found.keys() == expected.keys()
        assert torch.equal(captured(pixel_values=images).logits, found.logits)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)


def test_can_be_copied_and_changed_in_precision(zoo):
    model, captured, size = zoo
    twin, images = copy.deepcopy(captured), torch.randn(3, 3, size, size)
    assert difference(twin, captured, images) == 0
    wide = copy.deepcopy(model).double()
    # tables made in forward were float32 at capture
    assert difference(twin.double(), wide, images.double()) < 1e-6
    assert {parameter.dtype for parameter in captured.parameters()} == {torch.float32}


def test_is_in_evaluation_mode_and_plain(zoo):
    _, captured, size = zoo
    assert not any(module.training for module in captured.modules())
    assert {node.op for node in captured.graph.nodes} <= {"placeholder", "get_attr", "call_function", "output"}
    images = torch.randn(2, 3, size, size)
    expected = pytree.tree_leaves(captured(images))
    twin = copy.deepcopy(captured).train()  # nothing in the graph asks for the mode
    found = pytree.tree_leaves(twin(images))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if isinstance(a, torch.Tensor))


def test_is_differentiable(zoo):
    _, captured, size = zoo
    twin = copy.deepcopy(captured)
    outputs = pytree.tree_leaves(twin(torch.randn(2, 3, size, size)))
    sum(output.square().sum() for output in outputs if isinstance(output, torch.Tensor)).backward()
    read = {str(node.target) for node in twin.graph.nodes if node.op == "get_attr"}
    for name, parameter in twin.named_parameters():
        assert not parameter.requires_grad or name not in read or parameter.grad is not None, name


# --- the model is left as it was ---------------------------------------------------------------------


def test_training_mode_and_dropout_are_left_as_they_were():
    model = BatchNormed().train()
    model.stem.eval()  # a frozen part keeps its own mode
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(4, 3, 32, 32)
    captured = capture(model, images)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.encoder.dropout.p == 0.5
    trained = copy.deepcopy(model)  # its running statistics move
    with torch.no_grad():
        assert not torch.equal(trained(images), trained(images))
    assert difference(captured, model.eval(), images) < 2e-6


def test_the_mode_is_given_back_when_capture_fails():
    model = BatchNormed().train()
    with pytest.raises(CaptureError):
        capture(model, torch.randn(2, 4, 32, 32))
    assert all(module.training for module in model.modules())


def test_changing_the_captured_weights_leaves_the_model_alone():
    model = Handwritten().eval()
    images = torch.randn(2, 3, 32, 32)
    captured, before = capture(model, images), model(images)
    with torch.no_grad():
        for parameter in captured.parameters():
            parameter.zero_()
    assert torch.equal(model(images), before)
    assert not torch.equal(captured(images), before)


def test_gradients_and_the_callers_example_are_not_touched():
    model, images = Handwritten().eval(), torch.randn(1, 3, 32, 32, requires_grad=True)
    before = images.detach().clone()
    captured = capture(model, images)
    assert torch.equal(images, before)
    assert images.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert captured(images).requires_grad


# --- precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    [
        ("encoder post-norm relu", torch.float64, 1e-14),
        ("encoder post-norm relu", torch.bfloat16, 0.03),
        ("encoder post-norm relu", torch.float16, 4e-3),
        ("timm deit", torch.float64, 1e-14),
        ("timm deit", torch.bfloat16, 0.03),
    ],
)
def test_models_of_other_precision(name, dtype, bound):
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval().to(dtype)
    captured = capture(model, torch.randn(2, 3, size, size, dtype=dtype))
    assert {parameter.dtype for parameter in captured.parameters()} == {dtype}
    assert difference(captured, model, torch.randn(3, 3, size, size, dtype=dtype)) < bound


# --- output types ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    tokens: torch.Tensor


def test_a_users_own_output_type():
    pytree.register_dataclass(Result)

    class Net(Handwritten):
        def forward(self, x):
            return Result(super().forward(x), self.patches(x))

    images = torch.randn(2, 3, 32, 32)
    captured = capture(Net().eval(), images)
    assert isinstance(captured(images), Result)
    assert captured(x=images).tokens.shape == (2, 16, 32)


# --- refusals ----------------------------------------------------------------------------------------


class DataDependent(Handwritten):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Noisy(Handwritten):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class NoisyTable(Handwritten):
    def forward(self, x):
        return super().forward(x) + torch.rand(CLASSES)


class Dropping(Handwritten):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5)  # forgets `training=self.training`


class FixedBatch(Handwritten):
    def forward(self, x):
        return super().forward(x.reshape(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (DataDependent, r"depends on the values of its input: return super\(\).forward\(x if x.sum"),
        (Noisy, "randomness"),
        (NoisyTable, "randomness"),
        (Dropping, "randomness"),
        (FixedBatch, "fixes the batch"),
    ],
)
def test_what_cannot_be_captured_is_refused_in_one_line(build, said, capfd):
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match=said) as refused:
        capture(build().eval(), torch.randn(2, 3, 32, 32))
    assert_one_line(refused.value)
    assert capfd.readouterr() == ("", "")  # torch.export has pages to say


def test_a_wrong_number_of_channels_is_refused():
    with pytest.raises(CaptureError, match=re.escape("refuses an input of shape (2, 4, 32, 32)")) as refused:
        capture(Handwritten(), torch.randn(2, 4, 32, 32))
    assert_one_line(refused.value)


def test_a_model_that_wants_more_than_images_is_refused():
    class Net(nn.Module):
        def forward(self, images, text):
            return images

    with pytest.raises(CaptureError, match="text") as refused:
        capture(Net(), torch.randn(2, 3, 32, 32))
    assert_one_line(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = ZOO["timm deit"][0]()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[3, 2] = value
    with pytest.raises(ModelError, match=r"blocks\.1\.attn\.qkv\.weight") as refused:
        capture(model, torch.randn(2, 3, 32, 32))
    assert_one_line(refused.value)


def test_running_statistics_that_are_not_finite_are_named():
    model = BatchNormed()
    model.stem[1].running_var[0] = float("nan")
    with pytest.raises(ModelError, match=r"stem\.1\.running_var"):
        capture(model, torch.randn(2, 3, 32, 32))


def assert_one_line(error):
    assert isinstance(error, VitquantError)
    assert "\n" not in str(error)
    assert len(str(error)) < 300
