"""An engine for integer programs, format 3, in numpy, exact in 64-bit integers.

It was written from docs/program-format.md by somebody who saw only that, and shares nothing with vitquant.
"""
# ruff: noqa: B905, E741, N806, N818, PTH123
# fmt: off

import hashlib
import json
import math

import numpy as np

TYPES = {"u4": (0, 15), "s4": (-8, 7), "u8": (0, 255), "s8": (-128, 127), "u16": (0, 65535), "s16": (-32768, 32767),
         "s32": (-2**31, 2**31 - 1), "s64": (-2**63, 2**63 - 1)}
DTYPES = {"u8": "<u1", "s8": "<i1", "u16": "<u2", "s16": "<i2", "s32": "<i4", "s64": "<i8"}
NORM = "input factors input_zero epsilon largest multiplier addend shift low high"
KEYS = {
    "linear": "input weight bias input_zero weight_zero",
    "convolution": "input weight bias input_zero weight_zero stride padding dilation groups",
    "product": "left right left_zero right_zero", "multiply": "left right left_zero right_zero",
    "sum": "input axes keep input_zero", "requantize": "inputs multipliers addend shift low high",
    "softmax_to_powers": "input mask values octaves zero steps offset published",
    "softmax_to_levels": "input mask values octaves multiplier shift output_zero low high",
    "layer_norm": NORM, "rms_norm": NORM, "lookup": "input table lowest", "reshape": "input shape",
    "permute": "input axes", "slice": "input axis start stop step", "roll": "input shifts axes",
    "pad": "input amounts value", "concat": "inputs axis"}
TENSOR_KEYS = {"input", "inputs", "left", "right", "weight", "bias", "weight_zero", "multipliers", "addend", "mask",
               "values", "octaves", "factors", "table", "multiplier"}


class Refused(ValueError):
    pass


def need(condition, message):
    if not condition:
        raise Refused(message)


def strict_json(text):
    def pairs(items):
        result = dict(items)
        need(len(result) == len(items), "a key comes twice")
        return result

    def constant(name):
        raise Refused(f"{name} in JSON")

    def integer(digits):
        value = int(digits)
        need(-2**63 <= value < 2**63, "an integer of more than 64 bits")
        return value
    return json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_int=integer)


def read_safetensors(path):
    """(metadata, {name: (dtype, shape, bytes)}) of a safetensors file."""
    with open(path, "rb") as file:
        data = file.read()
    size = int.from_bytes(data[:8], "little")
    need(len(data) >= 8 + size, "the file is cut short")
    header, body = strict_json(data[8:8 + size].decode("utf-8")), data[8 + size:]
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        need(0 <= begin <= end <= len(body), "offsets outside of the file")
        tensors[name] = (entry["dtype"], entry["shape"], body[begin:end])
    return metadata, tensors


