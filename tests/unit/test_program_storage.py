"""A program comes back from its file as it was, or the file is refused by name."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

import vitquant
from vitquant.errors import CheckpointError, ExportError, LoweringError
from vitquant.lowering import lower
from vitquant.program import instructions as p
from vitquant.program.storage import load_program, save_program
from vitquant.runtime.interpreter import Interpreter

KEY = "vitquant_program"


def tiny() -> p.IntegerProgram:
    """One product and its codes, with a constant of every type."""
    steps = (
        p.Linear("a", "head", "x", "weight", "bias", 128, "zero"),
        p.Requantize("y", "head", ("a",), ("m",), "half", 20, -128, 127),
        p.Lookup("t", "table", "y", "table", -128),
        p.Pad("z", "table", "t", (0, 1), 7),
    )
    types = {
        "x": ("u8", -1, 5), "a": ("s32", -1, 3), "y": ("s8", -1, 3), "t": ("u16", -1, 3), "z": ("u16", -1, 4),
        "weight": ("s4", 3, 5), "zero": ("u4", 3, 1), "bias": ("s32", 3), "m": ("s32",), "half": ("s64", 1),
        "table": ("u16", 256), "spare": ("s16", 1, 2), "extra": ("u8", 3),
    }  # fmt: skip
    constants = {
        "weight": torch.arange(-8, 7).view(3, 5), "zero": torch.tensor([[0], [15], [3]]),
        "bias": torch.tensor([-(2**30), 5, 2**20]), "m": torch.tensor(2**16 + 1), "half": torch.tensor([2**40 - 1]),
        "table": torch.arange(256) * 257, "spare": torch.tensor([[-(2**15), 2**15 - 1]]),
        "extra": torch.tensor([0, 255, 7]),
    }  # fmt: skip
    registers = {name: p.Register(kind, tuple(shape)) for name, (kind, *shape) in types.items()}
    facts = {
        "input": {"scale": 0.1, "zero_point": 128, "low": 0, "high": 255},
        "recipe": "fq-vit",
        "odd": [None, True, 1.5, "\u00fc"],
    }
    return p.IntegerProgram("x", {"output": "z"}, registers, constants, steps, {"head:input": "x"}, facts)


@pytest.fixture
def saved(tmp_path):
    save_program(tiny(), tmp_path / "tiny.vitquant")
    return tmp_path / "tiny.vitquant"


def assert_equal(found: p.IntegerProgram, expected: p.IntegerProgram) -> None:
    assert replace(found, constants={}) == replace(expected, constants={})
    assert found.constants.keys() == expected.constants.keys()
    for name, values in expected.constants.items():
        assert found.constants[name].dtype == torch.int64
        assert torch.equal(found.constants[name], values), name


def test_what_is_saved_is_loaded(saved):
    assert_equal(load_program(saved), tiny())
    assert_equal(load_program(str(saved)), tiny())


@pytest.mark.parametrize("bits", ["w8a8s4", "w4a8s4", "w4a4s4"])
def test_a_lowered_model_gives_the_same_codes(tmp_path, bits):
    torch.manual_seed(0)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=10
    )
    program = lower(vitquant.quantize(model.eval(), "fq-vit", [torch.randn(4, 3, 32, 32)], bits=bits))
    save_program(program, str(tmp_path / "swin.vitquant"))
    loaded = load_program(tmp_path / "swin.vitquant")
    assert_equal(loaded, program)
    low, high = program.registers[program.input].limits
    codes = torch.randint(low, high + 1, (3, 3, 32, 32))
    assert torch.equal(Interpreter(loaded)(codes), Interpreter(program)(codes))


def test_the_same_program_gives_the_same_bytes(saved, tmp_path):
    whole = tiny()
    for number in range(3):
        other = replace(
            whole, constants=dict(reversed(whole.constants.items())), registers=dict(reversed(whole.registers.items()))
        )
        save_program(other, tmp_path / f"{number}")
        assert (tmp_path / f"{number}").read_bytes() == saved.read_bytes()


def test_constants_take_the_bytes_of_their_type(saved):
    sizes = {name: len(values) for name, values in safetensors.torch.load(saved.read_bytes()).items()}
    assert sizes == {
        "weight": 8, "zero": 2, "bias": 12, "m": 4, "half": 8, "table": 512, "spare": 4, "extra": 3
    }  # fmt: skip


def test_a_file_that_is_there_is_kept_without_force(saved):
    before = saved.read_bytes()
    with pytest.raises(ExportError, match="exists"):
        save_program(replace(tiny(), codes={}), saved)
    assert saved.read_bytes() == before
    save_program(replace(tiny(), codes={}), saved, force=True)
    assert load_program(saved).codes == {}


def test_a_program_that_is_not_valid_is_not_saved(tmp_path):
    with pytest.raises(LoweringError, match="no register that an instruction writes"):
        save_program(replace(tiny(), outputs={"output": "nowhere"}), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_without_safetensors_one_line_says_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match=r"pip install 'vitquant\[checkpoint\]'"):
        load_program(saved)


# Damage.


def attempt(path) -> p.IntegerProgram | str:
    """A program, or what the one error says: one line that names the file."""
    try:
        return load_program(path)
    except CheckpointError as error:
        text = str(error)
    assert text.startswith(str(path))
    assert len(text.splitlines()) == 1
    assert len(text) < len(str(path)) + 1500
    return text


def refused(path, message: str = "") -> None:
    text = attempt(path)
    assert isinstance(text, str)
    assert message in text


def test_a_file_that_is_missing_or_a_directory_is_named(tmp_path):
    refused(tmp_path / "absent", "is missing")
    refused(tmp_path, "is missing")


def test_every_truncation_is_refused(saved, tmp_path):
    content, path = saved.read_bytes(), tmp_path / "short"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path)


def test_every_flipped_bit_of_some_thousand_is_refused(saved, tmp_path):
    content, path, chance = saved.read_bytes(), tmp_path / "flipped", random.Random(0)
    for _ in range(1500):
        position, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        if chance.random() < 0.3:
            position = chance.randrange(200)  # lengths and offsets
        damaged = bytearray(content)
        damaged[position] ^= bit
        path.write_bytes(damaged)
        found = attempt(path)
        if not isinstance(found, str):  # a bit of safetensors' own header may change nothing
            assert_equal(found, tiny())


def test_random_bytes_are_refused(tmp_path):
    chance = random.Random(1)
    for length in (0, 1, 7, 8, 9, 100, 5000):
        for _ in range(20):
            (tmp_path / "noise").write_bytes(chance.randbytes(length))
            refused(tmp_path / "noise")


def test_other_safetensors_are_refused(tmp_path):
    path = tmp_path / "other"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(3)}))
    refused(path, "no bytes")
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(3, dtype=torch.uint8)}))
    refused(path, "not a saved program")
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(3, dtype=torch.uint8)}, {KEY: "[1]"}))
    refused(path, "no format number")
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(3, 2, dtype=torch.uint8)}, {KEY: "{}"}))
    refused(path, "no bytes")


@pytest.mark.parametrize(
    ("length", "rest"), [(2**63, b""), (2**64 - 1, b"{}"), (2**40, b"{}" * 50), (2**23 + 1, b" " * (2**23 + 1))]
)
def test_a_header_that_is_longer_than_any_is_not_read(tmp_path, length, rest):
    path = tmp_path / "long"
    path.write_bytes(length.to_bytes(8, "little") + rest)
    refused(path, "was truncated")


# Files of someone who knows the format: the checksum is right.


def plain(saved) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    content = saved.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"][KEY]), safetensors.torch.load(content)


def signed(path, values: Any, packed: dict[str, torch.Tensor], text: str | None = None) -> Any:
    """Write a file as `save_program` does, with a checksum of whatever it holds."""
    values.pop("sha256", None)
    body = json.dumps(values) if text is None else text
    body = f'{body[:-1]},"sha256":"'
    found = hashlib.sha256(body.encode())
    for name in sorted(packed):
        found.update(bytes(packed[name].tolist()))
    body += f'{found.hexdigest()}"}}'
    path.write_bytes(safetensors.torch.save(packed, {KEY: body}))
    return path


def test_a_program_signed_by_someone_else_is_loaded(saved, tmp_path):
    """So that what follows is refused for what it holds."""
    assert_equal(load_program(signed(tmp_path / "again", *plain(saved))), tiny())


def test_a_newer_format_asks_for_an_update_whatever_its_checksum(saved, tmp_path):
    values, packed = plain(saved)
    for change in ({"format": 4}, {"format": 10**18}, {"format": 4, "surprise": {}}):
        refused(signed(tmp_path / "new", {**values, **change}, packed), "newer than 3: update vitquant")
    refused(signed(tmp_path / "old", {**values, "format": 2}, packed), "format 2, older than 3: lower its model again")
    for wrong in (0, -1, True, "1", None, 1.0):
        refused(signed(tmp_path / "odd", {**values, "format": wrong}, packed), "format")


def change(values: Any, path: tuple[Any, ...], new: Any) -> None:
    for step in path[:-1]:
        values = values[step]
    values[path[-1]] = new


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (("registers", "weight"), ["s4", [3, 5, 1]], "needs 2 axes"),
        (("registers", "weight"), ["s4", [10**18, 10**18]], "no shape"),
        (("registers", "weight"), ["s4", [2**32, 2**32]], "not have the bytes"),
        (("registers", "weight"), ["s4", [0, 10**9]], "no shape"),
        (("registers", "weight"), ["s4", [-3, -5]], "no shape"),
        (("registers", "weight"), ["s4", [-1, 5]], "not have the bytes"),
        (("registers", "weight"), ["s4", [1] * 100000], "weight[1] = a list of 100000"),
        (("registers", "weight"), ["s4", [True, 5]], "should be an integer"),
        (("registers", "weight"), ["s4", [3.0, 5]], "should be an integer"),
        (("registers", "weight"), ["s4", ["3", 5]], "should be an integer"),
        (("registers", "weight"), ["s4", 15], "weight[1] = 15 should be a list"),
        (("registers", "weight"), ["s8", [3, 5]], "not have the bytes"),
        (("registers", "weight"), ["s5", [3, 5]], "no type"),
        (("registers", "weight"), ["s4"], "should be a list of 2"),
        (("registers", "weight"), [["s4"], [3, 5]], "should be a string"),
        (("registers", "weight"), None, "should be a list of 2"),
        (("registers", "x"), ["u8", [-1, 2**33]], "no shape"),
        (("registers", "x"), ["u8", [-1, 2**31]], "sums over 5 of an input"),
        (("registers", "two\nlines"), ["u8", [1]], "a key = "),
        (("registers", ""), ["u8", [1]], "no name"),
        (("registers", "n" * 5000), ["u8", [1]], "no name"),
        (("registers",), [], "registers = [] should be a table"),
        (("instructions",), {}, "should be a list"),
        (("instructions", 0), [], "instructions[0] = [] should be a table"),
        (("instructions", 0), {"op": ["linear"]}, "instructions[0].op = ['linear'] should be a string"),
        (("instructions", 0, "op"), "attention", "instructions[0].op: unknown 'attention'; did you mean"),
        (("instructions", 0, "op"), "Linear", "unknown 'Linear'; did you mean 'linear'?"),
        (("instructions", 0, "op"), "convolution", "'stride' is missing"),
        (("instructions", 0, "surprise"), 1, "unknown key 'surprise'"),
        (("instructions", 0, "input_zero"), True, "instructions[0].input_zero = True should be an integer"),
        (("instructions", 0, "input_zero"), "128", "should be an integer"),
        (("instructions", 0, "input_zero"), 128.0, "should be an integer"),
        (("instructions", 0, "input_zero"), None, "should be an integer"),
        (("instructions", 0, "input_zero"), 2**63, "should be an integer"),
        (("instructions", 0, "input_zero"), -(10**4000), "an integer of 4002 digits"),
        (("instructions", 0, "bias"), 0, "bias = 0 should be a string"),
        (("instructions", 0, "weight"), None, "weight = None should be a string"),
        (("instructions", 0, "site"), "a\u2028b", "site = "),
        (("instructions", 0, "output"), "z", "register z"),
        (("instructions", 1, "inputs"), "a", "should be a list"),
        (("instructions", 1, "inputs"), [["a"]], "should be a string"),
        (("instructions", 1, "inputs"), ["a"] * 10000, "one multiplier for each"),
        (("instructions", 1, "inputs"), ["z"], "not known before"),
        (("instructions", 1, "shift"), 64, "shift 64"),
        (("instructions", 2, "lowest"), -127, "leave a table"),
        (("instructions", 3, "amounts"), [0] * 10**5, "too many axes"),
        (("instructions", 3, "amounts"), [0, 2**62 - 4], "register z"),
        (("instructions", 3, "amounts"), [0, 2**62 + 1], "amounts"),
        (("instructions", 3, "value"), 65536, "do not fit u16"),
        (("codes",), [], "codes = [] should be a table"),
        (("codes", "head:input"), 5, "= 5 should be a string"),
        (("codes", "head:input"), "nowhere", "no register"),
        (("facts",), None, "facts = None should be a table"),
        (("facts", "input"), 3, "facts: 'input' is what inputs and outputs say"),
        (("inputs", 0, "scale"), "1", "inputs[0].scale = '1' should be a finite number"),
        (("inputs", 0, "scale"), 0, "no scale"),
        (("inputs", 0, "mean"), 0, "unknown key 'mean'"),
        (("inputs",), [], "inputs = [] should be a list of 1"),
        (("outputs",), [], "outputs = [] should be a list of 1 or more"),
        (("outputs",), [{"register": "z", "name": "a"}, {"register": "z", "name": "a"}], "two of them have one name"),
        (("outputs",), [{"register": "z"}], "name"),
        (("outputs", 0, "name"), "\n", "outputs[0].name"),
        (("outputs", 0, "register"), None, "outputs[0].register = None should be a string"),
        (("outputs", 0, "register"), "weight", "output"),
        (("outputs", 0, "scale"), [0.1], "output output: no scale"),
        (("inputs", 0, "register"), "nowhere", "input"),
        (("surprise",), 1, "unknown key 'surprise'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_signed_file_that_holds_no_valid_program_is_refused(saved, tmp_path, path, new, message):
    values, packed = plain(saved)
    change(values, path, new)
    refused(signed(tmp_path / "bad", values, packed), message)


def test_constants_and_bytes_that_do_not_belong_together_are_refused(saved, tmp_path):
    values, packed = plain(saved)
    refused(signed(tmp_path / "bad", values, {**packed, "ghost": torch.zeros(3, dtype=torch.uint8)}), "ghost")
    refused(
        signed(tmp_path / "bad", values, {**packed, "x": torch.zeros(5, dtype=torch.uint8)}),
        "'x' does not have the bytes",
    )
    less = {name: each for name, each in packed.items() if name != "bias"}
    refused(signed(tmp_path / "bad", values, less), "bias 'bias' is not known before")
    for size in (0, 7, 9, 1000):
        refused(signed(tmp_path / "bad", values, {**packed, "weight": torch.zeros(size, dtype=torch.uint8)}), "weight")


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, "[" * 100000 + "]" * 100000,
             '{"a":' * 3000 + "1" + "}" * 3000, '"\\ud800"', "{", "1" + "0" * 4000]
)  # fmt: skip
def test_values_that_python_s_json_cannot_hold_or_follow_are_refused_or_harmless(saved, tmp_path, text):
    values, packed = plain(saved)
    for key in ("facts", "codes", "inputs", "registers", "instructions"):
        kept = {name: each for name, each in values.items() if name not in (key, "sha256")}
        body = json.dumps(kept, sort_keys=True)[:-1] + f',"{key}":{text}}}'
        refused(signed(tmp_path / "bad", values, packed, body))
        if key == "facts":
            body = json.dumps(kept, sort_keys=True)[:-1] + f',"{key}":{{"note":{text}}}}}'
            found = attempt(signed(tmp_path / "bad", values, packed, body))
            assert isinstance(found, str) is (text != '"\\ud800"')  # a file name that is no UTF-8 has such characters
            if not isinstance(found, str):
                save_program(found, tmp_path / "again")
                assert_equal(load_program(tmp_path / "again"), found)


def test_random_changes_of_a_signed_file_are_refused_or_valid(saved, tmp_path):
    """Whatever is loaded runs."""
    chance, loaded = random.Random(2), 0
    odd = [None, True, -1, 0, 1, 2, 3, 63, 2**31, 2**62, -(2**63), 0.5, "", "x", "a", "weight", [], [1], [-1, 3], {}]

    def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [path] * bool(path) + [each for key, below in items for each in places(below, (*path, key))]

    for _ in range(1200):
        values, packed = plain(saved)
        for _ in range(chance.randint(1, 2)):
            change(
                values, chance.choice([place for place in places(values) if place[0] != "facts"]), chance.choice(odd)
            )
        program = attempt(signed(tmp_path / "fuzzed", values, packed))
        if not isinstance(program, str):
            loaded += 1
            Interpreter(program)(torch.full((2, *program.registers[program.input].shape[1:]), 3))
    assert 20 < loaded < 600


def test_what_is_declared_is_not_allocated(saved, tmp_path):
    """Sizes of 10**18 and texts of megabytes cost what the file has."""
    values, packed = plain(saved)
    change(values, ("registers", "x"), ["u8", [-1, 2**32]])
    change(values, ("registers", "weight"), ["s4", [2**31, 2**31]])
    path = signed(tmp_path / "bad", values, packed)
    tracemalloc.start()
    refused(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


LIMITED = """
import resource, sys, time
import torch
from vitquant.errors import CheckpointError
from vitquant.program.storage import load_program
from pathlib import Path
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for name in sys.argv[1:]:
    start = time.process_time()
    try:
        load_program(Path(name))
    except CheckpointError as error:
        print(str(error)[-60:].replace("\\n", "?"))
    assert time.process_time() - start < 20, name
