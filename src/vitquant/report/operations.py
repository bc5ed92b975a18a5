"""The operations of a quantized model: integer or float, why, and how their operands are quantized.

In a model that can be lowered, every operation is part of the integer program. In another model, `integer` means that
an operation could be computed in integers, since all of its operands are quantized suitably.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from vitquant.graph import operators as ops
from vitquant.graph.kinds import KINDS, IntegerForm
from vitquant.graph.operators import calls, is_rearrangement, is_selection, packet
from vitquant.graph.walk import depends_on_input, nodes_by_name, origin
from vitquant.model import QuantizedModel
from vitquant.program.instructions import IntegerProgram
from vitquant.quantizers import Quantizer
from vitquant.recipe import Assignment
from vitquant.report.accumulators import Accumulator, accumulators
from vitquant.spec import PerAxis, QuantSpec, Uniform

INTEGER, FLOAT, FUSED, CONSTANT, DATA = "integer", "float", "fused", "constant", "moves data"

_AFFINE = {ops.aten.mul, ops.aten.div, ops.aten.add, ops.aten.sub}


@dataclass(frozen=True)
class Operand:
    """One operand of an operation, and its quantizer.

    Arguments:
        name: `input`, `query`, ...
        value: the name of the value it reads; operands that read the same value share its quantizer.
        rule: the recipe's rule that decided; empty when no rule matched.
        spec: of the quantizer; None, like all below, if the operand stays in float.
        scale: the smallest and the largest step between levels.
        zero_point: the smallest and the largest zero point; None for a scheme without zero points.
        range: the smallest and the largest real number on the grid.
    """

    name: str
    value: str
    rule: str
    spec: QuantSpec | None = None
    scale: tuple[float, float] | None = None
    zero_point: tuple[int, int] | None = None
    range: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the spec's among them."""
        spec = {"bits": None} if self.spec is None else self.spec.to_dict()
        numbers = {"scale": self.scale, "zero_point": self.zero_point, "range": self.range}
        return {"operand": self.name, "value": self.value, "rule": self.rule or None, **spec, **numbers}


@dataclass(frozen=True)
class Operation:
    """One operation of the graph.

    Arguments:
        name: the site's name, or the graph node's if the operation is not a site.
        kind: the site's kind, or the operator's name.
        module: the path of the module that it came from, as the library names it.
        arithmetic: `integer`, `float`, `fused` into another operation, `constant` (the same for every
            image) or `moves data`.
        reason: why it has this arithmetic.
        operands: of a site; empty for other operations.
        macs: multiply-accumulates for one image.
        accumulator: of the integer program; None if the operation does not sum, or there is no program.
    """

    name: str
    kind: str
    module: str
    arithmetic: str
    reason: str
    operands: tuple[Operand, ...] = ()
    macs: int = 0
    accumulator: Accumulator | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        texts = {"name": self.name, "kind": self.kind, "module": self.module}
        operands = [operand.to_dict() for operand in self.operands]
        sums = {"macs": self.macs, "accumulator": None if self.accumulator is None else self.accumulator.to_dict()}
        return {**texts, "arithmetic": self.arithmetic, "reason": self.reason, **sums, "operands": operands}


def list_operations(model: QuantizedModel, program: IntegerProgram | None = None) -> tuple[Operation, ...]:
    """Every operation of a calibrated model, in the graph's order.

    Arguments:
        model: calibrated.
        program: what `lower` returned for the model; None if it cannot be lowered.

    Pitfall: it runs one image through the model, to determine how many times an operation is repeated for an image
    (Swin's windows are part of the batch dimension).
    """
    graph = model.graph_module.graph
    dynamic, owners, macs = depends_on_input(graph), _owners(model), _count_macs(model)
    quantized, quantizers, on_codes = _quantized_results(model), model.quantizers, model.integer_operations
    sums = {} if program is None else accumulators(program)
    found = []
    for node in graph.nodes:
        count = macs.get(node, 0)
        site = model.index.site_at(node.name)
        if site is not None:
            read = {operand: value.name for operand, value in model.index.read_by(site).items()}
            assignments = {operand: model.assignments[value] for operand, value in read.items()}
            if site.name in on_codes:
                arithmetic, reason = INTEGER, on_codes[site.name].description
            elif program is not None:
                arithmetic, reason = INTEGER, "in the integer program"
            else:
                refused = model.float_reasons.get(site.name, "")
                arithmetic, reason = classify(site.kind, assignments, node in quantized, refused)
            operands = tuple(_operand(name, read[name], assignments[name], quantizers) for name in read)
            accumulator = sums.get(site.name)
            found.append(Operation(site.name, site.kind, site.module, arithmetic, reason, operands, count, accumulator))
        elif node.op == "call_function" and ("shape" in node.meta or "shapes" in node.meta):
            arithmetic, reason = _classify_other(node, dynamic, owners)
            if program is not None and arithmetic == FLOAT:
                arithmetic, reason = FUSED, "part of a rescaling"
            kind = str(getattr(packet(node), "__name__", packet(node)))
            found.append(Operation(node.name, kind, str(node.meta.get("module", "")), arithmetic, reason, macs=count))
    return tuple(found)


