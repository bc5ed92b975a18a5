"""Scale search: choose the scale of each operand among multiples of the calibrated one by the layer's output."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vitquant.errors import CalibrationError, RecipeError
from vitquant.graph.operators import aten, calls
from vitquant.graph.segments import IMAGES
from vitquant.graph.sites import Site
from vitquant.graph.stored import stored
from vitquant.graph.taps import by_image
from vitquant.graph.walk import nodes_by_name
from vitquant.methods.context import Context
from vitquant.methods.searched_layer import (
    LAYERS,
    PRODUCTS,
    SearchedLayer,
    SearchedProduct,
    node_of,
    option,
    searched,
)
from vitquant.model import QuantizedModel, Record
from vitquant.objectives.correlation import CANDIDATES_AT_ONCE, IN_CACHE
from vitquant.objectives.product_output import Ranking
from vitquant.quantizers import Quantizer, build_quantizer
from vitquant.quantizers.parameters import SMALLEST_SCALE
from vitquant.schema import Integer, Plain, Table, TableOf
from vitquant.search.coordinates import Found, alternate, multiples
from vitquant.spec import PerTensor, PowerOfTwoScale, QParams
from vitquant.work import WorkState


@dataclass(frozen=True)
class SearchScalesSettings:
    """The range of the search and its objective.

    Arguments:
        low, high, candidates: multiples of the calibrated scale that are tried, evenly spaced; the calibrated scale
            itself is tried first.
        rounds: how many times all operands of a layer are searched, at most.
        gamma, theta: the weight of the ranking loss in attention, and its margin; gamma = 0 leaves it out.
        pairs: how many pairs of columns the ranking loss compares, drawn with `seed`; 0 compares all.
        bias_correction: whether to correct the bias after each round, so that every output unit of a layer has the same
            mean as in float.
        seed: of the draw of pairs.

    Raises:
        RecipeError: a number out of range.
    """

    low: float = 0.5
    high: float = 1.2
    candidates: int = 100
    rounds: int = 20
    gamma: float = 0.1
    theta: float = 0.2
    pairs: int = 256
    bias_correction: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("candidates", "rounds", "pairs", "seed"):
            if not isinstance(getattr(self, name), int):
                raise RecipeError(f"search-scales: {name} = {getattr(self, name)}: it is a whole number")
        if max(self.candidates, self.rounds, self.pairs) > 1_000_000:
            raise RecipeError("search-scales: candidates, rounds and pairs are at most 1,000,000")
        for name, smallest in (("candidates", 1), ("rounds", 1), ("gamma", 0), ("theta", 0), ("pairs", 0)):
            if not smallest <= getattr(self, name) < math.inf:
                raise RecipeError(f"search-scales: {name} = {getattr(self, name)}: it is at least {smallest}")
        if not 0 < self.low < self.high < math.inf:
            raise RecipeError(f"search-scales: low = {self.low}, high = {self.high}: 0 < low < high")


def search_scales(model: QuantizedModel, context: Context, settings: SearchScalesSettings) -> Record:
    """Choose the scales of the operands of layers and attention by the error of the outputs that they cause.

    For each linear layer, convolution and product of attention the scales of its two operands are searched in turn,
    among multiples of the calibrated ones, until neither changes: for the highest correlation of the quantized output
    with the float one and, in attention, also the least ranking loss within the map's rows. Every layer reads float
    inputs, so layers do not depend on each other. The scale of an operand that several layers read is chosen for all of
    them together.

    It takes as many float forward passes over the data as are needed to hold the operands within the context's memory.

    Arguments:
        model: calibrated, its operations still in float; scales and biases change.
        context: the objective is computed on all of its images. After an interruption, a later call with the same work
            state continues with the layers that are left; those that the deadline leaves out stay as calibrated.
        settings: see `SearchScalesSettings`.

    Raises:
        CalibrationError: no data, or the operands of one layer do not fit into the memory.

    Source: VT-PTQ, Liu et al. 2021, sections "Similarity-Aware Quantization for Linear Operation", "Ranking-Aware
    Quantization for Self-Attention" and "Bias Correction". Differences: docs/vt-ptq.md.

    Pitfall: a bias-corrected model is no longer the float model with quantizers in it: `run(quantized=False)` has the
        corrected biases.
    """
    model.require_calibrated()
    images, one = 0, None
    for batch in context.data:
        images, one = images + len(batch), batch[:1] if one is None else one
    if one is None:
        raise CalibrationError("no calibration images: give at least one batch")
    groups, refused = _groups(model, one, settings.pairs)
    ranking = Ranking(settings.gamma, settings.theta, settings.pairs, settings.seed)
    found = _Chosen.resumed(model, context.work)
    left = [group for group in groups if not found.has(group)]
    late: list[_Group] = []
    for some in _within(left, images, context.memory):
        if context.out_of_time:
            late += some
            continue
        held = _operands(model, context.data, [site for group in some for site in group.sites])
        for group in some:
            if context.out_of_time:
                late.append(group)
                continue
            context.progress("searching layers", found.groups, len(groups))
            layers = [searched(model, site, held, ranking) for site in group.sites]
            present = {name: model.quantizers[name] for name in group.values}
            search = _Search(layers, present, settings)
            corrects = settings.bias_correction and any(layer.correctable for layer in layers)
            result = alternate(group.values, 0, search.scores, settings.rounds, search.correct if corrects else None)
            found.add(search, result, layers)
            del layers, search
            if context.work.due:
                found.save(context.work)
        del held
    if late:
        found.save(context.work)
    context.progress("searching layers", found.groups, len(groups))
    found.put(model)  # at the end, so that corrected biases change no layer's float inputs
    reasons = {**refused, **dict.fromkeys((site.name for group in late for site in group.sites), "the time is up")}
    decisions = {**{name: {"as calibrated, because": why} for name, why in reasons.items()}, **found.decisions}
    layers_of_all = sum(len(group.sites) for group in groups)
    return Record("search-scales", {"images": images, "layers": layers_of_all, "rounds": found.rounds}, decisions)


_STATE = Table({"decisions": TableOf(TableOf(Plain())), "groups": Integer(0), "rounds": Integer(0)})


@dataclass
class _Chosen:
    """The results of the search so far.

    Arguments:
        biases: the names of all stored tensors, biases among them, by the tensor's `id`.
        scales: the chosen scales, by the name of the value.
        corrected: the corrected biases, by their name.
        decisions: for the record.
        groups: the number of groups of layers that are done.
        rounds: the most rounds that a group took.
    """

    biases: Mapping[int, str]
    scales: dict[str, Tensor]
    corrected: dict[str, Tensor]
    decisions: dict[str, dict[str, Any]]
    groups: int = 0
    rounds: int = 0

    @classmethod
    def resumed(cls, model: QuantizedModel, work: WorkState) -> _Chosen:
        """The results that a killed run saved; empty if there are none."""
        module, quantizers = model.graph_module, model.quantizers
        stored = dict((*module.named_parameters(), *module.named_buffers()))
        found = cls({id(each): name for name, each in stored.items()}, {}, {}, {})
        saved = work.load(_STATE)
        if saved is None:
            return found
        found.decisions.update(saved.values["decisions"])
        found.groups, found.rounds = saved.values["groups"], saved.values["rounds"]
        for key in saved.tensors:
            part, _, name = key.partition("/")
            if part == "scale" and name in quantizers:
                scale = saved.tensor(key, quantizers[name].scale)
                if not bool((scale >= SMALLEST_SCALE).all()):
                    raise saved.damaged()
                found.scales[name] = scale
            elif part == "bias" and name in stored:
                found.corrected[name] = saved.tensor(key, stored[name])
            else:
                raise saved.damaged()
        return found

    def has(self, group: _Group) -> bool:
        """Whether the scales of a group have been chosen."""
        return set(group.values) <= self.scales.keys()

    def add(self, search: _Search, result: Found, layers: Sequence[SearchedLayer | SearchedProduct]) -> None:
        """Add the result of the search of a group."""
        for name, index in result.choice.items():
            multiple = float(search.multiples[index])
            self.scales[name] = search.candidates[name][index].scale
            self.decisions[name] = {"multiple": multiple, "rounds": result.rounds, "settled": result.settled}
        for stored_bias, corrected in filter(None, (layer.corrected for layer in layers)):
            self.corrected[self.biases[id(stored_bias)]] = corrected
        self.groups, self.rounds = self.groups + 1, max(self.rounds, result.rounds)

    def save(self, work: WorkState) -> None:
        """Save all results."""
        tensors = {f"scale/{name}": scale for name, scale in self.scales.items()}
        tensors |= {f"bias/{name}": bias for name, bias in self.corrected.items()}
        work.save(tensors, {"decisions": self.decisions, "groups": self.groups, "rounds": self.rounds})

    def put(self, model: QuantizedModel) -> None:
        """Set the chosen scales and the corrected biases in the model."""
        module, quantizers = model.graph_module, model.quantizers
        with torch.no_grad():
            for name, bias in self.corrected.items():
                attrgetter(name)(module).copy_(bias)
        model.insert({name: _rescaled(quantizers[name], scale) for name, scale in self.scales.items()})


# --- which layers are searched together ---------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Layers that share operands and are searched together.

    Arguments:
        sites: the layers, in graph order.
        values: the names of the operands' values.
        held: bytes per image of the cached operands.
        work: bytes per image of the tensors that the search computes from them.
        candidates: bytes of the tensors that it computes from candidates, independent of the number of images.
    """

    sites: tuple[Site, ...]
    values: tuple[str, ...]
    held: int
    work: int
    candidates: int


