"""A named part of a model, such as a detector's backbone: what it is given, and its quantized form in its place."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from vitquant.calibration_data import batches_of
from vitquant.errors import CalibrationError, CaptureError, ModelError, VitquantError, first_line
from vitquant.graph.captured import CapturedModel
from vitquant.plain_forward import plain_forward
from vitquant.unwrapping import unwrapped

_ALONE = "takes images alone"
_WORDS = bool | int | float | str | None  # constants that can be compared


def inputs_of(model: nn.Module, name: str, data: Iterable[Any]) -> Iterable[torch.Tensor]:
    """The images that a submodule is given when the whole model runs, as calibration batches for `quantize`.

    They are made anew each time that they are gone through, one pass of the model at a time; of a generator they can be
    read once. The model runs in evaluation mode and without gradients, and is left as it is. A submodule that is
    called several times in a pass gives a batch for each call.

    Arguments:
        model: the whole model.
        name: of the submodule, as `model.get_submodule` takes it: `backbone.body`.
        data: batches, each what the model takes first: a tensor, or a list of images (channels, height, width), as
            torchvision's detectors take them; or a tuple that begins with one of these, or a mapping with
            `pixel_values`, whose other elements are left out.

    Returns:
        float (batch, channels, height, width), on the model's device.

    Raises:
        ModelError: the model has no such submodule.
        CalibrationError: the data is no batches of images.
        CaptureError: while they are gone through: the model refuses a batch, never calls the submodule, or gives it
            something else than one batch of images, with which it cannot be captured.

    Pitfall: a pass ends where the submodule is called, if it is called once for the first batch.
    """
    found = _submodule(model, name)
    inputs = _Inputs(model, unwrapped(found), _Call.of(name, unwrapped(found)), batches_of(data))
    return iter(inputs) if isinstance(data, Iterator) else inputs


def put_back(model: nn.Module, name: str, quantized: CapturedModel) -> nn.Module:
    """A copy of a model in which a submodule computes as its quantized form does, under all names that it has.

    Of the submodule its class, its methods and its plain attributes are left, and what it consisted of is gone. The
    copy shares nothing with what was given.

    Arguments:
        model: the whole model; it is left as it is.
        name: of the submodule, as `model.get_submodule` takes it.
        quantized: what `quantize` or `load` made of that submodule, or a `CapturedModel` of it.

    Raises:
        ModelError: the model has no such submodule, or cannot be copied, or that is no captured model.

    Pitfall: the copy raises a CaptureError where it calls the submodule with images of another size, a second tensor or
        an argument that is not the default. Hooks of the submodule itself are not called: what they change was
        captured.
    """
    found = _submodule(model, name)
    part = unwrapped(found)
    if not isinstance(quantized, CapturedModel):
        raise ModelError(f"what is put back is a {type(quantized).__name__}; give what vitquant.quantize returned")
    kind = nn.Module if isinstance(part, GraphModule) else type(part)  # a graph module is nothing without its graph
    husk: nn.Module = kind.__new__(kind)
    memo: dict[int, Any] = {id(found): husk, id(part): husk}
    nn.Module.__init__(husk)
    internal = {*husk.__dict__, "forward", "_compiled_call_impl"} - {"training"}
    try:
        forward = _Forward(copy.deepcopy(_Call.of(name, part)), copy.deepcopy(quantized))
        for attribute, value in part.__dict__.items():
            if attribute not in internal and not isinstance(value, Graph):
                husk.__dict__[attribute] = copy.deepcopy(value, memo)
        husk.__dict__["forward"] = forward
        husk._modules["captured"] = forward.model  # pyright: ignore[reportPrivateUsage]
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(f"the model cannot be copied: {first_line(error)}") from error


@dataclass(frozen=True)
class _Call:
    """How a submodule is called where it can be captured: with images, and with nothing else that matters.

    Arguments:
        name: of the submodule.
        signature: of its forward, without annotations.
        given: keywords of a `functools.partial` that was made its forward, which are its defaults.
        config: the submodule's, which in transformers says what an argument is that is None or left out.
    """

    name: str
    signature: inspect.Signature
    given: Mapping[str, Any]
    config: Any

    @staticmethod
    def of(name: str, part: nn.Module) -> _Call:
        forward = part.forward
        signature = inspect.signature(forward)
        plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
        given = forward.keywords if isinstance(forward, functools.partial) else {}
        return _Call(name, inspect.Signature(plain), dict(given), getattr(part, "config", None))

    def images(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The one tensor of a call.

        Raises:
            CaptureError: it has none, or there are other arguments that are not the defaults.
        """
        images, others = args[0] if args else None, {}
        if len(args) != 1 or kwargs:
            images, others = self._told_apart(args, kwargs)
        if not isinstance(images, torch.Tensor):
            got = f"of type {type(images).__name__}"
        elif images.is_nested or images.ndim != 4 or not images.is_floating_point():
            got = f"a{' nested' if images.is_nested else ''} tensor of {images.ndim} dimensions and {images.dtype}"
        else:
            for argument, value in others.items():
                self._refuse_unless_default(argument, value)
            return images
        raise CaptureError(
            f"what {self.name} is given first is {got}, not a float tensor (batch, channels, height, width); "
            f"name a part of it that is given one"
        )

    def _told_apart(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[object, dict[str, Any]]:
        """The first argument of the forward, None where it is left out, and the others by name."""
        try:
            bound = self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise CaptureError(f"{self.name} is called otherwise than its forward is written: {error}") from None
        named: dict[str, Any] = {}
        for parameter, value in bound.items():
            match self.signature.parameters[parameter].kind:
                case inspect.Parameter.VAR_POSITIONAL:
                    named |= {f"{parameter}[{place}]": each for place, each in enumerate(value)}
                case inspect.Parameter.VAR_KEYWORD:
                    named |= value
                case _:
                    named[parameter] = value
        first = next(iter(self.signature.parameters.values()))
        by_place = first.kind is inspect.Parameter.VAR_POSITIONAL
        return named.pop(f"{first.name}[0]" if by_place else first.name, None), named

    def _refuse_unless_default(self, argument: str, value: object) -> None:
        if any(_same(value, default) for default in self._defaults(argument)):
            return
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
            problem, remedy = f"given a tensor beside the images, {argument}", f"name a part of it that {_ALONE}"
        else:
            problem = f"called with {argument}={_shown(value)}, which is not its default, and is captured with that"
            remedy = self._remedy(argument, value)
        raise CaptureError(f"{self.name} is {problem}; {remedy}")

    def _defaults(self, argument: str) -> tuple[object, ...]:
        """What may be said in a call and is the same as nothing."""
        if argument in self.given:
            return (self.given[argument],)
        default = self._written(argument)
        return (default, getattr(self.config, argument)) if self._in_config(argument) else (default,)

    def _written(self, argument: str) -> object:
        """The default in the signature, `Parameter.empty` where there is none."""
        parameter = self.signature.parameters.get(argument)
        return inspect.Parameter.empty if parameter is None else parameter.default

    def _in_config(self, argument: str) -> bool:
        """Whether a default that is not written is one of the config."""
        if argument in self.given or not hasattr(self.config, argument):
            return False
        return self._written(argument) is None or self._written(argument) is inspect.Parameter.empty

    def _remedy(self, argument: str, value: object) -> str:
        part = f"model.get_submodule({self.name!r})"
        if self._in_config(argument):
            return f"change the default before you quantize: {part}.config.{argument} = {_shown(value)}"
        if not argument.isidentifier():
            return f"name a part of it that {_ALONE}"
        return (
            f"change the default before you quantize, and call it by keyword: part = {part}; "
            f"part.forward = functools.partial(part.forward, {argument}={_shown(value)})"
        )


@dataclass(frozen=True)
class _Forward:
    """The forward of a submodule that was put back.

    An object rather than a function, so that copies of the model have copies of it.
    """

    call: _Call
    model: CapturedModel

    @property
    def __signature__(self) -> inspect.Signature:
        return self.call.signature  # transformers asks it what to hand over

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(self.call.images(args, kwargs))


class _Reached(BaseException):
    """A pass has called the submodule. No `except Exception` of the model's takes it for a failure."""


@dataclass(frozen=True)
class _Inputs:
    """What `inputs_of` gives.

    Arguments:
        model: the whole model.
        part: the submodule, unwrapped.
        call: how it is called.
        data: batches for the model.
    """

    model: nn.Module
    part: nn.Module
    call: _Call
    data: Iterable[Any]

    def __iter__(self) -> Iterator[torch.Tensor]:
        once: bool | None = None
        for batch in self.data:
            calls = self._calls(batch, ends=once is True)
            once = len(calls) == 1 if once is None else once
            for args, kwargs in calls:
                yield self.call.images(args, kwargs)

    def _calls(self, batch: Any, ends: bool) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of the calls of one pass, which ends at the first of them where `ends`."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((tuple(map(_kept, args)), {key: _kept(value) for key, value in kwargs.items()}))
            if ends:
                raise _Reached

        given = _to(_device(self.model), _first_argument(batch))
        with plain_forward(self.model):
            # Before other hooks: what they make of the images is captured with the submodule.
            handle = self.part.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
            try:
                self.model(given)
            except _Reached:
                pass
            except VitquantError:
                raise
            except Exception as error:
                raise CaptureError(f"the model refuses a batch, {_described(given)}: {first_line(error)}") from error
            finally:
                handle.remove()
        if not calls:
            parts = [f"{self.call.name}.{each}" for each, _ in self.part.named_children()][:3]
            instead = f"; name one of its parts, such as {', '.join(parts)}" if parts else "; name another"
            raise CaptureError(f"the model never calls {self.call.name}, or only methods or parts of it{instead}")
        return calls


def _submodule(model: nn.Module, name: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is of type {type(model).__name__}, not a torch.nn.Module")
    try:
        if name:
            return model.get_submodule(name)
    except AttributeError:
        pass
    names = [each for each, _ in model.named_modules(remove_duplicate=False) if each]
    near = get_close_matches(name, names, n=3) or [each for each, _ in model.named_children()]
    raise ModelError(f"the model has no submodule {name!r}; the nearest are {', '.join(near[:5]) or 'none'}")


def _first_argument(batch: Any) -> torch.Tensor | list[torch.Tensor]:
    """What the whole model takes of a batch.

    Raises:
        CalibrationError: it is none.
    """
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, Mapping) and "pixel_values" in batch:
        return _first_argument(batch["pixel_values"])
    if isinstance(batch, list | tuple) and batch:
        return list(batch) if _are_images(batch) else _first_argument(batch[0])
    raise CalibrationError(
        "a batch for the whole model is a tensor, a list of images (channels, height, width), a tuple that begins with "
        f"one of these, or a mapping with pixel_values; got {type(batch).__name__}"
    )


def _are_images(batch: Sequence[Any]) -> bool:
    """Images of any height and width; a mask behind an image has other channels."""
    return (
        all(isinstance(each, torch.Tensor) and each.ndim == 3 for each in batch) and len({len(x) for x in batch}) == 1
    )


def _to(device: torch.device | None, given: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    if device is None:
        return given
    return given.to(device) if isinstance(given, torch.Tensor) else [image.to(device) for image in given]


def _device(model: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def _kept(value: Any) -> Any:
    """A tensor as it is now, as the model may write into it later; no inference tensor, which cannot be captured."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch.inference_mode(False):
        return value.detach().clone()


def _described(given: torch.Tensor | list[torch.Tensor]) -> str:
    if isinstance(given, torch.Tensor):
        return f"a tensor of {list(given.shape)}"
    return f"a list of {len(given)} images, the first of {list(given[0].shape)}"


def _same(value: object, default: object) -> bool:
    """Whether two constants are one: words and numbers, or tuples, lists and mappings of them."""
    if value is default:
        return True
    (left, left_form), (right, right_form) = pytree.tree_flatten(value), pytree.tree_flatten(default)
    return left_form == right_form and all(
        isinstance(a, _WORDS) and type(a) is type(b) and a == b for a, b in zip(left, right, strict=True)
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"<{type(value).__name__}>"
