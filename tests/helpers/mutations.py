"""Structure-aware mutations of every kind of file that vitquant reads, and what became of reading them."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from forging import TINY, digest, save_tiny, seal
from safetensors.torch import load, save_file

import vitquant
from vitquant.errors import VitquantError

LONGEST = 20.0  # seconds

# What a mutation puts in the place of a value: other types, ends of ranges, and what breaks parsers and libraries.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 256, 2**31, -(2**31), 2**53, 2**63 - 1, 2**63, 10**18, 0.0, -0.0, 0.5,
    1e-320, 1e-9, 1e38, 1e308, -1e308, "", " ", "x", "0", "-1", "nan", "1e9", "../../etc/passwd", "/dev/zero", "\x00",
    "\x1b[2J", "\ud800", "é", "a" * 5000, "*" * 200, "os:system", "pretrained", [], {}, [[]], [1], ["x"],
    {"x": 1}, [None] * 50,
    {"name": "x"}, [{"name": "x"}],
)  # fmt: skip
_NAMES = (
    "timm:hf-hub:org/model", "transformers:{canary}", "python:canary:run", "torchvision:vit_b_16", "timm:resnet18",
    "transformers:vit", "timm:vit_tiny_patch16_224", "timm:local-dir:{canary}", "transformers:org/model", "none:x",
)  # fmt: skip


@dataclass
class Attack:
    """What became of the mutations of one kind."""

    refused: int = 0
    accepted: int = 0
    longest: float = 0.0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """One kind of file: a function that writes a mutation, and one that reads it as a command does."""

    write: Callable[[random.Random], object]
    read: Callable[[], object]


def attack(kind: str, mutations: int, seed: int, folder: Path) -> Attack:
    """Read so many mutations of a kind of file; every failure says the seed that repeats it."""
    canary = Canary(folder)
    made: Kind = KINDS[kind](folder, canary)
    found = Attack()
    for number in range(seed, seed + mutations):
        chance = random.Random(f"{kind}{number}")
        made.write(chance)
        started = time.perf_counter()
        try:
            made.read()
            found.accepted += 1
        except VitquantError as error:
            found.refused += 1
            if "\n" in str(error) or len(str(error)) > 3000:
                found.failures.append(f"{number}: not one line: {str(error)[:200]!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = error.__traceback__
            while where and where.tb_next:
                where = where.tb_next
            place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else ""
            found.failures.append(f"{number}: {type(error).__name__} at {place}: {str(error)[:150]!r}")
        seconds = time.perf_counter() - started
        found.longest = max(found.longest, seconds)
        if seconds > LONGEST:
            found.failures.append(f"{number}: {seconds:.0f} s")
        if canary.sang():
            found.failures.append(f"{number}: code ran")
    return found


class Canary:
    """A directory whose code, and a pickle whose reading, leave a mark."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._mark = folder / "canary", folder / "sang"
        self.folder.mkdir()
        auto = {"AutoConfig": "conf.C", "AutoModelForImageClassification": "conf.M"}
        (self.folder / "config.json").write_text(json.dumps({"model_type": "vit", "auto_map": auto}))
        (self.folder / "conf.py").write_text(f"import pathlib\npathlib.Path({str(self._mark)!r}).touch()\n")
        (self.folder / "weights.pth").write_bytes(pickle.dumps(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._mark,))

    def sang(self) -> bool:
        """Whether code ran since it was asked."""
        ran = self._mark.exists()
        self._mark.unlink(missing_ok=True)
        return ran


def mutated(values: Any, chance: random.Random, canary: Canary, times: int | None = None) -> Any:
    """Plain values with one to three places changed: replaced, removed, doubled, renamed, moved or nudged."""
    values = deepcopy(values)
    for _ in range(times or chance.choice((1, 1, 1, 2, 3))):
        _mutate(values, chance, canary)
    return values