def _groups(model: QuantizedModel, image: Tensor, pairs: int) -> tuple[list[_Group], dict[str, str]]:
    """The layers that can be searched, grouped by common operands, and why other layers cannot be, by their name."""
    refused: dict[str, str] = {}
    members: list[tuple[set[str], list[Site]]] = []
    for site in model.sites:
        if site.kind not in LAYERS + PRODUCTS:
            continue
        if reason := _unfit(model, site):
            refused[site.name] = reason
            continue
        names = {value.name for value in model.index.read_by(site).values()}
        sites = [site]
        apart = []
        for group in members:
            if names & group[0]:
                names |= group[0]
                sites = group[1] + sites
            else:
                apart.append(group)
        members = [*apart, (names, sites)]
    order = {value.name: index for index, value in enumerate(model.values)}
    sizes = {name: x.numel() for name, x in _operands(model, [image], [s for _, some in members for s in some]).items()}
    return [
        _Group(tuple(sites), tuple(sorted(names, key=order.__getitem__)), *_bytes(model, sites, sizes, pairs))
        for names, sites in members
    ], refused


def _unfit(model: QuantizedModel, site: Site) -> str:
    """Why the scales of a site's operands cannot be searched; empty when they can."""
    values = model.index.read_by(site)
    if len({value.name for value in values.values()}) < 2:
        return "both of its operands are one value"
    for operand, value in values.items():
        spec = model.assignments[value.name].spec
        if spec is None:
            return f"its {operand} is in float"
        if operand != "weight" and not isinstance(spec.granularity, PerTensor):
            return f"its {operand} has more than one scale"
        if isinstance(spec.scheme, PowerOfTwoScale):
            return f"the scale of its {operand} is a power of two, and multiples of it are not"
        if operand == "weight" and (value.parameter is None or value.node != site.operands[operand]):
            return "its weight is computed or rearranged"
    node = node_of(model, site)
    if site.kind in LAYERS:
        bias = option(node, 2, "bias", None)
        if bias is not None and stored(model.graph_module, bias) is None:
            return "its bias is computed"
    if site.kind == "conv" and (
        not calls(node, {aten.conv2d})
        or option(node, 6, "groups", 1) != 1
        or isinstance(option(node, 4, "padding", 0), str)
    ):
        return "it is no plain two-dimensional convolution"
    return ""


