"""Scale reparameterization: the per-channel scales of a LayerNorm's output, folded into its neighbours to leave one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from vitquant.errors import RecipeError
from vitquant.graph.layer_norm_folding import FoldableNorm, NotFoldableError, fold, foldable_norm
from vitquant.graph.sites import Site, Value
from vitquant.graph.walk import nodes_by_name
from vitquant.methods.calibrate import estimated, observe, observer_of
from vitquant.methods.context import Context
from vitquant.model import QuantizedModel, Record
from vitquant.observers.observer import Observer
from vitquant.quantizers import Quantizer, build_quantizer
from vitquant.spec import PerAxis, PerTensor, QParams, QuantSpec, Uniform

# The finest step of a channel relative to the mean: a channel that hardly varies would be shifted by millions of steps.
FINEST = 2.0**-10


@dataclass(frozen=True)
class ReparameterizeScalesSettings:
    """Which LayerNorms are reparameterized.

    Arguments:
        sites: globs that match their names.
    """

    sites: tuple[str, ...] | list[str] = ("*",)

    def __post_init__(self) -> None:
        if isinstance(self.sites, str) or not all(isinstance(glob, str) for glob in self.sites):
            raise RecipeError(f"reparameterize-scales: sites = {self.sites!r}: it is a list of globs")


@dataclass(frozen=True)
class Reparameterization:
    """A common scale and zero point, and the affine map of the channels with which they serve every channel.

    Arguments:
        scale: float64 (), of the tensor.
        zero_point: float64 (), an integer.
        ratio: float64 (channels,), the divisor of each channel.
        shift: float64 (channels,), then subtracted from each channel.
    """

    scale: Tensor
    zero_point: Tensor
    ratio: Tensor
    shift: Tensor


def reparameterize_scales(model: QuantizedModel, context: Context, settings: ReparameterizeScalesSettings) -> Record:
    """Quantize LayerNorm outputs with one scale and zero point, as finely as with one of each per channel.

    Every channel of the output is observed by itself, with the observer of its rule. The differences of its scale and
    zero point from their means are folded into the LayerNorm and the linear layers after it, whose weights are observed
    again. The float function stays the same. It takes one more float forward pass per batch.

    Arguments:
        model: calibrated, its operations still in float; weights of LayerNorms and linear layers change.
        context: its data are iterated over once; the teacher is folded in the same way as the model.
        settings: which LayerNorms.

    Raises:
        CalibrationError: no data.
        RecipeError: no LayerNorm has such a name.

    Source: RepQ-ViT, Li et al. 2023, section "Scale Reparam for LayerNorm Activations". There the zero point is the
    mean of the channels' zero points and not an integer; here it is rounded before the shift is computed from it, which
    costs no accuracy.

    Pitfall: a LayerNorm that something other than linear layers reads, such as a residual or a pooling, keeps its one
        scale; the record says why.
    """
    model.require_calibrated()
    check_sites(model, settings)
    nodes = nodes_by_name(model.graph_module.graph)
    norms, chosen = _norms(model, settings)
    decisions: dict[str, dict[str, Any]] = {}
    found: dict[str, tuple[FoldableNorm, Value]] = {}
    for site in chosen:
        try:
            layers = foldable_norm(model.graph_module, nodes[site.node])
            found[site.name] = layers, _output(model, layers)
        except NotFoldableError as reason:
            decisions[site.name] = {"one scale, because": str(reason)}
    observers = {name: _by_channel(model, value) for name, (_, value) in found.items()}
    observe(model, context.data, {found[name][1].name: observer for name, observer in observers.items()})
    changed: dict[str, Quantizer] = {}
    for name, (layers, value) in found.items():
        spec = model.assignments[value.name].spec
        assert spec is not None
        observer = observers[name]
        low, high = observer.free_range() if layers.shiftable else observer.observed_range()
        result = reparameterization(low, high, spec, layers.shiftable)
        fold(layers, result.ratio, result.shift)
        if context.teacher is not None:
            of_teacher = context.teacher.graph_module
            node = nodes_by_name(of_teacher.graph)[model.index.site(name).node]
            fold(foldable_norm(of_teacher, node), result.ratio, result.shift)
        params = QParams(result.scale.float(), result.zero_point.to(torch.int32))
        changed[value.name] = build_quantizer(spec, params)
        largest, smallest = result.ratio.max().item(), result.ratio.min().item()
        decisions[name] = {"largest ratio": largest, "smallest ratio": smallest, "shifted": layers.shiftable}
    weights = {name: observer_of(name, model.assignments[name]) for name in _weights(model, found)}
    observe(model, (), weights)
    changed |= {name: estimated(name, observer) for name, observer in weights.items()}
    model.insert(changed)
    return Record("reparameterize-scales", {"reparameterized": len(found), "of": len(norms)}, decisions)


def check_sites(model: QuantizedModel, settings: ReparameterizeScalesSettings) -> None:
    """Refuse names that no LayerNorm of a model has.

    Raises:
        RecipeError: no LayerNorm has such a name; the message lists their names.
    """
    norms, chosen = _norms(model, settings)
    if norms and not chosen:
        there = ", ".join(site.name for site in norms[:5]) + (", ..." if len(norms) > 5 else "")
        raise RecipeError(
            f"no LayerNorm is called {' or '.join(settings.sites)} (there: {there}); "
            """give their names, or all of them: --set 'reparameterize-scales.sites=["*"]'"""
        )


def _norms(model: QuantizedModel, settings: ReparameterizeScalesSettings) -> tuple[list[Site], list[Site]]:
    """All LayerNorms, and those that the settings name."""
    norms = [site for site in model.sites if site.kind == "layer_norm"]
    return norms, [site for site in norms if any(fnmatchcase(site.name, glob) for glob in settings.sites)]


def reparameterization(low: Tensor, high: Tensor, spec: QuantSpec, shiftable: bool) -> Reparameterization:
    """The mean of the channels' scales and zero points, and the ratio and shift that bring every channel to it.

    With the channel's scale s_c and zero point z_c, and their means s and z, z rounded: ratio = s_c / s, and
    shift = s (z - z_c), so that (x / ratio - shift) / s + z = x / s_c + z_c, the code with the channel's own scale.

    Arguments:
        low, high: float64 (channels,), each channel's range, which need not contain zero.
        spec: of the tensor: uniform, per tensor.
        shiftable: False makes every shift zero: all channels share the zero point, and a channel's scale is the
            smallest with which its range is covered.

    Source: RepQ-ViT, equations of r_1 and r_2.
    """
    levels = spec.qmax - spec.qmin
    scale = (high - low) / levels
    scale = scale.clamp(min=FINEST * float(scale.mean()))
    if not bool(scale.any()):  # nothing varies
        scale = torch.ones_like(scale)
    zero_point = spec.qmin - torch.round(low / scale)
    if shiftable and not spec.symmetric:
        common = zero_point.mean().round().clamp(spec.qmin, spec.qmax)
        mean = scale.mean()
        return Reparameterization(mean, common, scale / mean, mean * (common - zero_point))
    middle = torch.tensor((spec.qmin + spec.qmax + 1) // 2, dtype=torch.float64, device=low.device)
    common = middle if spec.symmetric else zero_point.clamp(spec.qmin, spec.qmax).mean().round()
    above, below = (spec.qmax - common).clamp(min=0.5), (common - spec.qmin).clamp(min=0.5)
    scale = torch.maximum(high.clamp(min=0) / above, -low.clamp(max=0) / below)
    scale = scale.clamp(min=FINEST * float(scale.mean())) if bool(scale.any()) else torch.ones_like(scale)
    return Reparameterization(scale.mean(), common, scale / scale.mean(), torch.zeros_like(scale))


def _output(model: QuantizedModel, layers: FoldableNorm) -> Value:
    """The value that all linear layers after a LayerNorm read, which must be the same for all of them."""
    values = {(value := _read(model, name)["input"]).name: value for name in layers.linears}
    if len(values) > 1:
        raise NotFoldableError("its readers have quantizers of their own")
    (value,) = values.values()
    spec = model.assignments[value.name].spec
    if spec is None or not isinstance(spec.scheme, Uniform) or not isinstance(spec.granularity, PerTensor):
        raise NotFoldableError("its output is not quantized uniformly with one scale")
    return value


def _read(model: QuantizedModel, node: str) -> dict[str, Value]:
    """The values that the site of a graph node reads, by operand."""
    site = model.index.site_at(node)
    assert site is not None
    return model.index.read_by(site)


def _by_channel(model: QuantizedModel, value: Value) -> Observer:
    """A fresh observer of the kind of a value's rule, with a range for each channel."""
    assignment = model.assignments[value.name]
    assert assignment.spec is not None
    by_channel = replace(assignment.spec, granularity=PerAxis(value.channel_axis))
    return observer_of(value.name, replace(assignment, spec=by_channel))


def _weights(model: QuantizedModel, found: Mapping[str, tuple[FoldableNorm, Value]]) -> list[str]:
    """The quantized weights of the linear layers that changed."""
    changed = {name for layers, _ in found.values() for name in layers.linears}
    names = [_read(model, site.node)["weight"].name for site in model.sites if site.node in changed]
    return [name for name in names if model.assignments[name].spec is not None]