"""


def test_hostile_files_are_refused_within_a_gigabyte_and_seconds(saved, tmp_path):
    paths = []

    def write(name: str, new: Any, *path: Any) -> None:
        values, packed = plain(saved)
        change(values, path, new)
        paths.append(str(signed(tmp_path / name, values, packed)))

    linear = plain(saved)[0]["instructions"][0]
    write("huge", ["u8", [-1, 2**32]], "registers", "x")
    write(
        "many-registers", {**plain(saved)[0]["registers"], **{f"q{n}": ["u8", [1]] for n in range(200000)}}, "registers"
    )
    write("many-sums", [{**linear, "output": f"q{n}"} for n in range(30000)], "instructions")
    write("many-lists", [[]] * 2_500_000, "facts", "odd")
    write("long-name", "n" * 4_000_000, "outputs", 0, "register")
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, *paths], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(run.stdout.splitlines()) >= 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def test_the_real_deit_tiny_in_four_bits_is_half_its_size(shared, tmp_path):
    from vitquant.zoo import ModelSource, create

    weights = str(shared / "weights" / "deit_tiny_patch16_224.safetensors")
    model = create(ModelSource("timm:deit_tiny_patch16_224", weights=weights))
    sizes = {}
    for bits in ("w8a8s4", "w4a8s4"):
        program = lower(vitquant.quantize(model, "fq-vit", [torch.randn(2, 3, 224, 224)], bits=bits))
        save_program(program, tmp_path / bits)
        sizes[bits] = (tmp_path / bits).stat().st_size
        assert_equal(load_program(tmp_path / bits), program)
    assert sizes["w8a8s4"] < 6.4e6
    assert sizes["w4a8s4"] < 3.6e6
