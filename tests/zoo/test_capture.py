"""The contract of `capture`, over a zoo of tiny architectures with random weights."""

import copy
import dataclasses
import re

import pytest
import torch
import transformers
from architectures import CLASSES, ZOO, BatchNormed, Handwritten, vary
from torch import nn
from torch.utils import _pytree as pytree

from vitquant.errors import CaptureError, ModelError, VitquantError
from vitquant.graph.capture import capture


@pytest.fixture(scope="module", params=ZOO)
def zoo(request):
    """A model, what was captured of it, and its image size."""
    build, size = ZOO[request.param]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    return model, capture(model, torch.randn(2, 3, size, size)), size


@torch.no_grad()
def difference(captured, model, images):
    """The largest difference of an output, over the largest output; infinite when they differ in anything else."""
    left, right = pytree.tree_leaves(captured(images)), pytree.tree_leaves(model(images))
    if len(left) != len(right) or any(type(one) is not type(other) for one, other in zip(left, right, strict=True)):
        return float("inf")
    tensors = [(one, other) for one, other in zip(left, right, strict=True) if isinstance(other, torch.Tensor)]
    assert tensors
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
    tensors = [(a, b) for a, b in zip(found, expected, strict=True) if isinstance(a, torch.Tensor)]
    assert tensors
    assert all(torch.equal(a, b) for a, b in tensors)


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


class Generated(Handwritten):
    def forward(self, x):
        return super().forward(x) + torch.rand(1, generator=torch.Generator())


class Keeping(Handwritten):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return super().forward(x) + torch.rand(1, generator=self.generator)


class Dropping(Handwritten):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5)  # forgets `training=self.training`


class FixedBatch(Handwritten):
    def forward(self, x):
        return super().forward(x.reshape(2, 3, 32, 32))


class PartsAcrossTheBatch(nn.Module):
    """Parts of tokens with the batch moved behind them: the strides of a batch of 2 are those of a smaller whole."""

    def __init__(self, take):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16)
        self.part, self.head, self.take = nn.Linear(8, 16), nn.Linear(16, CLASSES), take

    def forward(self, x):
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.part(self.take(x)).mean(0))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    "take",
    [
        lambda x: x[..., :8].transpose(0, 1),
        lambda x: x[..., ::2].transpose(0, 1),
        lambda x: x.split(8, -1)[1].permute(1, 0, 2),
    ],
)
def test_no_size_is_taken_for_the_batch(take, batch):
    torch.manual_seed(0)
    model = PartsAcrossTheBatch(take).eval()
    captured = capture(model, torch.randn(batch, 3, 32, 32))
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 32)
        assert torch.allclose(captured(images), model(images), atol=1e-5)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (DataDependent, r"depends on the values of its input: return super\(\).forward\(x if x.sum"),
        (Noisy, "randomness"),
        (NoisyTable, "randomness"),
        (Generated, "no tensor, such as a torch.Generator: leave out what is random"),
        (Keeping, "no tensor, such as a torch.Generator: leave out what is random"),
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


@torch.library.custom_op("vitquant_capture_tests::even", mutates_args=())
def even(images: torch.Tensor) -> torch.Tensor:
    if len(images) % 2:
        raise RuntimeError("images come in pairs\nhere is a page about it")
    return images.clone()


even.register_fake(lambda images: torch.empty_like(images))


def test_a_model_that_does_not_run_at_every_batch_is_refused():
    class Paired(Handwritten):
        def forward(self, images):
            return super().forward(even(images))

    with pytest.raises(CaptureError, match="does not run on 2 and 3 images: images come in pairs") as refused:
        capture(Paired().eval(), torch.randn(2, 3, 32, 32))
    assert_one_line(refused.value)


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
