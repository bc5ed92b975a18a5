"""A short run of `benchmarks/forged_files.py`: forged files are refused in one line, or harmless."""

import pytest
from forging import save_tiny
from mutations import attack

from vitquant.errors import ExportError
from vitquant.exports.qdq import onnx_qdq_model
from vitquant.runtime.onnxruntime import OnnxModel


@pytest.mark.parametrize(
    ("kind", "mutations"),
    [
        ("config", 120), ("tensors", 12), ("recipe", 60), ("overlay", 60), ("sensitivity", 60), ("preprocessing", 60),
        ("labels", 60), ("classes", 60), ("program", 60), ("onnx-integer", 30), ("onnx-qdq", 30), ("weights", 40),
        ("work", 8),
    ],
)  # fmt: skip
def test_no_forged_file_ends_in_anything_but_a_line_of_ours(kind, mutations, tmp_path):
    found = attack(kind, mutations, seed=10**6, folder=tmp_path)
    assert found.failures == []
    assert found.refused > mutations // 4


def test_an_input_that_is_left_out_does_not_reach_onnx_runtime(tmp_path):
    """Its fusion of a LayerNorm whose bias is the empty name ends the process (ONNX Runtime 1.31.1)."""
    model = onnx_qdq_model(save_tiny(tmp_path / "out", "minmax"))
    del model.metadata_props[:]
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    norm.input[2] = ""
    with pytest.raises(ExportError, match="leaves out inputs"):
        OnnxModel(model.SerializeToString())
