"""Files of a fixed batch and of an opset that the caller chose."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from exported_models import exported, photos, timm_swin, timm_vit

import vitquant
from vitquant.engines import WAYS
from vitquant.errors import ExportError
from vitquant.exports.formats import write
from vitquant.exports.onnx_integer import onnx_integer_model
from vitquant.exports.openvino import write_openvino
from vitquant.exports.qdq.model import _export, onnx_qdq_model
from vitquant.exports.sizes import OPSETS
from vitquant.model import QuantizedModel
from vitquant.runtime.fixed_batch import in_batches
from vitquant.runtime.onnxruntime import OnnxModel
from vitquant.runtime.openvino import OpenVinoModel

OF_SHAPES = {"Shape", "Size", "ConstantOfShape", "Range", "NonZero", "Loop", "If", "Scan"}


@pytest.fixture(scope="module")
def vit() -> QuantizedModel:
    """With a class token, which is repeated for every image."""
    return exported(timm_vit, "fq-vit")[0]


@pytest.fixture(scope="module")
def swin() -> QuantizedModel:
    """With windows, of which there are several for each image, masks, and weights of 4 bits."""
    return exported(timm_swin, "fq-vit", "w4a8s4")[0]


def assert_static(proto: onnx.ModelProto, batch: int) -> None:
    """Every size is a number, and nothing computes one."""
    onnx.checker.check_model(proto, full_check=True)
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    for value in values.values():
        sizes = value.type.tensor_type.shape.dim
        assert all(size.HasField("dim_value") for size in sizes), value.name
    assert {
        graph.input[0].type.tensor_type.shape.dim[0].dim_value,
        graph.output[0].type.tensor_type.shape.dim[0].dim_value,
    } == {batch}
    assert OF_SHAPES.isdisjoint(node.op_type for node in graph.node)
    stored = {each.name for each in graph.initializer}
    for node in graph.node:
        assert all(name in values for name in node.output), node.name
        if node.op_type in ("Reshape", "Expand"):
            assert node.input[1] in stored
            sizes = next(onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name == node.input[1])
            assert (sizes > 0).all(), node.name


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_integers_of_a_fixed_batch(family: str, batch: int, request: pytest.FixtureRequest) -> None:
    program = vitquant.lower(request.getfixturevalue(family))
    proto = onnx_integer_model(program, batch=batch)
    assert_static(proto, batch)
    model, free = (OnnxModel(each.SerializeToString(), threads=1) for each in (proto, onnx_integer_model(program)))
    assert (model.batch, free.batch) == (batch, None)
    assert (model.metadata["vitquant.batch"], "vitquant.batch" in free.metadata) == (str(batch), False)
    codes = torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(codes), free(codes))
    assert model(codes[:0]).shape == (0, 7)


@pytest.mark.parametrize("batch", [1, 3])
def test_qdq_and_openvino_of_a_fixed_batch(vit: QuantizedModel, batch: int, tmp_path: Path) -> None:
    proto = onnx_qdq_model(vit, batch=batch)
    assert_static(proto, batch)
    write_openvino(vit, tmp_path / "ir", batch=batch)
    free = OnnxModel(exported(timm_vit, "fq-vit")[1].SerializeToString(), threads=1)
    expected = free(photos(5, seed=1))
    for model in (OnnxModel(proto.SerializeToString(), threads=1), OpenVinoModel(tmp_path / "ir", threads=1)):
        assert model.batch == batch
        assert json.loads(model.metadata["vitquant.batch"]) == batch
        found = model(photos(5, seed=1))
        assert torch.cosine_similarity(found, expected).min() > 0.99
        assert model(photos(0)).shape == (0, 7)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_any_number_of_images_in_batches_of_one_size(count: int, size: int) -> None:
    seen = []

    def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(images))
        return 2 * images[:, 0], images

    images = torch.arange(1, 2 * count + 1).view(count, 2)
    doubled, same = in_batches(run, images, size)
    assert torch.equal(doubled, 2 * images[:, 0])
    assert torch.equal(same, images)
    assert set(seen) == {size}


def test_a_batch_that_the_memory_does_not_hold_is_an_error_of_ours() -> None:
    def run(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer")

    for images in (torch.zeros(3, 2), torch.zeros(1, 1).expand(1, 2**30)):
        with pytest.raises(ExportError, match=r"^the memory does not hold a batch of 1000000 images"):
            in_batches(run, images, 1_000_000)
    with pytest.raises(ExportError, match=r"^the memory does not hold a batch of 1000000 images"):
        _export(torch.nn.Identity(), 1, (3, 2**15, 2**15), 1_000_000, 20)


@pytest.mark.parametrize("opset", [OPSETS["onnx-integer"][0], 20, OPSETS["onnx-integer"][-1]])
def test_integers_of_every_opset_are_the_same(swin: QuantizedModel, opset: int) -> None:
    """The weights have 4 bits, which take a byte each before opset 21."""
    program = vitquant.lower(swin)
    proto = onnx_integer_model(program, opset=opset)
    assert [(each.domain, each.version) for each in proto.opset_import] == [("", opset)]
    onnx.checker.check_model(proto, full_check=True)
    stored = {each.data_type for each in proto.graph.initializer}
    assert (onnx.TensorProto.UINT4 in stored) == (opset >= 21)
    codes = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    plain = OnnxModel(onnx_integer_model(program).SerializeToString(), threads=1)
    assert torch.equal(OnnxModel(proto.SerializeToString(), threads=1)(codes), plain(codes))


@pytest.mark.parametrize("opset", [OPSETS["onnx-qdq"][0], OPSETS["onnx-qdq"][-1]])
def test_qdq_of_every_opset_is_as_close(vit: QuantizedModel, opset: int) -> None:
    proto = onnx_qdq_model(vit, opset=opset)
    assert [(each.domain, each.version) for each in proto.opset_import] == [("", opset)]
    x = photos(4, seed=1)
    expected = OnnxModel(exported(timm_vit, "fq-vit")[1].SerializeToString(), threads=1)(x)
    assert torch.cosine_similarity(OnnxModel(proto.SerializeToString(), threads=1)(x), expected).min() > 0.99


@pytest.mark.parametrize(
    ("format", "options", "reason"),
    [
        ("program", {"batch": 1}, r"^--batch \(batch=...\) belongs to ONNX and OpenVINO files"),
        ("program", {"opset": 21}, "belongs to onnx-integer and onnx-qdq; program has none$"),
        ("openvino", {"opset": 21}, "belongs to onnx-integer and onnx-qdq; openvino has none$"),
        ("onnx-integer", {"opset": 17}, "^opset 17: onnx-integer can have 18 to 25$"),
        ("onnx-qdq", {"opset": 26}, "^opset 26: onnx-qdq can have 18 to 25$"),
        ("onnx-qdq", {"batch": 0}, "^batch = 0: a file takes at least 1 image$"),
        ("onnx-qdq", {"batch": 10**6 + 1}, "^batch = 1000001: a file takes at most 1000000 images at once$"),
        ("onnx-integer", {"batch": 2**63}, "at most 1000000 images at once$"),
        ("openvino", {"batch": 2**63 - 1}, "at most 1000000 images at once$"),
    ],
)
def test_what_a_format_cannot_have_is_refused(
    vit: QuantizedModel, format: str, options: dict[str, int], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=reason):
        write(vit, format, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_integers_of_4_bits_need_opset_21(swin: QuantizedModel) -> None:
    with pytest.raises(ExportError, match=r"^opset 20: the model has integers of 4 bits, and needs 21 to 25$"):
        onnx_qdq_model(swin, opset=20)


def test_a_file_of_one_image_serves_images(vit: QuantizedModel, tmp_path: Path) -> None:
    for format in ("onnx-integer", "onnx-qdq"):
        write(vit, format, tmp_path / format, batch=1, opset=22)
        run = WAYS["onnx-integer"][0].open(tmp_path / format, 1).on_images
        with torch.no_grad():
            assert torch.cosine_similarity(run(photos(3)), vit(photos(3))).min() > 0.9
