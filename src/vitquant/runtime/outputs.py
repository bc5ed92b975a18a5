"""What whatever runs a program gives: one tensor, or several by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

Outputs = Tensor | dict[str, Tensor]


def given(tensors: Mapping[str, Tensor]) -> Outputs:
    """The only tensor as it is, several by their names."""
    return next(iter(tensors.values())) if len(tensors) == 1 else dict(tensors)


def named(outputs: Outputs, names: Iterable[str]) -> dict[str, Tensor]:
    """What `given` gave, by name.

    Arguments:
        names: of all outputs, in their order.
    """
    return {name: outputs if isinstance(outputs, Tensor) else outputs[name] for name in names}


def mapped(change: Callable[[Tensor], Tensor], outputs: Outputs) -> Outputs:
    """Every tensor changed in the same way."""
    return change(outputs) if isinstance(outputs, Tensor) else {name: change(each) for name, each in outputs.items()}
