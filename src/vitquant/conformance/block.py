"""The vector of a whole model: a Vision Transformer of one block, from images to logits and tokens."""

from __future__ import annotations

import torch

from vitquant.conformance.drafting import Draft, Vector, noise
from vitquant.integer.exponential import exact_exponential
from vitquant.program import instructions as p
from vitquant.runtime.on_images import InputQuantization

_HEADS, _WIDTH, _CLASSES, _TOKENS = 2, 8, 5, 5
_INPUT = InputQuantization(2.0**-6 * 1.25, 114, 0, 255)
_FACTS = {
    "input": {"scale": _INPUT.scale, "zero_point": _INPUT.zero_point, "low": _INPUT.low, "high": _INPUT.high},
    "outputs": {
        "logits": {"scale": [0.125, 0.25, 0.1, 3.0, 0.007], "zero_point": -3},
        "tokens": {"scale": [0.03], "zero_point": 60},
    },
    "about": "a Vision Transformer of one block with constants of noise",
}


def block() -> Vector:
    """The program, with images whose codes include both ends, and which lie on halves between codes."""
    draft = Draft("u8", 3, 8, 8)
    tokens = _attention(draft, _patches(draft))
    outputs = {"logits": _logits(draft, tokens), "tokens": tokens}
    program = draft.program(outputs, codes={"pool:input": tokens}, facts=_FACTS)
    images = noise(1, -(2**12), 2**12, 3, 3, 8, 8).float() * 2.0**-11
    images[1] = (torch.arange(192).view(3, 8, 8) - 96.5) * torch.tensor(_INPUT.scale)  # exact halves, most of them
    images[2, 0], images[2, 1] = 1e30, -1e30
    about = (
        "one block, from images to logits and tokens: scales of query, key and value by head, a residual addition, 5 "
        "classes"
    )
    return Vector("vision-transformer", about, program, _INPUT.encode(images), images)


def _patches(draft: Draft) -> str:
    """Emit the patch embedding, and return the codes of the tokens: (images, 5, 8)."""
    sums = draft.emit(
        p.Convolution, "s32", input="x", weight=draft.noisy("s8", _WIDTH, 3, 4, 4, seed=2),
        bias=draft.noisy("s16", _WIDTH), input_zero=114,
        weight_zero=None, stride=(4, 4), padding=(0, 0), dilation=(1, 1), groups=1,
    )  # fmt: skip
    rows = draft.emit(p.Reshape, "s32", input=sums, shape=(-1, _WIDTH, _TOKENS - 1))
    rows = draft.emit(p.Permute, "s32", input=rows, axes=(0, 2, 1))
    positions = draft.constant("s64", (noise(3, -50, 50, _TOKENS - 1, _WIDTH) + 128) * 2**30 + 2**29)
    codes = _requantize(draft, [rows], [draft.constant("s32", noise(4, 2**20, 2**21, _WIDTH))], 30, positions)
    return draft.emit(p.Concat, "u8", inputs=(draft.noisy("u8", 1, 1, _WIDTH, seed=5), codes), axis=1)


