"""Finding a model's state dict among those of a file, in any container and with any prefix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitquant.errors import ModelError
from vitquant.zoo.failures import first_five

_AVERAGED = re.compile(r"(^|[._])(ema|teacher|swa|averaged?|shadow)([._]|$)", re.IGNORECASE)
_HEADS = ("head", "classifier", "fc", "cls_classifier", "distillation_classifier")
_DEPTH = 4  # of nested dictionaries


@dataclass(frozen=True)
class StateDict:
    """A candidate state dict in a file.

    Arguments:
        name: the keys that lead to it and the prefix that was removed from the names, joined by dots; empty if none.
        tensors: by name, without the prefix.
        left_out: the names of tensors in the same dictionary that do not have the prefix.
    """

    name: str
    tensors: Mapping[str, Tensor]
    left_out: Sequence[str] = ()

    @property
    def is_averaged(self) -> bool:
        """Whether it is a moving average of the weights, by its name."""
        return bool(_AVERAGED.search(self.name))


@dataclass(frozen=True)
class Chosen:
    """The chosen state dict, with notes for the user.

    Arguments:
        tensors: by name.
        notes: which other state dicts the file has, and which tensors were left out.
    """

    tensors: Mapping[str, Tensor]
    notes: Sequence[str]


def choose(loaded: Any, wanted: Mapping[str, Tensor], key: str | None) -> Chosen:
    """The state dict that fits best; of several that fit equally, the averaged one (EMA, teacher), as in timm's loader.

    A prefix is removed from the names if all tensors have it, or if those that have it make a complete model.

    Arguments:
        loaded: the content of a file.
        wanted: the model's state dict.
        key: the name of the state dict to choose (`model`, `state_dict_ema`, `teacher.backbone`), or a part of it.

    Raises:
        ModelError: there is no state dict, none of that name, or several fit equally.
    """
    found = [each for name, tensors in _held(loaded) for each in _without_prefix(name, tensors, wanted)]
    if not found:
        raise ModelError(f"holds no state dict, which maps names to tensors{_what_instead(loaded)}")
    named = found if key is None else _named(found, key)
    best = max(_fit(each, wanted) for each in named)
    fitting = [each for each in named if _fit(each, wanted) == best]
    preferred = [each for each in fitting if each.is_averaged] or fitting
    if not all(_same(each.tensors, preferred[0].tensors) for each in preferred[1:]):
        raise ModelError(f"holds {_names(preferred)}, which fit alike; choose by --weights-key (weights_key=)")
    taken, notes = preferred[0], []
    if others := [each for each in found if each is not taken and _fit(each, wanted) >= best]:
        notes.append(f"weights are {_names([taken])}; {_names(others)} beside it: --weights-key takes another")
    if unnamed := _averages_without_names(loaded):
        what = f"{first_five(unnamed)} holds averaged weights without names, which are left out"
        notes.append(f"{what}: save the model's state_dict after ema.copy_to(model.parameters()) to have them")
    if taken.left_out:
        count = len(taken.left_out)
        notes.append(f"weights are {taken.name}; {count} other tensors were left out: {first_five(taken.left_out)}")
    return Chosen(taken.tensors, notes)


def _held(loaded: Any) -> list[tuple[str, dict[str, Tensor]]]:
    """Every dictionary that contains tensors by name, with the keys that lead to it."""
    found = []
    for place, held in _dictionaries(loaded):
        values = {key: _as_tensor(value) for key, value in held.items()}
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        if tensors:
            found.append((".".join(place), tensors))
    return found


def _averages_without_names(loaded: Any) -> list[str]:
    """The keys of lists of tensors that are averaged weights, as torch_ema saves them."""
    return [
        ".".join((*place, key))
        for place, held in _dictionaries(loaded)
        for key, value in held.items()
        if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value)
        if _AVERAGED.search(".".join((*place, key)))
    ]


def _dictionaries(loaded: Any) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every dictionary with string keys, each once, with the keys that lead to it."""
    seen = set()
    pending: list[tuple[tuple[str, ...], Any]] = [((), loaded)]
    while pending:
        place, held = pending.pop(0)
        if not isinstance(held, Mapping) or id(held) in seen or len(place) > _DEPTH:
            continue
        seen.add(id(held))
        if not all(isinstance(key, str) for key in held):
            continue  # an optimizer's state
        yield place, held
        pending += [((*place, key), value) for key, value in held.items() if isinstance(value, Mapping)]


def _as_tensor(value: Any) -> Any:
    """A numpy array as a tensor; anything else as it is."""
    if type(value).__module__ != "numpy" or type(value).__name__ != "ndarray":
        return value
    try:
        return torch.from_numpy(value.copy())
    except TypeError:  # an array of strings
        return value


def _what_instead(loaded: Any) -> str:
    if isinstance(loaded, Mapping):
        if strange := [key for key in loaded if not isinstance(key, str)]:
            return f"; its key {str(strange[0])[:40]!r} is no name"
        return f"; its keys are {first_five([str(key)[:40] for key in loaded])}" if loaded else "; it is empty"
    return f"; it holds a {type(loaded).__name__}"


def _without_prefix(name: str, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[StateDict]:
    """The candidate state dicts of a dictionary: as it is, and for each prefix that the model's names may have."""
    weights = [key for key, tensor in tensors.items() if tensor.numel() > 1]  # not counters, such as n_averaged
    found = []
    for prefix in _prefixes(tensors, wanted):
        under = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        inside = {key: tensor for key, tensor in under.items() if tensor.ndim or key in wanted}  # no counters
        outside = [key for key in weights if not key.startswith(prefix)]
        if not outside or all(is_head(key) for key in wanted.keys() - inside.keys()):
            found.append(StateDict(".".join(filter(None, (name, prefix.rstrip(".")))), inside, outside))
    return [each for each in found if each.tensors.keys() & wanted.keys()] or [StateDict(name, tensors)]


def is_head(key: str) -> bool:
    """Whether a tensor belongs to a classifier head, by its name."""
    return any(part.startswith(_HEADS) for part in key.split(".")[:2])


def _prefixes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The prefixes of the model's names in the file's names, the shortest first."""
    found = {""}
    for key in tensors:
        parts = key.split(".")
        found.update(".".join(parts[:cut]) + "." for cut in range(1, len(parts)) if ".".join(parts[cut:]) in wanted)
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _fit(state: StateDict, wanted: Mapping[str, Tensor]) -> tuple[bool, int]:
    """How well the names fit those of the model: larger is better."""
    there = len(state.tensors.keys() & wanted.keys())
    return there > 0, 2 * there - len(state.tensors) if there else len(state.tensors)


def _named(found: list[StateDict], key: str) -> list[StateDict]:
    beneath = [each for each in found if f"{each.name}.".startswith(f"{key}.")]
    partly = [each for each in found if f".{key}." in f".{each.name}."]
    if not partly:
        raise ModelError(f"holds no weights under {key!r}, but {_names(found)}")
    return beneath or partly


def _names(states: Sequence[StateDict]) -> str:
    return first_five([repr(each.name) if each.name else "the file's own keys" for each in states])


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two dictionaries contain identical tensor objects."""
    return left.keys() == right.keys() and all(left[key] is right[key] for key in left)
