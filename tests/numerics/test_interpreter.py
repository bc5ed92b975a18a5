"""The interpreter against Python's integers, and its fast products against int64, with extreme operands."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitquant.errors import CaptureError
from vitquant.packing import packed_size
from vitquant.program import instructions as p
from vitquant.program.checking import check_program
from vitquant.program.ranges import Terms, prove_terms
from vitquant.program.shapes import written_shape
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.products import exact_dtype, exact_int64, exact_products, operand

law = settings(max_examples=60, deadline=None)
CODES = ("u4", "s4", "u8", "s8", "u16", "s16")


def one(step: p.Instruction, given: str, shape: tuple[int, ...], **constants: tuple[str, Tensor]) -> p.IntegerProgram:
    """A program of one instruction that reads codes `x` and writes s64 `y`."""
    registers = {"x": p.Register(given, (-1, *shape))}
    registers |= {name: p.Register(kind, tuple(values.shape)) for name, (kind, values) in constants.items()}
    shapes = {name: register.shape for name, register in registers.items()}
    registers["y"] = p.Register("s64", tuple(max(size, -1) for size in written_shape(step, shapes)))
    made = p.IntegerProgram(
        "x", {"output": "y"}, registers, {name: values for name, (_, values) in constants.items()}, (step,)
    )
    check_program(made)
    return made


def extreme(random: torch.Generator, kind: str, *shape: int) -> Tensor:
    """Noise of a type, or its two extremes mixed, or one of them."""
    low, high = p.type_limits(kind)
    noise = torch.randint(low, high + 1, shape, generator=random)
    choice = int(torch.randint(0, 4, (), generator=random))
    return [noise, torch.where(noise % 2 == 0, low, high), torch.full(shape, low), torch.full(shape, high)][choice]


def exact(x: Tensor) -> np.ndarray:
    """As Python's integers."""
    return np.array(x.tolist(), dtype=object).reshape(tuple(x.shape))


def assert_computes(program: p.IntegerProgram, codes: Tensor, expected: np.ndarray) -> None:
    for products in (exact_int64, exact_products):
        found = Interpreter(program, products)(codes)
        assert found.dtype == torch.int64
        assert found.tolist() == expected.tolist(), products


SEEDS, KINDS = st.integers(0, 2**31), st.sampled_from(CODES)