def _attention(draft: Draft, tokens: str) -> str:
    """Emit a block of attention, and return the codes of the tokens after it: (images, 5, 8)."""
    normal = draft.emit(
        p.LayerNorm, "u8", input=tokens, factors=draft.constant("u8", [0, 1, 2, 3, 0, 0, 1, 0]), input_zero=128,
        epsilon=77, largest=128 * 8, multiplier=draft.constant("s32", noise(6, 2**18, 2**20, _WIDTH)),
        addend=draft.constant("s64", 128 * 2**30 + 2**29), shift=30, low=0, high=255,
    )  # fmt: skip
    sums = draft.emit(
        p.Linear, "s32", input=normal, weight=draft.noisy("s4", 3 * _WIDTH, _WIDTH, seed=7), bias=None, input_zero=128,
        weight_zero=None,
    )  # fmt: skip
    sums = draft.emit(p.Reshape, "s32", input=sums, shape=(-1, _TOKENS, 3, _HEADS, _WIDTH // _HEADS))
    sums = draft.emit(p.Permute, "s32", input=sums, axes=(2, 0, 3, 1, 4))
    query, key, value = (_part(draft, sums, number) for number in range(3))
    key = draft.emit(p.Permute, "s8", input=key, axes=(0, 1, 3, 2))
    scores = draft.emit(p.Product, "s32", left=query, right=key, left_zero=0, right_zero=0)
    by_head = draft.constant("s32", [[[2**22]], [[2**21 + 5]]])
    scores = _requantize(draft, [scores], [by_head], 30, draft.constant("s64", 128 * 2**30 + 2**29))
    table = exact_exponential(0.05)
    probs = draft.emit(
        p.SoftmaxToPowers, "u4", input=scores, mask=draft.constant("u8", torch.eye(_TOKENS).flip(0)),
        values=draft.constant("u16", table.values), octaves=draft.constant("s32", table.octaves), zero=15, steps=1,
        offset=0, published=False,
    )  # fmt: skip
    powers = draft.constant("u16", [*(1 << (14 - code) for code in range(15)), 0])
    numerators = draft.emit(p.Lookup, "u16", input=probs, table=powers, lowest=0)
    context = draft.emit(p.Product, "s32", left=numerators, right=value, left_zero=0, right_zero=0)
    context = draft.emit(p.Permute, "s32", input=context, axes=(0, 2, 1, 3))
    scales = draft.constant("s32", [[2**17], [2**17 + 99]])
    context = _requantize(draft, [context], [scales], 30, draft.constant("s64", 128 * 2**30 + 2**29))
    context = draft.emit(p.Reshape, "u8", input=context, shape=(-1, _TOKENS, _WIDTH))
    sums = draft.emit(
        p.Linear, "s32", input=context, weight=draft.noisy("s8", _WIDTH, _WIDTH, seed=8),
        bias=draft.noisy("s16", _WIDTH, seed=9), input_zero=128, weight_zero=draft.noisy("s4", _WIDTH, 1),
    )  # fmt: skip
    factors = [draft.constant("s32", noise(10, 2**20, 2**22, _WIDTH)), draft.constant("s32", 2**29)]
    return _requantize(draft, [sums, tokens], factors, 30, draft.constant("s64", 2**35))


def _logits(draft: Draft, tokens: str) -> str:
    """Emit pooling and head, and return the codes of the logits: (images, 5)."""
    pooled = draft.emit(p.Sum, "s32", input=tokens, axes=(1,), keep=False, input_zero=60)
    pooled = _requantize(draft, [pooled], [draft.constant("s32", 2**28)], 30, draft.constant("s64", 2**37))
    logits = draft.emit(
        p.Linear, "s32", input=pooled, weight=draft.noisy("s8", _CLASSES, _WIDTH, seed=11), bias=None, input_zero=128,
        weight_zero=None,
    )  # fmt: skip
    return draft.emit(p.Requantize, "s8", inputs=(logits,), multipliers=(draft.constant("s32", 2**21),),
                      addend=draft.constant("s64", 2**29), shift=30, low=-128, high=127)  # fmt: skip


def _part(draft: Draft, sums: str, number: int) -> str:
    """Emit the codes of query, key or value, with a scale for each head: (images, heads, 5, 4)."""
    part = draft.emit(p.Slice, "s32", input=sums, axis=0, start=number, stop=number + 1, step=1)
    part = draft.emit(p.Reshape, "s32", input=part, shape=(-1, _HEADS, _TOKENS, _WIDTH // _HEADS))
    by_head = draft.constant("s32", noise(12 + number, 2**23, 2**24, _HEADS, 1, 1))
    return draft.emit(p.Requantize, "s8", inputs=(part,), multipliers=(by_head,), addend=draft.constant("s64", 2**29),
                      shift=30, low=-128, high=127)  # fmt: skip


def _requantize(draft: Draft, inputs: list[str], multipliers: list[str], shift: int, addend: str) -> str:
    given = {"inputs": tuple(inputs), "multipliers": tuple(multipliers), "addend": addend, "shift": shift}
    return draft.emit(p.Requantize, "u8", **given, low=0, high=255)
