"""Power-of-two factors chosen by squared error: which of the steps s, 2s, 4s, 8s each channel of an operand gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.errors import CalibrationError, RecipeError
from vitquant.methods.context import Context
from vitquant.model import QuantizedModel, Record
from vitquant.quantizers import Quantizer, build_quantizer
from vitquant.quantizers.quantizer import channel_axis
from vitquant.spec import PowerOfTwoFactor, QParams

_ROWS = 1024  # rows at once, which stay in the cache


@dataclass(frozen=True)
class ChooseFactorsSettings:
    """The settings of `choose_factors`.

    Arguments:
        batches: on which calibration batches the error is measured: `all`, or `last` as in FQ-ViT's code.
    """

    batches: str = "all"

    def __post_init__(self) -> None:
        if self.batches not in ("all", "last"):
            raise RecipeError(f"choose-factors: batches = {self.batches!r}: it is all or last")


def choose_factors(model: QuantizedModel, context: Context, settings: ChooseFactorsSettings) -> Record:
    """Give each channel the power-of-two factor with the least squared error, for given scale and zero point.

    It takes one more float forward pass per batch (a single one for `last`); memory does not grow with the data.

    Arguments:
        model: with quantizers; those of the scheme `PowerOfTwoFactor` are replaced.
        context: its data are iterated over once.

    Raises:
        CalibrationError: no data.

    Source: FQ-ViT, Lin et al. 2022, section "Power-of-Two Factor", equation of alpha; for `last`, FQ-ViT's code
    (`observer/ptf.py`).
    """
    chosen = {name: q for name, q in model.quantizers.items() if isinstance(q.spec.scheme, PowerOfTwoFactor)}
    if not chosen:
        return Record("choose-factors", {"operands": 0})
    errors: dict[str, Tensor] = {}
    batches = 0
    with torch.inference_mode():
        for batch in context.data if settings.batches == "all" else _last(context.data):
            model.run(batch, {name: _tap(errors, name, q) for name, q in chosen.items()}, quantized=False)
            batches += 1
    if not batches:
        raise CalibrationError("no calibration images: give at least one batch")
    factors = {name: error.argmin(0).to(torch.int32) for name, error in errors.items()}  # of equals the finest
    params = {name: QParams(q.scale, q.zero_point, factors[name]) for name, q in chosen.items()}
    model.insert({name: build_quantizer(q.spec, params[name]) for name, q in chosen.items()})
    decisions = {name: _decision(errors[name], factors[name]) for name in chosen}
    return Record("choose-factors", {"operands": len(chosen), "batches": batches}, decisions)


def has_no_factors(model: QuantizedModel) -> bool:
    """Whether a model's recipe gives no operand the scheme `PowerOfTwoFactor`."""
    specs = (assignment.spec for assignment in model.assignments.values())
    return not any(spec is not None and isinstance(spec.scheme, PowerOfTwoFactor) for spec in specs)


def factor_errors(x: Tensor, scale: Tensor, zero_point: Tensor, factors: int, qmax: int) -> Tensor:
    """The sum of squared errors of each channel with each factor.

    Arguments:
        x: (rows, channels), floating.
        scale: (), the finest step.
        zero_point: (), shared by all channels and factors.
        factors: the number of factors; factor k has the step scale * 2**k.
        qmax: the largest code; the smallest is 0.

    Returns:
        float64 (factors, channels).
    """
    total = torch.zeros(factors, x.shape[-1], dtype=torch.float64, device=x.device)
    for rows in x.float().split(_ROWS):
        for k in range(factors):
            step = scale * 2**k
            levels = (rows / step).round_().clamp_(-zero_point, qmax - zero_point)
            total[k] += levels.mul_(step).sub_(rows).square_().sum(0, dtype=torch.float64)
    return total


def _tap(errors: dict[str, Tensor], name: str, quantizer: Quantizer) -> Callable[[Tensor], None]:
    spec = quantizer.spec
    axis = channel_axis(spec.granularity)
    assert isinstance(spec.scheme, PowerOfTwoFactor)
    assert axis is not None
    assert quantizer.zero_point is not None
    scale, zero_point, factors, qmax = quantizer.scale, quantizer.zero_point, spec.scheme.factors, spec.qmax

    def update(x: Tensor) -> None:
        rows = x.movedim(axis, -1).flatten(0, -2)
        added = factor_errors(rows, scale, zero_point, factors, qmax)
        errors[name] = errors[name] + added if name in errors else added

    return update


def _last(data: Iterable[Tensor]) -> list[Tensor]:
    last = None
    for batch in data:
        last = batch
    return [] if last is None else [last]


def _decision(errors: Tensor, factors: Tensor) -> dict[str, object]:
    """How many channels have each factor, and the error relative to that with the coarsest step for all channels."""
    best, shared = errors.amin(0).sum().item(), errors[-1].sum().item()
    counts = torch.bincount(factors.long(), minlength=len(errors)).tolist()
    return {"channels per factor": counts, "squared error / one step for all": best / shared if shared else 1.0}
