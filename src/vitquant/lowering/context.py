"""The state of lowering while it walks a graph, with the program that it has emitted so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_map_only

from vitquant.errors import LoweringError
from vitquant.graph.operators import arguments, packet
from vitquant.graph.walk import depends_on_input
from vitquant.integer.correct_rounding import CorrectRounding
from vitquant.lowering.scaled import Joined, Masked, Powers, Scaled, Static, Term, compact, numerators, size_along
from vitquant.model import QuantizedModel
from vitquant.program.instructions import TYPES, Instruction, Lookup, Register, smallest_type
from vitquant.quantizers import Quantizer

Value = Scaled | Static | Joined | Masked | tuple[()]  # (): a split, whose parts are lowered one by one
SIMULATE = "run it with --engine simulated, or export it as onnx-qdq"


class Context:
    """The state of lowering one model.

    Arguments:
        model: calibrated.

    Attributes:
        one_image: the shape of every tensor for a batch of one image.
        static: the tensors that do not depend on the images, for a batch of one.
        dynamic: the nodes that depend on the images.
        values: for each node lowered so far its value in terms of integer registers.
        image, image_quantizer: the codes of the images and their quantizer, once that has been lowered.
        registers, constants, instructions: of the program so far.
    """

    def __init__(self, model: QuantizedModel) -> None:
        self.model, self.module = model, model.graph_module
        self.dynamic = depends_on_input(self.module.graph)
        self.one_image, self.static = _run(model, 1)
        self._static_of_two: dict[Node, Tensor] | None = None
        self._sites = {site.node: site.name for site in model.sites}
        self.registers: dict[str, Register] = {}
        self.constants: dict[str, Tensor] = {}
        self.instructions: list[Instruction] = []
        self.values: dict[Node, Value] = {}
        self.image: Term | None = None
        self.image_quantizer: Quantizer | None = None
        self.site, self._place = "input", "input"

    def enter(self, node: Node) -> None:
        """Go to a node: instructions emitted from now on belong to its site, or to the previous one if it has none."""
        if node.name in self._sites:
            self.site = self._place = self._sites[node.name]
        elif node.op == "call_module":
            self._place = str(node.target).partition(".")[2]  # a quantizer: the name of its value
        elif node in self.dynamic:
            module = node.meta.get("module")
            self._place = f"{module} ({node.name})" if module else node.name

    def refuse(self, reason: str, remedy: str = SIMULATE) -> LoweringError:
        """The error for the node that is being lowered."""
        return LoweringError(f"{self._place}: {reason}", remedy)

    def static_of_two(self, node: Node) -> Tensor:
        """The value of a node that does not depend on the images, for a batch of two."""
        if self._static_of_two is None:
            _, self._static_of_two = _run(self.model, 2)
        return self._static_of_two[node]

    def emit(self, kind: Callable[..., Instruction], written: Register, **given: Any) -> str:
        """Emit an instruction, and return the name of the register that it writes."""
        output = f"r{len(self.instructions)}"
        self.instructions.append(kind(output=output, site=self.site, **given))
        self.registers[output] = written
        return output

    def constant(self, name: str, values: Tensor, type: str = "") -> str:
        """Add a constant, of the smallest type that holds it unless one is given, and return its name."""
        values = values.detach().to("cpu", torch.int64)
        name = f"{name}.{len(self.constants)}"
        self.constants[name] = values
        self.registers[name] = Register(
            type or smallest_type(int(values.min()), int(values.max())), tuple(values.shape)
        )
        return name

    def value(self, node: Node) -> Value:
        """The value of a node in terms of integer registers.

        Raises:
            LoweringError: the node is the image before any quantizer, or is not a tensor.
        """
        if node in self.values:
            return self.values[node]
        if node in self.dynamic:
            raise self.refuse(
                "it reads the image before that is quantized", "move this operation into the preprocessing"
            )
        raise self.refuse(f"it computes with {node.name}, which is no tensor")

    def codes(self, value: Value, what: str) -> Term:
        """The single term of a value that is one register of codes, powers included.

        Raises:
            LoweringError: the value is anything else.
        """
        term = value.single if isinstance(value, Scaled) else None
        if term is None:
            raise self._not_quantized(what)
        return term

    def linear(self, value: Scaled) -> Scaled:
        """The value with codes of powers replaced by integer numerators, by one table lookup for each term."""
        return Scaled(tuple(each for term in value.terms for each in self._linear(term)), value.constant)

    def _linear(self, term: Term) -> tuple[Term, ...]:
        if not isinstance(term, Powers):
            return (term,)
        terms, shape = [], self.registers[term.register].shape
        for table, scale in numerators(term):
            written = Register(smallest_type(0, int(table.max())), shape)
            constant = self.constant(f"{self.site}.powers", table, written.type)
            register = self.emit(Lookup, written, input=term.register, table=constant, lowest=0)
            terms.append(Term(register, torch.zeros((), dtype=torch.int64), scale, numerators=True))
        return tuple(terms)

    def term(self, node: Node, what: str) -> Term:
        """The single term of a node's value: integers with a scale and a zero point.

        Raises:
            LoweringError: the value is anything else, including powers of the square root of two.
        """
        term, *more = self._terms(node, what)
        if more:
            raise self.refuse(f"its {what} is powers of the root of two, which only products of activations read")
        return term

    def factor(self, node: Node, what: str, summed: Sequence[int]) -> Term:
        """The term of a node as an operand of a layer: at most 8 bits, or numerators of powers, with one zero point.

        Arguments:
            summed: the axes that are summed over, counted from the last; scales must not differ along them.
        """
        term = self.term(node, what)
        self._check_factor(term, what, summed)
        return term

    def factors(self, node: Node, what: str, summed: Sequence[int]) -> tuple[Term, ...]:
        """The terms of a node as an operand of a product of activations, each with the restrictions of `factor`."""
        terms = self._terms(node, what)
        for term in terms:
            self._check_factor(term, what, summed)
        return terms

    def _terms(self, node: Node, what: str) -> tuple[Term, ...]:
        """The terms of a value: one, or for numerators of powers one for each of the powers in an octave."""
        value = self.value(node)
        if isinstance(value, Scaled) and not bool(value.constant.any()):
            terms = self.linear(value).terms
            if len(terms) == 1 or (terms and all(term.numerators for term in terms)):
                return terms
        raise self._not_quantized(what)

    def _not_quantized(self, what: str) -> LoweringError:
        return self.refuse(f"its {what} is not quantized", "let the recipe quantize it")

    def _check_factor(self, term: Term, what: str, summed: Sequence[int]) -> None:
        kind = self.registers[term.register].type
        if TYPES[kind][0] > 8 and not term.numerators:
            raise self.refuse(f"its {what} is {kind}, and products are of 8 bits", "give it 8 bits or less")
        if any(size_along(term.scale, axis) > 1 for axis in summed):
            reason = f"its {what} has {term.scale.numel()} scales, and its sums run over them"
            raise self.refuse(reason, "use per = tensor")
        self.zero(term, what)

    def zero(self, term: Term, what: str) -> int:
        """The zero point of a term, for an instruction that takes only one."""
        zero = compact(term.zero)
        if zero.numel() != 1:
            raise self.refuse(f"its {what} has several zero points", "use per = tensor, or symmetric = true")
        return int(zero)

    def operand(self, argument: Any) -> Value:
        """The value of an elementwise operation's argument, a node or a number."""
        if isinstance(argument, Node):
            return self.value(argument)
        return Static(torch.tensor(float(argument), dtype=torch.float64))


