"""From a quantized model to an integer program, or a refusal that names the site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vitquant.errors import LoweringError
from vitquant.graph.operators import (
    CONVOLUTIONS,
    JOINS,
    LINEAR,
    PRODUCTS,
    arguments,
    aten,
    calls,
    is_rearrangement,
    is_selection,
    packet,
)
from vitquant.graph.walk import depends_on_input
from vitquant.integer.arithmetic import rescaling
from vitquant.lowering.moves import NoMoveError, moves
from vitquant.lowering.scaled import Hidden, Joined, Scaled, Static, Term, compact, dense
from vitquant.model import QuantizedModel
from vitquant.operations import (
    IntegerLayerNorm,
    IntegerOperation,
    IntegerSoftmax,
    LogIntSoftmax,
    TableActivation,
)
from vitquant.operations.replacement import operation_at
from vitquant.program.instructions import (
    Concat,
    Convolution,
    Instruction,
    IntegerProgram,
    LayerNorm,
    Linear,
    LogSoftmax,
    Lookup,
    Pad,
    Product,
    Register,
    Requantize,
    Sum,
    UniformSoftmax,
    smallest_type,
)
from vitquant.program.moving import move
from vitquant.program.ranges import prove_ranges
from vitquant.quantizers import Quantizer
from vitquant.quantizers.logarithmic import Log2Quantizer

Value = Scaled | Static | Joined | Hidden | Term | tuple


def lower(model: QuantizedModel) -> IntegerProgram:
    """Turn a quantized model into an integer program that computes its codes without floating point.

    Arguments:
        model: calibrated, with every operation on integers, such as by the recipe `fq-vit`.

    Raises:
        CalibrationError: a quantizer is missing.
        LoweringError: an operation cannot be computed in integers, or could overflow; it names the site, the reason
            and the remedy.
    """
    program = _Lowering(model).program()
    prove_ranges(program)
    return program


class _Shapes(Interpreter):
    """Runs one image through a graph, keeping the shape of every tensor, and the value of every static one."""

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__(model.graph_module)
        self.dynamic = depends_on_input(model.graph_module.graph)
        self.shapes: dict[Node, tuple[int, ...]] = {}
        self.static: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
            if n not in self.dynamic:
                self.static[n] = result
        return result


class _Lowering:
    """Walks a graph once; for every node it knows what real tensor it is in terms of integer registers."""

    def __init__(self, model: QuantizedModel) -> None:
        model._require_calibrated()
        self.model = model
        self.module = model.graph_module
        parameter = next(model.parameters())
        run = _Shapes(model)
        with torch.inference_mode():
            run.run(torch.zeros(1, *model.input_shape, dtype=parameter.dtype, device=parameter.device))
        self.one_image, self.static, self.dynamic = run.shapes, run.static, run.dynamic
        self.sites = {site.node: site.name for site in model.sites}
        self.registers: dict[str, Register] = {}
        self.constants: dict[str, Tensor] = {}
        self.instructions: list[Instruction] = []
        self.values: dict[Node, Value] = {}
        self.codes: dict[str, str] = {}
        self.site = self.first = "input"
        self.input_term: Term | None = None

    def program(self) -> IntegerProgram:
        """Lower every node."""
        output = None
        for node in self.module.graph.nodes:
            self.site = self.sites.get(node.name, self.site if node in self.dynamic else node.name)
            if node.op == "placeholder":
                continue  # the image is known by its quantizer
            if node.op == "output":
                output = self._output(node)
            elif node.op == "call_module" and isinstance(self._called(node), Quantizer):
                self._quantizer(node, self._called(node))
            elif node not in self.dynamic:
                if node in self.static:
                    self.values[node] = Static(self.static[node].double())
            elif node in self.one_image or node.meta.get("shapes"):
                self.values[node] = self._dynamic(node)
        assert output is not None
        assert self.input_term is not None  # a graph whose image is not quantized was refused on the way
        return IntegerProgram(
            input=self.first,
            output=output.register,
            registers=self.registers,
            constants=self.constants,
            instructions=tuple(self.instructions),
            codes=self.codes,
            facts={
                "input": {"scale": float(self.input_term.scale), "zero_point": int(self.input_term.zero)},
                "output": {"scale": output.scale.flatten().tolist(), "zero_point": int(output.zero)},
                "recipe": self.model.recipe.name,
                "bits": str(self.model.bits),
            },
        )

    def _called(self, node: Node) -> Any:
        return self.module.get_submodule(str(node.target))

    def _refuse(self, reason: str, remedy: str) -> LoweringError:
        return LoweringError(f"{self.site}: {reason}; {remedy}")

    # Registers, constants, instructions.

    def _emit(self, kind: Callable[..., Instruction], written: Register, **given: Any) -> str:
        output = f"r{len(self.instructions)}"
        self.instructions.append(kind(output=output, site=self.site, **given))
        self.registers[output] = written
        return output

    def _constant(self, name: str, values: Tensor, type: str = "") -> str:
        values = values.detach().to("cpu", torch.int64)
        name = f"{name}.{len(self.constants)}"
        low, high = int(values.min()), int(values.max())
        self.constants[name] = values
        self.registers[name] = Register(type or smallest_type(low, high), tuple(values.shape))
        return name

    def _scalar(self, values: Tensor, what: str) -> float:
        if values.numel() != 1:
            raise self._refuse(
                f"its {what} has {values.numel()} scales, and its sums run over them", "use per = tensor"
            )
        return values.item()

    def _term(self, node: Node, what: str) -> Term:
        value = self.values[node]
        term = value.single if isinstance(value, Scaled) else None
        if term is None:
            raise self._refuse(f"its {what} is not quantized", "let the recipe quantize it")
        return term

    def _zero(self, term: Term, what: str) -> int:
        if term.zero.numel() != 1:
            raise self._refuse(f"its {what} has several zero points", "use per = tensor")
        return int(term.zero)

    # Quantizers: where sums become codes.

    def _quantizer(self, node: Node, quantizer: Quantizer) -> None:
        source = node.all_input_nodes[0]
        if source.op == "placeholder":
            self.values[node] = self._network_input(node, quantizer)
        elif source not in self.dynamic:
            self.values[node] = self._static_codes(str(node.target), self.static[source], quantizer)
        elif operation_at(self.module, self._computed(source)) is not None:
            self.values[node] = self.values[source]  # its codes are this quantizer's already
        else:
            self.values[node] = self._requantized(self.values[source], node, quantizer)
        self.codes[str(node.target).removeprefix("quantizers.")] = self._term(node, "result").register

    def _computed(self, node: Node) -> Node:
        while is_rearrangement(node) or is_selection(node):
            node = node.all_input_nodes[0]
        return node

    def _network_input(self, node: Node, quantizer: Quantizer) -> Scaled:
        self.site = "input"
        spec = quantizer.spec
        self.registers[self.first] = Register(smallest_type(spec.qmin, spec.qmax), (-1, *self.one_image[node][1:]))
        self.input_term = self._term_of(self.first, quantizer, len(self.one_image[node]))
        self._scalar(self.input_term.scale, "input")
        return Scaled((self.input_term,), torch.zeros((), dtype=torch.float64))

    def _static_codes(self, name: str, value: Tensor, quantizer: Quantizer) -> Scaled:
        spec = quantizer.spec
        with torch.inference_mode():
            codes = quantizer.encode(value)
        register = self._constant(name.removeprefix("quantizers."), codes, smallest_type(spec.qmin, spec.qmax))
        return Scaled((self._term_of(register, quantizer, value.ndim),), torch.zeros((), dtype=torch.float64))

    def _term_of(self, register: str, quantizer: Quantizer, rank: int) -> Term:
        """The real tensor that codes of a quantizer are."""
        if isinstance(quantizer, Log2Quantizer):
            raise self._refuse("powers of two are read by other than a product", "quantize it uniformly")
        like = torch.empty([1] * rank, dtype=torch.float64)
        step = quantizer._along(quantizer.step.detach().cpu(), like)
        assert quantizer.zero_point is not None
        zero = quantizer._along(quantizer.zero_point.detach().cpu(), like).to(torch.int64)
        return Term(register, zero, step)

    def _requantized(self, value: Value, node: Node, quantizer: Quantizer) -> Scaled:
        shape, rank = tuple(node.meta["shape"]), len(node.meta["shape"])
        if isinstance(value, Joined):
            parts = [self._requantized(part, node, quantizer) for part in value.parts]
            registers = tuple(part.terms[0].register for part in parts)
            spec = quantizer.spec
            joined = self._emit(
                Concat, Register(smallest_type(spec.qmin, spec.qmax), shape), inputs=registers, axis=value.axis
            )
            return Scaled((self._term_of(joined, quantizer, rank),), torch.zeros((), dtype=torch.float64))
        if isinstance(value, Static):
            return self._static_codes(self.site, value.value, quantizer)
        if not isinstance(value, Scaled):
            raise self._refuse("what it reads is not a sum of integers", "quantize its input")
        target = self._term_of("", quantizer, rank)
        ratios = [compact(term.scale / target.scale) for term in value.terms]
        shared = torch.stack([ratio.abs().amax() for ratio in ratios])
        offset = value.constant / target.scale + target.zero
        for term, ratio in zip(value.terms, ratios, strict=True):
            offset = offset - ratio * term.zero
        step = rescaling(shared, offset.abs().amax().expand_as(shared))
        multipliers = [torch.round(torch.ldexp(ratio, torch.tensor(step.shift))).to(torch.int64) for ratio in ratios]
        exact = (value.constant / target.scale + target.zero).expand(torch.broadcast_shapes(offset.shape))
        addend = torch.round(torch.ldexp(exact, torch.tensor(step.shift))).to(torch.int64) + (1 << (step.shift - 1))
        for term, multiplier in zip(value.terms, multipliers, strict=True):
            addend = addend - multiplier * term.zero
        spec = quantizer.spec
        output = self._emit(
            Requantize,
            Register(smallest_type(spec.qmin, spec.qmax), shape),
            inputs=tuple(term.register for term in value.terms),
            multipliers=tuple(self._constant(f"{self.site}.multiplier", m, "s32") for m in multipliers),
            addend=self._constant(f"{self.site}.addend", compact(addend), "s64"),
            shift=step.shift,
            low=spec.qmin,
            high=spec.qmax,
        )
        return Scaled((replace(target, register=output),), torch.zeros((), dtype=torch.float64))

    # Operations.

    def _dynamic(self, node: Node) -> Value:
        operation = operation_at(self.module, node)
        if operation is not None:
            return self._operation(node, operation)
        if node.op != "call_function":
            raise self._refuse(f"{node.target} is not known", "leave it out of the model")
        if calls(node, LINEAR):
            return self._linear(node)
        if calls(node, CONVOLUTIONS):
            return self._convolution(node)
        if calls(node, PRODUCTS):
            return self._product(node)
        if calls(node, {aten.mul, aten.div, aten.add, aten.sub}):
            return self._elementwise(node)
        if calls(node, {aten.masked_fill}):
            return self._hide(node)
        if calls(node, {aten.mean, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool1d}):
            return self._mean(node)
        if calls(node, JOINS) and packet(node) is aten.cat:
            return self._joined(node)
        if node.meta.get("shapes") and "shape" not in node.meta:
            return ()  # a split: its parts are taken one by one
        if is_rearrangement(node) or is_selection(node):
            return self._moved(node)
        raise self._refuse(
            f"{packet(node)} has no integer form here", "quantize the model by another recipe, or ask for it"
        )

    def _linear(self, node: Node) -> Scaled:
        source, weight = self._term(arguments(node)[0], "input"), self._term(arguments(node)[1], "weight")
        scale = self._scalar(source.scale, "input") * weight.scale.flatten()
        bias = self._bias(arguments(node)[2] if len(arguments(node)) > 2 else None, scale)
        output = self._emit(
            Linear, Register("s32", tuple(node.meta["shape"])),
            input=source.register, weight=weight.register, bias=bias,
            input_zero=self._zero(source, "input"), weight_zero=self._weight_zero(weight),
        )  # fmt: skip
        return self._accumulated(output, scale)

    def _convolution(self, node: Node) -> Scaled:
        given = dict(zip(("bias", "stride", "padding", "dilation", "groups"), arguments(node)[2:], strict=False))
        if not calls(node, {aten.conv2d}) or isinstance(given.get("padding"), str):
            raise self._refuse(f"{packet(node)} is not a plain two-dimensional convolution", "use conv2d")
        source, weight = self._term(arguments(node)[0], "input"), self._term(arguments(node)[1], "weight")
        scale = self._scalar(source.scale, "input") * weight.scale.flatten()
        output = self._emit(
            Convolution, Register("s32", tuple(node.meta["shape"])), input=source.register, weight=weight.register,
            bias=self._bias(given.get("bias"), scale), input_zero=self._zero(source, "input"),
            weight_zero=self._weight_zero(weight), stride=_pair(given.get("stride", 1)),
            padding=_pair(given.get("padding", 0)), dilation=_pair(given.get("dilation", 1)),
            groups=int(given.get("groups", 1)),
        )  # fmt: skip
        return self._accumulated(output, scale.view(-1, 1, 1))

    def _weight_zero(self, weight: Term) -> str | None:
        return self._constant(f"{self.site}.weight_zero", weight.zero) if bool(weight.zero.any()) else None

    def _bias(self, node: Node | None, scale: Tensor) -> str | None:
        """The bias on the accumulator's scale."""
        if node is None:
            return None
        value = self.values[node]
        assert isinstance(value, Static)
        bias = torch.round(value.value.detach().cpu() / scale)
        if float(bias.abs().max()) >= 2**31:
            raise self._refuse("its bias does not fit 32 bits on the scale of its sums", "use more bits for its weight")
        return self._constant(f"{self.site}.bias", bias, "s32")

    def _product(self, node: Node) -> Scaled:
        left, right = (self._term(argument, "operand") for argument in arguments(node)[:2])
        scale = torch.tensor(self._scalar(left.scale, "operand") * self._scalar(right.scale, "operand"))
        output = self._emit(
            Product, Register("s32", tuple(node.meta["shape"])), left=left.register, right=right.register,
            left_zero=self._zero(left, "operand"), right_zero=self._zero(right, "operand"),
        )  # fmt: skip
        return self._accumulated(output, scale.double())

    def _accumulated(self, register: str, scale: Tensor) -> Scaled:
        zero = torch.zeros((), dtype=torch.int64)
        return Scaled((Term(register, zero, scale.double()),), torch.zeros((), dtype=torch.float64))

    def _elementwise(self, node: Node) -> Value:
        left, right = (self._operand(argument) for argument in arguments(node)[:2])
        if node.kwargs.get("alpha", 1) != 1:
            raise self._refuse("it adds a multiple", "write the multiple as a product")
        if isinstance(left, Static) and isinstance(right, Scaled) and packet(node) in (aten.add, aten.mul):
            left, right = right, left
        match packet(node), left, right:
            case aten.mul, Scaled(), Static():
                return left.times(right.value.cpu())
            case aten.div, Scaled(), Static():
                return left.times(1.0 / right.value.cpu())
            case aten.add, Scaled(), Static() | Scaled():
                return left.plus(right.value.cpu() if isinstance(right, Static) else right)
            case aten.sub, Scaled(), Static():
                return left.plus(-right.value.cpu())
            case aten.sub, Scaled(), Scaled():
                return left.plus(right.times(torch.tensor(-1.0)))
            case _:
                raise self._refuse(f"{packet(node)} of two activations has no integer form here", "ask for it")

    def _operand(self, argument: Any) -> Value:
        if isinstance(argument, Node):
            return self.values[argument]
        return Static(torch.tensor(float(argument), dtype=torch.float64))

    def _hide(self, node: Node) -> Hidden:
        scores = self.values[arguments(node)[0]]
        hidden = self.values[arguments(node)[1]]
        if not isinstance(scores, Scaled) or not isinstance(hidden, Static):
            raise self._refuse("its mask depends on the image", "give a constant mask")
        if -1 in arguments(node)[1].meta["shape"]:
            raise self._refuse("its mask is repeated for every image", "add it to scores that have an axis for windows")
        return Hidden(scores, hidden.value.cpu() != 0, node)

    def _mean(self, node: Node) -> Scaled:
        term, shape = self._term(arguments(node)[0], "input"), tuple(node.meta["shape"])
        read = tuple(arguments(node)[0].meta["shape"])
        if calls(node, {aten.mean}):
            axes = tuple(sorted(int(axis) % len(read) for axis in arguments(node)[1]))
            keep = bool(arguments(node)[2]) if len(arguments(node)) > 2 else False
        else:
            size = arguments(node)[1]
            if any(int(s) != 1 for s in (size if isinstance(size, list | tuple) else [size])):
                raise self._refuse("it averages over windows", "average over everything")
            axes, keep = tuple(range(len(read) - len(size), len(read))), True
        if 0 in axes:
            raise self._refuse("it averages over the batch", "average over other axes")
        scale, count = term.scale, 1
        for axis in axes:
            count *= read[axis]
            if scale.ndim >= len(read) - axis and scale.shape[axis - len(read)] != 1:
                raise self._refuse("its input has a scale for each thing that it sums", "use per = tensor")
        if not keep and scale.ndim:
            scale = self._without(scale, axes, len(read))
        output = self._emit(
            Sum, Register("s32", shape), input=term.register, axes=axes, keep=keep, input_zero=self._zero(term, "input")
        )
        return self._accumulated(output, scale / count)

    @staticmethod
    def _without(values: Tensor, axes: Sequence[int], rank: int) -> Tensor:
        values = values.view([1] * (rank - values.ndim) + list(values.shape))
        return values.squeeze(tuple(axes))

    def _joined(self, node: Node) -> Joined:
        parts = []
        for part in arguments(node)[0]:
            value = self.values[part]
            if not isinstance(value, Scaled | Static):
                raise self._refuse("it joins what is no sum of integers", "quantize its parts")
            parts.append(value)
        axis = (int(arguments(node)[1]) if len(arguments(node)) > 1 else 0) % len(node.meta["shape"])
        return Joined(tuple(parts), axis)

    def _moved(self, node: Node) -> Value:
        source = node.all_input_nodes[0]
        if calls(source, {aten.unbind, aten.split, aten.split_with_sizes, aten.chunk}) and not source.meta.get("shape"):
            source = source.all_input_nodes[0]
        value = self.values[source]
        try:
            steps = moves(node, tuple(source.meta["shape"]), tuple(node.meta["shape"]))
        except NoMoveError as reason:
            raise self._refuse(f"{reason} has no integer form here", "ask for it") from None
        if isinstance(value, Hidden):
            if len(node.meta["shape"]) < 2 or node.meta["shape"][-1] != source.meta["shape"][-1]:
                raise self._refuse("the rows of masked scores are rearranged", "apply the mask last")
            return replace(value, moved=(*value.moved, node))
        if not isinstance(value, Scaled):
            raise self._refuse("it rearranges what is no sum of integers", "quantize it")
        return self._walk(value, steps, source)

    def _walk(self, value: Scaled, steps: Sequence[Instruction], source: Node) -> Scaled:
        shape, one = tuple(source.meta["shape"]), self.one_image[source]
        for step in steps:
            value, shape, one = self._step(value, step, shape, one)
        return value

    def _step(
        self, value: Scaled, step: Instruction, shape: tuple[int, ...], one: tuple[int, ...]
    ) -> tuple[Scaled, tuple[int, ...], tuple[int, ...]]:
        """One move, of the registers and of what is broadcast to them."""
        sample = move(step, torch.empty(one, dtype=torch.int8))
        after = tuple(sample.shape)
        growing = tuple(self._growing(step, shape, one, after))
        terms = []
        for term in value.terms:
            given = {k: v for k, v in vars(step).items() if k not in ("output", "site", "input")}
            if isinstance(step, Pad):
                given["value"] = self._zero(term, "input")
            register = self._emit(
                type(step), Register(self.registers[term.register].type, growing), input=term.register, **given
            )
            zero, scale = (self._rearranged(v, step, one) for v in (term.zero, term.scale))
            terms.append(Term(register, zero, scale))
        return Scaled(tuple(terms), self._rearranged(value.constant, step, one)), growing, after

    def _growing(
        self, step: Instruction, shape: tuple[int, ...], one: tuple[int, ...], after: tuple[int, ...]
    ) -> list[int]:
        """The shape after a move, with -1 for the size that grows with the batch."""
        double = [2 * size if grows == -1 else size for size, grows in zip(one, shape, strict=True)]
        doubled = move(step, torch.empty(double, dtype=torch.int8)).shape
        return [size if size == other else -1 for size, other in zip(after, doubled, strict=True)]

    def _rearranged(self, values: Tensor, step: Instruction, one: tuple[int, ...]) -> Tensor:
        if values.numel() == 1:
            return values.reshape(())
        return compact(move(replace(step, value=0) if isinstance(step, Pad) else step, dense(values, one)))

    # Operations on codes.

    def _operation(self, node: Node, operation: IntegerOperation) -> Scaled:
        value, shape = self.values[arguments(node)[0]], tuple(node.meta["shape"])
        if isinstance(value, Hidden):
            hidden = self._constant(f"{self.site}.hidden", value.hidden.to(torch.int64), "u8")
            shape = tuple(value.node.meta["shape"])
            result = self._on_codes(node, operation, value.scores, hidden, shape)
            before = value.node
            for moved in value.moved:
                steps = moves(moved, tuple(before.meta["shape"]), tuple(moved.meta["shape"]))
                result, before = self._walk(result, steps, before), moved
            return result
        return self._on_codes(node, operation, value, None, shape)

    def _on_codes(
        self, node: Node, operation: IntegerOperation, value: Value, hidden: str | None, shape: tuple[int, ...]
    ) -> Scaled:
        term = value.single if isinstance(value, Scaled) else None
        if term is None:
            raise self._refuse("its input is not quantized", "let the recipe quantize it")
        spec = operation.result.spec
        written = Register(smallest_type(spec.qmin, spec.qmax), shape)
        match operation:
            case LogIntSoftmax():
                return self._log_softmax(operation, term, hidden, shape)
            case IntegerSoftmax():
                table = operation.exponential
                multiplier, shift = operation.steps()
                register = self._emit(
                    UniformSoftmax, written, input=term.register, hidden=hidden,
                    values=self._constant(f"{self.site}.values", table.values, "u16"),
                    octaves=self._constant(f"{self.site}.octaves", table.octaves, "u16"),
                    multiplier=multiplier, shift=shift, result_zero=self._result_zero(operation),
                    low=spec.qmin, high=spec.qmax,
                )  # fmt: skip
            case IntegerLayerNorm():
                register = self._layer_norm(node, operation, term, written)
            case TableActivation():
                table = operation.table(next(self.model.parameters()).dtype)
                register = self._emit(
                    Lookup, written, input=term.register,
                    table=self._constant(f"{self.site}.table", table, written.type), lowest=operation.source.spec.qmin,
                )  # fmt: skip
            case _:
                raise self._refuse("it is computed as published, with float statistics", "use the recipe fq-vit")
        return Scaled((self._term_of(register, operation.result, len(shape)),), torch.zeros((), dtype=torch.float64))

    @staticmethod
    def _result_zero(operation: IntegerOperation) -> int:
        assert operation.result.zero_point is not None
        return int(operation.result.zero_point)

    def _log_softmax(self, operation: LogIntSoftmax, term: Term, hidden: str | None, shape: tuple[int, ...]) -> Scaled:
        """The codes, and what they stand for: 2**(zero - 1 - code), or 0."""
        result, table = operation.result, operation.exponential
        assert isinstance(result, Log2Quantizer)
        codes = self._emit(
            LogSoftmax, Register(smallest_type(0, result.zero_code), shape), input=term.register, hidden=hidden,
            values=self._constant(f"{self.site}.values", table.values, "u16"),
            octaves=self._constant(f"{self.site}.octaves", table.octaves, "u16"),
            zero=result.zero_code, published=operation.published,
        )  # fmt: skip
        last = result.zero_code - 1
        powers = torch.tensor([1 << (last - code) for code in range(last + 1)] + [0])
        register = self._emit(
            Lookup,
            Register("u16", shape),
            input=codes,
            table=self._constant(f"{self.site}.powers", powers, "u16"),
            lowest=0,
        )
        return self._accumulated(register, torch.tensor(2.0**-last, dtype=torch.float64))

    def _layer_norm(self, node: Node, operation: IntegerLayerNorm, term: Term, written: Register) -> str:
        weight, bias = (self.static[p] if isinstance(p, Node) else None for p in arguments(node)[1:3])
        definition, source = operation.definition(written.shape[-1], weight, bias), operation.source
        factors = None if source.factor is None else self._constant(f"{self.site}.factors", source.factor, "u8")
        assert source.zero_point is not None
        return self._emit(
            LayerNorm, written, input=term.register, factors=factors, input_zero=int(source.zero_point),
            epsilon=definition.epsilon, largest=definition.largest,
            multiplier=self._constant(f"{self.site}.multiplier", definition.affine.multiplier, "s32"),
            addend=self._constant(f"{self.site}.addend", definition.affine.addend, "s64"),
            shift=definition.affine.shift, low=definition.low, high=definition.high,
        )  # fmt: skip

    def _output(self, node: Node) -> Term:
        results = [result for result in arguments(node)[0] if isinstance(result, Node)]
        if len(results) != 1:
            raise self._refuse(f"the model gives {len(results)} tensors", "wrap it so that it gives its logits only")
        return self._term(results[0], "result")


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)
    return (values[0], values[-1])
