"""The documentation site: README.md, docs/ and the docstrings of the public names. `make docs` builds it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import vitquant

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "vitquant"
version = release = vitquant.__version__

# The source is the whole repository, so that a link between files is the same on the site and in the repository.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "src/**/*.md"]
exclude_patterns = [".*", "benchmarks", "build", "demo", "dist", "tests", "vitquant-demo", "src/**/__pycache__"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
myst_heading_anchors = 6  # what GitHub gives a heading, so that links to headings are checked
myst_fence_as_directive = ["mermaid"]

add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "code"  # docstrings have single backticks around code
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source", "Pitfall", "Pitfalls"]

html_theme = "furo"
html_title = f"vitquant {release}"
html_copy_source = False
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]

for _name in vitquant.__all__:  # autodoc looks at what a module holds, and these are imported when they are first used
    setattr(vitquant, _name, getattr(vitquant, _name))

_ONE_LINE_SECTION = re.compile(r"(\s*)(Source|Pitfalls?): (\S.*)")


def _as_sections(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Write `Source: text` as the section that napoleon knows: a heading, and its text indented.

    The empty comment keeps napoleon from taking what stands before a colon in a property's first line for its type.
    """
    found = ["..", ""] if what == "property" else []
    inside = False
    for line in lines:
        if match := _ONE_LINE_SECTION.fullmatch(line):
            indent, heading, text = match.groups()
            found += ["", f"{indent}{heading}:", f"{indent}    {text}"]
            inside = True
        else:
            inside = inside and bool(line.strip())
            found.append(line)
    lines[:] = found


def _without_factories(
    app: Sphinx, what: str, name: str, obj: object, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write a dataclass's `<factory>`, which is no Python and keeps Sphinx from reading the signature, as `...`."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", _without_factories)
    app.connect("autodoc-process-docstring", _as_sections, priority=400)  # before napoleon, at 500
