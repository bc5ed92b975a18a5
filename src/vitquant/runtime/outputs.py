"""The outputs of a runtime: one tensor, or several by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from vitquant.errors import ModelError

Outputs = Tensor | dict[str, Tensor]


def given(tensors: Mapping[str, Tensor]) -> Outputs:
    """A single tensor as it is, several as a dictionary by name."""
    return next(iter(tensors.values())) if len(tensors) == 1 else dict(tensors)


def named(outputs: Outputs, names: Iterable[str]) -> dict[str, Tensor]:
    """The outputs that `given` returned as a dictionary by name.

    Arguments:
        names: of all outputs, in their order.

    Raises:
        ModelError: these are other outputs.
    """
    names = tuple(names)
    found = {names[0]: outputs} if isinstance(outputs, Tensor) else outputs
    if found.keys() != set(names):
        raise ModelError(f"it gives the outputs {', '.join(found)}, and not {', '.join(names)}; export it again")
    return {name: outputs if isinstance(outputs, Tensor) else outputs[name] for name in names}


def mapped(change: Callable[[Tensor], Tensor], outputs: Outputs) -> Outputs:
    """The outputs with a function applied to every tensor."""
    return change(outputs) if isinstance(outputs, Tensor) else {name: change(each) for name, each in outputs.items()}
