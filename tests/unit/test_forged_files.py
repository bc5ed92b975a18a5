"""A short run of `benchmarks/forged_files.py`: forged files are refused in one line, or harmless."""

import pytest
from mutations import attack


@pytest.mark.parametrize(
    ("kind", "mutations"),
    [
        ("config", 120), ("tensors", 12), ("recipe", 60), ("overlay", 60), ("sensitivity", 60), ("preprocessing", 60),
        ("labels", 60), ("program", 60), ("onnx-integer", 30), ("onnx-qdq", 30), ("weights", 40),
    ],
)  # fmt: skip
def test_no_forged_file_ends_in_anything_but_a_line_of_ours(kind, mutations, tmp_path):
    found = attack(kind, mutations, seed=10**6, folder=tmp_path)
    assert found.failures == []
    assert found.refused > mutations // 4
