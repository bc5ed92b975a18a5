"""Digests of what recipes make of real models, which a change of structure leaves as they are.

`python tests/helpers/golden.py compare` says where the code that is here gives other numbers than `tests/golden.json`;
`python tests/helpers/golden.py write` replaces that file, after a change that means to change numbers.

Each run quantizes a model and answers a few images. Four digests are kept: of the quantizers and parameters, of the
codes at every quantizer, of the simulated logits, and of the codes that the integer program gives. Calibration sums
floats, whose order is the processor's, so the file names what made it: `probe` is the digest of a few float results.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import vitquant
from vitquant.demo import embedded
from vitquant.errors import LoweringError
from vitquant.runtime.on_images import interpreted
from vitquant.tasks.classification import logits_of
from vitquant.tasks.images import batches, load_listing, subset
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.zoo import ModelSource, create

FILE = Path(__file__).parents[1] / "golden.json"
SHARED = Path(__file__).resolve().parents[3] / "shared"
BRIEF = ("search-scales.candidates=12", "search-scales.rounds=2", "search-scales.pairs=16")
_GAME = {"cycles": 2, "images": 2, "iterations": 2, "warmup": 1, "steps": 2}
GAME = tuple(f"distill-adversarially.{key}={value}" for key, value in _GAME.items())
BRIEFLY = ("reconstruct-output.steps=4",)


@dataclass(frozen=True)
class Run:
    """A model, `embedded` or `deit`, and what quantizes it.

    Arguments:
        settings: as `vitquant quantize --set` takes them.
    """

    model: str
    recipe: str
    bits: str | None = None
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.model, self.recipe, self.bits, *self.settings)))


RUNS = (
    Run("embedded", "minmax"),
    Run("embedded", "moving-average"),
    Run("embedded", "percentile"),
    Run("embedded", "omse"),
    Run("embedded", "fq-vit"),
    Run("embedded", "fq-vit", "w4a8s4"),
    Run("embedded", "fq-vit-published"),
    Run("embedded", "fq-vit+uniform-probs", "w8a8"),
    Run("embedded", "fq-vit+uniform-probs+uniform-norm-inputs", "w8a8"),
    Run("embedded", "fq-vit+wide-residual"),
    Run("embedded", "vt-ptq", None, BRIEF),
    Run("embedded", "vt-ptq+fully-integer", "w6a6s5", BRIEF),
    Run("embedded", "repq-vit"),
    Run("embedded", "repq-vit+fully-integer"),
    Run("embedded", "repq-vit+power-of-two-factor"),
    Run("embedded", "repq-vit+searched-scales+fully-integer", "w4a4", BRIEF),
    Run("embedded", "default"),
    Run("embedded", "default", "w6a6", BRIEFLY),
    Run("embedded", "default", "w4a8", BRIEFLY),
    Run("embedded", "default", "w4a4", BRIEFLY),
    Run("embedded", "psaq-vit"),
    Run("embedded", "repq-vit+adversarially-distilled", "w4a4", GAME),
    Run("deit", "fq-vit"),
    Run("deit", "repq-vit+fully-integer"),
    Run("deit", "vt-ptq+fully-integer", "w8a8s5", BRIEF),
)


@cache
def probe() -> str:
    """A digest of float results that depend on the processor, and on the version of torch."""
    torch.set_num_threads(1)
    images = embedded.batches("test", 4)[0][0]
    x = torch.linspace(-6, 6, 20_001)
    functions = (torch.exp, torch.erf, torch.tanh, torch.sigmoid, lambda v: v.abs().sqrt(), torch.sin)
    with torch.inference_mode():
        return _digest([embedded.model()(images), *(each(x) for each in functions)])


def digests(run: Run) -> dict[str, str]:
    """What a run gives, on one thread."""
    torch.set_num_threads(1)
    model, calibration, images = _given(run.model)
    quantized = vitquant.quantize(model, run.recipe, calibration, bits=run.bits, settings=run.settings, simulated=True)
    state = {**dict(quantized.graph_module.named_parameters()), **_of_quantizers(quantized)}
    codes: dict[str, list[Tensor]] = {}
    quantizers = quantized.quantizers
    taps = {
        name: lambda x, name=name: codes.setdefault(name, []).append(quantizers[name].encode(x).to(torch.int32))
        for name in quantizers
    }
    with torch.inference_mode():
        for batch in images.split(16):
            quantized.run(batch, taps)
        logits = torch.cat([logits_of(quantized(batch)) for batch in images.split(16)])
        found = {
            "quantizers": _digest(state[name] for name in sorted(state)),
            "codes": _digest(each for name in sorted(codes) for each in codes[name]),
            "logits": _digest([logits]),
        }
        try:
            program = interpreted(vitquant.lower(quantized))
        except LoweringError:
            return {**found, "program": "none"}
        answers = [program.run(program.input.encode(batch)) for batch in images.split(16)]
    return {**found, "program": _digest(answers)}


def _of_quantizers(model: vitquant.QuantizedModel) -> dict[str, Tensor]:
    parts = {
        f"{name} {part}": getattr(quantizer, part)
        for name, quantizer in model.quantizers.items()
        for part in ("scale", "zero_point", "factor")
    }
    return {name: part for name, part in parts.items() if part is not None}


def _given(model: str) -> tuple[torch.nn.Module, list[Tensor], Tensor]:
    """A model, calibration batches, and 64 images to answer."""
    if model == "embedded":
        train, test = (
            torch.cat([images for images, _ in embedded.batches(each, 64)][:1]) for each in ("train", "test")
        )
        return embedded.model(), list(train[:32].split(16)), test
    photographs = [
        torch.cat(
            [
                images
                for images, _ in batches(subset(load_listing(SHARED / "images" / name), count, 0), Preprocessing(), 16)
            ]
        )
        for name, count in (("photos_calibration", 32), ("photos_eval", 64))
    ]
    weights = SHARED / "weights" / "deit_tiny_patch16_224.safetensors"
    return (
        create(ModelSource("timm:deit_tiny_patch16_224", weights=str(weights))),
        list(photographs[0].split(16)),
        photographs[1],
    )


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for each in tensors:
        found.update(f"{each.dtype}{list(each.shape)}".encode())
        found.update(each.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def main() -> int:
    runs = [run for run in RUNS if not sys.argv[2:] or run.name in sys.argv[2:]]
    found = {}
    for run in runs:
        found[run.name] = digests(run)
        print(run.name, found[run.name], flush=True)
    if sys.argv[1] == "write":
        kept = {} if len(runs) == len(RUNS) else json.loads(FILE.read_text())["runs"]
        whole = {"torch": torch.__version__, "probe": probe(), "runs": {**kept, **found}}
        FILE.write_text(json.dumps(whole, indent=1) + "\n")
        return 0
    golden = json.loads(FILE.read_text())
    if golden["probe"] != probe():
        print("made on another kind of processor, or with another torch: nothing to compare with")
        return 2
    others = [
        f"{name}: {part}"
        for name, parts in found.items()
        for part in parts
        if parts[part] != golden["runs"][name][part]
    ]
    print("\n".join(others) or "identical")
    return int(bool(others))


if __name__ == "__main__":
    raise SystemExit(main())
