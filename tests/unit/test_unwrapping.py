"""Wrapped models: looked through, or one line on what to give instead."""

import copy

import pytest
import timm.utils
import torch
import torch.distributed
from architectures import Handwritten
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import vitquant
from vitquant.errors import CaptureError, CheckpointError, ModelError
from vitquant.graph.capture import capture
from vitquant.model.saved import digest
from vitquant.unwrapping import unwrapped

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Handwritten().eval()


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        nn.DataParallel,
        AveragedModel,
        timm.utils.ModelEma,
        timm.utils.ModelEmaV2,
        lambda model: nn.DataParallel(timm.utils.ModelEmaV3(model)),
        lambda model: nn.DataParallel(compiled(model)),
        lambda model: compiled(AveragedModel(nn.DataParallel(model))),
    ],
)
def test_wrappers_are_taken_off(model, wrap):
    found = unwrapped(wrap(model))
    assert type(found) is Handwritten
    assert found.state_dict().keys() == model.state_dict().keys()


def test_distributed_models_are_taken_out_of_it(model, process_group):
    assert unwrapped(nn.parallel.DistributedDataParallel(model)) is model


def test_a_model_is_quantized_and_loaded_through_its_wrappers(model, tmp_path):
    plain = vitquant.quantize(model, "minmax", [IMAGES])
    wrapped = vitquant.quantize(nn.DataParallel(compiled(model)), "minmax", [IMAGES])
    assert digest(wrapped) == digest(plain)
    wrapped.save(tmp_path / "out")
    with torch.no_grad():
        found = vitquant.load(tmp_path / "out", model=AveragedModel(model))(IMAGES)
        assert torch.equal(found, plain(IMAGES))


def never(graph, inputs):
    pytest.fail("it was compiled")


@pytest.mark.parametrize("where", ["whole", "part"])
def test_what_was_compiled_in_place_runs_as_written_and_stays_compiled(model, where):
    expected = model(IMAGES)
    part = model if where == "whole" else model.patches
    part.compile(backend=never)
    before = part._compiled_call_impl
    captured = capture(model, IMAGES)
    assert part._compiled_call_impl is before
    torch.testing.assert_close(captured(IMAGES), expected, atol=1e-6, rtol=0)


def test_a_compiled_part_is_captured_with_the_names_that_it_has(model):
    model.patches = torch.compile(model.patches, backend=never)
    call = vars(model.patches)["forward"]
    assert capture(model, IMAGES).state_dict().keys() == model.state_dict().keys()
    assert vars(model.patches)["forward"] is call


@pytest.mark.parametrize(
    "change",
    [
        lambda model: parametrizations.weight_norm(model.head),
        lambda model: parametrizations.spectral_norm(model.qkv),
        lambda model: prune.l1_unstructured(model.qkv, "weight", 0.5),
        lambda model: model.norm.register_forward_hook(lambda module, inputs, output: output * 2),
        lambda model: model.train(),
        lambda model: model.requires_grad_(False),
    ],
)
def test_modules_that_are_more_than_plain_are_captured_as_they_compute(model, change, tmp_path):
    change(model)
    quantized = vitquant.quantize(model, "minmax", [IMAGES], bits="w8a8")
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(IMAGES)
        assert (quantized(IMAGES) - expected).abs().max() < 0.1 * expected.abs().max()
    quantized.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(vitquant.load(tmp_path / "out", model=model)(IMAGES), quantized(IMAGES))


class OfAnyArguments(nn.Module):
    """Forwards what it is given, as wrappers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def replaced(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


@pytest.mark.parametrize("wrap", [OfAnyArguments, replaced])
def test_a_forward_of_any_arguments_is_captured(model, wrap):
    expected = model(IMAGES)
    captured = capture(wrap(model), IMAGES)
    assert torch.equal(captured(IMAGES), expected)
    assert captured(IMAGES[:1]).shape == expected[:1].shape


def partly(model, kind):
    model.head.to(kind)
    return model


def without_shape(model):
    model.head = nn.LazyLinear(5)
    return model


def in_integers(model):
    model.head.weight = nn.Parameter(model.head.weight.mul(100).to(torch.int8), requires_grad=False)
    return model


class WithAdapters(Handwritten):
    def merge_and_unload(self):
        """As PEFT has it."""


class Sharded(Handwritten):
    def unshard(self):
        """As FSDP has it."""


def scripted_within(model):
    model.head = torch.jit.freeze(torch.jit.script(model.head))
    return model


def sparse(model):
    model.head.weight = nn.Parameter(model.head.weight.detach().to_sparse())
    return model


def made_in_inference_mode(model):
    with torch.inference_mode():
        return Handwritten().eval()


def quantized(model):
    return vitquant.quantize(model, "minmax", [IMAGES])


def exported(model):
    return torch.export.export(model, (IMAGES,))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda model: torch.jit.trace(model, IMAGES), "compiled by torch.jit; give the module"),
        (lambda model: torch.jit.script(nn.Linear(2, 2)), "compiled by torch.jit"),
        (exported, "ExportedProgram.*give the module"),
        (lambda model: exported(model).module(), "ExportedProgram.*give the one"),
        (lambda model: model.to("meta"), "patches.proj.weight is on the meta device"),
        (lambda model: partly(model, "meta"), "head.weight is on the meta device"),
        (without_shape, "head.weight has no shape yet"),
        (in_integers, "head.weight holds int8"),
        (lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), "quantized by torch.ao"),
        (lambda model: WithAdapters(), "merge_and_unload"),
        (lambda model: Sharded(), "FSDP.*state dict"),
        (quantized, "quantized already"),
        (lambda model: nn.Sequential(quantized(model)), "quantized already"),
        (lambda model: quantized(model).graph_module, "quantized already"),
        (scripted_within, "head is compiled by torch.jit"),
        (sparse, "head.weight is sparse"),
        (made_in_inference_mode, "made under torch.inference_mode"),
        (lambda model: "timm:deit_tiny_patch16_224", "the text 'timm:deit.*create"),
        (lambda model: model.state_dict(), "OrderedDict, perhaps a state dict"),
        (lambda model: Handwritten, r"the class Handwritten; give an instance of it, Handwritten\(\.\.\.\)"),
        (lambda model: [model], "of type list"),
        (lambda model: None, "of type NoneType"),
        (lambda model: model.forward, "of type method"),
    ],
)
def test_what_cannot_be_captured_is_said_in_a_line(model, wrong, said, tmp_path):
    given = wrong(model)
    with pytest.raises(ModelError, match=said) as refused:
        vitquant.quantize(given, "minmax", [IMAGES])
    assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match=said):
        capture(given, IMAGES)


def test_a_model_of_another_precision_is_told_so(model, tmp_path):
    with pytest.raises(CaptureError, match=r"torch\.float16 and the input of torch\.float32; give model\.float\(\)"):
        vitquant.quantize(copy.deepcopy(model).half(), "minmax", [IMAGES])
    vitquant.quantize(model, "minmax", [IMAGES]).save(tmp_path / "out")
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(CheckpointError, match=r"saved from a float32 model.*give model\.to\(torch\.float32\)"):
            vitquant.load(tmp_path / "out", model=copy.deepcopy(model).to(dtype))
