"""The classes of a model: how many there are, and the names by which folders call them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from vitquant.errors import DataError, ModelError

SYNSET = re.compile(r"n\d{8}(?!\d)")  # a noun of WordNet, as ImageNet names its classes
_HEADS = ("head", "heads", "fc", "classifier")


@dataclass(frozen=True)
class ClassNames:
    """A model's classes by name.

    Arguments:
        count: how many classes the model has.
        names: the names of a class index, such as its synset and "tench, Tinca tinca"; empty where none are known.
        origin: where the names come from, for messages.
        by_file: the user gave them, so that a folder named by a number is looked up as well.
    """

    count: int
    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    origin: str = ""
    by_file: bool = False

    def index(self, name: str) -> int | None:
        """The class that goes by a name, or None.

        Names as they are come before their first synonym, before either without regard to case and punctuation,
        before other synonyms, before a synset that the name begins with (`n01440764_tench`).

        Raises:
            DataError: several classes go by it.
        """
        synset = SYNSET.match(name)
        keys = (name, name, _plain(name), _plain(name), _plain(name), synset.group() if synset else None)
        for table, key in zip(self._tables, keys, strict=True):
            if found := table.get(key or ""):
                if len(found) > 1:
                    indices = " and ".join(map(str, sorted(found)))
                    raise DataError(f"{name!r} is the name of classes {indices} in {self.origin}")
                return next(iter(found))
        return None

    def has(self, name: str) -> bool:
        """Whether a class, or several, go by a name."""
        try:
            return self.index(name) is not None
        except DataError:
            return True

    @cached_property
    def _tables(self) -> tuple[dict[str, set[int]], ...]:
        texts = [(index, text) for index, names in self.names.items() for text in names]
        firsts = [(index, text.split(",")[0].strip()) for index, text in texts]
        others = [(index, part) for index, text in texts for part in text.split(",")[1:]]
        plain = [[(index, _plain(text)) for index, text in pairs] for pairs in (texts, firsts, others)]
        return tuple(map(_table, (texts, firsts, *plain, texts)))


def refuse_features(model: nn.Module) -> None:
    """Refuse a model without a head: what it gives are features, and the largest feature is no class.

    Raises:
        ModelError: it `is_headless`.
    """
    if is_headless(model):
        raise ModelError(
            "the model has no head: it gives features, not classes; load it with the head's weights, or give --task "
            "features"
        )


def is_headless(model: nn.Module) -> bool:
    """Whether timm's `num_classes` or transformers' `num_labels` is 0, or the head passes its input on."""
    said = getattr(model, "num_classes", getattr(getattr(model, "config", None), "num_labels", None))
    heads = [head for name in _HEADS if isinstance(head := getattr(model, name, None), nn.Module)]
    return said == 0 or bool(heads and all(map(_passes_on, heads)))


def _passes_on(head: Any) -> bool:
    return all(isinstance(part, nn.Identity | nn.Sequential | nn.Dropout) for part in head.modules())


def _table(pairs: Iterable[tuple[int, str]]) -> dict[str, set[int]]:
    table: dict[str, set[int]] = {}
    for index, text in pairs:
        table.setdefault(text, set()).add(index)
    return table


def _plain(text: str) -> str:
    """A name without case, accents' encoding (macOS has another), punctuation and underscores."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
