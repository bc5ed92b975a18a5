"""Integers from the command line: engines, exports, and whether what was exported is what was evaluated."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vitquant import engines
from vitquant.cli import main
from vitquant.cli.evaluate import Engine
from vitquant.cli.export import Format
from vitquant.exports.formats import FORMATS, exported
from vitquant.loading import load
from vitquant.lowering import lower
from vitquant.model.saved import digest
from vitquant.program.storage import load_program, save_program
from vitquant.runtime.metadata import to_metadata
from vitquant.runtime.onnxruntime import OnnxModel
from vitquant.runtime.openvino import OpenVinoModel

ARGUMENTS = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 10}
MODEL = ["timm:vit_tiny_patch16_224"] + [f"--model-arg={key}={value}" for key, value in ARGUMENTS.items()]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with images, and a tiny ViT quantized by `fq-vit` (twice, from other weights) and by `minmax`."""
    import timm

    folder = tmp_path_factory.mktemp("integers")
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        path = folder / "images" / f"class_{index % 10}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (36, 36, 3), dtype=torch.uint8, generator=generator).numpy()).save(path)
    for name, recipe, seed in (("integers", "fq-vit", 1), ("others", "fq-vit", 2), ("float", "minmax", 1)):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        words = ["--weights", folder / f"{name}.safetensors", "--recipe", recipe, "--output", folder / name]
        call("quantize", *MODEL, "--calibration", folder / "images", "--batch", 6, *words, "--quiet")
    return folder


