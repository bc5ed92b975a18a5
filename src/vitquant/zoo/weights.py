"""Loading weights from a file, or a refusal that names the tensors that do not fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitquant.errors import ModelError
from vitquant.tasks.classes import is_headless
from vitquant.zoo.conversion import converted_by_library
from vitquant.zoo.failures import first_five
from vitquant.zoo.source import ModelSource
from vitquant.zoo.state_dicts import choose, is_head
from vitquant.zoo.weight_files import digest_of_weights, read_weights

Note = Callable[[str], None]


def warn(text: str) -> None:
    """Issue a note on weights as a Python warning."""
    warnings.warn(text, stacklevel=4)


def pinned(source: ModelSource) -> ModelSource:
    """The source with the SHA-256 of its weights file; unchanged if it has no file.

    Raises:
        ModelError: the file cannot be read.
    """
    if source.weights in ("pretrained", "random"):
        return source
    return replace(source, weights_sha256=digest_of_weights(Path(source.weights)))


def load_weights(model: nn.Module, source: ModelSource, note: Note = warn) -> None:
    """Load the weights of a file into a model.

    Arguments:
        note: called with notes: which weights were chosen among several, and what was converted.

    Raises:
        ModelError: see `create`.
    """
    path = Path(source.weights)
    if source.weights_sha256 and (digest := digest_of_weights(path)) != source.weights_sha256:
        raise ModelError(f"{path}: SHA-256 is {digest[:12]}..., not {source.weights_sha256[:12]}... as recorded")
    wanted = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    loaded = read_weights(path)
    try:
        chosen = choose(loaded, wanted, source.weights_key)
        given = chosen.tensors
        _refuse_no_weights(given, wanted)
    except ModelError as error:
        raise ModelError(f"{path} {error}") from error
    notes = [*chosen.notes]
    if _count(found := _problems(given, wanted)) and _is_comparable(given, wanted):
        converted = converted_by_library(model, given)
        if converted is not None and _count(now := _problems(converted[1], wanted)) < _count(found):
            library, tensors = converted
            notes.append(_what_was_converted(library, given, tensors))
            given, found = tensors, now
    if heads := _of_a_head_that_is_not_there(model, found, wanted):
        given = {key: tensor for key, tensor in given.items() if key not in heads}
        notes.append(f"left out, as the model has no head: {first_five(heads)}")
        found = _problems(given, wanted)
    if _count(found):
        said = "; ".join(f"{len(keys)} {what}: {first_five(keys)}" for what, keys in found.items() if keys)
        raise ModelError(f"{path} does not fit {source.name}: {said}{_advice(source, given, wanted, found)}")
    try:
        _refuse_not_finite(given, dict(model.named_parameters()))
    except ModelError as error:
        raise ModelError(f"{path} {error}") from error
    for text in notes:
        note(f"{path}: {text}")
    model.load_state_dict(given, strict=False)  # a counter of training batches may be absent


def _problems(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    return {
        "missing": [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in given if key not in wanted],
        "of another shape": [
            f"{key} {list(given[key].shape)} for {list(wanted[key].shape)}"
            for key in wanted
            if key in given and given[key].shape != wanted[key].shape
        ],
    }


def _of_a_head_that_is_not_there(
    model: nn.Module, problems: Mapping[str, list[str]], wanted: Mapping[str, Tensor]
) -> list[str]:
    """The tensors of a file's classifier where they are all that does not fit, and the model was asked for without."""
    unexpected = problems["unexpected"]
    alone = _count(problems) == len(unexpected) and all(map(is_head, unexpected))
    return unexpected if alone and is_headless(model) and not any(map(is_head, wanted)) else []


def _count(problems: Mapping[str, list[str]]) -> int:
    return sum(map(len, problems.values()))


