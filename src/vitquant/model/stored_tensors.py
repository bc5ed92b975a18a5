"""Validation of a saved model's tensors before they are used: every shape, dtype and value is checked."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from vitquant.errors import CheckpointError
from vitquant.graph.sites import Value
from vitquant.graph.stored import constants
from vitquant.packing import unpack
from vitquant.quantizers import Quantizer, build_quantizer
from vitquant.quantizers.quantizer import channel_axis
from vitquant.spec import Logarithmic, PowerOfTwoFactor, PowerOfTwoScale, QParams, QuantSpec, TwinUniform

Tensors = dict[str, torch.Tensor]

_SCALES = 2.0**-120, 2.0**100  # outside of them scale * code may leave float32's normal numbers
_FURTHEST_ZERO = 2**25  # distance of a zero point from the codes; `params_from_free_range` goes to 2**24


def stored_quantizer(tensors: Tensors, prefix: str, value: Value, spec: QuantSpec, directory: object) -> Quantizer:
    """The quantizer of a value, from its stored tensors.

    Arguments:
        tensors: of the saved model.
        prefix: the prefix of the quantizer's keys.
        value: the value that it quantizes.
        spec: the quantizer's spec.
        directory: for messages.

    Raises:
        CheckpointError: a tensor is missing, is present although the spec has none, or does not fit the spec.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{directory}: {value.name} has {what}; quantize the model again")

    scale = take(tensors, f"{prefix}.scale", directory)
    zero, factor = tensors.get(f"{prefix}.zero_point"), tensors.get(f"{prefix}.factor")
    shapes = _shapes(value, spec)
    if scale.dtype != torch.float32 or tuple(scale.shape) not in shapes:
        raise refuse(f"a scale of {scale.dtype} {tuple(scale.shape)}, not float32 {' or '.join(map(str, shapes))}")
    if not bool(((scale >= _SCALES[0]) & (scale <= _SCALES[1])).all()):
        raise refuse("a scale that is not positive, or beyond what float32 computes with")
    if isinstance(spec.scheme, PowerOfTwoScale) and bool((torch.frexp(scale).mantissa != 0.5).any()):
        raise refuse("a scale that is no power of two")
    if (zero is None) != isinstance(spec.scheme, Logarithmic):
        raise refuse("no zero point" if zero is None else "a zero point, which logarithmic schemes do not have")
    if zero is not None:
        fixed = spec.symmetric and not isinstance(spec.scheme, PowerOfTwoFactor)
        middle = 0 if spec.signed else 1 << (spec.bits - 1)
        beyond = 0 if isinstance(spec.scheme, TwinUniform) else _FURTHEST_ZERO
        low, high = (middle, middle) if fixed else (spec.qmin - beyond, spec.qmax + beyond)
        if zero.dtype != torch.int32 or zero.shape != scale.shape or not _within(zero, low, high):
            raise refuse(f"zero points that are not int32 {tuple(scale.shape)} from {low} to {high}")
    if (factor is None) == isinstance(spec.scheme, PowerOfTwoFactor):
        raise refuse("no factors" if factor is None else "factors, which its scheme does not have")
    if factor is not None and isinstance(spec.scheme, PowerOfTwoFactor):
        channels, most = shapes[-1], spec.scheme.factors - 1
        if factor.dtype != torch.int32 or tuple(factor.shape) != channels or not _within(factor, 0, most):
            raise refuse(f"factors that are not int32 {channels} from 0 to {most}")
    return build_quantizer(spec, QParams(scale, zero, factor))


def _shapes(value: Value, spec: QuantSpec) -> list[tuple[int, ...]]:
    """The shapes that the scale of a value's quantizer may have."""
    axis = channel_axis(spec.granularity)
    if axis is None or not -len(value.shape) <= axis < len(value.shape):
        return [()]
    return [(), (value.shape[axis],)]


def _within(values: torch.Tensor, low: int, high: int) -> bool:
    return bool(((values >= low) & (values <= high)).all())


def unpack_weights(
    tensors: Tensors,
    packed: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Value],
    quantizers: Mapping[str, Quantizer],
    directory: object,
) -> None:
    """Replace packed codes by the float32 weights that they decode to.

    Arguments:
        tensors: of the saved model; changed in place.
        packed: the entries `packed` of the config, by the tensor's key.
        values, quantizers: by the name of the value.
        directory: for messages.

    Raises:
        CheckpointError: a packed tensor is not a quantized weight of the model, or has another shape or size.
    """
    for key, entry in packed.items():
        value, quantizer = values.get(entry["operand"]), quantizers.get(entry["operand"])
        if value is None or quantizer is None or value.parameter != key or list(value.shape) != list(entry["shape"]):
            raise CheckpointError(f"{directory}: packed {key!r} is no quantized weight of the model in that shape")
        codes = take(tensors, key, directory)
        if codes.dtype != torch.uint8 or codes.ndim != 1:
            raise CheckpointError(f"{directory}: packed {key!r} is {codes.dtype} {tuple(codes.shape)}, no bytes")
        spec = quantizer.spec
        tensors[key] = quantizer.decode(unpack(codes, spec.bits, spec.signed, value.shape))


def take(tensors: Tensors, key: str, directory: object) -> torch.Tensor:
    """The tensor of a key.

    Raises:
        CheckpointError: there is no such tensor.
    """
    if key not in tensors:
        raise CheckpointError(f"{directory}: {key} is missing; the model was not calibrated or the file is incomplete")
    return tensors[key]


def load_tensors(module: GraphModule, tensors: Tensors, packed: Mapping[str, Any], directory: object) -> None:
    """Load tensors into a graph.

    Arguments:
        module: the graph, with its quantizers.
        tensors: by the keys of its state dict.
        packed: the keys of the tensors that were packed, which are float32 whatever the model's dtype.
        directory: for messages.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype; a parameter holds NaN or infinity,
            a buffer NaN, or a table of indices an index outside of the range of the model's own.
    """
    computed = constants(module)  # those that were saved replace these, which this processor may round differently
    expected = module.state_dict() | {name: tensor for name, tensor in computed.items() if name in tensors}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not part of the model"
        raise CheckpointError(f"{directory}: {what}; it was saved from another model")
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for key, tensor in expected.items():
        found = tensors[key]
        if tensor.shape != found.shape:
            shapes = f"{tuple(found.shape)} saved, {tuple(tensor.shape)} in the model"
            raise CheckpointError(f"{directory}: {key} has another shape: {shapes}")
        if tensor.dtype != found.dtype and key not in packed:
            raise CheckpointError(f"{directory}: {key} is {found.dtype}, and {tensor.dtype} in the model")
        if (key in parameters and not bool(torch.isfinite(found).all())) or bool(torch.isnan(found).any()):
            raise CheckpointError(f"{directory}: {key} holds NaN or infinity; quantize the model again")
        if key in read and not tensor.is_floating_point() and not _indices_of(operator.attrgetter(key)(module), found):
            raise CheckpointError(f"{directory}: {key} holds indices outside of the model's own")
    for name, tensor in computed.items():
        if name in tensors:
            tensor.copy_(tensors.pop(name))
    module.load_state_dict(tensors)


def _indices_of(own: torch.Tensor, found: torch.Tensor) -> bool:
    return not own.numel() or _within(found, int(own.min()), int(own.max()))
