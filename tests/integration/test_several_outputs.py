"""Models that give several tensors, feature maps, or features: quantized, lowered, exported and compared like any."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import vitquant
from vitquant.engines import WAYS, engine
from vitquant.errors import CaptureError, DataError, LoweringError, ModelError
from vitquant.exports.formats import FORMATS
from vitquant.graph.outputs import named_tensors
from vitquant.objectives.relative_error import relative_error, shift_free_error
from vitquant.program.storage import load_program
from vitquant.tasks.features import FeaturesResult
from vitquant.tasks.task import TASKS

SIZE = 64
DATA = [torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))]
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
TINY |= {"image_size": SIZE, "patch_size": 16}


def vit(**given):
    sizes = {"img_size": SIZE, "depth": 2, "embed_dim": 48, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **given)


class Gives(nn.Module):
    """Gives what a function makes of images, tokens and logits."""

    def __init__(self, made):
        super().__init__()
        torch.manual_seed(0)
        self.vit, self.made = vit(num_classes=5), made

    def forward(self, images):
        tokens = self.vit.forward_features(images)
        return self.made(images, tokens, self.vit.forward_head(tokens))


def swin_maps():
    sizes = {"img_size": SIZE, "window_size": 2, "depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **sizes)


def dinov2_maps():
    return transformers.Dinov2Backbone(transformers.Dinov2Config(**TINY, out_features=["stage1", "stage2"]))


MODELS = {  # the model; the task; its outputs
    "features": (lambda: vit(num_classes=0), "features", {"output": (48,)}),
    "tokens": (lambda: vit(num_classes=0, global_pool=""), "features", {"output": (17, 48)}),
    "logits and tokens": (
        lambda: Gives(lambda images, tokens, logits: {"logits": logits, "tokens": tokens}),
        "classification",
        {"logits": (5,), "tokens": (17, 48)},
    ),
    "swin maps": (swin_maps, "features", {"0": (16, 16, 24), "1": (8, 8, 48)}),
    "transformers": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**TINY)),
        "features",
        {"last_hidden_state": (17, 48), "pooler_output": (48,)},
    ),
    "dinov2 maps": (dinov2_maps, "features", {"feature_maps.0": (48, 4, 4), "feature_maps.1": (48, 4, 4)}),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    """A float model, what was quantized of it in integers, its task, and the shapes of its outputs."""
    create, task, outputs = MODELS[request.param]
    torch.manual_seed(0)
    model = create().eval()
    return model, vitquant.quantize(model, "default", DATA, bits="w8a8"), task, outputs


def test_outputs_and_task_are_those_of_the_model(made):
    model, quantized, task, outputs = made
    assert quantized.outputs == {name: (-1, *shape) for name, shape in outputs.items()}
    assert quantized.provenance["task"] == task
    with torch.inference_mode():
        found, expected = quantized(DATA[0]), model(DATA[0])
    assert type(found) is type(expected)
    assert list(named_tensors(found)) == list(named_tensors(expected)) == list(outputs)


def test_the_program_gives_every_output_by_name_for_any_number_of_images(made):
    _, quantized, _, outputs = made
    program = vitquant.lower(quantized)
    assert list(program.outputs) == list(outputs)
    for count in (6, 1, 0):
        found = program.run(DATA[0][:count])
        if len(outputs) == 1:
            assert isinstance(found, torch.Tensor)
            found = {"output": found}
        assert {name: tuple(each.shape) for name, each in found.items()} == {
            name: (count, *shape) for name, shape in outputs.items()
        }


def test_what_was_saved_is_what_is_loaded(made, tmp_path):
    model, quantized, task, _ = made
    quantized.save(tmp_path / "out")
    loaded = vitquant.load(tmp_path / "out", model)
    assert loaded.provenance["task"] == task
    with torch.inference_mode():
        pairs = zip(named_tensors(loaded(DATA[0])).values(), named_tensors(quantized(DATA[0])).values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    vitquant.lower(quantized).save(tmp_path / "program")
    program = load_program(tmp_path / "program")
    assert program.outputs == vitquant.lower(quantized).outputs
    assert program.facts["outputs"].keys() == program.outputs.keys()


@pytest.mark.parametrize("format", ["program", "onnx-integer", "onnx-qdq"])
def test_every_form_keeps_its_promises_and_names_its_outputs(made, tmp_path, format):
    model, quantized, task, outputs = made
    path = tmp_path / ("integer.program" if format == "program" else "model.onnx")
    report = vitquant.export(quantized, format, path, DATA, float_model=model)
    assert report.broken == []
    assert {each.agreement is None for each in report.comparisons} == {task == "features"}
    if format != "program":
        import onnx

        assert [each.name for each in onnx.load(path).graph.output] == list(outputs)


def test_integer_onnx_with_float_ends_is_the_program(made, tmp_path):
    _, quantized, _, outputs = made
    vitquant.export(quantized, "onnx-integer", tmp_path / FORMATS["onnx-integer"].path, DATA, float_io=True)
    found, expected = engine("onnxruntime", quantized, tmp_path)(DATA[0]), vitquant.lower(quantized).run(DATA[0])
    if len(outputs) == 1:
        assert torch.equal(found, expected)
    else:
        assert all(torch.equal(found[name], expected[name]) for name in outputs)


def test_evaluation_compares_what_the_task_says(made):
    model, quantized, task, outputs = made
    data = DATA if task == "features" else [(DATA[0], torch.arange(6) % 5)]
    result = vitquant.evaluate(quantized, data, float_model=model)
    assert result.images == 6
    features = vitquant.evaluate(quantized, data, float_model=model, task="features", engine_name="simulated")
    assert isinstance(features, FeaturesResult)
    assert isinstance(result, FeaturesResult) is (task == "features")
    assert {each.name: each.shape for each in features.outputs} == outputs
    assert all(0.9 < each.lowest_cosine <= each.cosine < 1 for each in features.outputs)
    assert all((each.neighbours is None) is (len(each.shape) > 2) for each in features.outputs)
    if task == "features":
        with pytest.raises(ModelError, match=r"no head|gives (logits of shape|list|dict|BaseModel|Backbone)"):
            vitquant.evaluate(quantized, [(DATA[0], torch.zeros(6))], float_model=model, task="classification")


def test_reconstruction_and_sensitivity_look_at_every_output():
    """A tensor that is given beside the logits: what only it depends on is learned, and measured."""

    class Beside(nn.Module):
        def __init__(self, give):
            super().__init__()
            self.vit, self.beside, self.give = vit(num_classes=5), nn.Linear(48, 7), give

        def forward(self, images):
            tokens = self.vit.forward_features(images)
            logits = self.vit.forward_head(tokens)
            return (logits, self.beside(tokens)) if self.give else logits

    torch.manual_seed(0)
    model = Beside(True).eval()
    settings = ["reconstruct-output.steps=2"]
    learned = vitquant.quantize(model, "repq-vit+reconstructed-output", DATA, bits="w4a4", settings=settings)
    plain = vitquant.quantize(model, "repq-vit", DATA, bits="w4a4")
    weights = (each.graph_module.get_parameter("beside.weight") for each in (learned, plain))
    assert not torch.equal(*weights)
    measured = {each.name: each for each in vitquant.sensitivity(model, "vt-ptq", DATA).sites}
    assert measured["head"].output_error > 0  # each has an effect on one of the two
    assert measured["head_2"].output_error > 0


def test_the_task_that_is_asked_for_is_the_one_that_is_saved():
    torch.manual_seed(0)
    model = vit(num_classes=5).eval()
    assert vitquant.quantize(model, "minmax", DATA).provenance["task"] == "classification"
    assert vitquant.quantize(model, "minmax", DATA, task="features").provenance["task"] == "features"
    with pytest.raises(DataError, match="task 'segments' is unknown; the tasks are: classification, features"):
        vitquant.quantize(model, "minmax", DATA, task="segments")


def test_what_is_no_classifier_is_not_quantized_as_one():
    torch.manual_seed(0)
    for model, problem in (
        (vit(num_classes=0), "the model has no head"),
        (swin_maps(), r"no logits, .* outputs are 0 \[16, 16, 24\], 1 \[8, 8, 48\] for an image"),
    ):
        with pytest.raises(ModelError, match=problem):
            vitquant.quantize(model.eval(), "minmax", DATA, task="classification")


def test_a_model_that_gives_integers_alone_is_refused():
    with pytest.raises(CaptureError, match="gives no tensor of floating point"):
        vitquant.quantize(Gives(lambda _, tokens, logits: logits.argmax(-1)).eval(), "minmax", DATA)


def test_a_task_that_a_file_names_is_one_or_refused(tmp_path):
    torch.manual_seed(0)
    model = vit(num_classes=5).eval()
    quantized = vitquant.quantize(model, "minmax", DATA)
    for task, problem in (("segments", "task 'segments' is unknown; the tasks are"), (3, "task = 3 should be")):
        quantized.provenance["task"] = task
        if isinstance(task, str):
            quantized.save(tmp_path / "out", force=True)
        with pytest.raises(vitquant.VitquantError, match=problem) as refused:
            vitquant.load(tmp_path / "out", model) if isinstance(task, str) else quantized.save(tmp_path / "other")
        assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (lambda x, y: y.argmax(-1), "argmax has no integer form"),
        (lambda x, y: (y > 0)[:, 0], "gt has no integer form"),
        (lambda x, y: torch.arange(3.0), "1 is no float tensor that is computed from the image"),
        (lambda x, y: x, "1 is the image itself"),
        (lambda x, y: y.transpose(0, 1), "the first axis of 1 is not the images"),
        (lambda x, y: y.reshape(-1), "the first axis of 1 is not the images"),
    ],
)
def test_what_integers_cannot_give_is_refused_by_name(more, problem):
    model = Gives(lambda images, _, logits: (logits, more(images, logits)))
    with pytest.raises(LoweringError, match=problem):
        vitquant.quantize(model.eval(), "fq-vit", DATA)


def test_the_command_line_evaluates_features(run, tmp_path):
    torch.manual_seed(0)
    for number in range(6):
        pixels = torch.randint(0, 256, (SIZE, SIZE, 3), dtype=torch.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{number}.png")
    save_file(vit(num_classes=0).state_dict(), tmp_path / "weights.safetensors")
    sizes = {"img_size": SIZE, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
    words = [f"--model-arg={key}={value}" for key, value in sizes.items()]
    words += ["--weights", tmp_path / "weights.safetensors", "--calibration", tmp_path / "images"]
    out = tmp_path / "out"
    words += ["--output", out, "--recipe", "fq-vit", "--json"]
    code, text, _ = run("quantize", "timm:vit_tiny_patch16_224", *words)
    assert (code, json.loads(text)["task"]) == (0, "features")
    code, text, err = run("evaluate", out, "--data", tmp_path / "images", "--json")
    values = json.loads(text)
    assert (code, err, values["task"], values["engine"], values["images"]) == (0, "", "features", "integer", 6)
    (output,) = values["outputs"]
    assert 0.9 < output["lowest_cosine"] <= output["cosine"] < 1
    code, text, _ = run("evaluate", out, "--data", tmp_path / "images")
    assert code == 0
    assert "cosine with the float model's 0." in text
    assert "have the same nearest neighbour" in text.replace("\n", " ").replace("  ", " ")
    for words, problem in (
        (["--task", "classification"], "the model has no head: it gives features, not classes"),
        (["--task", "segments"], "task 'segments' is unknown; the tasks are: classification, features"),
    ):
        code, text, err = run("evaluate", out, "--data", tmp_path / "images", *words)
        assert (code, text, err.count("\n")) == (2, "", 1)
        assert problem in err, err


@pytest.mark.parametrize("numbers", [lambda y: y[:, 0], lambda y: y.mean(-1)])
def test_one_number_for_an_image_is_an_output(tmp_path, numbers):
    model = Gives(lambda _, tokens, logits: {"logits": logits, "number": numbers(logits)}).eval()
    quantized = vitquant.quantize(model, "fq-vit", DATA)
    assert quantized.outputs == {"logits": (-1, 5), "number": (-1,)}
    for format in ("program", "onnx-integer"):
        assert vitquant.export(quantized, format, tmp_path / format, DATA, float_model=model).broken == []
    result = vitquant.evaluate(quantized, DATA, float_model=model, task="features")
    assert [each.neighbours is None for each in result.outputs] == [False, True]


def test_outputs_that_are_not_by_image_are_simulated_and_not_compared(tmp_path):
    model = Gives(lambda _, tokens, logits: logits.mean()).eval()
    quantized = vitquant.quantize(model, "minmax", DATA)
    with pytest.raises(ModelError, match="let its first axis be the images"):
        vitquant.export(quantized, "onnx-qdq", tmp_path / "model.onnx", DATA)
    with pytest.raises(ModelError, match="whose first axis is the images"):
        vitquant.evaluate(quantized, DATA, float_model=model)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (("r3", "constant.0"), ["r3", "constant.0"]),  # registers and constants are called so in exported files
        (("val_0", "getitem"), ["val_0", "getitem"]),  # and values by torch's exporter
        (("input", "head.weight"), ["input", "head.weight"]),
        (("\u00e9 b", "a/b'"), ["\u00e9 b", "a/b'"]),
        (("images", "logits"), ["0", "1"]),  # as the input of every file is called
        (("a\nb", "logits"), ["0", "1"]),
    ],
)
def test_outputs_may_be_called_as_anything_else_is(tmp_path, keys, names):
    model = Gives(lambda _, tokens, logits: dict(zip(keys, (logits, tokens), strict=True)))
    quantized = vitquant.quantize(model.eval(), "fq-vit", DATA)
    assert list(quantized.outputs) == names
    for format in ("onnx-integer", "onnx-qdq"):
        assert vitquant.export(quantized, format, tmp_path / f"{format}.onnx", DATA).broken == []
        import onnx

        assert [each.name for each in onnx.load(tmp_path / f"{format}.onnx").graph.output] == names


def test_outputs_are_compared_by_their_names_and_not_by_their_order():
    model = Gives(lambda _, tokens, logits: {"first": tokens[:, 0], "mean": tokens.mean(1)}).eval()
    other = Gives(lambda _, tokens, logits: {"mean": tokens.mean(1), "first": tokens[:, 0]}).eval()
    third = Gives(lambda _, tokens, logits: {"mean": tokens.mean(1), "last": tokens[:, 0]}).eval()
    quantized = vitquant.quantize(model, "default", DATA, bits="w8a8")
    swapped, same = (vitquant.evaluate(quantized, DATA, float_model=each) for each in (other, model))
    found = {each.name: each for each in swapped.outputs}
    assert {each.name: each for each in same.outputs} == found
    assert all(each.cosine > 0.99 for each in swapped.outputs)
    assert vitquant.compare(quantized, DATA, float_model=other).comparisons[0].cosine > 0.99
    for compared in (vitquant.evaluate, vitquant.compare):
        with pytest.raises(ModelError, match=r"outputs are called .*mean.*, and not .*: give the same model"):
            compared(quantized, DATA, float_model=third)


def test_one_tensor_under_several_names_and_names_with_numbers_are_sites_of_their_own():
    def made(_, tokens, logits):
        return {"a": tokens, "b": tokens, "b_2": tokens[:, 0], "c": logits}

    quantized = vitquant.quantize(Gives(made).eval(), "fq-vit", DATA)
    sites = [site.name for site in quantized.sites if site.kind == "output"]
    assert sites == ["output.a", "output.b", "output.b_2", "output.c"]
    assert len({site.name for site in quantized.sites}) == len(quantized.sites)
    program = vitquant.lower(quantized)
    assert program.outputs["a"] == program.outputs["b"]
    assert list(program.run(DATA[0])) == ["a", "b", "b_2", "c"]


@pytest.mark.parametrize("format", ["onnx-qdq", "openvino"])
def test_a_norm_with_two_quantizers_and_hidden_states_are_exported_under_their_names(tmp_path, format):
    def made(_, tokens, logits):
        return {"patches": tokens[:, 1:], "first": tokens[:, 0], "logits": logits}

    model = Gives(made).eval()
    quantized = vitquant.quantize(model, "fq-vit", DATA)
    vitquant.export(quantized, format, tmp_path / format, DATA, float_model=model)
    quantized.save(tmp_path / "out")
    (tmp_path / format).rename(tmp_path / "out" / FORMATS[format].path)
    found = engine(format, quantized, tmp_path / "out")(DATA[0])
    assert list(found) == ["patches", "first", "logits"]
    config = transformers.ViTConfig(**TINY, output_hidden_states=True)
    torch.manual_seed(0)
    hidden = vitquant.quantize(transformers.ViTModel(config).eval(), "minmax", DATA)
    vitquant.export(hidden, format, tmp_path / "hidden", DATA)
    opened = WAYS[format][0].open(tmp_path / "hidden", 1)
    assert list(opened.on_images(DATA[0])) == list(hidden.outputs)


@pytest.mark.parametrize("wrapped", [lambda y: (y,), lambda y: {"probs": y}, lambda y: (y, None, 3)])
def test_a_classifier_may_wrap_its_logits(wrapped):
    model = Gives(lambda _, tokens, logits: wrapped(logits)).eval()
    quantized = vitquant.quantize(model, "minmax", DATA)
    assert quantized.provenance["task"] == "classification"
    labelled = [{"pixel_values": DATA[0], "labels": torch.arange(6) % 5}]
    assert vitquant.evaluate(quantized, labelled, float_model=model).agreement is not None
    alone = vitquant.evaluate(quantized, labelled, float_model=model, engine_name="float")
    assert (alone.engine, alone.agreement) == ("float", 100.0)
    with pytest.raises(ModelError, match="engine 'float' is the float model, which is not there"):
        vitquant.evaluate(quantized, labelled, engine_name="float")
    with pytest.raises(vitquant.VitquantError, match=r"give batches \(images, labels\)"):
        vitquant.evaluate(quantized, DATA, float_model=model)


def test_only_logits_are_learned_without_their_mean():
    outputs = {"logits": (-1, 5), "tokens": (-1, 17, 48), "number": (-1,)}
    errors = dict(zip(outputs, TASKS["classification"].errors(outputs), strict=True))
    assert errors == {"logits": shift_free_error, "tokens": relative_error, "number": relative_error}
    assert TASKS["classification"].errors({"logits": (-1, 1)}) == (relative_error,)
    assert TASKS["features"].errors(outputs) == (relative_error,) * 3