def _bytes(
    model: QuantizedModel, sites: Sequence[Site], sizes: Mapping[str, int], pairs_at_most: int
) -> tuple[int, int, int]:
    """`held`, `work` and `candidates` of a group; see `objectives` for the tensors that the search computes.

    Arguments:
        sizes: the number of elements of each operand for one image.
        pairs_at_most: pairs of columns in the ranking loss; 0 for all.
    """
    held = work = candidate = 0
    for site in sites:
        if site.kind in LAYERS:
            weight = model.index.read_by(site)["weight"].shape
            outputs, inputs = weight[0], math.prod(weight[1:])
            elements = sizes[str(site.reader("input"))]
            tokens = elements // inputs if site.kind == "linear" else _elements(node_of(model, site)) // outputs
            held += max(elements, tokens * inputs)  # the patches of a convolution may overlap
            work += tokens * (inputs + outputs) + 3 * inputs * (inputs + outputs)
            candidate = max(candidate, 2 * CANDIDATES_AT_ONCE * inputs * (inputs + outputs))
        else:
            operands = [sizes[str(site.reader(operand))] for operand in site.operands]
            held += sum(operands)
            pairs, rows = _map(model, site, sizes, pairs_at_most)
            candidate = max(candidate, 4 * max(IN_CACHE, *operands) + 3 * pairs * rows)
    return 4 * held, 4 * work, 4 * candidate


