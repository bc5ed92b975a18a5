"""Images that are made from a model alone, to calibrate on where there are none."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor, nn

from vitquant.autocast import in_own_precision
from vitquant.errors import CalibrationError, RecipeError
from vitquant.files import Directory, write_file
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.model.saved import float_digest
from vitquant.parsing import parse_value
from vitquant.progress import Progress, silent
from vitquant.schema import Table, check, of_type
from vitquant.seeding import generator_for
from vitquant.synthesis.noise import NOISES, NoiseSettings
from vitquant.synthesis.patch_similarity import (
    Draws,
    Objective,
    Optimized,
    PatchSimilaritySettings,
    bytes_of_one,
    optimize,
)
from vitquant.synthesis.ranks import Ranks
from vitquant.tasks.classification import class_count, logits_among
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.tasks.task import task_of
from vitquant.unwrapping import unwrapped
from vitquant.version import __version__
from vitquant.work import WorkDirectory, WorkState

if TYPE_CHECKING:
    from PIL.Image import Image

PATCH_SIMILARITY = "psaq-vit"
SETTINGS: dict[str, type[PatchSimilaritySettings] | type[NoiseSettings]] = {
    PATCH_SIMILARITY: PatchSimilaritySettings,
    **dict.fromkeys(NOISES, NoiseSettings),
}
ABOUT, SHEET = "synthesis.json", "contact-sheet.png"
MOST = 10_000  # images
_SET = 32  # images that are optimized side by side; more are optimized in sets
_AT_ONCE = 8  # images that are differentiated at a time, whose tensors then stay in the processor's cache
_TRACED = (
    "entropy",
    "cross entropy",
    "distance of the total variation",
)  # of the parts of the loss, those without a student


@dataclass(frozen=True)
class SyntheticImages:
    """Images that were made for a model.

    Arguments:
        pixels: uint8 (images, 3, height, width): what a file of them holds, and what calibrates.
        about: how they were made, as plain JSON values.
        preprocessing: of the model.
    """

    pixels: Tensor
    about: dict[str, Any]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def cut_short(self) -> str:
        """What is missing because a time limit came first; empty if nothing is."""
        missing = []
        if len(self) < self.about["asked"]:
            missing.append(f"{len(self)} of {self.about['asked']} images")
        done = [len(each[_TRACED[0]]) for each in self.about.get("losses", ())]
        if done and min(done) < self.about["iterations"]:
            missing.append(f"{min(done)} of {self.about['iterations']} iterations")
        return ", ".join(missing)

    @property
    def ends_of_losses(self) -> dict[str, tuple[float, float]]:
        """Each part of the loss in the first and in the last iteration, the mean over the sets of images."""
        sets = self.about.get("losses", ())
        traces = {name: [each[name] for each in sets] for name in _TRACED if sets and sets[0][name]}
        return {
            name: (sum(trace[0] for trace in each) / len(each), sum(trace[-1] for trace in each) / len(each))
            for name, each in traces.items()
        }

    def batches(self, size: int = 32) -> list[Tensor]:
        """The images as the model takes them, float32 (size, 3, height, width), for `quantize`.

        Arguments:
            size: how many in a batch; the last may have fewer.
        """
        mean, std = _channels(self.preprocessing.mean), _channels(self.preprocessing.std)
        return [(part.to(torch.float32) / 255 - mean) / std for part in self.pixels.split(size)]

    def save(self, directory: str | Path) -> None:
        """Write one PNG for each image, and `synthesis.json` with what they were made by.

        The preprocessing of the model gives back the same pixels: where it resizes an image and crops it, the files
        have a frame that it takes away.

        Arguments:
            directory: made when missing.

        Raises:
            DataError: Pillow is not installed.
            ExportError: a file cannot be written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(self.files()):
            image.save(directory / name_of(number))
        write_file(directory / ABOUT, json.dumps(self.about, indent=1).encode(), force=True)

    def files(self) -> Iterator[Image]:
        """The images with their frames, as Pillow's.

        Raises:
            DataError: see `save`.
        """
        for image in self.pixels:
            yield self.preprocessing.framed(image)