@law
@given(SEEDS, KINDS, KINDS, st.sampled_from([None, *CODES]), st.booleans())
def test_linear(seed: int, kind: str, weights: str, zeros: str | None, biased: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    outputs, summed = (int(n) for n in torch.randint(1, 70, (2,), generator=random))
    x, weight = extreme(random, kind, 3, 2, summed), extreme(random, weights, outputs, summed)
    constants = {"w": (weights, weight)}
    low, high = p.type_limits(kind)
    input_zero = int(torch.randint(low, high + 1, (), generator=random))
    expected = (exact(x) - input_zero) @ exact(weight).T
    if zeros is not None:
        zero = extreme(random, zeros, outputs, 1)
        constants["z"] = (zeros, zero)
        expected = (exact(x) - input_zero) @ (exact(weight) - exact(zero)).T
    if biased:
        bias = extreme(random, "s32", outputs)
        constants["b"] = ("s32", bias)
        expected = expected + exact(bias)
    step = p.Linear("y", "here", "x", "w", "b" if biased else None, input_zero, "z" if zeros else None)
    assert_computes(one(step, kind, (2, summed), **constants), x, expected)


@law
@given(SEEDS, KINDS, KINDS, st.booleans())
def test_product(seed: int, kind: str, other: str, swapped: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    rows, summed, columns = (int(n) for n in torch.randint(1, 40, (3,), generator=random))
    x = extreme(random, kind, 2, 3, rows, summed)
    right = extreme(random, other, 3, summed, columns)
    zeros = [int(extreme(random, which)) for which in (kind, other)]
    expected = np.matmul(exact(x) - zeros[0], exact(right) - zeros[1])
    step, codes = p.Product("y", "here", "x", "r", *zeros), x
    if swapped:  # (r.T x.T).T
        step, codes, right = p.Product("y", "here", "r", "x", zeros[1], zeros[0]), x.mT, right.mT.contiguous()
        expected = np.swapaxes(expected, -1, -2)
    assert_computes(one(step, kind, tuple(codes.shape[1:]), r=(other, right)), codes, expected)


@law
@given(SEEDS, st.sampled_from(CODES), st.sampled_from(CODES), st.booleans(), st.booleans())
def test_convolution(seed: int, kind: str, weights: str, has_zero: bool, biased: bool) -> None:
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    groups, inputs, outputs = draw(1, 3), draw(1, 3), draw(1, 3)
    kernel, stride, dilation, padding = ((draw(low, 3), draw(low, 3)) for low in (1, 1, 1, 0))
    sizes = tuple(draw(max(1, d * (k - 1) + 1 - 2 * a), 9) for k, d, a in zip(kernel, dilation, padding, strict=True))
    x = extreme(random, kind, 2, groups * inputs, *sizes)
    weight = extreme(random, weights, groups * outputs, inputs, *kernel)
    input_zero = int(extreme(random, kind))
    zero, bias = extreme(random, weights, groups * outputs, 1, 1, 1), extreme(random, "s32", groups * outputs)
    constants = {"w": (weights, weight)} | ({"z": (weights, zero)} if has_zero else {})
    constants |= {"b": ("s32", bias)} if biased else {}
    step = p.Convolution(
        "y", "here", "x", "w", "b" if biased else None, input_zero, "z" if has_zero else None, stride, padding,
        dilation, groups,
    )  # fmt: skip
    kernels = exact(weight) - (exact(zero) if has_zero else 0)
    padded = np.full((2, groups * inputs, *(s + 2 * a for s, a in zip(sizes, padding, strict=True))), 0, dtype=object)
    padded[:, :, padding[0] : padding[0] + sizes[0], padding[1] : padding[1] + sizes[1]] = exact(x) - input_zero
    ends = [padded.shape[2 + axis] - dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
    rows, columns = (range(0, ends[axis], stride[axis]) for axis in (0, 1))
    expected = np.empty((2, groups * outputs, len(rows), len(columns)), dtype=object)
    for output in range(groups * outputs):
        first = output // outputs * inputs
        for a, row in enumerate(rows):
            for b, column in enumerate(columns):
                window = padded[:, first : first + inputs, row:, column:]
                window = window[:, :, : dilation[0] * kernel[0] : dilation[0], : dilation[1] * kernel[1] : dilation[1]]
                value = (window[:, :, : kernel[0], : kernel[1]] * kernels[output]).sum((1, 2, 3))
                expected[:, output, a, b] = value + (int(bias[output]) if biased else 0)
    assert_computes(one(step, kind, tuple(x.shape[1:]), **constants), x, expected)


@law
@given(SEEDS, KINDS, KINDS)
def test_multiply_and_sum(seed: int, kind: str, other: str) -> None:
    random = torch.Generator().manual_seed(seed)
    x, right = extreme(random, kind, 2, 3, 4, 5), extreme(random, other, 3, 1, 5)
    zeros = [int(extreme(random, which)) for which in (kind, other)]
    step = p.Multiply("y", "here", "x", "r", *zeros)
    expected = (exact(x) - zeros[0]) * (exact(right) - zeros[1])
    assert_computes(one(step, kind, (3, 4, 5), r=(other, right)), x, expected)
    for axes, keep in (((1,), False), ((2, 3), True), ((3, 1), False), ((1, 2, 3), True)):
        summed = p.Sum("y", "here", "x", axes, keep, zeros[0])
        assert_computes(one(summed, kind, (3, 4, 5)), x, (exact(x) - zeros[0]).sum(axes, keepdims=keep))


@law
@given(SEEDS, st.integers(1, 62), st.sampled_from(["u8", "s16", "s32"]))
def test_requantize_is_one_floor_of_an_exact_sum(seed: int, shift: int, kind: str) -> None:
    """Of two inputs with a multiplier for each channel: nothing is rounded in between."""
    random = torch.Generator().manual_seed(seed)
    digits = 62 - 2 - p.TYPES[kind][0]
    x, y = extreme(random, kind, 4, 2, 6), extreme(random, kind, 1, 2, 6)
    most = (1 << min(31, digits)) - 1
    m, n = (torch.randint(-most, most + 1, (6,), generator=random) for _ in range(2))
    m[0], m[1], n[0] = most, -most, most
    addend = torch.randint(-(2**60), 2**60, (2, 1), generator=random)
    constants = {"r": (kind, y), "m": ("s32", m), "n": ("s32", n), "a": ("s64", addend)}
    low, high = -(2 ** int(torch.randint(1, 62, (), generator=random))), 2**62
    step = p.Requantize("y", "here", ("x", "r"), ("m", "n"), "a", shift, low, high)
    expected = (exact(x) * exact(m) + exact(y) * exact(n) + exact(addend)) >> shift
    assert_computes(one(step, kind, (2, 6), **constants), x, np.clip(expected, low, high))


# What a multiplier and an addend of (heads, rows, channels) may be given for.
GRANULARITIES = {
    "tensor": (), "channel": (5,), "row": (4, 1), "head": (3, 1, 1), "head and channel": (3, 1, 5),
    "row and channel": (4, 5), "element": (3, 4, 5), "channel, of every image": (1, 1, 1, 5),
}  # fmt: skip


@law
@given(SEEDS, st.lists(st.sampled_from(sorted(GRANULARITIES)), min_size=2, max_size=4), st.integers(1, 40))
def test_multipliers_vary_by_tensor_channel_row_or_head(seed: int, names: list[str], shift: int) -> None:
    """Each input of a requantization in its own way, and the addend in another."""
    random = torch.Generator().manual_seed(seed)
    shapes = [GRANULARITIES[name] for name in names]
    x, others = extreme(random, "s16", 2, 3, 4, 5), [extreme(random, "s16", 3, 4, 5) for _ in names[2:]]
    multipliers = [extreme(random, "s32", *shape) for shape in shapes[1:]]
    addend = torch.randint(-(2**50), 2**50, shapes[0], generator=random)
    constants = {f"m{n}": ("s32", values) for n, values in enumerate(multipliers)}
    constants |= {f"r{n}": ("s16", values) for n, values in enumerate(others, 1)} | {"a": ("s64", addend)}
    inputs, factors = (
        ("x", *(f"r{n}" for n in range(1, len(multipliers)))),
        tuple(f"m{n}" for n in range(len(multipliers))),
    )
    total = exact(addend)
    for values, multiplier in zip([x, *others], multipliers, strict=True):
        total = total + exact(values) * exact(multiplier)
    step = p.Requantize("y", "here", inputs, factors, "a", shift, -(2**40), 2**40)
    assert_computes(one(step, "s16", (3, 4, 5), **constants), x, np.clip(total >> shift, -(2**40), 2**40))


@pytest.mark.parametrize("kind", CODES)
def test_lookup_has_an_entry_for_every_code(kind: str) -> None:
    low, high = p.type_limits(kind)
    table = torch.randint(-(2**31), 2**31, (high - low + 1,), generator=torch.Generator().manual_seed(0))
    program = one(p.Lookup("y", "here", "x", "t", low), kind, (high - low + 1,), t=("s32", table))
    assert torch.equal(Interpreter(program)(torch.arange(low, high + 1)[None])[0], table)


# Which dtype, and that it is exact there.


@pytest.mark.parametrize(
    ("total", "digits", "dtype"),
    [
        (2**24 - 1, 8, torch.float32), (2**24, 8, torch.float64), (2**24 - 1, 9, torch.float64),
        (2**53 - 1, 30, torch.float64), (2**53, 8, torch.int64), (2**70, 8, torch.int64), (0, 1, torch.float32),
    ],
)  # fmt: skip
def test_dtypes_by_their_bounds(total: int, digits: int, dtype: torch.dtype) -> None:
    assert exact_dtype(Terms(total, digits)) is dtype


def boundary(kind: str, weights: str, summed: int, last: int) -> tuple[p.IntegerProgram, Tensor]:
    """A sum of the largest products of a type, and a bias that is added last: odd, so that no digit may be lost."""
    (_, high), (_, most) = p.type_limits(kind), p.type_limits(weights)
    weight = torch.full((2, summed), most)
    weight[1, ::2] = p.type_limits(weights)[0]
    step = p.Linear("y", "here", "x", "w", "b", 0, None)
    bias = torch.tensor([last, last])
    program = one(step, kind, (1, summed), w=(weights, weight), b=("s64", bias))
    codes = torch.full((3, 1, summed), high)
    codes[1, :, 1::2] = 0
    codes[2, :, ::3] = p.type_limits(kind)[0]
    return program, codes


@pytest.mark.parametrize(
    ("kind", "weights", "summed", "dtype"),
    [
        ("u8", "s8", 516, torch.float32), ("u8", "s8", 517, torch.float64), ("u4", "s4", 140_000, torch.float32),
        ("u8", "s16", 3, torch.float64), ("s32", "s16", 127, torch.float64), ("s32", "s16", 129, torch.int64),
    ],
)  # fmt: skip
def test_sums_at_the_bound_of_a_dtype_are_exact(kind: str, weights: str, summed: int, dtype: torch.dtype) -> None:
    program, codes = boundary(kind, weights, summed, 1)
    expected = exact(codes) @ exact(program.constants["w"]).T + 1
    bound = prove_terms(program)["y"].total
    assert exact_products(program)["y"] is dtype
    assert bound >= max(map(abs, expected.flatten()))
    assert_computes(program, codes, expected)


def test_float32_is_wrong_one_step_above_its_bound() -> None:
    """Or the bound would protect nothing."""
    x, weight = torch.full((1, 600), 255), torch.full((1, 600), 127)
    x[0, 0], weight[0, 0] = 2, 1  # the sum is odd
    assert int(x @ weight.T) != int(x.float() @ weight.float().T)


def test_other_devices_get_float64() -> None:
    """There float32 may be TF32, or be added in less than float32."""
    for device, dtype in (("meta", torch.float64), ("cpu", torch.float32)):
        for zero in (None, 3):
            assert operand(torch.zeros(3, dtype=torch.int8, device=device), zero, torch.float32).dtype is dtype


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_torch_was_told_of_float32_changes_nothing(precision: str) -> None:
    program, codes = boundary("u8", "s8", 513, 1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(Interpreter(program)(codes), Interpreter(program, exact_int64)(codes))
    finally:
        torch.set_float32_matmul_precision(before)


AVX2 = """
import sys, torch
assert torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT"), torch.backends.cpu.get_cpu_capability()
from vitquant.program.instructions import Convolution, IntegerProgram, Linear, Product, Register
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.products import exact_int64, exact_products
random = torch.Generator().manual_seed(0)
seen = set()
for low, high, kind in ((0, 255, "u8"), (-128, 127, "s8"), (0, 65535, "u16")):
    for summed in (1, 64, 197, 511, 3072):
        for extremes in (True, False):
            x = torch.randint(low, high + 1, (2, 50, summed), generator=random)
            w = torch.randint(-128, 128, (96, summed), generator=random)
            if extremes:
                x, w = torch.where(x % 2 == 0, low, high), torch.where(w % 2 == 0, -128, 127)
            registers = {"x": Register(kind, (-1, 50, summed)), "w": Register("s8", (96, summed)),
                         "v": Register("s8", (summed, 96)), "y": Register("s64", (-1, 50, 96))}
            for step, name, weight in ((Linear("y", "s", "x", "w", None, 7, None), "w", w),
                                       (Product("y", "s", "x", "v", 7, -3), "v", w.T.contiguous())):
                needed = {key: registers[key] for key in ("x", name, "y")}
                program = IntegerProgram("x", {"output": "y"}, needed, {name: weight}, (step,))
                seen.add(exact_products(program)["y"])
                assert torch.equal(Interpreter(program)(x), Interpreter(program, exact_int64)(x)), (kind, summed)
assert {torch.float32, torch.float64} <= seen, seen
print("equal")
"""


def test_products_are_exact_on_a_processor_without_avx512() -> None:
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    run = subprocess.run(
        [sys.executable, "-c", AVX2], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "equal"), run.stderr[-2000:]


# What is held.


def test_constants_are_held_packed() -> None:
    weight = torch.randint(-8, 8, (6, 10), generator=torch.Generator().manual_seed(0))
    constants = {"w": ("s4", weight), "z": ("u8", torch.full((6, 1), 3)), "b": ("s32", torch.arange(6))}
    run = Interpreter(one(p.Linear("y", "here", "x", "w", "b", 5, "z"), "u4", (2, 10), **constants))
    buffers = list(run.buffers())
    assert {buffer.dtype for buffer in buffers} == {torch.uint8}
    assert sum(buffer.numel() for buffer in buffers) == packed_size(60, 4) + 6 + 24
    held = [value for value in vars(run).values() if isinstance(value, Tensor)] + list(run.program.constants)
    assert not held


def test_registers_are_held_in_the_bytes_of_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (
        p.Lookup("c", "here", "x", "t", 0), p.Requantize("u", "here", ("c",), ("m",), "a", 1, 0, 255),
        p.Requantize("w", "here", ("c",), ("m",), "a", 1, 0, 65535), p.Concat("y", "here", ("u", "w"), 1),
    )  # fmt: skip
    registers = {
        name: p.Register(kind, (-1, 3)) for name, kind in {"x": "u4", "c": "s4", "u": "u8", "w": "u16"}.items()
    }
    registers |= {"t": p.Register("s4", (16,)), "m": p.Register("s32", ()), "a": p.Register("s64", ())}
    constants = {"t": torch.arange(-8, 8), "m": torch.tensor(5), "a": torch.tensor(80)}
    registers["y"] = p.Register("s32", (-1, 6))
    program = p.IntegerProgram("x", {"output": "y"}, registers, constants, steps)
    check_program(program)
    run, kept = Interpreter(program), {}
    execute = run._execute

    def spy(instruction, held):
        kept.update({name: tensor.dtype for name, tensor in held.items()})
        return execute(instruction, held)

    monkeypatch.setattr(run, "_execute", spy)
    tapped = {}
    codes = torch.tensor([[0, 7, 15]])
    assert run(codes, {"c": lambda x: tapped.setdefault("c", x)}).tolist() == [[20, 37, 57] * 2]
    assert kept == {"x": torch.uint8, "c": torch.int8, "u": torch.uint8, "w": torch.int32}
    assert tapped["c"].dtype == torch.int64
    assert torch.equal(run(codes.to(torch.uint8)), run(codes))


def test_registers_that_nobody_reads_any_more_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (
        p.Lookup("a", "here", "x", "t", 0), p.Lookup("b", "here", "a", "t", 0), p.Concat("c", "here", ("a", "b"), 1),
        p.Lookup("d", "here", "c", "t", 0), p.Lookup("y", "here", "d", "t", 0),
    )  # fmt: skip
    registers = {name: p.Register("u4", (-1, 6 if name in "cdy" else 3)) for name in "xabcdy"}
    registers["t"] = p.Register("u4", (16,))
    run, kept = Interpreter(p.IntegerProgram("x", {"output": "y"}, registers, {"t": torch.arange(16)}, steps)), []
    execute = run._execute

    def spy(instruction, held):
        kept.append("".join(held))
        return execute(instruction, held)

    monkeypatch.setattr(run, "_execute", spy)
    run(torch.tensor([[0, 7, 15]]))
    assert kept == ["x", "a", "ab", "c", "d"]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 3, 5).long(), "images of"), (torch.zeros(2, 4), "codes from 0 to 255"),
        (torch.full((2, 4), 256), "codes from 0 to 255"), (torch.full((2, 4), -1), "codes from 0 to 255"),
    ],
)  # fmt: skip
def test_what_are_no_codes_is_refused(codes: Tensor, message: str) -> None:
    run = Interpreter(one(p.Sum("y", "here", "x", (1,), True, 0), "u8", (4,)))
    with pytest.raises(CaptureError, match=message):
        run(codes)