def _map(model: QuantizedModel, site: Site, sizes: Mapping[str, int], pairs_at_most: int) -> tuple[int, int]:
    """The number of column pairs compared in an attention map, and of its rows in one image, over heads and windows."""
    operand = "query" if site.kind == "scores" else "probs"
    nodes = nodes_by_name(model.graph_module.graph)
    columns = nodes[site.node if site.kind == "scores" else site.operands[operand]].meta["shape"][-1]
    pairs = columns * (columns - 1) // 2
    rows = sizes[str(site.reader(operand))] // nodes[site.operands[operand]].meta["shape"][-1]
    return min(pairs, pairs_at_most or pairs), rows


def _within(groups: Sequence[_Group], images: int, memory: float) -> Iterator[list[_Group]]:
    """The groups in graph order, as many at a time as fit into the memory budget."""
    some: list[_Group] = []
    for group in groups:
        if (alone := _needed([group], images)) > memory * 1e9:
            raise CalibrationError(
                f"it needs {alone / 1e9:.3f} GB for {images} images, and search-scales may take {memory:g}: "
                f"give memory = {math.ceil(alone / 1e7) / 100:g} (--memory-budget), or fewer images",
                group.sites[0].name,
            )
        if _needed([*some, group], images) > memory * 1e9:
            yield some
            some = []
        some.append(group)
    if some:
        yield some


def _needed(groups: Sequence[_Group], images: int) -> int:
    """The memory of groups in bytes: operands of all groups, and the largest work memory of any one group."""
    held = sum(group.held for group in groups) * images
    return held + max(group.work * images + group.candidates for group in groups)


def _operands(model: QuantizedModel, data: Iterable[Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """The operands of some sites in the float model, but for weights: (images, ...) of all images, at least float32."""
    held: dict[str, list[Tensor]] = defaultdict(list)
    names = [str(site.reader(operand)) for site in sites for operand in site.operands if operand != "weight"]
    read = model.segment(IMAGES, names, quantized=False)
    with torch.inference_mode():
        for batch in data:
            for name, x in zip(names, read(batch), strict=True):
                x = by_image(x, read.shapes[name].index(-1), len(batch))
                held[name].append(x.to(torch.promote_types(x.dtype, torch.float32)))
    return {name: torch.cat(held.pop(name)) for name in names}


# --- the search of one group ---------------------------------------------------------------------------


class _Search:
    """The score of every candidate of an operand, summed over the layers that read it."""

    def __init__(
        self,
        layers: Sequence[SearchedLayer | SearchedProduct],
        present: Mapping[str, Quantizer],
        settings: SearchScalesSettings,
    ):
        self.multiples = multiples(settings.low, settings.high, settings.candidates)
        self.candidates = {name: _multiplied(quantizer, self.multiples) for name, quantizer in present.items()}
        self._layers = layers

    def scores(self, name: str, choice: Mapping[str, int]) -> Tensor:
        """The objective of every candidate of one operand, while the others stay as chosen."""
        fixed = {other: self.candidates[other][index] for other, index in choice.items()}
        with torch.inference_mode():
            scores = [each.scores(name, self.candidates[name], fixed) for each in self._layers if name in each.values]
        return torch.stack(scores).sum(0)

    def correct(self, choice: Mapping[str, int]) -> None:
        """Correct the biases for a choice."""
        with torch.inference_mode():
            for layer in self._layers:
                layer.correct({name: self.candidates[name][index] for name, index in choice.items()})


def _elements(node: Node) -> int:
    """The number of elements of a node's tensor for one image."""
    return math.prod(size for size in node.meta["shape"] if size != -1)


def _multiplied(quantizer: Quantizer, by: Tensor) -> list[Quantizer]:
    """The quantizer with each multiple of its scale."""
    scales = [(quantizer.scale.double() * m).float().clamp(min=SMALLEST_SCALE) for m in by.tolist()]
    return [_rescaled(quantizer, scale) for scale in scales]


def _rescaled(quantizer: Quantizer, scale: Tensor) -> Quantizer:
    return build_quantizer(quantizer.spec, QParams(scale, quantizer.zero_point, quantizer.factor))