class SynthesisStoppedError(CalibrationError):
    """The loss of a synthesis became NaN or infinite.

    Arguments:
        problem: when, and what to do.
        images: as they were before.
    """

    def __init__(self, problem: str, images: SyntheticImages) -> None:
        super().__init__(problem)
        self.images = images


@in_own_precision
def synthesize(
    model: nn.Module,
    count: int = 32,
    method: str = PATCH_SIMILARITY,
    *,
    settings: Sequence[str] | Mapping[str, Any] = (),
    preprocessing: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    memory: float = 4.0,
    time_limit: float = math.inf,
    work: str | Path | None = None,
) -> SyntheticImages:
    """Make images for a model from the model alone; the model is not changed.

    In a process group of torch's each process makes a part of the images, and all of them get all.

    Arguments:
        model: any module with attention that takes one batch of images.
        count: how many, at most 10,000.
        method: `psaq-vit`; or `gaussian-noise` or `uniform-noise`, as baselines.
        settings: of the method, see `PatchSimilaritySettings`: {"iterations": 100}, or ["iterations=100"].
        preprocessing: of the model, with the keys of timm's data configuration: the size of the images, and how pixels
            are normalized. The common one for ImageNet when None.
        seed: of all random draws. An image depends on the seed and its number, not on how many others there are.
        progress: called with the entropy, the iterations that are done, and their number.
        memory: gigabytes for what gradients need; the result depends on it by the rounding of sums only.
        time_limit: seconds, after which the images so far are the result.
        work: a directory in which the state is saved: after an interruption the same call continues there. It can be
            removed afterwards.

    Raises:
        RecipeError: there is no such method or setting, or a number is out of range.
        ModelError: the model has no attention between patches.
        CalibrationError: torch cannot differentiate the model, or the memory is too small for one image.
        SynthesisStoppedError: the loss became NaN or infinite; the error holds the images of the iteration before.
        CheckpointError: the work directory belongs to another run.

    Source: PSAQ-ViT, Li et al., ECCV 2022. docs/psaq-vit.md.

    Pitfall: the images show what the model has learned from its training images; they are not free of these.
    """
    deadline = time.monotonic() + time_limit
    chosen = check_synthesis(count, method, settings)
    if not memory > 0 or not time_limit >= 0:
        raise RecipeError(f"memory = {memory}, time_limit = {time_limit}: both are positive, in gigabytes and seconds")
    steps = Preprocessing() if preprocessing is None else Preprocessing.from_dict(preprocessing)
    about: dict[str, Any] = {
        "method": method,
        "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(chosen).items()},
        "seed": seed,
        "asked": count,
        "preprocessing": steps.to_dict(),
        "vitquant": __version__,
    }
    if isinstance(chosen, NoiseSettings):
        limits = _limits(steps)
        noise = [NOISES[method](steps.input_size, limits, generator_for(seed, f"image {n}")) for n in range(count)]
        return SyntheticImages(_pixels(torch.stack(noise), steps), about, steps)
    model = unwrapped(model)
    like = next(model.parameters())
    example = torch.randn(2, *steps.input_size, generator=torch.Generator().manual_seed(0)).to(like)
    captured = copy.deepcopy(CapturedModel(capture(model, example), steps.input_size)).requires_grad_(False)
    identity = float_digest(captured)
    captured = captured.to(chosen.dtype)
    classified = task_of(model, captured.outputs).name == "classification"
    logits = logits_among({name: name for name in captured.outputs}) if classified else None
    objective = Objective.of(captured, chosen, logits)
    classes = (class_count(captured.outputs) or 1) if classified else 1
    ranks = Ranks.of_this_process()
    with ExitStack() as held:
        kept = None
        if work is not None:
            run = {"model": identity, "synthesis": {**about, "vitquant": None}, "process": asdict(ranks)}
            own = Path(work) if ranks.count == 1 else Path(work) / f"process-{ranks.rank}"
            kept = held.enter_context(WorkDirectory.opened(own, run))
        numbers = ranks.part(count)
        sets = [numbers[first : first + _SET] for first in range(0, len(numbers), _SET)]
        at_once: int | None = None
        done: list[Optimized] = []
        for number, each in enumerate(sets):
            if done and (done[-1].stopped or time.monotonic() >= deadline):
                break
            draws = Draws.of(seed, each, steps.input_size, classes, chosen)
            if at_once is None:
                at_once = _fitting(bytes_of_one(objective, draws, like.device), memory)
            done.append(
                optimize(
                    objective,
                    draws,
                    _limits(steps, like.device),
                    at_once,
                    work=WorkState(kept, f"set-{number}"),
                    out_of_time=lambda: time.monotonic() >= deadline,
                    progress=_among(progress, number, len(sets), chosen.steps),
                )
            )
    return _gathered(ranks, done, about, chosen.steps, steps)


