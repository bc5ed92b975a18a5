"""The program of a model whose scales and weights change: what depends on them is lowered again, and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import islice
from operator import attrgetter

import torch
from torch import Tensor
from torch.fx import Node

from vitquant.graph.segments import is_quantizer
from vitquant.integer_modules.replacement import operation_at, prepare_operations
from vitquant.lowering.context import Context, Value
from vitquant.lowering.lower import lower_node, program_of
from vitquant.lowering.scaled import Joined, Masked, Scaled, Static
from vitquant.model import QuantizedModel
from vitquant.program.instructions import Instruction


class FollowingProgram:
    """The integer program of a model, which follows changes of quantizers and stored tensors.

    A quantizer that has not changed gives codes of the same register on the same scale, whatever is before it. A change
    of the scales of one layer thus reaches the next quantizers and ends there: a few instructions and constants are
    replaced. Registers keep their names.

    Arguments:
        model: calibrated, with its operations on codes.

    Attributes:
        program: of the model as it was when it could be lowered last.

    Raises:
        LoweringError: see `translate`.

    Pitfall: it is not proved that the program cannot overflow; `check_program` does.
    """

    def __init__(self, model: QuantizedModel) -> None:
        self._model = model
        self._lower()
        self._known = True  # whether the context is that of `program`

    def follow(self, changed: Collection[str]) -> int:
        """Lower again what depends on some quantizers or stored tensors that have changed.

        Arguments:
            changed: the names of the values whose quantizers have changed, and the names of changed stored tensors.

        Returns:
            The index of the first instruction that depends on them; 0 if the whole model was lowered.

        Raises:
            LoweringError: the changed model has no integers; `program` stays as it was, and the next call lowers the
                whole model.
        """
        known, self._known = self._known, False
        first = self._again(changed) if known else None
        if first is None:  # the change needs other instructions
            self._lower()
        self._known = True
        return first or 0

    def _lower(self) -> None:
        """Lower the whole model, and note what each node emits."""
        prepare_operations(self._model.graph_module)
        self._context = context = Context(self._model)
        self._emitted: dict[Node, tuple[slice, slice]] = {}
        self._site: dict[Node, str] = {}
        for node in self._model.graph_module.graph.nodes:
            before, self._site[node] = (len(context.instructions), len(context.constants)), context.site
            lower_node(context, node)
            after = (len(context.instructions), len(context.constants))
            self._emitted[node] = slice(before[0], after[0]), slice(before[1], after[1])
        self._names = list(context.constants)
        self._put()

    def _again(self, changed: Collection[str]) -> int | None:
        """Lower the nodes again that depend on what changed: the first of their instructions.

        None if they need other instructions or constants than before; the context is then of no use.
        """
        context, module = self._context, self._model.graph_module
        prepare_operations(module)
        present = self._model.quantizers
        quantizers = {present[name] for name in changed if name in present}
        if context.image_quantizer in quantizers:
            return None
        dirty: set[Node] = set()
        first = len(context.instructions)
        for node in module.graph.nodes:
            operation = operation_at(module, node)
            own = (is_quantizer(node) and module.get_submodule(str(node.target)) in quantizers) or (
                node.op == "get_attr" and node.target in changed
            )
            own = own or (operation is not None and not quantizers.isdisjoint((operation.source, operation.result)))
            if not own and dirty.isdisjoint(node.all_input_nodes):
                continue
            if node in context.static and not self._computed_again(node):
                return None
            instructions, constants = self._emitted[node]
            before = context.values.get(node)
            if not self._replaced(node, instructions, constants):
                return None
            if instructions.stop > instructions.start:
                first = min(first, instructions.start)
            if own or not same(before, context.values.get(node)):
                dirty.add(node)
        self._put()
        return first

    def _put(self) -> None:
        program = program_of(self._context)  # it shares the registers and constants of the context
        self.program = replace(program, registers=dict(program.registers), constants=dict(program.constants))

    def _computed_again(self, node: Node) -> bool:
        """Compute a stored tensor or its quantized value anew; False where the node is anything else."""
        context, module = self._context, self._model.graph_module
        if node.op == "get_attr":
            context.static[node] = attrgetter(str(node.target))(module).detach().cpu()
            return True
        if not is_quantizer(node):
            return False
        with torch.inference_mode():
            context.static[node] = module.get_submodule(str(node.target))(context.static[node.all_input_nodes[0]])
        return True

    def _replaced(self, node: Node, instructions: slice, constants: slice) -> bool:
        """Lower a node again, and replace what it emitted before; False if that is of another form now."""
        context, whole, every = self._context, self._context.instructions, self._context.constants
        context.instructions = whole[: instructions.start]
        context.constants = dict(islice(every.items(), constants.start))
        context.site = self._site[node]
        lower_node(context, node)
        emitted = context.instructions[instructions.start :]
        written = dict(islice(context.constants.items(), constants.start, None))
        context.instructions, context.constants = whole, every
        if [*map(_form, emitted)] != [*map(_form, whole[instructions])] or [*written] != self._names[constants]:
            return False
        whole[instructions] = emitted
        every.update(written)
        return True


def _form(instruction: Instruction) -> tuple[type, str]:
    return type(instruction), instruction.output


def same(left: Value | None, right: Value | None) -> bool:
    """Whether two values are the same registers on the same scales."""
    match left, right:
        case Static(), Static():
            return _equal(left.value, right.value)
        case Scaled(), Scaled():
            pairs = list(zip(left.terms, right.terms, strict=False))
            terms = all(
                type(a) is type(b) and a.register == b.register and _equal(a.zero, b.zero) and _equal(a.scale, b.scale)
                for a, b in pairs
            )
            return terms and len(left.terms) == len(right.terms) and _equal(left.constant, right.constant)
        case Joined(), Joined():
            parts = list(zip(left.parts, right.parts, strict=False))
            return len(left.parts) == len(right.parts) and all(same(*pair) for pair in parts)
        case Masked(), Masked():
            return same(left.scores, right.scores) and _equal(left.mask, right.mask)
        case _:
            return False  # the parts of a split are values of their own


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)
