"""`vitquant inspect --program`: a saved model's program, and a program's file; what is no program is refused."""

import json

import pytest
import saved_models
import timm
import torch
from safetensors.torch import load, save
from small_programs import everything

import vitquant
from vitquant.program.storage import FORMAT, plain, save_program, sealed
from vitquant.program.text import text_form

KEY = "vitquant_program"


@pytest.fixture
def file(tmp_path):
    save_program(everything(), tmp_path / "small.program")
    return tmp_path / "small.program"


def test_a_file_is_shown_line_by_line_however_wide_they_are(run, file):
    code, out, err = run("inspect", file, "--program")
    assert (code, err) == (0, "")
    assert out.splitlines() == text_form(everything())
    assert max(map(len, out.splitlines())) > 140


def test_as_json_it_is_what_the_file_holds(run, file):
    code, out, _ = run("inspect", file, "--program", "--json")
    assert code == 0
    assert json.loads(out) == {"program": json.loads(json.dumps(plain(everything()))), "text": text_form(everything())}


def test_a_saved_model_s_lines_have_the_scales_of_its_codes(run):
    code, out, err = run("inspect", saved_models.folder("vit fq-vit"), "--program")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("input input: u8[N, 3, 32, 32]  # scale 0.0")
    assert lines[-1].startswith("output output = r")
    query = next(line for line in lines if "# blocks.0.attn.qkv" in line and "= requantize(" in line)
    assert " *0.0" in query
    assert "  # blocks.0.attn.qkv scale 0.0" in query
    steps = vitquant.load(saved_models.folder("vit fq-vit")).quantizers["patch_embed:weight"].step
    scales = f"{float(steps.min()):.6g}..{float(steps.max()):.6g}"
    assert f"weight=patch_embed:weight.1: s8[24, 3, 16, 16] scale {scales}, bias=" in lines[1]


def test_a_model_that_does_not_lower_has_no_program(run, tmp_path):
    made = vitquant.ModelSource("timm:vit_tiny_patch16_224", saved_models.PLAIN, "random")
    model = timm.create_model("vit_tiny_patch16_224", **saved_models.PLAIN).eval()
    vitquant.quantize(model, "minmax", [torch.randn(2, 3, 32, 32)], source=made).save(tmp_path / "float")
    code, out, err = run("inspect", tmp_path / "float", "--program")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"error: {tmp_path / 'float'} has no integer program: blocks.0.norm1" in err


def forged(file, change):
    """The same file, signed again after a change of its JSON."""
    packed = load(file.read_bytes())
    values = json.loads(json.dumps(plain(everything())))
    change(values)
    file.write_bytes(save(packed, {KEY: sealed(values, packed)}))
    return file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["instructions"][0].update(op="attention"), "instructions[0].op: unknown 'attention'"),
        (lambda v: v.update(format=FORMAT + 1), f"it has format {FORMAT + 1}, newer than {FORMAT}: update vitquant"),
        (lambda v: v.update(format=FORMAT - 1), f"it has format {FORMAT - 1}, older than {FORMAT}: lower its model ag"),
        (lambda v: v["instructions"][0].pop("epsilon"), "instructions[0]: 'epsilon' is missing"),
        (lambda v: v["instructions"][0].update(shift=0), "norm: shift 0 is not from 1 to 62; the program is not valid"),
    ],
)
def test_what_is_no_program_of_this_format_is_one_line_and_exit_code_2(run, file, change, said):
    code, out, err = run("inspect", forged(file, change), "--program")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {file}: {said}")