def _mutate(values: Any, chance: random.Random, canary: Canary) -> None:
    container = _somewhere(values, chance)
    if not container:
        return
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = chance.choice(keys)
    value = container[key]
    match chance.randrange(9):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[chance.choice(("x", f"{key}x", str(key)[:-1], "auto_map", "__class__"))] = container.pop(key)
        case 1:
            container.append(deepcopy(value))
        case 2:
            other = _somewhere(values, chance)
            inside = list(other.values()) if isinstance(other, dict) else other
            container[key] = deepcopy(chance.choice(inside)) if inside else None
        case 3 if isinstance(value, int | float) and not isinstance(value, bool):
            container[key] = chance.choice((value + 1, value - 1, -value, value * 2, value / 2, value * 1000))
        case 3 if isinstance(value, str):
            container[key] = chance.choice((value + "x", value[:-1], value.upper(), value * 2, value[::-1]))
        case 4 if isinstance(value, str) and ":" in value:
            container[key] = chance.choice(_NAMES).format(canary=canary.folder)
        case 5 if isinstance(container, dict):
            container["trust_remote_code"] = True
        case 6:
            for _ in range(chance.choice((3, 40, 300))):
                value = [value]
            container[key] = value
        case _:
            container[key] = deepcopy(chance.choice(_VALUES))


def _somewhere(values: Any, chance: random.Random) -> Any:
    """A list or table inside, each as likely as another."""
    found, level = [], [values]
    while level:
        found += level
        level = [
            each
            for part in level
            for each in (part.values() if isinstance(part, dict) else part)
            if isinstance(each, dict | list) and each
        ]
    return chance.choice(found)


def json_text(values: Any, chance: random.Random) -> str:
    """JSON, now and then of what only a parser minds: a key twice, NaN, deep brackets, an end that is missing."""
    text = json.dumps(values)
    match chance.randrange(25):
        case 0:
            return text.replace('":', '":' + "[" * 100_000, 1)
        case 1:
            return text.replace("1", chance.choice(("NaN", "Infinity", "1e999", "9" * 5000)), 1)
        case 2:
            return text[: chance.randrange(len(text))]
        case 3:
            return "{" + text[1:-1] + ', "format": 1, "format": 1}'
        case _:
            return text


# The kinds.