@pytest.mark.parametrize("images", [0, 1, 3, 4, 5, 9])
def test_any_number_of_images(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitquant.runtime.interpreter._AT_ONCE", 4)  # images, of one element each
    run = Interpreter(one(p.Sum("y", "here", "x", (1,), True, 2), "u8", (4,)))
    codes = torch.randint(0, 256, (images, 4))
    assert torch.equal(run(codes), codes.sum(1, keepdim=True) - 8)


def test_the_real_deit_tiny_in_floating_point_products_is_that_in_int64(shared) -> None:
    import vitquant
    from vitquant.lowering import lower
    from vitquant.zoo import ModelSource, create

    weights = str(shared / "weights" / "deit_tiny_patch16_224.safetensors")
    model = create(ModelSource("timm:deit_tiny_patch16_224", weights=weights))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    program = lower(vitquant.quantize(model, "fq-vit", [images], bits="w4a8s4"))
    low, high = program.registers[program.input].limits
    codes = torch.where(images[:1] > 0, high, low)  # extremes only
    run = Interpreter(program)
    assert set(exact_products(program).values()) == {torch.float32}
    assert torch.equal(run(codes), Interpreter(program, exact_int64)(codes))
    assert sum(buffer.numel() for buffer in run.buffers()) < 0.6 * sum(each.numel() for each in model.parameters())
