"""Shape inference: the shape of each instruction's output, for any number of images.

A size of -k in a shape here is k times the number of images; in the declared shape of a register it is -1 for any k.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import assert_never

from vitquant.errors import LoweringError
from vitquant.program import instructions as p
from vitquant.program.opcodes import opcode_of

Shape = tuple[int, ...]


def written_shape(i: p.Instruction, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of an instruction's output.

    Arguments:
        i: its fields are checked to be in range: axes and sizes are small integers.
        shapes: of all its operands.

    Raises:
        LoweringError: the operands' shapes do not fit together, or images would be mixed; the message names the site.
    """
    try:
        shape = _shape(i, shapes)
        _need(sum(size < 0 for size in shape) <= 1, "has two sizes that grow with the batch")
    except _MisfitError as misfit:
        raise LoweringError(f"{i.site}: {opcode_of(i)} {misfit}; the program is not valid") from None
    return shape


def all_shapes(program: p.IntegerProgram) -> dict[str, Shape]:
    """The shape of every register and constant.

    Raises:
        LoweringError: see `written_shape`.
    """
    shapes: dict[str, Shape] = {name: tuple(values.shape) for name, values in program.constants.items()}
    shapes[program.input] = program.registers[program.input].shape
    for instruction in program.instructions:
        shapes[instruction.output] = written_shape(instruction, shapes)
    return shapes


class _MisfitError(Exception):
    """The operands of an instruction do not fit together; the message says why."""


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _MisfitError(otherwise)


def _shape(instruction: p.Instruction, shapes: Mapping[str, Shape]) -> Shape:
    match instruction:
        case p.Linear() as i:
            x, (outputs, summed) = shapes[i.input], _of_rank(2, shapes[i.weight])
            _need(x[-1:] == (summed,), f"sums over {summed} of an input of {x}")
            _zero_points(shapes, i.weight_zero, shapes[i.weight])
            _need(i.bias is None or shapes[i.bias] == (outputs,), f"has no bias for each of {outputs} outputs")
            return (*x[:-1], outputs)
        case p.Convolution() as i:
            return _convolution(i, shapes)
        case p.Product() as i:
            left, right = shapes[i.left], shapes[i.right]
            _need(min(len(left), len(right)) >= 2, "is of no matrices")
            _need(left[-1] == right[-2] > 0, f"is of {left} and {right}")
            return (*_broadcast(left[:-2], right[:-2]), left[-2], right[-1])
        case p.Multiply() as i:
            return _broadcast(shapes[i.left], shapes[i.right])
        case p.Requantize() as i:
            _need(len(i.inputs) == len(i.multipliers) > 0, "does not have one multiplier for each input")
            shape = shapes[i.addend]
            for name in (*i.inputs, *i.multipliers):
                shape = _broadcast(shape, shapes[name])
            return shape
        case p.SoftmaxToPowers() | p.SoftmaxToLevels() as i:
            (values,), (octaves,) = _of_rank(1, shapes[i.values]), _of_rank(1, shapes[i.octaves])
            _need(1 < values == octaves <= 2**16 + 1, f"has tables of {values} and {octaves} entries")
            _fits(shapes, i.mask, shapes[i.input])
            _row(shapes[i.input])
            return shapes[i.input]
        case p.LayerNorm() | p.RmsNorm() as i:
            for name in (i.factors, i.multiplier, i.addend):
                _fits(shapes, name, (_row(shapes[i.input]),))
            return shapes[i.input]
        case p.Lookup() as i:
            _of_rank(1, shapes[i.table])
            return shapes[i.input]
        case p.Sum() as i:
            x = shapes[i.input]
            _axes(i.axes, x)
            left = ((1 if axis in i.axes else size) for axis, size in enumerate(x) if i.keep or axis not in i.axes)
            return tuple(left)
        case p.Concat() as i:
            return _concat(i, [shapes[name] for name in i.inputs])
        case p.Reshape() | p.Permute() | p.Slice() | p.Roll() | p.Pad():
            return _moved(instruction, shapes)
        case _:
            assert_never(instruction)


def _moved(instruction: p.Move, shapes: Mapping[str, Shape]) -> Shape:
    match instruction:
        case p.Reshape() as i:
            return _reshape(i, shapes[i.input])
        case p.Permute() as i:
            x = shapes[i.input]
            _need(sorted(i.axes) == list(range(len(x))), f"takes axes {i.axes} of {x}")
            return tuple(x[axis] for axis in i.axes)
        case p.Slice() as i:
            x = shapes[i.input]
            _axes((i.axis,), x)
            _need(0 <= i.start < i.stop <= x[i.axis] and i.step >= 1, f"takes {i.start}:{i.stop}:{i.step} of {x}")
            return (*x[: i.axis], len(range(i.start, i.stop, i.step)), *x[i.axis + 1 :])
        case p.Roll() as i:
            _axes(i.axes, shapes[i.input])
            _need(len(i.shifts) == len(i.axes), "has not one shift for each axis")
            return shapes[i.input]
        case p.Pad() as i:
            x, sizes = shapes[i.input], list(shapes[i.input])
            pairs = list(zip(i.amounts[::2], i.amounts[1::2], strict=False))
            _need(0 < 2 * len(pairs) == len(i.amounts) <= 2 * len(x), f"has amounts {i.amounts} for {x}")
            for axis, (before, after) in enumerate(pairs, 1):
                _need(min(before, after) >= 0, "takes elements away")
                _need(sizes[-axis] > 0 or before == after == 0, "is along the batch")
                sizes[-axis] += before + after
            return tuple(sizes)
        case _:
            assert_never(instruction)