def _config(folder: Path, canary: Canary) -> Kind:
    directory = folder / "out"
    save_tiny(directory)
    path = directory / "config.json"
    original = {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"}
    captured = _captured()
    built = random.Random(0)

    def write(chance: random.Random) -> None:
        values = deepcopy(original)
        part = chance.choice(("", "", "source", "quantization_config", "preprocessing", "calibration", "records"))
        if part:
            values[part] = mutated(values[part], chance, canary)
        else:
            values = mutated(values, chance, canary)
        path.write_text(json_text({**values, "digest": digest(values)}, chance))

    def read() -> None:
        if built.random() < 0.1:
            vitquant.load(directory)
            vitquant.float_model(directory)
        else:
            _loaded(directory, captured)

    return Kind(write, read)


def _captured() -> Any:
    from vitquant.graph.capture import capture
    from vitquant.zoo import architecture

    model = architecture(vitquant.ModelSource("timm:vit_tiny_patch16_224", TINY, "random"))
    return capture(model, torch.randn(2, 3, 32, 32))


def _loaded(directory: Path, captured: Any) -> Any:
    """What `load` does, without building and capturing the model again."""
    from unittest.mock import patch

    with (
        patch("vitquant.loading.capture", lambda *_: deepcopy(captured)),
        patch("vitquant.loading.architecture", lambda _: captured),
    ):
        return vitquant.load(directory)


def _tensors(folder: Path, canary: Canary) -> Kind:
    directory = folder / "out"
    save_tiny(directory)
    captured = _captured()
    path = directory / "model.safetensors"
    original, content = load(path.read_bytes()), path.read_bytes()
    images = torch.randn(1, 3, 32, 32)

    def write(chance: random.Random) -> None:
        tensors = {name: tensor.clone() for name, tensor in original.items()}
        for _ in range(chance.choice((1, 1, 2))):
            _mutate_tensor(tensors, chance)
        save_file(tensors, path)
        if chance.random() < 0.3:
            path.write_bytes(_mutate_bytes(content, chance, header=int.from_bytes(content[:8], "little")))
        seal(directory)

    def read() -> None:
        with torch.inference_mode():
            _loaded(directory, captured)(images)

    return Kind(write, read)


def _mutate_tensor(tensors: dict[str, torch.Tensor], chance: random.Random) -> None:
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    match chance.randrange(8):
        case 0:
            tensors.pop(name)
        case 1:
            dtypes = torch.int32, torch.bool, torch.float16, torch.float64, torch.uint8, torch.int64, torch.float32
            tensors[name] = tensor.to(chance.choice(dtypes))
        case 2:
            shapes = ((0,), (1,), (tensor.numel(),), (1, *tensor.shape), (*tensor.shape, 2))
            tensors[name] = tensor.new_ones(chance.choice(shapes))
        case 3:
            tensors[f"{name}x"] = tensors.pop(name)
        case 4:
            tensors[name] = tensors[chance.choice(list(tensors))].clone()
        case _ if tensor.numel():
            values = (
                0,
                1,
                -1,
                255,
                2**30,
                -(2**31),
                float("nan"),
                float("inf"),
                -float("inf"),
                1e-44,
                1e38,
                -1e-3,
                3.0,
            )
            value = chance.choice(values)
            if tensor.is_floating_point() or (value == value and abs(value) < 2**31):
                limits = None if tensor.is_floating_point() or tensor.dtype == torch.bool else torch.iinfo(tensor.dtype)
                value = value if limits is None else max(limits.min, min(limits.max, int(value)))
                tensor.view(-1)[chance.randrange(tensor.numel())] = value


def _mutate_bytes(content: bytes, chance: random.Random, header: int = 64) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(min(len(changed), header + 8) if chance.random() < 0.7 else len(changed))
        changed[place] = chance.choice((0, 255, changed[place] ^ 1 << chance.randrange(8), ord("["), ord('"')))
    return bytes(changed[: chance.randrange(len(changed))] if chance.random() < 0.1 else changed)


def _recipe(folder: Path, canary: Canary) -> Kind:
    from vitquant.recipe import available

    return _toml(folder, canary, [each.to_dict() for each in available()], lambda path: _matched(str(path)))


def _overlay(folder: Path, canary: Canary) -> Kind:
    import tomllib

    paths = sorted((Path(vitquant.__file__).parent / "recipes").glob("*.toml"))
    overlays = [table for path in paths if (table := tomllib.loads(path.read_text())).get("overlay")]
    return _toml(folder, canary, overlays, lambda path: _matched(f"vt-ptq+{path}"))


def _matched(name: str) -> None:
    """Read a recipe, match it with a model, and get its methods ready."""
    from vitquant.methods.table import planned
    from vitquant.recipe import Recipe, assign, load_recipe

    recipe = load_recipe(name)
    planned(recipe)
    assign(recipe, recipe.bits, _values())
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    recipe.to_toml()


def _values() -> Any:
    from vitquant.graph.sites import find_sites, find_values

    if not _FOUND:
        captured = _captured()
        _FOUND.append(find_values(captured, find_sites(captured)))
    return _FOUND[0]


_FOUND: list[Any] = []


def _toml(folder: Path, canary: Canary, originals: list[Any], read: Callable[[Path], object]) -> Kind:
    import tomli_w

    path = folder / "file.toml"

    def write(chance: random.Random) -> None:
        text = None
        while text is None:
            try:
                text = tomli_w.dumps(mutated(chance.choice(originals), chance, canary))
            except (TypeError, AttributeError, ValueError, RecursionError):  # null, and roots that are no table
                continue
        match chance.randrange(25):
            case 0:
                text += "\nx = " + "[" * 50_000
            case 1:
                text += "\n" + ".".join("a" * 50_000) + " = 1"
            case 2:
                text = text.replace("1", chance.choice(("nan", "inf", "9" * 5000, "1e999")), 1)
            case 3:
                text = text[: chance.randrange(len(text) or 1)]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))

    return Kind(write, lambda: read(path))