def unpack(raw, kind, shape, name):
    count = math.prod(shape)
    if kind in ("u4", "s4"):
        need(len(raw) == (count + 1) // 2, f"{name}: wrong number of bytes")
        packed = np.frombuffer(raw, np.uint8).astype(np.int64)
        values = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
        need(not values[count:].any(), f"{name}: the last half byte is not 0")
        values = values[:count]
        if kind == "s4":
            values = (values ^ 8) - 8
    else:
        dtype = np.dtype(DTYPES[kind])
        need(len(raw) == count * dtype.itemsize, f"{name}: wrong number of bytes")
        values = np.frombuffer(raw, dtype).astype(np.int64)
    return values.reshape(shape)


class Program:
    def __init__(self, path):
        metadata, tensors = read_safetensors(path)
        need("vitquant_program" in metadata, "no vitquant_program in the metadata")
        text = metadata["vitquant_program"]
        p = strict_json(text)
        need(isinstance(p, dict) and type(p.get("format")) is int and p["format"] == 3, "the format is not 3")
        need(list(p)[-1] == "sha256" and text.isascii(), "sha256 is not the last key")
        need(set(p) == {"format", "inputs", "outputs", "registers", "instructions", "codes", "facts", "sha256"},
             "keys are missing or unknown")
        digest = hashlib.sha256(text[:-66].encode("ascii"))
        for name in sorted(tensors):
            digest.update(tensors[name][2])
        need(text[-66:] == digest.hexdigest() + '"}' and p["sha256"] == digest.hexdigest(), "the digest differs")
        need(len(p["inputs"]) == 1 <= len(p["outputs"]), "not one input and an output")
        self.input, self.instructions = p["inputs"][0], p["instructions"]
        self.outputs = {each["name"]: each for each in p["outputs"]}
        need(len(self.outputs) == len(p["outputs"]), "two outputs have one name")
        self.registers, self.constants = p["registers"], {}
        for name, (dtype, shape, raw) in tensors.items():
            need(dtype == "U8" and len(shape) == 1 and name in self.registers, f"constant {name}")
            kind, shape = self.registers[name]
            need(kind in TYPES and -1 not in shape, f"constant {name}")
            self.constants[name] = unpack(raw, kind, shape, name)
        self._check_instructions()

    def _check_instructions(self):
        known = {*self.constants, self.input["register"]}
        for i in self.instructions:
            need(i.get("op") in KEYS, f"unknown opcode {i.get('op')}")
            need(set(i) == {"op", "output", "site", *KEYS[i["op"]].split()}, f"keys of {i['op']}")
            for key in TENSOR_KEYS & set(i):
                names = i[key] if isinstance(i[key], list) else [i[key]] if isinstance(i[key], str) else []
                need(all(n in known for n in names), f"{i['op']}.{key} is not written before")
            need(i["output"] in self.registers and i["output"] not in known, f"{i['output']} is written twice")
            known.add(i["output"])
        results = {each["register"] for each in self.outputs.values()}
        need(results <= known == set(self.registers), "registers that nothing writes")

    def run_all(self, codes):
        """All registers, from the codes of N images."""
        codes = np.asarray(codes).astype(np.int64)
        name = self.input["register"]
        kind, shape = self.registers[name]
        need(codes.shape[1:] == tuple(shape[1:]) and codes.ndim == len(shape), "the shape of the input")
        low, high = TYPES[kind]
        need(not codes.size or (codes.min() >= low and codes.max() <= high), "codes outside of the input's type")
        values = {**self.constants, name: codes}
        for i in self.instructions:
            a = dict(i)
            for key in TENSOR_KEYS & set(i):
                a[key] = ([values[n] for n in i[key]] if isinstance(i[key], list)
                          else values[i[key]] if isinstance(i[key], str) else i[key])
            y = OPS[i["op"]](a)
            kind, shape = self.registers[i["output"]]
            need(y.ndim == len(shape) and all(s in (-1, t) for s, t in zip(shape, y.shape)),
                 f"{i['output']}: {y.shape} is not {shape}")
            values[i["output"]] = y
        return values

    def run(self, codes):
        codes = np.asarray(codes)
        if codes.shape[0] == 0:
            return {n: np.zeros((0, *self.registers[o["register"]][1][1:]), np.int64) for n, o in self.outputs.items()}
        values = self.run_all(codes)
        return {name: values[output["register"]] for name, output in self.outputs.items()}

    def codes_of_images(self, images):
        need("scale" in self.input, "the program does not say what its codes stand for")
        x = np.asarray(images).astype(np.float32)
        need(not np.isnan(x).any(), "NaN has no code")
        with np.errstate(over="ignore"):
            q = np.rint(x / np.float32(self.input["scale"]))          # float32, halves to even
        q = np.clip(q.astype(np.float64), -2.0**40, 2.0**40).astype(np.int64) + self.input["zero_point"]
        return np.clip(q, self.input["low"], self.input["high"])

    def numbers_of_codes(self, name, codes):
        output = self.outputs[name]
        need("scale" in output, "the program does not say what its outputs stand for")
        return (codes - output["zero_point"]).astype(np.float32) * np.array(output["scale"], np.float32)


def zero(x):
    return 0 if x is None else x


def bits(a):
    """Binary digits of an array of numbers from 0 to 2^62."""
    result = np.zeros(a.shape, np.int64)
    a = a.copy()
    for step in (32, 16, 8, 4, 2, 1):
        big = a >= (1 << step)
        result += np.where(big, step, 0)
        a = np.where(big, a >> step, a)
    return result + a


def isqrt(a):
    r = np.sqrt(a.astype(np.float64)).astype(np.int64)
    for _ in range(2):
        r = np.minimum(r, 3037000498)
        r = np.where(r * r > a, r - 1, r)
        r = np.where((r + 1) * (r + 1) <= a, r + 1, r)
    return r


def linear(a):
    weight = a["weight"] - zero(a["weight_zero"])
    return np.matmul(a["input"] - a["input_zero"], weight.T) + zero(a["bias"])


def convolution(a):
    w = a["weight"] - zero(a["weight_zero"])
    (s0, s1), (a0, a1), (d0, d1), groups = a["stride"], a["padding"], a["dilation"], a["groups"]
    p = np.pad(a["input"] - a["input_zero"], ((0, 0), (0, 0), (a0, a0), (a1, a1)))
    O, C, U, V = w.shape
    B, _, H, W = p.shape
    I, J = (H - d0 * (U - 1) - 1) // s0 + 1, (W - d1 * (V - 1) - 1) // s1 + 1
    p, w = p.reshape(B, groups, C, H, W), w.reshape(groups, O // groups, C, U, V)
    y = np.zeros((B, groups, O // groups, I * J), np.int64)
    for u in range(U):
        for v in range(V):
            part = p[..., u * d0:u * d0 + (I - 1) * s0 + 1:s0, v * d1:v * d1 + (J - 1) * s1 + 1:s1]
            y += np.matmul(w[None, :, :, :, u, v], part.reshape(B, groups, C, I * J))
    y = y.reshape(B, O, I, J)
    return y if a["bias"] is None else y + a["bias"][:, None, None]


def sum_(a):
    return (a["input"] - a["input_zero"]).sum(axis=tuple(a["axes"]), keepdims=a["keep"])


def requantize(a):
    total = a["addend"]
    for x, m in zip(a["inputs"], a["multipliers"], strict=True):
        total = total + x * m
    return np.clip(total >> a["shift"], a["low"], a["high"])


def softmax_rows(a):
    x, L = a["input"], len(a["values"]) - 1
    masked = np.broadcast_to(zero(a["mask"]), x.shape) == 1
    largest = np.where(masked, np.iinfo(np.int64).min, x).max(axis=-1, keepdims=True)
    d = np.where(masked, L, np.where(masked, x, largest) - x)
    v = a["values"][d]
    return d, v, np.maximum(1 << 15, v.sum(axis=-1, keepdims=True))


def softmax_to_powers(a):
    d, v, S = softmax_rows(a)
    if a["published"]:
        q = (2 * S + v) // np.maximum(1, 2 * v)
        w = bits(q) - 1
        return np.minimum(a["zero"], w + (2 * q >= 3 * (np.int64(1) << w)))
    n = {1: 12, 2: 11}[a["steps"]]
    w = bits(S) - 1
    m = S << (30 - w)
    for _ in range(12):
        m = (m * m) >> 30
        t = m >> 31
        m, w = m >> t, 2 * w + t
    return np.clip((a["octaves"][d] + w - 15 * 2**12 + a["offset"] + 2**(n - 1)) >> n, 0, a["zero"])


def softmax_to_levels(a):
    _, v, S = softmax_rows(a)
    r = (a["multiplier"] << 16) // S
    y = ((v * r + (1 << (a["shift"] + 15))) >> (a["shift"] + 16)) + a["output_zero"]
    return np.clip(y, a["low"], a["high"])


def norm(a, centred):
    X = (a["input"] - a["input_zero"]) << zero(a["factors"])
    C = X.shape[-1]
    g = max(0, min(12, (62 - ((C * a["largest"])**2 + a["epsilon"]).bit_length()) // 2))
    T = X.sum(axis=-1, keepdims=True) if centred else 0
    V = C * (X * X).sum(axis=-1, keepdims=True) - T * T
    R = (1 << (50 + g)) // isqrt((V + a["epsilon"]) << (2 * g))
    n = ((C * X - T) * R + 2**33) >> 34
    return np.clip((n * a["multiplier"] + a["addend"]) >> a["shift"], a["low"], a["high"])


def slice_(a):
    index = [slice(None)] * a["input"].ndim
    index[a["axis"]] = slice(a["start"], a["stop"], a["step"])
    return a["input"][tuple(index)]


def pad(a):
    amounts, x = a["amounts"], a["input"]
    widths = [(0, 0)] * x.ndim
    for k in range(len(amounts) // 2):
        widths[x.ndim - 1 - k] = (amounts[2 * k], amounts[2 * k + 1])
    return np.pad(x, widths, constant_values=a["value"])


def concat(a):
    first = max(x.shape[0] for x in a["inputs"])
    inputs = [np.broadcast_to(x, (first, *x.shape[1:])) if x.shape[0] == 1 else x for x in a["inputs"]]
    return np.concatenate(inputs, axis=a["axis"])


OPS = {
    "linear": linear, "convolution": convolution, "sum": sum_, "requantize": requantize,
    "product": lambda a: np.matmul(a["left"] - a["left_zero"], a["right"] - a["right_zero"]),
    "multiply": lambda a: (a["left"] - a["left_zero"]) * (a["right"] - a["right_zero"]),
    "softmax_to_powers": softmax_to_powers, "softmax_to_levels": softmax_to_levels,
    "layer_norm": lambda a: norm(a, True), "rms_norm": lambda a: norm(a, False),
    "lookup": lambda a: a["table"][a["input"] - a["lowest"]],
    "reshape": lambda a: a["input"].reshape(a["shape"]), "permute": lambda a: a["input"].transpose(a["axes"]),
    "slice": slice_, "roll": lambda a: np.roll(a["input"], a["shifts"], a["axes"]), "pad": pad, "concat": concat}