def summarize(operations: Sequence[Operation]) -> dict[str, Any]:
    """The numbers of operations and operands, and the shares of quantized and of integer multiply-accumulates."""
    counts = Counter(operation.arithmetic for operation in operations)
    operands = [operand for operation in operations for operand in operation.operands]
    quantized = [o for o in operations if o.operands and all(operand.spec is not None for operand in o.operands)]
    macs, quantized_macs = sum(o.macs for o in operations), sum(o.macs for o in quantized)
    integer_macs = sum(o.macs for o in operations if o.accumulator is not None)
    return {
        "operations": {arithmetic: counts[arithmetic] for arithmetic in (INTEGER, FLOAT, FUSED, CONSTANT, DATA)},
        "operands": len(operands),
        "quantized_operands": sum(operand.spec is not None for operand in operands),
        "macs": macs,
        "quantized_macs": quantized_macs,
        "quantized_macs_percent": 100 * quantized_macs / macs if macs else 0.0,
        "integer_macs": integer_macs,
        "integer_macs_percent": 100 * integer_macs / macs if macs else 0.0,
    }


def classify(
    kind: str, operands: Mapping[str, Assignment], quantized_result: bool, refused: str = ""
) -> tuple[str, str]:
    """Whether a site that is simulated in float could be computed in integers, and why.

    Arguments:
        kind: of the site.
        operands: the assignment of each of its operands.
        quantized_result: whether its result is quantized.
        refused: why it is not computed on codes although the recipe asks for it; else empty.
    """
    for name, assignment in operands.items():
        if assignment.spec is None:
            by = f"is left in float by rule {assignment.rule}" if assignment.rule else "is matched by no rule"
            return FLOAT, f"its {name} {by}"
    for name, assignment in operands.items():
        spec = assignment.spec
        assert spec is not None
        widest = KINDS[kind].widest
        if spec.bits > widest:
            return FLOAT, f"its {name} has {spec.bits} bits: above {widest} is simulated only"
        per_axis = isinstance(spec.granularity, PerAxis) and isinstance(spec.scheme, Uniform)
        if per_axis and name in KINDS[kind].summed:
            return FLOAT, f"its {name} has a scale for each channel that it sums"
    if KINDS[kind].form in (IntegerForm.ON_CODES, IntegerForm.NONE):
        if refused:
            return FLOAT, refused
        return FLOAT, "between quantized tensors" if quantized_result else "on a quantized tensor"
    return INTEGER, "all of its operands are quantized"


def _classify_other(node: Node, dynamic: set[Node], owners: Mapping[Node, str]) -> tuple[str, str]:
    """Arithmetic and reason of an operation that is not a site."""
    if node not in dynamic:
        return CONSTANT, "the same for every image"
    if is_rearrangement(node) or is_selection(node) or calls(node, ops.JOINS):
        return DATA, "moves data"
    if node in owners:
        return FUSED, f"part of {owners[node]}"
    dtype = node.meta.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        return DATA, "masks or indices"
    return FLOAT, "not a site"


def _owners(model: QuantizedModel) -> dict[Node, str]:
    """For each operation that fuses into the rescaling of a site's sums, the name of that site.

    Between a product of query and key and its softmax these are all operations: scale, bias, mask. Elsewhere they are
    those that scale or shift a sum by constants before it is quantized (LayerScale).
    """
    scores = {site.name for site in model.sites if site.kind == "scores"}
    sums = {site.node: site.name for site in model.sites if KINDS[site.kind].rescaled}
    dynamic = depends_on_input(model.graph_module.graph)
    owners: dict[Node, str] = {}
    for node in model.graph_module.graph.nodes:
        if node.name in sums:
            owners[node] = sums[node.name]
            continue
        owned = [argument for argument in node.all_input_nodes if argument in owners]
        if not owned:
            continue
        on_scores = owners[owned[0]] in scores and (calls(node, ops.ON_SCORES) or node.op == "call_module")
        affine = calls(node, _AFFINE) and sum(argument in dynamic for argument in node.all_input_nodes) == 1
        if on_scores or affine or is_rearrangement(node) or is_selection(node):
            owners[node] = owners[owned[0]]
    return owners


def _quantized_results(model: QuantizedModel) -> set[Node]:
    """The operations whose result is quantized, perhaps after a rearrangement or selection."""
    nodes = nodes_by_name(model.graph_module.graph)
    return {origin(nodes[value.node]) for value in model.values if model.assignments[value.name].spec is not None}


def _operand(name: str, value: str, assignment: Assignment, quantizers: Mapping[str, Quantizer]) -> Operand:
    if assignment.spec is None:
        return Operand(name, value, assignment.rule)
    quantizer = quantizers[value]
    low, high = quantizer.range()
    zero_point = quantizer.zero_point
    return Operand(
        name,
        value,
        assignment.rule,
        spec=assignment.spec,
        scale=(quantizer.step.min().item(), quantizer.step.max().item()),
        zero_point=None if zero_point is None else (int(zero_point.min()), int(zero_point.max())),
        range=(low.min().item(), high.max().item()),
    )


def _count_macs(model: QuantizedModel) -> dict[Node, int]:
    parameter = next(model.parameters())
    counter = _MacCounter(model.graph_module)
    with torch.inference_mode():
        counter.run(torch.zeros(1, *model.input_shape, dtype=parameter.dtype, device=parameter.device))
    return counter.macs


class _MacCounter(Interpreter):
    """Runs a graph and counts the multiply-accumulates of the products that depend on the image."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.macs: dict[Node, int] = {}
        self._dynamic = depends_on_input(module.graph)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self._dynamic and calls(n, ops.LINEAR | ops.CONVOLUTIONS | ops.PRODUCTS):
            left, right = (self.env[argument] for argument in n.args[:2])  # type: ignore[index]
            summed = right[0].numel() if calls(n, ops.CONVOLUTIONS) else left.shape[-1]
            self.macs[n] = result.numel() * summed
        return result
