"""Evaluate, compare and export from Python: what the library promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import timm
import torch

import vitquant
from vitquant import workflows
from vitquant.engines import forms_of
from vitquant.errors import CalibrationError, ExportError, RecipeError
from vitquant.parity import ParityReport
from vitquant.recipe import load_recipe, override

TRAIN = list(torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)).split(8))


@pytest.fixture(scope="module")
def quantized() -> vitquant.QuantizedModel:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 10}
    return vitquant.quantize(timm.create_model("vit_tiny_patch16_224", **sizes), "fq-vit", TRAIN)


def test_an_export_is_there_once_it_was_compared(quantized, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    report = vitquant.export(
        quantized, "onnx-integer", tmp_path / "model.onnx", TRAIN, progress=lambda *each: said.append(each)
    )
    assert not report.broken
    assert any(each.form == "onnxruntime, onnx-integer" and each.identical == 100 for each in report.comparisons)
    assert [done for what, done, _ in said if what != "exporting"] == list(range(len(said) - 1))
    assert len({total for what, _, total in said if what != "exporting"}) == 1
    forms = forms_of(tmp_path / "model.onnx", "onnx-integer", quantized)
    assert not vitquant.compare(quantized, TRAIN, forms).broken
    with pytest.raises(ExportError, match=r"is there|exists"):
        vitquant.export(quantized, "onnx-integer", tmp_path / "model.onnx", TRAIN)


@pytest.mark.parametrize("name", ["qdq.onnx", "qdq.bin"])
def test_a_file_whose_content_nothing_vouches_for_is_refused_under_any_name(quantized, tmp_path: Path, name) -> None:
    vitquant.export(quantized, "onnx-qdq", tmp_path / name, TRAIN)
    assert len(forms_of(tmp_path / name, "onnx-qdq", quantized)) == 2
    proto = onnx.load(tmp_path / name)
    kept = [each for each in proto.metadata_props if each.key != "vitquant.digest"]
    assert len(kept) == len(proto.metadata_props) - 1
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    (tmp_path / name).write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="does not say what was in it when it was exported; export it again"):
        forms_of(tmp_path / name, "onnx-qdq", quantized)
    del proto.graph.input[0].type.tensor_type.shape.dim[:]
    (tmp_path / name).write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="its input has no shape; export it again"):
        forms_of(tmp_path / name, "onnx-qdq", quantized)


def test_an_export_that_is_not_the_model_is_not_written(quantized, tmp_path: Path, monkeypatch) -> None:
    real = workflows.examine

    def broken(*arguments: object) -> ParityReport:
        report = real(*arguments)  # type: ignore[arg-type]
        first, *others = report.comparisons
        return replace(report, comparisons=(replace(first, promise="bit for bit", kept=False), *others))

    monkeypatch.setattr(workflows, "examine", broken)
    (tmp_path / "old.onnx").write_bytes(b"old")
    for path, force in (("new.onnx", False), ("old.onnx", True)):
        with pytest.raises(vitquant.BrokenPromiseError, match=r"nothing was written.*bit for bit") as refused:
            vitquant.export(quantized, "onnx-integer", tmp_path / path, TRAIN, force=force)
        assert refused.value.report.broken
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_bytes() == b"old"


def test_what_cannot_be_is_refused_before_the_work(quantized, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="format 'tflite' is unknown"):
        vitquant.export(quantized, "tflite", tmp_path / "x", TRAIN)
    with pytest.raises(CalibrationError, match="no images to compare on"):
        vitquant.export(quantized, "program", tmp_path / "x", [])
    with pytest.raises(CalibrationError, match="no images to compare on"):
        vitquant.compare(quantized, [])
    assert list(tmp_path.iterdir()) == []


def test_engines_are_chosen_by_name(quantized, tmp_path: Path) -> None:
    test = [(images, torch.arange(8)) for images in TRAIN]
    integer, simulated = (vitquant.evaluate(quantized, test, engine_name=each) for each in ("integer", "simulated"))
    assert (integer.engine, simulated.engine) == ("integer", "simulated")
    assert vitquant.evaluate(quantized, test).engine == "integer"
    vitquant.export(quantized, "onnx-integer", tmp_path / "integer.onnx", TRAIN)
    onnx = vitquant.evaluate(quantized, test, engine_name="onnx-integer", directory=tmp_path)
    assert (onnx.top1, onnx.images) == (integer.top1, integer.images)


def test_a_program_runs_on_images_and_is_saved(quantized, tmp_path: Path) -> None:
    from vitquant.program.storage import load_program

    program = vitquant.lower(quantized)
    program.save(tmp_path / "model.program")
    assert torch.equal(load_program(tmp_path / "model.program").run(TRAIN[0]), program.run(TRAIN[0]))


def test_overrides_are_a_mapping_or_texts() -> None:
    recipe = load_recipe("fq-vit")
    texts = ["norm-inputs.observer=omse", "weights.bits=4", "choose-factors.batches=last", "calibration.images=7"]
    values = {
        "norm-inputs.observer": "omse", "weights.bits": 4, "choose-factors.batches": "last", "calibration.images": 7,
    }  # fmt: skip
    assert override(recipe, values) == override(recipe, texts) != recipe
    for wrong in ({"weights": 4}, {"weights.bits": object()}, {"weights.": 4}, {"nothing.bits": 4}):
        with pytest.raises(RecipeError) as refused:
            override(recipe, wrong)
        assert "\n" not in str(refused.value)