def _preprocessing(folder: Path, canary: Canary) -> Kind:
    from PIL import Image

    from vitquant.tasks.preprocessing import Preprocessing

    image = Image.new("RGB", (60, 40), (9, 99, 199))

    def read(path: Path) -> None:
        steps = Preprocessing.from_toml(path)
        if max(steps.input_size) / steps.crop_pct < 1000:
            assert bool(torch.isfinite(steps.transform()(image)).all())

    return _toml(folder, canary, [Preprocessing().to_dict(), {"crop_pct": 0.9}, {"std": [0.5, 0.5, 0.5]}], read)


def _sensitivity(folder: Path, canary: Canary) -> Kind:
    from vitquant.allocation.table import SensitivityTable

    model = vitquant.zoo.create(vitquant.ModelSource("timm:vit_tiny_patch16_224", {**TINY, "depth": 2}, "random"))
    images = torch.randn(2, 3, 32, 32)
    quick = ["search-scales.candidates=2", "search-scales.rounds=1"]
    table = vitquant.sensitivity(model, "vt-ptq", [images], candidates=(4, 6, 8), settings=quick)
    original, path = json.loads(table.to_json()), folder / "sensitivity.json"

    def write(chance: random.Random) -> None:
        path.write_text(json_text(mutated(original, chance, canary), chance))

    def read() -> None:
        found = SensitivityTable.from_json(path)
        for by in ("nuclear-norm", "output-error", "correlation"):
            found.allocate(mean_bits=6, by=by)
        found.to_json()

    return Kind(write, read)


def _labels(folder: Path, canary: Canary) -> Kind:
    from PIL import Image

    from vitquant.tasks.classes import ClassNames
    from vitquant.tasks.images import check_labels, load_listing

    data = folder / "data"
    data.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(data / name)
    rows = [["file", "class_index"], ["a.png", "0"], ["b.png", "1"], ["c.png", "2"]]
    cells = (
        "", "-1", "9" * 5000, "1.5", "nan", "../a.png", "/etc/passwd", "/dev/zero", "a.png", "\x00", "é", '"', '"a',
        "٣", "1_0", " 1", "x" * 200_000, "0x1", "True", "\r", ";",
    )  # fmt: skip

    def write(chance: random.Random) -> None:
        table = deepcopy(rows)
        for _ in range(chance.choice((1, 1, 2, 3))):
            row = chance.choice(table)
            match chance.randrange(6):
                case 0:
                    row.pop() if row else None
                case 1:
                    row.append(chance.choice(cells))
                case 2:
                    table.insert(chance.randrange(len(table) + 1), deepcopy(row))
                case 3 if len(table) > 1:
                    table.remove(row)
                case _ if row:
                    row[chance.randrange(len(row))] = chance.choice(cells)
        content = chance.choice(("\n", "\n", "\r\n", "\n\n")).join(",".join(row) for row in table).encode()
        (data / "labels.csv").write_bytes(
            _mutate_bytes(content, chance) if content and chance.random() < 0.3 else content
        )

    def read() -> None:
        check_labels(load_listing(data, ClassNames(3)), 3)

    return Kind(write, read)


