"""Elementary functions of real numbers in decimal arithmetic, which is the same on every processor.

Those of torch and of the C library are not: vector instructions, fused multiply-adds and library versions change their
last digit, and torch's square roots are one unit too low for some arguments on some processors. The constants of a
program are therefore computed with these functions.

Their precision is that of the decimal context in which they are called: call them inside `digits()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext

Real = Callable[[Decimal], Decimal]

_CONTEXT = Context(prec=40, rounding=ROUND_HALF_EVEN, Emin=-999_999, Emax=999_999, traps=[])
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534")
_LOG_2 = _CONTEXT.ln(Decimal(2))
_RELATIVE = Decimal("1e-40")  # terms of a series below this share of it change none of its digits
_SMALL = Decimal("1e-10")  # below it four terms of a series are exact to 40 digits


def digits() -> AbstractContextManager[Context]:
    """A decimal context of 40 digits that raises no error on overflow or division by zero."""
    return localcontext(_CONTEXT)


def rounded(function: Real, values: Iterable[float]) -> list[float]:
    """The function's value at each of some finite numbers, rounded to the nearest double."""
    with digits():
        return [float(function(Decimal(value))) for value in values]


def exp(x: Decimal) -> Decimal:
    """e**x."""
    return x.exp()


def exp2(x: Decimal) -> Decimal:
    """2**x."""
    return (x * _LOG_2).exp()


def expm1(x: Decimal) -> Decimal:
    """e**x - 1."""
    return x.exp() - 1 if abs(x) > _SMALL else x + x**2 / 2 + x**3 / 6 + x**4 / 24


def log(x: Decimal) -> Decimal:
    """The natural logarithm."""
    return x.ln()


def log2(x: Decimal) -> Decimal:
    """The logarithm to base 2."""
    return x.ln() / _LOG_2


def log1p(x: Decimal) -> Decimal:
    """The natural logarithm of 1 + x."""
    return (1 + x).ln() if abs(x) > _SMALL else x - x**2 / 2 + x**3 / 3 - x**4 / 4


def sqrt(x: Decimal) -> Decimal:
    """The square root."""
    return x.sqrt()


def rsqrt(x: Decimal) -> Decimal:
    """1 / sqrt(x)."""
    return 1 / x.sqrt()


def erf(x: Decimal) -> Decimal:
    """2 / sqrt(pi) times the integral of exp(-t**2) from 0 to x, by a series of terms of one sign."""
    if abs(x) > 10:  # the difference from 1 is below 1e-44
        return Decimal(1).copy_sign(x)
    size = abs(x)
    term = total = size
    growth, number = 2 * x * x, 1
    while term > total * _RELATIVE:
        number += 2
        term = term * growth / number
        total += term
    return (total * 2 * (-x * x).exp() / _PI.sqrt()).copy_sign(x)


def sigmoid(x: Decimal) -> Decimal:
    """1 / (1 + e**-x)."""
    return 1 / (1 + (-x).exp())


def tanh(x: Decimal) -> Decimal:
    """The hyperbolic tangent."""
    if abs(x) > 100:
        return Decimal(1).copy_sign(x)
    grown = expm1(2 * x)
    return grown / (grown + 2)


def softplus(x: Decimal) -> Decimal:
    """log(1 + e**x)."""
    return x if x > 200 else log1p(x.exp())


def log_sigmoid(x: Decimal) -> Decimal:
    """log(sigmoid(x))."""
    return -softplus(-x)


def silu(x: Decimal) -> Decimal:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def mish(x: Decimal) -> Decimal:
    """x * tanh(softplus(x))."""
    if x > 200:
        return x
    grown = x.exp() * (x.exp() + 2)  # (1 + e**x)**2 - 1
    return x * grown / (grown + 2)


def gelu(x: Decimal) -> Decimal:
    """x times the distribution function of the normal distribution; below -9, where it is above -1e-18, inexact."""
    return x * (1 + erf(x / Decimal(2).sqrt())) / 2


def gelu_by_tanh(x: Decimal) -> Decimal:
    """The approximation of `gelu` by x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))."""
    return x * sigmoid(2 * (2 / _PI).sqrt() * (x + Decimal("0.044715") * x**3))
