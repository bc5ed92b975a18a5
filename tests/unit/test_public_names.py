"""What the reference shows: every public name says what it is."""

import inspect
from collections.abc import Iterator

import pytest

import vitquant


def _documented(name: str) -> Iterator[tuple[str, object]]:
    """A public name, and of a class what it adds that is public."""
    found = getattr(vitquant, name)
    yield name, found
    if inspect.isclass(found):
        for member, value in vars(found).items():
            if not member.startswith("_") and (callable(value) or isinstance(value, (property, classmethod))):
                yield f"{name}.{member}", getattr(found, member)


@pytest.mark.parametrize("name", vitquant.__all__)
def test_a_public_name_has_a_docstring(name):
    assert [each for each, value in _documented(name) if not inspect.getdoc(value)] == []
