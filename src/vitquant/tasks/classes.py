"""The classes of a model: their number, and the names by which folders refer to them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from vitquant.errors import DataError, ModelError

SYNSET = re.compile(r"n\d{8}(?!\d)")  # a WordNet synset, the id of an ImageNet class
_HEADS = ("head", "heads", "fc", "classifier")


@dataclass(frozen=True)
class ClassNames:
    """The names of a model's classes.

    Arguments:
        count: the number of classes.
        names: the names of each class index, such as its synset and "tench, Tinca tinca"; empty if none are known.
        origin: where the names come from, for messages.
        by_file: whether the user gave them in a file, so that folders named by a number are looked up as well.
    """

    count: int
    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    origin: str = ""
    by_file: bool = False

    def index(self, name: str) -> int | None:
        """The class with a name, or None.

        The name is compared, in this order, with the names as they are; with their first synonyms; with both, ignoring
        case and punctuation; with the other synonyms; and by the synset that it begins with (`n01440764_tench`).

        Raises:
            DataError: several classes have this name.
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
        """Whether one or more classes have a name."""
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
    """Refuse a model without a classification head, whose outputs are features and not logits.

    Raises:
        ModelError: the model `is_headless`.
    """
    if is_headless(model):
        raise ModelError(
            "the model has no head: it gives features, not classes; load it with the head's weights, or give --task "
            "features"
        )


def is_headless(model: nn.Module) -> bool:
    """Whether timm's `num_classes` or transformers' `num_labels` is 0, or the head is an identity."""
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
    """A name without case and punctuation, in normalized Unicode, since macOS encodes accents differently."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