def _convolution(i: p.Convolution, shapes: Mapping[str, Shape]) -> Shape:
    images, channels, *sizes = _of_rank(4, shapes[i.input])
    outputs, summed, *kernel = _of_rank(4, shapes[i.weight])
    _need(channels == summed * i.groups and outputs % i.groups == 0, f"has {i.groups} groups for {channels} channels")
    _zero_points(shapes, i.weight_zero, shapes[i.weight])
    _need(i.bias is None or shapes[i.bias] == (outputs,), f"has no bias for each of {outputs} outputs")
    found = []
    for axis, (size, width) in enumerate(zip(sizes, kernel, strict=True)):
        _need(size > 0, "is along the batch")
        room = size + 2 * i.padding[axis] - i.dilation[axis] * (width - 1) - 1
        _need(room >= 0, f"has a kernel of {tuple(kernel)} for images of {tuple(sizes)}")
        found.append(room // i.stride[axis] + 1)
    return (images, outputs, *found)


def _reshape(i: p.Reshape, x: Shape) -> Shape:
    total, known = prod(map(abs, x)), prod(size for size in i.shape if size != -1)
    free, grows = i.shape.count(-1), any(size < 0 for size in x)
    _need(all(size > 0 or size == -1 for size in i.shape) and free <= 1, f"to {i.shape} is no shape")
    _need(total % known == 0 if free else total == known and not grows, f"of {x} to {i.shape} does not fit")
    rest = -(total // known) if grows else total // known
    shape = tuple(rest if size == -1 else size for size in i.shape)
    _need(not grows or _keeps_images(x, shape), f"of {x} to {shape} mixes images")
    return shape


def _keeps_images(x: Shape, shape: Shape) -> bool:
    """Whether a reshape keeps images apart: it only merges other axes with the batch axis, or splits them from it."""
    (before, size), (after, _) = _outside(x), _outside(shape)
    return before % after == 0 or (after % before == 0 and size % (after // before) == 0)


def _outside(shape: Shape) -> tuple[int, int]:
    """The product of the sizes before the batch axis, and the size of the batch axis for one image."""
    axis = next(axis for axis, size in enumerate(shape) if size < 0)
    return prod(shape[:axis]), -shape[axis]


def _concat(i: p.Concat, parts: list[Shape]) -> Shape:
    """The shape of a concatenation; parts whose first size is one are repeated for every image."""
    _need(len(parts) > 0, "joins nothing")
    first = next((part[0] for part in parts if part[:1] not in ((), (1,))), 1)
    whole = [(first, *part[1:]) for part in parts if part[:1] in ((1,), (first,))]
    _need(len(whole) == len(parts), "joins parts of several batches")
    for part in whole:
        _axes((i.axis,), part)
        others = [(*each[: i.axis], *each[i.axis + 1 :]) for each in (part, whole[0])]
        _need(len(part) == len(whole[0]) and others[0] == others[1], f"joins {part} to {whole[0]}")
    return (*whole[0][: i.axis], sum(part[i.axis] for part in whole), *whole[0][i.axis + 1 :])


def _broadcast(left: Shape, right: Shape) -> Shape:
    rank = max(len(left), len(right))
    pairs = [*zip((1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right, strict=True)]
    _need(all(a == b or 1 in (a, b) for a, b in pairs), f"reads {left} beside {right}")
    return tuple(b if a == 1 else a for a, b in pairs)


def _zero_points(shapes: Mapping[str, Shape], name: str | None, weight: Shape) -> None:
    """Check that a constant of zero points has one for the whole weight, or one for each output."""
    if name is not None:
        _fits(shapes, name, weight)
        by_output = (weight[0], *(1 for _ in weight[1:]))
        reason = f"reads zero points of {shapes[name]} for a weight of {weight}, not one or {by_output}"
        _need(prod(shapes[name]) == 1 or shapes[name] == by_output, reason)


def _fits(shapes: Mapping[str, Shape], name: str | None, whole: Shape) -> None:
    """Check that an operand can be broadcast to a shape."""
    if name is not None:
        _need(_broadcast(whole, shapes[name]) == whole, f"reads {shapes[name]} for each of {whole}")


def _of_rank(rank: int, shape: Shape) -> Shape:
    _need(len(shape) == rank, f"reads {shape} and needs {rank} axes")
    return shape


def _row(shape: Shape) -> int:
    _need(shape[-1:] > (0,), f"has no rows in {shape}")
    return shape[-1]


def _axes(axes: Iterable[int], shape: Shape) -> None:
    """Check that these are axes of a shape, at least one, none twice, and not the axis that grows with the batch."""
    axes = tuple(axes)
    _need(len(set(axes)) == len(axes) > 0, f"has axes {axes}")
    _need(all(0 <= axis < len(shape) and shape[axis] > 0 for axis in axes), f"takes axes {axes} of {shape}")