def _classes(folder: Path, canary: Canary) -> Kind:
    from vitquant.tasks.classes_file import read_classes

    path = folder / "classes.txt"
    whole = (
        "folder,class_index\ncat,0\ndog,1\ncow,2\n", "n01440764 tench, Tinca tinca\nn01443537 goldfish\ncow\n",
        '{"cat": 0, "dog": 1, "cow": 2}', '{"0": ["n02121620", "cat"], "1": "dog", "2": "cow"}',
        "['cat', 'dog', 'cow']",
        '{"model_type": "vit", "id2label": {"0": "cat", "1": "dog", "2": "cow"}}',
    )  # fmt: skip
    parts = (
        "", ",", ";", "\t", "\n", "\r", "\x00", '"', "'", "{", "}", "[", "]", ":", "-1",
        "9" * 5000, "0x" + "f" * 5000, "1.5", "nan", "true", "null", "None", "[" * 5000, "{'a':" * 5000, "\u202e", "é",
        "x" * 100_000, "cat", "0", "(", "#", "\\",
        f"__import__('pathlib').Path({str(folder / 'ran')!r}).touch()",
    )  # fmt: skip

    def write(chance: random.Random) -> None:
        text = chance.choice(whole)
        for _ in range(chance.choice((1, 1, 2, 3))):
            start = chance.randrange(len(text) + 1)
            text = text[:start] + chance.choice(parts) + text[min(len(text), start + chance.choice((0, 0, 1, 3))) :]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))

    def read() -> None:
        names = read_classes(path, 3)
        assert names.names.keys() <= {0, 1, 2}
        assert not (folder / "ran").exists()

    return Kind(write, read)


def _program(folder: Path, canary: Canary) -> Kind:
    from safetensors import safe_open
    from safetensors.torch import save

    from vitquant.lowering import lower
    from vitquant.program.storage import _KEY, load_program, save_program, sealed
    from vitquant.runtime.interpreter import Interpreter

    path = folder / "integer.program"
    save_program(lower(save_tiny(folder / "out")), path)
    packed = load(path.read_bytes())
    with safe_open(path, "pt") as file:
        original = json.loads(file.metadata()[_KEY])
    original.pop("sha256")

    def write(chance: random.Random) -> None:
        tensors = {name: tensor.clone() for name, tensor in packed.items()}
        values = original
        if chance.random() < 0.2:
            _mutate_tensor(tensors, chance)
        else:
            values = mutated(original, chance, canary)
        try:
            text = sealed(values, tensors) if chance.random() < 0.8 else json_text(values, chance)
        except (ValueError, TypeError, RecursionError, RuntimeError):
            text = json_text({**values, "sha256": "0" * 64} if isinstance(values, dict) else values, chance)
        path.write_bytes(save(tensors, {_KEY: text}))

    def read() -> None:
        program = load_program(path)
        shape = program.registers[program.input].shape[1:]
        if len(shape) < 5 and torch.Size(shape).numel() < 2**20:
            Interpreter(program)(torch.zeros((1, *shape), dtype=torch.int64))

    return Kind(write, read)


def _weights(folder: Path, canary: Canary) -> Kind:
    from vitquant.zoo import create

    weights = create(vitquant.ModelSource("timm:vit_tiny_patch16_224", TINY, "random")).state_dict()
    names = [f"weights{suffix}" for suffix in (".pth", ".safetensors", ".pt")]
    chosen = [names[0]]

    def write(chance: random.Random) -> None:
        tensors: dict[Any, Any] = {name: tensor.clone() for name, tensor in weights.items()}
        for _ in range(chance.choice((1, 1, 2))):
            _mutate_tensor(tensors, chance)
        chosen[0] = chance.choice(names)
        path = folder / chosen[0]
        if path.suffix == ".safetensors":
            save_file(tensors, path)
        else:
            odd: list[Any] = [3, ("a", 1), None, b"x", 1.5, "\ud800"]
            match chance.randrange(6):
                case 0:
                    tensors[chance.choice(odd)] = tensors[
                        "head.bias" if "head.bias" in tensors else next(iter(tensors))
                    ]
                case 1:
                    tensors[chance.choice(list(tensors))] = chance.choice([*odd, [], {}, torch.Size([1])])
                case 2:
                    tensors = {chance.choice(["model", "state_dict", 3, "x"]): tensors, "epoch": chance.choice(odd)}
                case 3:
                    tensors["canary"] = canary
            if chance.random() < 0.1:
                name = next(iter(weights))
                tensors[name] = chance.choice([weights[name].to_sparse(), weights[name].to("meta")])
            torch.save(tensors, path)
        if chance.random() < 0.2:
            path.write_bytes(_mutate_bytes(path.read_bytes(), chance, header=2000))

    def read() -> None:
        model = create(vitquant.ModelSource("timm:vit_tiny_patch16_224", TINY, str(folder / chosen[0])))
        with torch.inference_mode():
            model(torch.zeros(1, 3, 32, 32))

    return Kind(write, read)


