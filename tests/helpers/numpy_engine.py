"""An engine in numpy that knows docs/program-format.md and nothing of vitquant: what that page says is enough."""

from __future__ import annotations

import hashlib
import json
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

BITS = {
    "u4": (4, False), "s4": (4, True), "u8": (8, False), "s8": (8, True), "u16": (16, False), "s16": (16, True),
    "s32": (32, True), "s64": (64, True),
}  # fmt: skip
STORED = {"u8": "<u1", "s8": "<i1", "u16": "<u2", "s16": "<i2", "s32": "<i4", "s64": "<i8"}


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], bytes]]]:
    """Metadata, and by name what the header says of a tensor and its bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__", {})
    return metadata, {name: (it, data[slice(*it["data_offsets"])]) for name, it in header.items()}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a vector."""
    dtypes = {"I64": "<i8", "F32": "<f4"}
    found = read_safetensors(path)[1]
    return {name: np.frombuffer(data, dtypes[it["dtype"]]).reshape(it["shape"]) for name, (it, data) in found.items()}


def read_program(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A program's JSON, and its constants."""
    metadata, tensors = read_safetensors(path)
    text = metadata["vitquant_program"]
    program = json.loads(text)
    assert program["format"] == 3
    digest = hashlib.sha256(text[:-66].encode())
    for name in sorted(tensors):
        digest.update(tensors[name][1])
    assert digest.hexdigest() == program["sha256"] == text[-66:-2]
    return program, {name: unpack(data, *program["registers"][name]) for name, (_, data) in tensors.items()}


def unpack(data: bytes, type: str, shape: list[int]) -> np.ndarray:
    """A constant as int64."""
    if type not in STORED:
        both = np.frombuffer(data, np.uint8)
        values = np.stack([both & 15, both >> 4], -1).ravel()[: int(np.prod(shape))].astype(np.int64)
        return (values - 16 * (values > 7) * (type == "s4")).reshape(shape)
    return np.frombuffer(data, STORED[type]).astype(np.int64).reshape(shape)


def encode(images: np.ndarray, said: dict[str, Any]) -> np.ndarray:
    """Codes of images."""
    ratio = np.round(images.astype(np.float32) / np.float32(said["scale"])) + np.float32(said["zero_point"])
    return np.clip(ratio, said["low"], said["high"]).astype(np.int64)


def decode(codes: np.ndarray, said: dict[str, Any]) -> np.ndarray:
    """Logits that codes stand for."""
    return (codes - said["zero_point"]).astype(np.float32) * np.array(said["scale"], np.float32)


def run(program: dict[str, Any], constants: dict[str, np.ndarray], codes: np.ndarray) -> dict[str, np.ndarray]:
    """Every register, by name."""
    held = {**constants, program["inputs"][0]["register"]: codes}
    for given in program["instructions"]:
        held[given["output"]] = OPERATIONS[given["op"]](given, held)
    return held


def read(given: dict[str, Any], key: str, held: dict[str, np.ndarray], zero: str = "") -> np.ndarray:
    return held[given[key]] - (given[zero] if zero else 0)


def weights(given: dict[str, Any], held: dict[str, np.ndarray]) -> tuple[np.ndarray, Any]:
    zero = 0 if given["weight_zero"] is None else held[given["weight_zero"]]
    return held[given["weight"]] - zero, 0 if given["bias"] is None else held[given["bias"]]


def linear(given, held):
    weight, bias = weights(given, held)
    return read(given, "input", held, "input_zero") @ weight.T + bias


def convolution(given, held):
    weight, bias = weights(given, held)
    (s0, s1), (a0, a1), (d0, d1) = given["stride"], given["padding"], given["dilation"]
    x = np.pad(read(given, "input", held, "input_zero"), ((0, 0), (0, 0), (a0, a0), (a1, a1)))
    outputs, channels, high, wide = weight.shape
    rows, columns = ((x.shape[2] - d0 * (high - 1) - 1) // s0 + 1, (x.shape[3] - d1 * (wide - 1) - 1) // s1 + 1)
    y = np.zeros((len(x), outputs, rows, columns), np.int64)
    for o in range(outputs):
        first = o // (outputs // given["groups"]) * channels
        for u in range(high):
            for v in range(wide):
                window = x[:, first : first + channels, u * d0 :: s0, v * d1 :: s1][:, :, :rows, :columns]
                y[:, o] += (window * weight[o, :, u, v][:, None, None]).sum(1)
    return y + np.reshape(bias, (-1, 1, 1))


def product(given, held):
    return np.matmul(read(given, "left", held, "left_zero"), read(given, "right", held, "right_zero"))


def multiply(given, held):
    return read(given, "left", held, "left_zero") * read(given, "right", held, "right_zero")


def summed(given, held):
    return read(given, "input", held, "input_zero").sum(tuple(given["axes"]), keepdims=given["keep"])


def requantize(given, held):
    total = held[given["addend"]]
    for name, multiplier in zip(given["inputs"], given["multipliers"], strict=True):
        total = total + held[name] * held[multiplier]
    return np.clip(total >> given["shift"], given["low"], given["high"])


def bits(values):
    return np.vectorize(lambda value: int(value).bit_length(), otypes=[np.int64])(values)


def rows(given, held):
    """d, values[d] and S of a softmax."""
    x, values = held[given["input"]], held[given["values"]]
    mask = np.zeros(x.shape, bool) if given["mask"] is None else np.broadcast_to(held[given["mask"]] == 1, x.shape)
    largest = np.where(mask, -(2**62), x).max(-1, keepdims=True)
    d = np.where(mask, len(values) - 1, np.where(mask, 0, largest - x))
    return d, values[d], np.maximum(2**15, values[d].sum(-1, keepdims=True))


def softmax_to_powers(given, held):
    d, v, total = rows(given, held)
    if given["published"]:
        q = (2 * total + v) // np.maximum(1, 2 * v)
        w = bits(q) - 1
        return np.minimum(given["zero"], w + (2 * q >= 3 * 2**w))
    n = {1: 12, 2: 11}[given["steps"]]
    w = bits(total) - 1
    m = total << (30 - w)
    for _ in range(12):
        m = (m * m) >> 30
        t = m >> 31
        m, w = m >> t, 2 * w + t
    code = (held[given["octaves"]][d] + w - 15 * 2**12 + given["offset"] + 2 ** (n - 1)) >> n
    return np.clip(code, 0, given["zero"])


def softmax_to_levels(given, held):
    _, v, total = rows(given, held)
    r = (given["multiplier"] << 16) // total
    y = ((v * r + 2 ** (given["shift"] + 15)) >> (given["shift"] + 16)) + given["output_zero"]
    return np.clip(y, given["low"], given["high"])


def layer_norm(given, held):
    return norm(given, held, centered=True)


def rms_norm(given, held):
    return norm(given, held, centered=False)


def norm(given, held, centered):
    factors = 0 if given["factors"] is None else held[given["factors"]]
    x = read(given, "input", held, "input_zero") << factors
    channels, epsilon = x.shape[-1], given["epsilon"]
    g = max(0, min(12, (62 - ((channels * given["largest"]) ** 2 + epsilon).bit_length()) // 2))
    total = x.sum(-1, keepdims=True) * centered
    spread = channels * (x * x).sum(-1, keepdims=True) - total * total
    deviation = np.vectorize(isqrt, otypes=[np.int64])((spread + epsilon) << (2 * g))
    normal = ((channels * x - total) * (2 ** (50 + g) // deviation) + 2**33) >> 34
    y = (normal * held[given["multiplier"]] + held[given["addend"]]) >> given["shift"]
    return np.clip(y, given["low"], given["high"])


def pad(given, held):
    x, amounts = held[given["input"]], given["amounts"]
    around = [tuple(amounts[2 * n : 2 * n + 2]) for n in range(len(amounts) // 2)]
    around += [(0, 0)] * (x.ndim - len(around))
    return np.pad(x, around[::-1], constant_values=given["value"])


def cut(given, held):
    places = slice(given["start"], given["stop"], given["step"])
    return held[given["input"]][(slice(None),) * given["axis"] + (places,)]


def concat(given, held):
    parts = [held[name] for name in given["inputs"]]
    first = max(len(part) for part in parts)
    return np.concatenate([np.broadcast_to(part, (first, *part.shape[1:])) for part in parts], given["axis"])


OPERATIONS = {
    "linear": linear, "convolution": convolution, "product": product, "multiply": multiply, "sum": summed,
    "requantize": requantize, "softmax_to_powers": softmax_to_powers, "softmax_to_levels": softmax_to_levels,
    "layer_norm": layer_norm, "rms_norm": rms_norm, "pad": pad, "slice": cut, "concat": concat,
    "lookup": lambda given, held: held[given["table"]][held[given["input"]] - given["lowest"]],
    "reshape": lambda given, held: held[given["input"]].reshape(given["shape"]),
    "permute": lambda given, held: held[given["input"]].transpose(given["axes"]),
    "roll": lambda given, held: np.roll(held[given["input"]], given["shifts"], given["axes"]),
}  # fmt: skip