def accumulated(register: str, scale: Tensor) -> Scaled:
    """The real tensor of a register that holds accumulated sums."""
    return Scaled((Term(register, torch.zeros((), dtype=torch.int64), scale.double().cpu()),), nothing())


def nothing() -> Tensor:
    """Zero, as the constant part of a value without one."""
    return torch.zeros((), dtype=torch.float64)


def growing_shape(node: Node) -> tuple[int, ...]:
    """A node's shape, -1 for the size that grows with the batch."""
    return tuple(node.meta["shape"])


def operator_name(node: Node) -> str:
    """The name of the operator that a node calls, for messages."""
    return str(getattr(packet(node), "__name__", packet(node))).removeprefix("aten.")


def options(node: Node, *names: str) -> dict[str, Any]:
    """The arguments of a node after its first two, by name."""
    return {**dict(zip(names, arguments(node)[2:], strict=False)), **node.kwargs}


class _Shapes(Interpreter):
    """Runs a graph and records the shape of every tensor, and the value of every one that does not depend on images.

    The latter become constants of the program, so they are computed on the CPU with correct rounding.
    """

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__(model.graph_module)
        self.extra_traceback = False
        self._dynamic = depends_on_input(model.graph_module.graph)
        self._device = next(model.parameters()).device
        self.shapes: dict[Node, tuple[int, ...]] = {}
        self.static: dict[Node, Tensor] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self._node in self._dynamic:
            return super().call_function(target, args, kwargs)
        args, kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
        with CorrectRounding():
            result = super().call_function(target, args, kwargs)
        return tree_map_only(Tensor, lambda x: x.to(self._device), result)

    def run_node(self, n: Node) -> Any:
        self._node = n
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
            if n not in self._dynamic:
                self.static[n] = result.detach().cpu()
        return result


def _run(model: QuantizedModel, images: int) -> tuple[dict[Node, tuple[int, ...]], dict[Node, Tensor]]:
    parameter, run = next(model.parameters()), _Shapes(model)
    with torch.inference_mode():
        run.run(torch.zeros(images, *model.input_shape, dtype=parameter.dtype, device=parameter.device))
    return run.shapes, run.static