def call(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


@pytest.fixture
def out(workshop, tmp_path):
    """A copy of the model that lowers, to export into."""
    return shutil.copytree(workshop / "integers", tmp_path / "out")


@pytest.fixture
def run(capsys):
    """Run one command in this process: exit code, what `--json` printed if it was asked for, stderr."""

    def run(*words):
        capsys.readouterr()
        code = call(*words)
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if "--json" in words and printed.out else printed.out, printed.err

    return run


def test_the_command_line_offers_what_python_does():
    assert tuple(Engine) == engines.ENGINES
    assert list(Format) == list(FORMATS)


def test_what_is_evaluated_is_the_integer_program_and_every_engine_can_be_asked_for(run, workshop, out):
    for format in ("onnx-integer", "onnx-qdq", "openvino"):
        assert run("export", out, "--format", format, "--quiet")[0] == 0
    found = {}
    for engine in ("", *engines.ENGINES):
        words = ["--engine", engine] if engine else []
        code, found[engine], _ = run("evaluate", out, "--data", workshop / "images", *words, "--json")
        assert code == 0
    assert {name: figures["engine"] for name, figures in found.items()} == {
        **{name: name for name in found},
        "": "integer",
    }
    assert {name: figures["file"] for name, figures in found.items() if figures["file"]} == {
        "onnxruntime": str(out / "integer.onnx"),
        "onnx-integer": str(out / "integer.onnx"),
        "onnx-qdq": str(out / "qdq.onnx"),
        "openvino": str(out / "openvino"),
    }
    assert found["float"]["agreement"] == 100
    figures = ("top1", "top5", "agreement")
    assert all(found[""][name] == found["integer"][name] == found["onnxruntime"][name] for name in figures)


def test_the_file_that_was_run_is_in_the_table(run, workshop, out):
    assert run("export", out, "--format", "onnx-qdq", "--images", 4, "--quiet")[0] == 0
    code, text, _ = run("evaluate", out, "--data", workshop / "images", "--engine", "onnxruntime")
    assert code == 0
    assert "qdq.onnx" in text.replace("\n", "")


def test_python_takes_paths_as_strings(run, workshop, out):
    for format in ("program", "onnx-qdq"):
        assert run("export", out, "--format", format, "--images", 4, "--quiet")[0] == 0
    model, images = load(str(out)), torch.zeros(1, 3, 32, 32)
    assert exported(str(out)) == exported(out) == {name: out / FORMATS[name].path for name in ("program", "onnx-qdq")}
    assert engines.engine("onnxruntime", model, str(out))(images).shape == (1, 10)
    assert all(engines.forms_of(str(path), name, model) for name, path in exported(out).items())


def test_an_engine_without_its_file_says_what_the_model_can_be_exported_to(run, workshop):
    words = ("evaluate", workshop / "float", "--data", workshop / "images", "--engine")
    code, _, err = run(*words, "onnxruntime")
    assert (code, err.count("\n")) == (2, 1)
    assert "--format onnx-qdq" in err
    code, _, err = run(*words, "onnx-integer")
    assert (code, err.count("\n")) == (2, 1)
    assert "holds nothing for onnx-integer, and cannot: blocks.0.norm1" in err


def test_a_recipe_that_computes_in_float_is_simulated(run, workshop):
    code, figures, err = run("evaluate", workshop / "float", "--data", workshop / "images", "--json")
    assert (code, figures["engine"], err) == (0, "simulated", "")
    code, _, err = run("evaluate", workshop / "float", "--data", workshop / "images", "--engine", "integer")
    assert code == 2
    assert "blocks.0.norm1: the recipe minmax computes it in float; use a recipe that computes on codes" in err


def test_a_recipe_of_integers_that_does_not_lower_is_simulated_with_the_reason(run, workshop, tmp_path):
    words = [
        "--recipe",
        "fq-vit-published",
        "--weights",
        workshop / "integers.safetensors",
        "--output",
        tmp_path / "out",
    ]
    call("quantize", *MODEL, "--calibration", workshop / "images", "--batch", 6, *words, "--quiet")
    code, figures, err = run("evaluate", tmp_path / "out", "--data", workshop / "images", "--json")
    assert (code, figures["engine"]) == (0, "simulated")
    assert "note: simulated, since the model does not lower: " in err


@pytest.mark.parametrize("format", ["program", "onnx-integer", "onnx-qdq", "openvino"])
def test_an_export_is_compared_and_not_overwritten(run, out, format):
    code, found, _ = run("export", out, "--format", format, "--images", 4, "--json")
    assert code == 0
    assert found["parity"]["broken"] == []
    forms = [each["form"] for each in found["parity"]["comparisons"]]
    assert any("onnxruntime" in form or "openvino" in form or "stored program" in form for form in forms)
    assert found["bytes"] > 1000
    code, _, err = run("export", out, "--format", format, "--images", 4)
    assert code == 2
    assert "--force" in err
    assert run("export", out, "--format", format, "--images", 4, "--force", "--quiet")[0] == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_without_the_float_weights_a_note_says_what_is_promised(run, workshop, out, tmp_path):
    weights = workshop / "integers.safetensors"
    moved = weights.rename(weights.with_suffix(".moved"))
    try:
        code, found, err = run("export", out, "--format", "onnx-qdq", "--images", 4, "--json")
        assert (code, err.count("\n")) == (0, 2)
        assert "promise no more than a cosine of 0.9" in err
        assert "cosine at least 0.900" in [each["promise"] for each in found["parity"]["comparisons"]]
        assert "cosine" not in run("export", out, "--format", "program", "--images", 4, "--json")[2]
    finally:
        moved.rename(weights)


def test_an_export_goes_where_it_is_told_with_float_ends(run, out, tmp_path):
    import onnxruntime

    path = tmp_path / "deeper" / "model.onnx"
    words = ("--format", "onnx-integer", "--float-io", "--output", path, "--images", 4, "--json")
    code, found, _ = run("export", out, *words)
    assert (code, found["output"], found["parity"]["broken"]) == (0, str(path), [])
    exact = [each for each in found["parity"]["comparisons"] if each["form"].startswith("onnxruntime")]
    assert exact
    assert all(each["promise"] == "bit for bit" and each["identical"] == 100 for each in exact)
    session = onnxruntime.InferenceSession(str(path))
    assert (session.get_inputs()[0].type, session.get_outputs()[0].type) == ("tensor(float)",) * 2


@pytest.mark.parametrize("format", ["onnx-integer", "onnx-qdq", "openvino"])
def test_a_file_of_a_fixed_batch_is_compared_and_evaluated_on_any_number_of_images(run, workshop, out, format):
    opset = () if format == "openvino" else ("--opset", 22)
    code, found, err = run("export", out, "--format", format, "--batch", 5, *opset, "--images", 4, "--json")
    assert (code, found["parity"]["broken"], err.count("error")) == (0, [], 0)
    code, found, _ = run("evaluate", out, "--data", workshop / "images", "--engine", format, "--json")
    assert (code, found["images"], found["file"]) == (0, 12, str(out / FORMATS[format].path))
    runs = {"openvino": OpenVinoModel}.get(format, OnnxModel)
    assert runs(out / FORMATS[format].path).batch == 5


def test_an_export_that_cannot_be_leaves_everything_as_it_was(run, workshop, out, tmp_path):
    code, _, err = run("export", out, "--format", "program", "--output", out / "model.safetensors", "--force")
    assert code == 2
    assert "is a file of the saved model" in err
    words = ("--format", "onnx-integer", "--output", tmp_path / "new" / "deep" / "x.onnx")
    assert run("export", workshop / "float", *words)[0] == 2
    assert not (tmp_path / "new").exists()
    assert run("inspect", out, "--quiet")[0] == 0


def test_parity_makes_what_was_not_exported_and_throws_it_away(run, workshop):
    before = sorted(path.name for path in (workshop / "integers").iterdir())
    words = ("--against", "onnxruntime", "openvino", "interpreter", "--images", 4, "--json")
    code, found, _ = run("parity", workshop / "integers", *words)
    assert code == 0
    forms = " ".join(each["form"] for each in found["comparisons"])
    assert all(word in forms for word in ("onnx-integer", "onnx-qdq", "openvino", "stored program", "int64"))
    assert len(found["flips"]) > 15
    assert sorted(path.name for path in (workshop / "integers").iterdir()) == before


def test_every_export_says_the_same_of_its_model(run, out):
    for format in FORMATS:
        assert run("export", out, "--format", format, "--images", 4, "--quiet")[0] == 0
    said = [OnnxModel(out / "integer.onnx").metadata, OnnxModel(out / "qdq.onnx").metadata]
    said += [OpenVinoModel(out / "openvino").metadata, to_metadata(load_program(out / "integer.program").facts)]
    model = load(out)
    for metadata in said:
        facts = {name: metadata[f"vitquant.{name}"] for name in ("recipe", "bits", "model")}
        assert facts == {"recipe": "fq-vit", "bits": "w8a8s4", "model": digest(model)}
        assert json.loads(metadata["vitquant.preprocessing"]) == model.provenance["preprocessing"]


def test_an_export_of_another_model_is_refused(run, workshop, out):
    for format, engine in (
        ("program", ""),
        ("onnx-integer", "onnxruntime"),
        ("onnx-qdq", "onnxruntime"),
        ("openvino",) * 2,
    ):
        others = workshop / "others" / FORMATS[format].path
        assert run("export", workshop / "others", "--format", format, "--images", 4, "--quiet", "--force")[0] == 0
        shutil.move(others, out / FORMATS[format].path)
        words = [("parity", out, "--images", 4)]
        words += [("evaluate", out, "--data", workshop / "images", "--engine", engine)] if engine else []
        for each in words:
            code, _, err = run(*each)
            assert (code, err.count("\n")) == (2, 1)
            assert f"{out / FORMATS[format].path} was exported from another model" in err
        remove = shutil.rmtree if format == "openvino" else os.remove
        remove(out / FORMATS[format].path)


def lying(saved, other):
    """The program of a saved model that says that it is of another."""
    program = lower(load(saved))
    return replace(program, facts={**program.facts, "model": digest(load(other))})


def test_parity_ends_with_1_when_an_export_is_of_another_model_than_it_says(run, workshop, out):
    save_program(lying(workshop / "others", out), out / "integer.program")
    code, found, _ = run("parity", out, "--images", 4, "--json")
    assert code == 1
    assert "stored program beside integer program: bit for bit" in found["broken"][0]


def test_a_broken_promise_is_named_on_stderr_where_no_table_names_it(run, workshop, out, monkeypatch):
    save_program(lying(workshop / "others", out), out / "integer.program")
    code, text, err = run("parity", out, "--images", 4, "--quiet")
    assert (code, text, err.count("\n")) == (1, "", 1)
    assert err.startswith("broken: interpreter, stored program beside integer program: bit for bit")
    for name, value in (("AGREEMENT", 101.0), ("FLIPPED_IMAGES", -1)):  # more must agree than there are
        monkeypatch.setattr(f"vitquant.parity.comparison.{name}", value)
    code, text, err = run("export", out, "--format", "onnx-qdq", "--images", 4, "--quiet")
    assert (code, text, err.count("\n")) == (1, "", 1)
    assert err.startswith("broken: integer program beside float64 simulation")
    assert not (out / "qdq.onnx").exists()


def test_parity_without_anything_to_promise_is_refused(run, workshop):
    code, text, err = run("parity", workshop / "float", "--images", 4)
    assert (code, text, err.count("\n")) == (2, "", 1)
    assert "blocks.0.norm1" in err
    assert f"vitquant export {workshop / 'float'} --format onnx-qdq" in err


def test_parity_of_a_model_that_does_not_lower_says_why(run, workshop):
    code, found, _ = run("parity", workshop / "float", "--against", "onnxruntime", "--images", 4, "--json")
    assert code == 0
    assert "blocks.0.norm1" in found["not_lowered"]
    assert found["flips"] == []
    assert any(each["form"].startswith("onnxruntime, onnx-qdq") for each in found["comparisons"])


def test_programs_of_a_model_that_does_not_lower_are_not_passed_over(run, workshop, tmp_path):
    model = shutil.copytree(workshop / "float", tmp_path / "float")
    code, _, err = run("parity", model, "--against", "interpreter", "--images", 4)
    assert code == 2
    assert "blocks.0.norm1" in err
    assert run("export", workshop / "others", "--format", "program", "--images", 4, "--quiet", "--force")[0] == 0
    shutil.copy(workshop / "others" / "integer.program", model)
    code, _, err = run("parity", model, "--images", 4)
    assert code == 2
    assert "was exported from another model" in err
    save_program(lying(workshop / "others", model), model / "integer.program", force=True)
    code, found, _ = run("parity", model, "--images", 4, "--json")
    assert code == 1
    assert "no integer program" in found["broken"][0]


def test_tables_say_what_json_says(run, workshop):
    code, text, _ = run("parity", workshop / "integers", "--images", 4)
    assert code == 0
    assert "every promise is kept" in text
    assert "bit for bit" in text
    assert "rescaling" in text


def test_inspect_tells_accumulators_and_that_everything_is_in_integers(run, workshop):
    code, found, _ = run("inspect", workshop / "integers", "--json")
    assert code == 0
    assert found["engine"] == "integer"
    assert found["summary"]["integer_macs_percent"] == 100
    assert found["summary"]["operations"]["float"] == 0
    sums = {each["name"]: each["accumulator"] for each in found["operations"] if each["accumulator"]}
    assert {"patch_embed", "blocks.0.attn.scores", "blocks.0.mlp.fc2", "head"} <= sums.keys()
    assert all(each["type"] == "s32" and each["low"] < each["high"] for each in sums.values())
    assert all(each["headroom_bits"] >= 0 for each in sums.values())
    _, found, _ = run("inspect", workshop / "float", "--json")
    assert (found["engine"], found["summary"]["integer_macs_percent"]) == ("simulated", 0)
    assert "blocks.0.norm1" in found["not_lowered"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evaluate", "--data", "IMAGES", "--engine", "openvino"), "vitquant export .* --format openvino"),
        (("evaluate", "--data", "IMAGES", "--engine", "onnxruntime"), "vitquant export .* --format onnx-integer"),
        (("evaluate", "--data", "IMAGES", "--engine", "quick"), "'quick' is not one of"),
        (("export", "--format", "tflite"), "'tflite' is not one of"),
        (
            ("export", "--format", "onnx-qdq", "--float-io"),
            r"--float-io \(float_io=True\) applies to onnx-integer only",
        ),
        (("export", "--format", "program", "--data", "NOWHERE"), "NOWHERE"),
        (
            ("export", "--format", "program", "--batch", "1"),
            r"--batch \(batch=...\) belongs to ONNX and OpenVINO files",
        ),
        (("export", "--format", "onnx-qdq", "--batch", "0"), r"0 is not in the range x>=1|greater than or equal to 1"),
        (("export", "--format", "onnx-integer", "--opset", "17"), "opset 17: onnx-integer can have 18 to 25"),
        (("export", "--format", "openvino", "--opset", "20"), "openvino has none"),
        (("parity", "--against", "tensorrt"), "'tensorrt' is not one of"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(run, workshop, out, words, said):
    command, *rest = (str(workshop / "images") if word == "IMAGES" else word for word in words)
    before = sorted(out.iterdir())
    code, _, err = run(command, out, *rest)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(said, err)
    assert sorted(out.iterdir()) == before
