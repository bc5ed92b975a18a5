"""Shell completion; this module does not import torch."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path


def recipe_names(incomplete: str) -> list[str]:
    """The packaged recipes and `default` with this prefix, or after a `+` the packaged overlays."""
    below, plus, begun = incomplete.rpartition("+")
    packaged = [file for file in (files("vitquant") / "recipes").iterdir() if file.name.endswith(".toml")]
    texts = {Path(file.name).stem: file.read_text(encoding="utf-8") for file in packaged}
    overlays = {name for name, text in texts.items() if tomllib.loads(text).get("overlay", False)}
    fitting = overlays if plus else {"default", *texts} - overlays
    return [f"{below}{plus}{name}" for name in sorted(fitting) if name.startswith(begun)]


def measures(incomplete: str) -> list[str]:
    """The measures of sensitivity with this prefix."""
    return [name for name in ("nuclear-norm", "output-error", "correlation") if name.startswith(incomplete)]
