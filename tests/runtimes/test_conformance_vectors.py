"""The conformance vectors cover the format, and every runtime gives what they say."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import numpy_engine
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load

from vitquant.conformance import all_vectors, write_vectors
from vitquant.conformance.drafting import noise
from vitquant.conformance.vectors import covered
from vitquant.errors import ExportError
from vitquant.exports.onnx_integer import onnx_integer_model
from vitquant.integer import softmax
from vitquant.integer.arithmetic import logarithm
from vitquant.integer.layer_norm import guard_bits
from vitquant.program import instructions as p
from vitquant.program.opcodes import OPCODES, Constant, Flag, form
from vitquant.program.storage import load_program
from vitquant.program.text import text_form
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.on_images import interpreted
from vitquant.runtime.onnxruntime import OnnxModel
from vitquant.runtime.outputs import named
from vitquant.runtime.products import exact_int64, exact_products

VECTORS = {vector.name: vector for vector in all_vectors()}
# Of every byte of every file; it changes with the format, with FORMAT, and with the vectors only.
DIGEST = "d70f393439c9dde0b639b882ab1d93d84b7dc11e4d31f2e1212875aaf4044f91"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "written"
    write_vectors(path)
    return path


@pytest.fixture(scope="module")
def read(directory):
    """A vector as somebody finds it: its program and its tensors."""
    entries = {each["name"]: each for each in json.loads((directory / "index.json").read_text())["vectors"]}

    @cache
    def read(name):
        entry = entries[name]
        return load_program(directory / entry["program"]), load((directory / entry["tensors"]).read_bytes())

    return read


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("products", [exact_int64, exact_products])
def test_the_interpreter_gives_every_register(read, name, products):
    program, expected = read(name)
    seen = {program.input: expected[program.input]}
    taps = {each.output: lambda x, name=each.output: seen.__setitem__(name, x) for each in program.instructions}
    result = Interpreter(program, products)(expected[program.input], taps)
    for output, codes in named(result, program.outputs).items():
        assert torch.equal(codes, expected[program.outputs[output]])
    assert seen.keys() == {key for key in expected if key != "images" and not key.startswith("outputs/")}
    assert all(torch.equal(values, expected[name]) for name, values in seen.items())


@pytest.mark.parametrize("name", VECTORS)
def test_onnx_gives_the_outputs_in_three_runtimes(read, name):
    program, expected = read(name)
    codes = expected[program.input]
    model = onnx_integer_model(program)
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    for optimize in (True, False):
        found = named(OnnxModel(content, optimize, threads=1)(codes), program.outputs)
        assert all(torch.equal(found[output], expected[register]) for output, register in program.outputs.items())
    dtype = onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    results = ReferenceEvaluator(model).run(list(program.outputs), {"images": codes.numpy().astype(dtype)})
    for result, register in zip(results, program.outputs.values(), strict=True):
        assert np.array_equal(np.asarray(result, np.int64), expected[register].numpy())


@pytest.mark.parametrize("name", VECTORS)
def test_an_engine_that_knows_the_page_alone_gives_every_register(directory, name):
    program = numpy_engine.Program(directory / f"{name}.program")
    expected = {key: tensor.numpy() for key, tensor in load((directory / f"{name}.safetensors").read_bytes()).items()}
    found = program.run_all(expected[program.input["register"]])
    for register in (each["output"] for each in program.instructions):
        assert np.array_equal(found[register], expected[register]), register
    if "images" in expected:
        assert np.array_equal(program.codes_of_images(expected["images"]), expected["x"])
        for output, codes in program.run(expected["x"]).items():
            assert np.array_equal(program.numbers_of_codes(output, codes), expected[f"outputs/{output}"])


def test_the_engine_of_the_page_is_short_and_shares_nothing():
    source = Path(numpy_engine.__file__).read_text()
    assert len(source.splitlines()) <= 300
    imported = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imported == ["import hashlib", "import json", "import math", "import numpy as np"]


def test_images_and_outputs_are_what_codes_stand_for(read):
    program, expected = read("vision-transformer")
    with torch.inference_mode():
        found = interpreted(program)(expected["images"])
    assert list(found) == ["logits", "tokens"]
    assert all(torch.equal(numbers, expected[f"outputs/{output}"]) for output, numbers in found.items())
    ratio = expected["images"][1] / np.float32(program.facts["input"]["scale"])
    assert int((ratio - ratio.floor() == 0.5).sum()) > 100  # halves, which round to even
    codes = expected[program.input]
    assert {0, 255} <= set(codes[2].unique().tolist())


# What they cover.


def test_they_cover_the_whole_format():
    programs = [vector.program for vector in VECTORS.values()]
    found = {key: {word for each in programs for word in covered(each)[key]} for key in covered(programs[0])}
    assert found["opcodes"] == set(OPCODES)
    assert found["types"] == set(p.TYPES)
    optional = [(o, a) for o in OPCODES for a in form(o).arguments if isinstance(a.role, Constant) and a.role.optional]
    flags = [(o, a) for o in OPCODES for a in form(o).arguments if isinstance(a.role, Flag)]
    ways = {f"{opcode}.{a.key} {way}" for opcode, a in optional for way in ("present", "absent")}
    assert found["arguments"] == ways | {f"{opcode}.{a.key} {way}" for opcode, a in flags for way in ("true", "false")}


def test_they_write_every_type_and_read_every_type():
    written = {v.program.registers[i.output].type for v in VECTORS.values() for i in v.program.instructions}
    stored = {v.program.registers[name].type for v in VECTORS.values() for name in v.program.constants}
    assert written == stored == set(p.TYPES)


def test_requantizations_have_every_granularity_and_several_inputs():
    steps = [(v.program, i) for v in VECTORS.values() for i in v.program.instructions if isinstance(i, p.Requantize)]
    four_axes = [(program, i) for program, i in steps if len(program.registers[i.output].shape) == 4]
    shapes = {tuple(program.constants[m].shape) for program, i in four_axes for m in i.multipliers}
    assert {(), (5,), (4, 1), (3, 1, 1), (3, 1, 5), (4, 5), (3, 4, 5)} <= shapes
    assert {len(i.inputs) for _, i in steps} == {1, 2, 3}
    assert {1, 31, 32, 62} <= {i.shift for _, i in steps}


def test_softmax_meets_constant_rows_masked_rows_and_both_ends_of_its_tables():
    ends, masked = set(), set()
    for vector in VECTORS.values():
        for i in vector.program.instructions:
            if isinstance(i, p.SoftmaxToPowers | p.SoftmaxToLevels) and i.input == "x":
                distances = vector.codes.amax(-1, keepdim=True) - vector.codes
                last = len(vector.program.constants[i.values]) - 2
                ends |= {int(distances.min()) == 0, int(distances.max()) == last}
                assert "noise" in vector.name or bool((distances == 0).all(-1).any())
                if i.mask is not None:
                    mask = vector.program.constants[i.mask].expand(2, 4, 8)
                    masked |= {"whole" if row.all() else "part" if row.any() else "none" for row in mask.reshape(-1, 8)}
    assert (ends, masked) == ({True}, {"whole", "part", "none"})


def test_layer_norms_have_all_some_and_no_guard_bits_and_gains_of_zero():
    guards = set()
    for vector in VECTORS.values():
        for i in vector.program.instructions:
            if isinstance(i, p.LayerNorm) and i.input == "x":
                guards.add(guard_bits(vector.codes.shape[-1], i.largest, i.epsilon))
                gains = vector.program.constants[i.multiplier]
                assert i.shift == 1 or len(gains) == 1 or int(gains[-1]) == 0
                rows = vector.codes.flatten(0, -2)
                assert bool((rows == rows[:, :1]).all(1).any())
    assert {0, 12} < guards


def test_a_logarithm_that_is_off_by_one_shows_in_every_row_that_is_long_enough(monkeypatch):
    vector = VECTORS["softmax-to-powers-last-digits"]
    expected = Interpreter(vector.program, exact_int64)(vector.codes)
    for off in (-1, 1):
        monkeypatch.setattr(softmax, "logarithm", lambda x, bits, off=off: logarithm(x, bits) + off)
        found = Interpreter(vector.program, exact_int64)(vector.codes)
        assert bool((found != expected).any(-1)[0, 4:].all())
    real = torch.floor(torch.log2(torch.tensor(33.0 * 57814, dtype=torch.float64)) * 4096)
    assert int(logarithm(torch.tensor(33 * 57814), 12)) == int(real) - 1


@pytest.mark.parametrize("digits", [24, 28, 30])
def test_a_logarithm_of_fewer_digits_shows(monkeypatch, digits):
    def cut(x, bits):
        length = torch.floor(torch.log2(x.double())).long()
        m = x << (30 - length)
        for _ in range(bits):
            m = m >> (31 - digits) << (31 - digits)
            m = m * m >> 30
            m, length = m >> (m >> 31), 2 * length + (m >> 31)
        return length

    vector = VECTORS["softmax-to-powers-few-digits"]
    expected = Interpreter(vector.program, exact_int64)(vector.codes)
    for fewer in (0, 31 - digits):
        digits = 31 - fewer
        monkeypatch.setattr(softmax, "logarithm", cut)
        found = Interpreter(vector.program, exact_int64)(vector.codes)
        assert int((found != expected).any(-1).sum()) == (6 if fewer else 0)


def test_no_vector_is_too_easy():
    """Outputs differ, but where a vector is about what gives the same everywhere."""
    same = ("softmax-to-levels-nothing", "softmax-to-levels-zero", "layer-norm-one-channel")
    for name, vector in VECTORS.items():
        with torch.inference_mode():
            outputs = named(Interpreter(vector.program, exact_int64)(vector.codes), vector.program.outputs)
        assert all((len(codes.unique()) == 1) is name.startswith(same) for codes in outputs.values()), name
        assert 8 * vector.codes.numel() <= 2**16


def test_every_line_of_text_is_whole():
    for vector in VECTORS.values():
        program = vector.program
        assert len(text_form(program)) == 1 + len(program.instructions) + len(program.outputs)


# Files.


def test_the_bytes_are_the_same_everywhere(directory, tmp_path):
    write_vectors(tmp_path / "again")
    found = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
        found.update(file.name.encode() + file.read_bytes())
    assert found.hexdigest() == DIGEST
    assert len(list(directory.iterdir())) == 2 * len(VECTORS) + 1


def test_noise_is_that_of_splitmix64():
    """The first outputs of the published generator for seed 1234567 (Vigna's C code)."""
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert (noise(1234567, 0, 2**62 - 1, 5)).tolist() == [value % 2**62 for value in first]


def test_the_index_says_what_each_is_for(directory):
    index = json.loads((directory / "index.json").read_text())
    assert (index["format"], index["program_format"]) == (1, 3)
    assert [each["name"] for each in index["vectors"]] == list(VECTORS)
    assert all(each["about"] and each["covers"]["opcodes"] for each in index["vectors"])


def test_the_command_writes_them_and_keeps_what_is_there(run, tmp_path, directory):
    code, out, err = run("vectors", tmp_path / "v")
    assert (code, err) == (0, "")
    assert str(len(VECTORS)) in out
    assert {file.name for file in (tmp_path / "v").iterdir()} == {file.name for file in directory.iterdir()}
    code, out, err = run("vectors", tmp_path / "v")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is not empty; give another directory, or --force" in err
    (tmp_path / "v" / "multiply.program").write_bytes(b"")
    code, out, _ = run("vectors", tmp_path / "v", "--force", "--json")
    said = json.loads(out)
    assert (code, said["directory"], len(said["vectors"])) == (0, str(tmp_path / "v"), len(VECTORS))
    load_program(tmp_path / "v" / "multiply.program")


def test_other_directories_are_never_replaced(run, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "thesis.tex").write_text("all of it")
    code, _, err = run("vectors", tmp_path / "v", "--force")
    assert (code, err.count("\n")) == (2, 1)
    assert "holds no directory of conformance vectors" in err
    (tmp_path / "v" / "index.json").write_text("{}")
    code, _, err = run("vectors", tmp_path / "v", "--force")
    assert (code, err.count("\n")) == (2, 1)
    assert "thesis.tex" in err


def test_scores_of_64_bits_have_no_onnx_form():
    steps = (p.SoftmaxToPowers("y", "here", "x", None, "v", "o", 15, 1, 0, False),)
    constants = {"v": torch.full((3,), 2**15), "o": torch.zeros(3, dtype=torch.int64)}
    types = {"x": ("s64", (-1, 4)), "y": ("u4", (-1, 4)), "v": ("u16", (3,)), "o": ("s32", (3,))}
    registers = {name: p.Register(*given) for name, given in types.items()}
    with pytest.raises(ExportError, match="here: its scores have 64 bits"):
        onnx_integer_model(p.IntegerProgram("x", {"output": "y"}, registers, constants, steps))