def _is_comparable(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether the file's tensors have a size comparable with the model's, so that resampling is cheap."""
    return sum(tensor.numel() for tensor in given.values()) < 64 * (1 + sum(map(torch.numel, wanted.values())))


def _refuse_no_weights(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not plain float weights, and name the first."""
    for key, tensor in given.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_quantized or tensor.layout is not torch.strided or tensor.is_meta:
            what = "is quantized" if tensor.is_quantized else "holds no values" if tensor.is_meta else "is sparse"
            raise ModelError(f"does not hold plain weights: {key} {what}; give the float weights")
        if wanted[key].is_floating_point() if key in wanted else key.endswith((".weight", ".bias")):
            if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                raise ModelError(f"does not hold float weights: {key} is of {kind}; give those before quantization")
        elif key in wanted and (tensor.is_floating_point() or tensor.is_complex()):
            raise ModelError(f"does not fit: {key} is of {kind} where the model counts")


def _refuse_not_finite(given: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse tensors with NaN, and parameters with infinity, after rounding to float32."""
    for key, tensor in given.items():
        if tensor.is_floating_point():
            numbers = tensor.float()
            bad = ~torch.isfinite(numbers) if key in parameters else torch.isnan(numbers)  # a mask may be infinite
            if bad.any():
                raise ModelError(f"holds NaN or infinity: {key}, {int(bad.sum())} of {bad.numel()} numbers")


def _what_was_converted(library: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    resized = [
        f"{key} {list(before[key].shape)} to {list(after[key].shape)}"
        for key in after
        if key in before and before[key].shape != after[key].shape
    ]
    renamed = "" if before.keys() == after.keys() else f"names were converted by {library}"
    return "; ".join(filter(None, (renamed, f"resampled by {library}: {first_five(resized)}" if resized else "")))


def _in_parts(unexpected: Sequence[str], missing: Sequence[str]) -> str:
    """Advice for a file of tensors from which weights are computed (LoRA, weight norm, pruning); else empty."""
    names = frozenset(unexpected)
    for key in unexpected:
        if re.search(r"\.(lora_\w+|base_layer)\.", f".{key}."):
            return f"; {key} is of an adapter (LoRA, PEFT): save the state_dict of model.merge_and_unload()"
    for key in missing:
        module, _, name = key.rpartition(".")
        parametrized = ".".join(filter(None, (module, "parametrizations", name, "original")))
        if parametrized in names or f"{parametrized}0" in names:
            kind, undo = "parametrized, as by weight or spectral norm", "parametrize.remove_parametrizations"
        elif {f"{key}_orig", f"{key}_mask"} <= names:
            kind, undo = "pruned", "prune.remove"
        elif {f"{key}_g", f"{key}_v"} <= names:
            kind, undo = "weight-normalized", "remove_weight_norm"
        elif f"{key}_orig" in names:
            kind, undo = "spectral-normalized", "remove_spectral_norm"
        else:
            continue
        return f"; {key} is {kind}: torch.nn.utils.{undo}(module, {name!r}) for every such module, then save again"
    return ""


def _advice(
    source: ModelSource, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], found: Mapping[str, list[str]]
) -> str:
    """Advice for the most common mistakes; empty for others."""
    differing = [key for key in wanted if key in given and given[key].shape != wanted[key].shape]
    classes = {(given[key].shape[:1], wanted[key].shape[:1]) for key in differing}
    same_inside = all(given[key].shape[1:] == wanted[key].shape[1:] for key in differing)
    if differing and len(classes) == 1 and same_inside and all(is_head(key) for key in differing):
        name = "num_labels" if source.library == "transformers" else "num_classes"
        return f"; give --model-arg {name}={given[differing[0]].shape[0]} (arguments={{{name!r}: ...}})"
    if parts := _in_parts(found["unexpected"], found["missing"]):
        return parts
    if any("dist_token" in key or "head_dist" in key for key in found["unexpected"]):
        return "; the weights are of a distilled model, which has two heads; give its name"
    if found["missing"] and not differing and all(is_head(key) for key in found["missing"]):
        if there := [key for key in wanted if key in given and is_head(key) and "norm" not in key]:
            what = f"the classifier is there in part, {first_five(there)}"
            return f"; {what}: save the whole state_dict, or give the model that it is of"
        if others := [key for key in found["unexpected"] if is_head(key)]:
            theirs, ours = (key.split(".")[0] for key in (others[0], found["missing"][0]))
            return f"; the classifier is called {theirs} in the file, and {ours} in the model: rename it"
        return "; the file has no classifier: it was trained without, or for another task"
    return ""
