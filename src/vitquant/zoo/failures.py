"""Errors of other libraries as one-line errors of vitquant."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from vitquant.errors import ModelError
from vitquant.zoo.source import ModelSource


def import_library(name: str) -> ModuleType:
    """Import a library, or raise an error that names the extra that installs it, or the dependency that it lacks."""
    library = name.partition(".")[0]
    extra = {"transformers": "transformers", "safetensors": "checkpoint"}.get(library, "timm")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == library:
            raise ModelError(f"{library} is not installed: pip install vitquant[{extra}]") from error
        absent = error.name.partition(".")[0]
        raise ModelError(f"{library} needs {absent}, which is not installed: pip install {absent}") from error
    except Exception as error:  # installed, but broken or of an incompatible version
        raise ModelError(f"{library} is installed but cannot be imported: {one_line(error)}") from error


def unknown(source: ModelSource, word: str, known: Iterable[str], what: str = "model") -> ModelError:
    """An error for a name that a library does not know, with up to three similar names."""
    near = difflib.get_close_matches(word, list(known), n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return ModelError(f"{source.name}: {source.library} has no {what} {word!r}{hint}")


def first_five(keys: Sequence[str]) -> str:
    """The first five keys, followed by dots if there are more."""
    return ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")


def shown(arguments: Mapping[str, Any]) -> str:
    """Model arguments as the user wrote them."""
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"


def one_line(error: Exception) -> str:
    """An exception's type and message on one line of at most about 200 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 200 else text[:200] + '...'}"