def _onnx(folder: Path, canary: Canary, integer: bool) -> Kind:
    import onnx

    from vitquant.engines import WAYS
    from vitquant.exports.onnx_integer import onnx_integer_model
    from vitquant.exports.qdq import onnx_qdq_model
    from vitquant.lowering import lower
    from vitquant.runtime.onnx_files import DIGEST, seal

    model = save_tiny(folder / "out", "fq-vit" if integer else "minmax")
    proto = onnx_integer_model(lower(model)) if integer else onnx_qdq_model(model)
    content, path = proto.SerializeToString(), folder / "model.onnx"
    altered = [False]

    def write(chance: random.Random) -> None:
        forged = onnx.ModelProto.FromString(content)
        _mutate_onnx(forged, chance, canary)
        altered[0] = chance.random() < 0.3
        if not altered[0]:
            kept = [entry for entry in forged.metadata_props if entry.key != DIGEST]
            del forged.metadata_props[:]
            forged.metadata_props.extend(kept)
            seal(forged)
        data = forged.SerializeToString()
        path.write_bytes(_mutate_bytes(data, chance, header=500) if chance.random() < 0.05 else data)

    def read() -> None:
        opened = WAYS["onnx-integer"][0].open(path, 1)
        if altered[0] and path.read_bytes() != content:
            raise AssertionError("an altered file was taken")
        opened.on_images(torch.zeros(1, 3, 32, 32))

    return Kind(write, read)


def _mutate_onnx(proto: Any, chance: random.Random, canary: Canary) -> None:
    import numpy as np
    from onnx import helper, numpy_helper

    graph = proto.graph
    match chance.randrange(8):
        case 0 | 1:
            entry = chance.choice(proto.metadata_props)
            try:
                values = json.loads(entry.value)
            except ValueError:
                values = entry.value
            if isinstance(values, dict | list) and values:
                entry.value = json_text(mutated(values, chance, canary), chance)
            else:
                entry.value = chance.choice(("", "x", "[" * 5000, "{}", "null", "1"))
        case 2 | 3:
            place = chance.randrange(len(graph.initializer))
            tensor = graph.initializer[place]
            values = np.array(numpy_helper.to_array(tensor))
            if values.dtype.kind in "iuf" and values.size and chance.random() < 0.7:
                flat = values.reshape(-1)
                bound = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else np.inf
                flat[chance.randrange(values.size)] = chance.choice((0, 1, bound, flat[0]))
                graph.initializer[place].CopyFrom(numpy_helper.from_array(values, tensor.name))
            else:
                tensor.dims.append(chance.choice((0, 2, 2**40)))
        case 4:
            node = chance.choice(graph.node)
            other = chance.choice(graph.node)
            match chance.randrange(5):
                case 0:
                    node.op_type = chance.choice((other.op_type, "Loop", "If", "Scan", "Foo", "ConstantOfShape"))
                case 1 if node.input:
                    node.input[chance.randrange(len(node.input))] = chance.choice((*other.output, "", "nowhere"))
                case 2:
                    node.domain = chance.choice(("com.microsoft", "ai.onnx.ml", "x"))
                case 3:
                    node.attribute.append(helper.make_attribute(chance.choice(("axis", "to", "x")), 10**6))
                case _:
                    graph.node.remove(node)
        case 5:
            tensor = chance.choice(graph.initializer)
            tensor.data_location = 1
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", chance.choice(("../../etc/passwd", "/dev/zero", str(canary.folder)))
        case 6:
            end = chance.choice((*graph.input, *graph.output))
            end.type.tensor_type.elem_type = chance.choice((0, 1, 6, 7, 8, 9, 16, 99))
        case _:
            entry = proto.opset_import.add()
            entry.domain, entry.version = chance.choice(("", "x", "com.microsoft")), chance.choice((1, 21, 999))


