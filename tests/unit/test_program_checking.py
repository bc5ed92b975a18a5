"""Programs that are not valid are refused by name, one for each thing that can be wrong."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import timm
import torch
from small_programs import everything, one, program

import vitquant
from vitquant.errors import LoweringError
from vitquant.lowering import lower
from vitquant.program import instructions as p
from vitquant.program.checking import check_program
from vitquant.runtime.interpreter import Interpreter


def changed(site: str, **given: object) -> p.IntegerProgram:
    """`everything` with other fields in the last instruction of a site that has them."""
    whole = everything()
    has = [
        index
        for index, each in enumerate(whole.instructions)
        if each.site == site and given.keys() <= {field.name for field in fields(each)}
    ]
    steps = list(whole.instructions)
    steps[has[-1]] = replace(steps[has[-1]], **given)  # type: ignore[arg-type]
    return replace(whole, instructions=tuple(steps))


def test_a_valid_program_is_not_refused_and_runs():
    check_program(everything())
    codes = torch.randint(0, 256, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    assert len(Interpreter(everything())(codes).unique()) >= 4


CHANGES = [
    ("query", {"inputs": ("w",)}, "inputs 'w' is not known before"),
    ("query", {"inputs": ("nowhere",)}, "inputs 'nowhere' is not known before"),
    ("query", {"inputs": ()}, "one multiplier for each input"),
    ("query", {"multipliers": ("m", "m")}, "one multiplier for each input"),
    ("query", {"multipliers": ("q",)}, "'q' is not known before"),
    ("scores", {"multipliers": ("q",)}, "multipliers q is no constant"),
    ("query", {"multipliers": ("half",)}, "half is not of s32"),
    ("query", {"shift": 0}, "shift 0 is not from 1 to 62"),
    ("query", {"shift": 63}, "shift 63 is not from 1 to 62"),
    ("query", {"low": 9, "high": 8}, "nothing lies from 9 to 8"),
    ("query", {"high": 256}, "values from 0 to 256 do not fit u8"),
    ("query", {"low": -1}, "values from -1 to 255 do not fit u8"),
    ("query", {"output": "a"}, "register a is written twice"),
    ("query", {"output": "x"}, "register x is written twice"),
    ("query", {"output": "bias"}, "register bias is written twice"),
    ("query", {"output": "z"}, "no register 'z'"),
    ("query", {"axes": (0, 1, 2)}, r"register k is of \(-1, 4, 5\), not \(-1, 5, 4\)"),
    ("query", {"axes": (0, 1, 1)}, "takes axes"),
    ("query", {"axes": (0, 2)}, "takes axes"),
    ("query", {"axes": (0, 2, 16)}, "axes 16 is not from 0 to 15"),
    ("linear", {"weight": "x"}, "weight x is no constant"),
    ("linear", {"weight": "bias"}, "needs 2 axes"),
    ("linear", {"bias": "gain"}, "bias for each of 5"),
    ("linear", {"weight_zero": "powers"}, "reads"),
    ("linear", {"input_zero": 2**40}, "do not fit s32"),
    ("linear", {"input_zero": 2**63}, "input_zero"),
    ("linear", {"input_zero": 2**62}, "may exceed 64 bits"),
    ("scores", {"right": "q"}, r"is of \(-1, 4, 5\) and \(-1, 4, 5\)"),
    ("scores", {"left": "factors"}, "is of no matrices"),
    ("context", {"left_zero": -(2**22)}, "do not fit s32"),
    ("softmax", {"zero": 17}, "zero 17 is not from 1 to 16"),
    ("softmax", {"zero": 16}, "do not fit u4"),
    ("softmax", {"zero": 0}, "zero 0 is not from 1 to 32"),
    ("softmax", {"zero": 33, "steps": 2}, "zero 33 is not from 1 to 32"),
    ("softmax", {"steps": 0}, "steps 0 is not from 1 to 2"),
    ("softmax", {"steps": 3}, "steps 3 is not from 1 to 2"),
    ("softmax", {"offset": 2**17 + 1}, "offset 131073 is not from -131072 to 131072"),
    ("softmax", {"offset": -(2**17) - 1}, "offset -131073 is not from"),
    ("softmax", {"steps": 2, "published": True}, "published rounding is to powers of two that begin at 1"),
    ("softmax", {"offset": 1, "published": True}, "published rounding is to powers of two that begin at 1"),
    ("softmax", {"octaves": "values"}, "values is not of s32"),
    ("softmax", {"values": "powers"}, "tables of 16 and 257"),
    ("softmax", {"values": "square"}, "square is not of u16"),
    ("softmax", {"mask": "factors"}, "is not 0 or 1"),
    ("softmax", {"mask": "gain"}, "is not 0 or 1"),
    ("softmax", {"table": "values", "lowest": 1}, "codes from 0 to 15 leave a table of 1 to 257"),
    ("activation", {"table": "powers"}, "codes from 0 to 255 leave a table of 0 to 15"),
    ("activation", {"table": "weight"}, "needs 1 axes"),
    ("mean", {"axes": ()}, "has axes"),
    ("mean", {"axes": (0,)}, "takes axes"),
    ("mean", {"axes": (1, 1)}, "has axes"),
    ("mean", {"keep": True}, "register t is of"),
    ("norm", {"input_zero": -1}, "inputs up to 2048 exceed 1984"),
    ("norm", {"largest": 1983}, "inputs up to 1984 exceed 1983"),
    ("norm", {"largest": 2**28}, "are too many"),
    ("norm", {"epsilon": 0}, "epsilon 0"),
    ("norm", {"epsilon": 2**60 + 1}, "epsilon"),
    ("norm", {"factors": "gain"}, "gain is not from 0 to 31"),
    ("norm", {"multiplier": "shift"}, "shift is not of s32"),
    ("norm", {"multiplier": "powers"}, "not of s32"),
    ("norm", {"addend": "bias"}, r"reads \(6,\) beside \(5,\)"),
]


@pytest.mark.parametrize(("site", "given", "message"), CHANGES, ids=lambda value: str(value)[:40])
def test_an_instruction_that_is_not_valid_is_refused_by_its_site(site, given, message):
    with pytest.raises(LoweringError, match=message) as refused:
        check_program(changed(site, **given))
    assert site in str(refused.value)


@pytest.mark.parametrize("site", ["", "two\nlines", "\x1b[2J", "long" * 1000])
def test_a_site_that_cannot_be_printed_is_refused(site):
    whole = everything()
    steps = (replace(whole.instructions[0], site=site), *whole.instructions[1:])
    with pytest.raises(LoweringError, match="no site that can be printed") as refused:
        check_program(replace(whole, instructions=steps))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 200


SMALL = {"gain": torch.full((6,), 2**31 - 1), "weight": torch.full((5, 6), 127)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"registers": {**w.registers, "spare": p.Register("u8", (2,))}}, "spare: a register that is never"),
        (lambda w: {"registers": {**w.registers, "x": p.Register("u8", (4, 6))}}, "input: no register whose first"),
        (lambda w: {"registers": {**w.registers, "x": p.Register("u9", (-1, 4, 6))}}, "x: no type 'u9'"),
        (lambda w: {"registers": {**w.registers, "q": p.Register("u8", (-1, 4, -1))}}, "two sizes"),
        (lambda w: {"registers": {**w.registers, "q": p.Register("u8", (-1, 4, 0))}}, "q: no shape"),
        (lambda w: {"registers": {**w.registers, "q": p.Register("u8", (-2, 4, 5))}}, "q: no shape"),
        (lambda w: {"registers": {**w.registers, "q": p.Register("u8", (-1, 10**18))}}, "q: no shape"),
        (lambda w: {"registers": {**w.registers, "q": p.Register("u8", (-1,) + (1,) * 99)}}, "q: no shape"),
        (lambda w: {"registers": {**w.registers, "a\nb": p.Register("u8", (1,))}}, "no name that can be printed"),
        (lambda w: {"registers": {**w.registers, "bias": p.Register("u8", (5,))}}, "from 0 to 400 are not u8"),
        (lambda w: {"registers": {**w.registers, "bias": p.Register("s32", (1, 5))}}, r"bias: torch.int64 of \(5,\)"),
        (lambda w: {"constants": {**w.constants, "bias": torch.zeros(5)}}, "bias: torch.float32"),
        (lambda w: {"constants": {**w.constants, "spare": torch.zeros(5).long()}}, "a constant without a register"),
        (lambda w: {"input": "bias"}, "input: no register"),
        (lambda w: {"input": "nowhere"}, "input: no register"),
        (lambda w: {"outputs": {"output": "nowhere"}}, "output output: no register that an instruction writes"),
        (lambda w: {"outputs": {"output": "x"}}, "output output: no register that an instruction writes"),
        (lambda w: {"outputs": {"output": "bias"}}, "output output: no register that an instruction writes"),
        (lambda w: {"outputs": {}}, "outputs: 0 are not from 1 to 1024"),
        (lambda w: {"outputs": {str(n): "y" for n in range(1025)}}, "outputs: 1025 are not from 1 to 1024"),
        (lambda w: {"outputs": {"a\nb": "y"}}, "no name of an output that can be printed"),
        (lambda w: {"facts": {"outputs": {"other": {"scale": [0.1], "zero_point": 0}}}}, "outputs: the facts name"),
        (lambda w: {"facts": {"outputs": []}}, "outputs: the facts name"),
        (lambda w: {"codes": {"norm:input": "nowhere"}}, "no register 'nowhere'"),
        (lambda w: {"codes": {"two\nlines": "x"}}, "codes: no register 'x' for"),
        (lambda w: {"facts": {"input": {"scale": 0.0, "zero_point": 0}}}, "input: no scale"),
        (lambda w: {"facts": {"input": {**w.facts["input"], "zero_point": 2**31}}}, "input: no scale"),
        (lambda w: {"facts": {"input": {"scale": [0.1], "zero_point": 0}}}, "input: no scale"),
        (lambda w: {"facts": {"input": {"scale": 0.1, "zero_point": 0.5}}}, "input: no scale"),
        (
            lambda w: {"facts": {"outputs": {"output": {"scale": [0.1, 0.1], "zero_point": 0}}}},
            "output output: no scale",
        ),
        (
            lambda w: {"facts": {"outputs": {"output": {"scale": [float("nan")], "zero_point": 0}}}},
            "output output: no scale",
        ),
        (lambda w: {"facts": {"outputs": {"output": []}}}, "output output: no scale"),
        (lambda w: {"facts": {"input": {**w.facts["input"], "mean": 0}}}, "input: no scale"),
        (
            lambda w: {"facts": {"outputs": {"output": {**w.facts["outputs"]["output"], "low": 0}}}},
            "output output: no scale",
        ),
        (lambda w: {"facts": {"input": {"scale": 0.1, "zero_point": 0}}}, "input: no scale and zero point, lowest"),
        (lambda w: {"facts": {"input": {**w.facts["input"], "high": 256}}}, "input: no lowest and highest code"),
        (lambda w: {"facts": {"input": {**w.facts["input"], "low": 255}}}, "input: no lowest and highest code"),
        (lambda w: {"facts": {"input": {**w.facts["input"], "low": "0"}}}, "input: no lowest and highest code"),
        (
            lambda w: {"constants": {**w.constants, "gain": SMALL["gain"], "shift": torch.full((6,), 2**63 - 1)}},
            "affine part may exceed 64 bits",
        ),
    ],
)
def test_a_program_that_is_not_valid_is_refused(change, message):
    whole = everything()
    with pytest.raises(LoweringError, match=message):
        check_program(replace(whole, **change(whole)))


def test_an_instruction_of_another_class_is_refused():
    class Surprise(p.Linear):
        pass

    whole = everything()
    with pytest.raises(LoweringError, match="no instruction Surprise"):
        check_program(replace(whole, instructions=(Surprise("x1", "here", "x", "w", None, 0, None),)))


@pytest.mark.parametrize(
    ("shape", "to", "message"),
    [
        ((-1, 4, 6), (6, -1, 4), "mixes images"),
        ((-1, 4, 6), (24,), "does not fit"),
        ((-1, 4, 6), (-1, 5), "does not fit"),
        ((-1, 4, 6), (-1, -1), "is no shape"),
        ((-1, 4, 6), (-1, 0), "is no shape"),
        ((-1, 4, 6), (-1, -4, 6), "shape -4 is not from -1"),
        ((-1, 4, 6), (-1, *[1] * 40), "too many axes"),
    ],
)
def test_a_reshape_that_does_not_fit_or_mixes_images_is_refused(shape, to, message):
    with pytest.raises(LoweringError, match=message):
        check_program(one(p.Reshape("y", "here", "x", to), p.Register("u8", (-1, 24)), shape))


@pytest.mark.parametrize(
    "step",
    [
        p.Slice("y", "here", "x", 1, 2, 2, 1),
        p.Slice("y", "here", "x", 1, -1, 2, 1),
        p.Slice("y", "here", "x", 1, 0, 5, 1),
        p.Slice("y", "here", "x", 1, 0, 4, 0),
        p.Slice("y", "here", "x", 0, 0, 1, 1),
        p.Slice("y", "here", "x", 3, 0, 1, 1),
        p.Roll("y", "here", "x", (1,), (0,)),
        p.Roll("y", "here", "x", (1, 2), (1,)),
        p.Roll("y", "here", "x", (), ()),
        p.Pad("y", "here", "x", (0, 0, 0, 0, 1, 0), 0),
        p.Pad("y", "here", "x", (1,), 0),
        p.Pad("y", "here", "x", (-1, 0), 0),
        p.Pad("y", "here", "x", (0,) * 8, 0),
        p.Pad("y", "here", "x", (), 0),
        p.Pad("y", "here", "x", (1, 1), 256),
        p.Pad("y", "here", "x", (2**62, 2**62), 0),
        p.Concat("y", "here", (), 1),
        p.Concat("y", "here", ("x", "x"), 0),
        p.Concat("y", "here", ("x", "x"), 3),
        p.Concat("y", "here", ("x", "c"), 1),
        p.Concat("y", "here", ("x", "d"), 1),
        p.Multiply("y", "here", "x", "c", 0, 0),
        p.Sum("y", "here", "x", (0,), True, 0),
        p.Convolution("y", "here", "x", "c", None, 0, None, (1, 1), (0, 0), (1, 1), 1),
    ],
    ids=str,
)
def test_a_move_that_no_register_can_make_is_refused(step):
    others = {"c": torch.zeros(1, 5, 7, dtype=torch.int64), "d": torch.zeros(2, 4, 6, dtype=torch.int64)}
    for shape in ((-1, 4, 6), (-1, 4, 7), (-1, 8, 6), (-1, 5, 6)):
        with pytest.raises(LoweringError, match="here"):
            check_program(one(step, p.Register("u8", shape), **others))


@pytest.mark.parametrize(
    "given",
    [
        {"stride": (0, 1)},
        {"stride": (1,)},
        {"padding": (-1, 0)},
        {"dilation": (1, 0)},
        {"groups": 0},
        {"groups": 2},
        {"groups": 4},
        {"dilation": (4, 1)},
        {"bias": "d"},
        {"weight_zero": "w"},
        {"padding": (0, 0, 0)},
    ],
)
def test_a_convolution_that_does_not_fit_is_refused(given):
    step = p.Convolution("y", "here", "x", "c", None, 0, None, (1, 1), (1, 1), (1, 1), 1)
    weight = {"c": torch.ones(2, 3, 3, 3).long(), "d": torch.ones(3).long(), "w": torch.ones(2, 3, 3, 3, 1).long()}
    written = p.Register("s32", (-1, 2, 5, 5))
    check_program(one(step, written, (-1, 3, 5, 5), **weight))
    with pytest.raises(LoweringError, match="here"):
        check_program(one(replace(step, **given), written, (-1, 3, 5, 5), **weight))


def test_a_convolution_that_cuts_its_images_is_refused():
    step = p.Convolution("y", "here", "x", "c", None, 0, None, (1, 1), (-1, 1), (1, 1), 1)
    with pytest.raises(LoweringError, match="here: padding -1 is not from 0"):
        check_program(one(step, p.Register("s32", (-1, 2, 1, 5)), (-1, 3, 5, 5), c=torch.ones(2, 3, 3, 3).long()))


def test_groups_that_do_not_divide_the_outputs_are_refused():
    step = p.Convolution("y", "here", "x", "c", None, 0, None, (1, 1), (1, 1), (1, 1), 2)
    for outputs, valid in ((2, True), (4, True), (3, False)):
        weight, written = torch.ones(outputs, 2, 3, 3).long(), p.Register("s32", (-1, outputs, 5, 5))
        made = one(step, written, (-1, 4, 5, 5), c=weight)
        if valid:
            check_program(made)
        else:
            with pytest.raises(LoweringError, match="has 2 groups for 4 channels"):
                check_program(made)


def test_images_are_neither_padded_nor_summed_nor_behind_another_axis():
    with pytest.raises(LoweringError, match="here: pad is along the batch"):
        check_program(one(p.Pad("y", "here", "x", (0, 0, 0, 0, 3, 0), 0), p.Register("u8", (2, 4, 6))))
    with pytest.raises(LoweringError, match=r"output output: its first size is not the batch but that of \(4, -1, 6\)"):
        check_program(one(p.Permute("y", "here", "x", (1, 0, 2)), p.Register("u8", (4, -1, 6))))
    steps = (
        p.Permute("l", "left", "x", (1, 2, 0)),
        p.Permute("r", "right", "x", (1, 0, 2)),
        p.Product("y", "product", "l", "r", 0, 0),
    )
    registers = {
        "l": p.Register("u8", (4, 6, -1)),
        "r": p.Register("u8", (4, -1, 6)),
        "y": p.Register("s32", (4, 6, 6)),
    }
    with pytest.raises(LoweringError, match="product: product is of"):
        check_program(program(*steps, registers=registers, constants={}))


def test_so_many_elements_that_no_machine_runs_them_are_refused():
    steps = [p.Pad("r0", "here", "x", (0, 2**28), 0), p.Concat("r1", "here", ("r0",) * 9, 1)]
    registers = {"r0": p.Register("u8", (-1, 1, 2**28 + 1)), "r1": p.Register("u8", (-1, 9, 2**28 + 1))}
    whole = program(*steps, registers={"x": p.Register("u8", (-1, 1, 1)), **registers}, constants={})
    with pytest.raises(LoweringError, match="more than 4294967296 elements"):
        check_program(whole)


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("recipe", ["fq-vit", "fq-vit+uniform-probs+uniform-norm-inputs"])
def test_what_is_lowered_is_valid(name, recipe):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "num_classes": 10}
    if name == "vit":
        model = timm.models.vision_transformer.VisionTransformer(
            patch_size=8, embed_dim=32, depth=1, num_heads=2, **sizes
        )
    else:
        model = timm.models.swin_transformer.SwinTransformer(
            patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), **sizes
        )
    check_program(lower(vitquant.quantize(model.eval(), recipe, [torch.randn(4, 3, 32, 32)])))


@pytest.mark.parametrize("octave", [-1, 2**18])
def test_octaves_beyond_the_table_s_own_are_refused(octave):
    whole = everything()
    octaves = whole.constants["octaves"].clone()
    octaves[3] = octave
    with pytest.raises(LoweringError, match="softmax: octaves is not from 0 to 262143"):
        check_program(replace(whole, constants={**whole.constants, "octaves": octaves}))