def _gathered(
    ranks: Ranks, done: list[Optimized], about: dict[str, Any], iterations: int, steps: Preprocessing
) -> SyntheticImages:
    """The images of all processes.

    Raises:
        SynthesisStoppedError: the loss of one of them was not finite.
    """
    pixels = [_pixels(each.images, steps) for each in done]
    every = ranks.gathered([(x, each.trace, each.stopped) for x, each in zip(pixels, done, strict=True)])
    made = [each for part in every for each in part]
    about["iterations"] = iterations
    about["losses"] = [{name: [row[n] for row in trace] for n, name in enumerate(_TRACED)} for _, trace, _ in made]
    found = SyntheticImages(torch.cat([pixels for pixels, _, _ in made]), about, steps)
    stopped = next((stopped for _, _, stopped in made if stopped), "")
    if stopped:
        raise SynthesisStoppedError(f"{stopped}: the images are those of the iteration before; lower the rate", found)
    return found


def check_synthesis(
    count: int, method: str, settings: Sequence[str] | Mapping[str, Any]
) -> PatchSimilaritySettings | NoiseSettings:
    """The settings of a synthesis, after all checks that need no model.

    Arguments:
        count, method, settings: see `synthesize`.

    Raises:
        RecipeError: there is no such method or setting, or a number is out of range.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
        raise RecipeError(f"{count} images: it is a whole number from 1 to {MOST:,}")
    if method not in SETTINGS:
        near = get_close_matches(str(method), SETTINGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they are: {', '.join(SETTINGS)}"
        raise RecipeError(f"synthesis {str(method)[:80]!r} is unknown; {hint}")
    kind = SETTINGS[method]
    values = dict(settings) if isinstance(settings, Mapping) else dict(map(_assigned, settings))
    check(values, Table({}, {name: of_type(hint) for name, hint in get_type_hints(kind).items()}), RecipeError, method)
    return kind(**values)


def _assigned(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"synthesis {text!r}: write KEY=VALUE, as in iterations=100")
    return key.strip(), parse_value(value, RecipeError)


def synthetic_directory() -> Directory:
    """The kind of directory that `SyntheticImages.save` writes, with a contact sheet or without one."""
    names = (ABOUT, SHEET, *map(name_of, range(MOST)))
    return Directory("set of synthetic images", dict.fromkeys(names), lambda path: (path / ABOUT).is_file())


def name_of(number: int) -> str:
    """The file name of an image."""
    return f"{number:04d}.png"


def _fitting(one: int, memory: float) -> int:
    """How many images are differentiated at a time.

    Raises:
        CalibrationError: not even one.
    """
    fit = int(memory * 1e9 // one)
    if fit < 1:
        raise CalibrationError(
            f"a gradient for one image takes {one / 1e9:.3g} GB, and {memory:.3g} GB are allowed; allow more memory"
        )
    return min(fit, _AT_ONCE)


def _among(progress: Progress, number: int, sets: int, steps: int) -> Progress:
    return lambda what, done, total: progress(what, number * steps + done, sets * steps)


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def _limits(steps: Preprocessing, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """What black and white are after normalization, (3, 1, 1) each."""
    mean, std = _channels(steps.mean).to(device), _channels(steps.std).to(device)
    return (0 - mean) / std, (1 - mean) / std


def _pixels(images: Tensor, steps: Preprocessing) -> Tensor:
    pixels = images.detach().cpu().float() * _channels(steps.std) + _channels(steps.mean)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)
