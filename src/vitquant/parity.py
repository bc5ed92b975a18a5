"""How far apart the forms of one model are: float, simulated, in integers, and as each runtime computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter as GraphInterpreter

from vitquant.model import QuantizedModel
from vitquant.operations import IntegerOperation
from vitquant.program.instructions import IntegerProgram
from vitquant.quantizers import Quantizer
from vitquant.quantizers.logarithmic import Log2Quantizer
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.products import exact_int64
from vitquant.tasks.classification import logits_of

AGREEMENT = 98.0  # per cent of images that the integer program gives the exact simulation's class
RESCALING = "rescaling"
FLIPPED = 1e-3  # share of codes that a rescaling may round otherwise than the simulation does
_AT_ONCE = 4  # images whose every register is held


@dataclass(frozen=True)
class Comparison:
    """Two forms of a model on the same images.

    Arguments:
        form, beside: which.
        images: how many.
        agreement: per cent of them that both give the same class.
        identical: per cent of them whose logits are the same, bit for bit.
        cosine: of the logits, the mean over images.
        worst: the largest difference of a logit.
        promise: what has to hold, in words; empty when nothing is promised.
        kept: whether it does.
    """

    form: str
    beside: str
    images: int
    agreement: float
    identical: float
    cosine: float
    worst: float
    promise: str = ""
    kept: bool = True


@dataclass(frozen=True)
class Flips:
    """Codes that the integers round otherwise than the simulation, when both are fed the same codes.

    Arguments:
        value: the quantized tensor, by name.
        made_by: `rescaling`, or the kind of the operation whose codes these are.
        codes: how many were compared.
        flipped: how many differ.
        largest: by how many steps at most.
    """

    value: str
    made_by: str
    codes: int
    flipped: int
    largest: int

    @property
    def share(self) -> float:
        """The share of codes that differ."""
        return self.flipped / self.codes

    @property
    def kept(self) -> bool:
        """Whether the promise about rescaling holds: at most `FLIPPED` of the codes, by one step."""
        return self.made_by != RESCALING or (self.share <= FLIPPED and self.largest <= 1)


def compare(form: str, logits: Tensor, beside: str, reference: Tensor) -> Comparison:
    """Two forms of a model by their logits, (images, classes)."""
    logits, reference = logits.double(), reference.double()
    return Comparison(
        form,
        beside,
        len(logits),
        agreement=100 * (_classes(logits) == _classes(reference)).double().mean().item(),
        identical=100 * (logits == reference).all(1).double().mean().item(),
        cosine=torch.cosine_similarity(logits, reference, dim=1).mean().item(),
        worst=(logits - reference).abs().max().item(),
    )


def bit_exact(comparison: Comparison) -> Comparison:
    """With the promise that both forms give the same bits."""
    return replace(comparison, promise="bit for bit", kept=comparison.identical == 100)


def same_classes(comparison: Comparison) -> Comparison:
    """With the promise that nearly all images get the same class."""
    return replace(comparison, promise=f"at least {AGREEMENT:g} % agree", kept=comparison.agreement >= AGREEMENT)


def as_close_as(comparison: Comparison, usual: Comparison) -> Comparison:
    """With the promise that a form which rounds in its own way stays as close as quantization itself does.

    Arguments:
        usual: the simulation beside the float model. Two draws of the same rounding noise are sqrt(2) times as far
            from each other as from what both round; twice as far is another model.
    """
    most = 2 * (1 - usual.cosine) + 1e-3
    return replace(comparison, promise=f"cosine at least {1 - most:.3f}", kept=comparison.cosine >= 1 - most)


def run(form: Callable[[Tensor], Any], batches: Iterable[Tensor]) -> Tensor:
    """The logits that a form gives for all images, on the CPU."""
    with torch.inference_mode():
        return torch.cat([logits_of(form(images)).cpu() for images in batches])


def adversarial_codes(program: IntegerProgram, seed: int = 0) -> dict[str, Tensor]:
    """Images of codes that no photograph has: the smallest, the largest, and random ones; int64, a few of each."""
    first = program.registers[program.input]
    shape, (low, high) = first.shape[1:], first.limits
    random = torch.randint(low, high + 1, (2, *shape), generator=torch.Generator().manual_seed(seed))
    return {
        f"all {low}": torch.full((1, *shape), low),
        f"all {high}": torch.full((1, *shape), high),
        "random codes": random,
    }


def defined(program: IntegerProgram) -> Interpreter:
    """The interpreter as it is defined, in int64 throughout."""
    return Interpreter(program, exact_int64)


def flipped_codes(
    model: QuantizedModel,
    program: IntegerProgram,
    batches: Iterable[Tensor],
    progress: Callable[[int], object] | None = None,
) -> list[Flips]:
    """Which codes the integers round otherwise than the simulation does, site by site.

    The program runs, and the simulation beside it is fed the program's codes at every quantizer, so that a flipped
    code is counted where it arises and nowhere else.

    Arguments:
        model: calibrated.
        program: what `lower` made of it.
        batches: images, float32 (batch, channels, height, width).
        progress: called with the number of images done.
    """
    counts: dict[str, list[int]] = {}
    interpreter, done = Interpreter(program).to(next(model.parameters()).device), 0
    for images in batches:
        for part in images.split(_AT_ONCE):
            with torch.inference_mode():
                _count(model, program, interpreter, part, counts)
            done += len(part)
            if progress is not None:
                progress(done)
    made_by = _makers(model)
    return [Flips(name, made_by[name], *numbers) for name, numbers in counts.items()]


def _count(
    model: QuantizedModel,
    program: IntegerProgram,
    interpreter: Interpreter,
    images: Tensor,
    counts: dict[str, list[int]],
) -> None:
    constant = program.constants.keys() | {program.input}
    names = {name: register for name, register in program.codes.items() if register not in constant}
    held: dict[str, Tensor] = {}
    image = model.image_quantizer
    assert image is not None
    taps = {register: lambda x, register=register: held.__setitem__(register, x) for register in set(names.values())}
    interpreter(image.encode(images), taps)

    def compared(name: str, quantizer: Quantizer, x: Tensor) -> Tensor:
        if name not in names:
            return quantizer(x)
        codes = _codes(quantizer, held[names[name]])
        difference = (quantizer.encode(x).to(torch.int64) - codes).abs()
        entry = counts.setdefault(name, [0, 0, 0])
        entry[0] += codes.numel()
        entry[1] += int((difference > 0).sum())
        entry[2] = max(entry[2], int(difference.max()))
        return quantizer.decode(codes, x.dtype)

    _Fed(model.graph_module, compared).run(images)


def _codes(quantizer: Quantizer, register: Tensor) -> Tensor:
    """A quantizer's codes from its register, which for powers of two holds numerators."""
    if not isinstance(quantizer, Log2Quantizer):
        return register
    return quantizer.encode(torch.ldexp(register.double(), torch.tensor(1 - quantizer.zero_code))).to(torch.int64)


class _Fed(GraphInterpreter):
    """Runs a graph, handing what every quantizer reads to a function that says what it gives."""

    def __init__(self, module: Any, compared: Callable[[str, Quantizer, Tensor], Tensor]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._compared = compared

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = self.fetch_attr(str(target))
        if isinstance(called, Quantizer):
            return self._compared(str(target).removeprefix("quantizers."), called, args[0])
        return called(*args, **kwargs)


def _makers(model: QuantizedModel) -> dict[str, str]:
    """What computes the codes of every value: a rescaling, or an operation on codes."""
    operations = [each for each in model.graph_module.modules() if isinstance(each, IntegerOperation)]
    made_by = {id(operation.result): operation.kind for operation in operations}
    return {name: made_by.get(id(quantizer), RESCALING) for name, quantizer in model.quantizers.items()}


def _classes(logits: Tensor) -> Tensor:
    """The class of each image; of equal logits, the first."""
    return logits.sort(dim=1, descending=True, stable=True).indices[:, 0]