def _work(folder: Path, canary: Canary) -> Kind:
    """States of long work: of finished methods, of searches and a reconstruction that were cut short, and the mark."""
    from unittest.mock import patch

    from vitquant.zoo import architecture

    model = architecture(vitquant.ModelSource("timm:vit_tiny_patch16_224", TINY, "random"))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    recipe = "repq-vit+searched-scales+evolved-scales+reconstructed-output"
    settings = ["search-scales.candidates=2", "search-scales.rounds=1", "search-scales.pairs=4"]
    settings += ["evolve-scales.passes=2", "evolve-scales.cycles=2", "evolve-scales.population=3"]
    settings += ["reconstruct-output.steps=4", "reconstruct-output.batch=1"]
    asked: dict[str, Any] = {"settings": settings, "work": folder / "work"}

    def until(what: str) -> dict[str, bytes]:
        """What a run leaves that is killed at the third step of some work."""

        def progress(now: str, done: int, total: int) -> None:
            if now.startswith(what) and done == 3:
                raise KeyboardInterrupt

        with patch("vitquant.work._EVERY", 0.0), patch("vitquant.work._SHARE", 1e9), suppress(KeyboardInterrupt):
            vitquant.quantize(model, recipe, [images], progress=progress, **asked)
        return {path.name: path.read_bytes() for path in (folder / "work").iterdir()}

    left = [until("searching layers"), until("evolving"), until("reconstructing the output")]

    def write(chance: random.Random) -> None:
        shutil.rmtree(folder / "work", ignore_errors=True)
        (folder / "work").mkdir()
        files = chance.choice(left)
        for name, content in files.items():
            (folder / "work" / name).write_bytes(content)
        name = chance.choice(list(files))
        path = folder / "work" / name
        if name == "run.json":
            path.write_text(json_text(mutated(json.loads(files[name]), chance, canary), chance))
            return
        length = int.from_bytes(files[name][:8], "little")
        values = json.loads(json.loads(files[name][8 : 8 + length])["__metadata__"]["values"])
        tensors = load(files[name])
        if chance.random() < 0.5:
            values = mutated(values, chance, canary) if values else chance.choice(_VALUES)
        else:
            _mutate_tensor(tensors, chance)
        save_file(tensors, path, {"values": json_text(values, chance)})
        if chance.random() < 0.2:
            path.write_bytes(_mutate_bytes(files[name], chance, header=length))

    def read() -> None:
        vitquant.quantize(model, recipe, [images], **asked)

    return Kind(write, read)


KINDS: dict[str, Callable[[Path, Canary], Kind]] = {
    "config": _config,
    "tensors": _tensors,
    "recipe": _recipe,
    "overlay": _overlay,
    "sensitivity": _sensitivity,
    "preprocessing": _preprocessing,
    "labels": _labels,
    "classes": _classes,
    "program": _program,
    "onnx-integer": lambda folder, canary: _onnx(folder, canary, True),
    "onnx-qdq": lambda folder, canary: _onnx(folder, canary, False),
    "weights": _weights,
    "work": _work,
}
