"""Random generators that depend on a seed and a purpose alone, so that no draw depends on those before it."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A random generator on the CPU for one purpose.

    Arguments:
        seed: of all draws of a run.
        purpose: such as the name of a method.
    """
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
