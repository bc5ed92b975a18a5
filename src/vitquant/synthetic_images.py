"""Images that are made from a model alone, to calibrate on where there are none."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from vitquant.autocast import in_own_precision
from vitquant.errors import CalibrationError, ExportError, ModelError, RecipeError
from vitquant.files import Directory, replacing, write_file
from vitquant.files.refusal import told_as
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
    PatchSimilaritySettings,
    images_at_once,
    optimize,
)
from vitquant.tasks.folders import ABOUT_SYNTHESIS, CONTACT_SHEET
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.tasks.task import task_of
from vitquant.unwrapping import unwrapped
from vitquant.version import __version__
from vitquant.work import WorkDirectory, WorkState
from vitquant.workers.ranks import ALONE, Ranks

USUAL = "psaq-vit-leaves"
METHODS: dict[str, PatchSimilaritySettings | NoiseSettings] = {
    "psaq-vit": PatchSimilaritySettings(),
    USUAL: PatchSimilaritySettings(iterations=50, warmup=10, start="dead-leaves"),
    **dict.fromkeys(NOISES, NoiseSettings()),
}
MOST = 10_000  # images
_SET = 32  # images that are optimized side by side; more are optimized in sets
_TRACED = ("entropy", "cross entropy", "distance of the total variation")  # the first parts of `Losses`


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
        begun = [each for each in self.about.get("losses", ()) if each[_TRACED[0]]]
        return {
            name: (mean(each[name][0] for each in begun), mean(each[name][-1] for each in begun))
            for name in (_TRACED if begun else ())
        }

    def batches(self, size: int = 32) -> list[Tensor]:
        """The images as the model takes them, float32 (size, 3, height, width), for `quantize`.

        Arguments:
            size: how many in a batch; the last may have fewer.
        """
        centre, scale = _channels(self.preprocessing.mean), _channels(self.preprocessing.std)
        return [(part.to(torch.float32) / 255 - centre) / scale for part in self.pixels.split(size)]

    def save(self, directory: str | Path, force: bool = False) -> None:
        """Write one PNG for each image, and `synthesis.json` with what they were made by.

        The preprocessing of the model gives back the same pixels: where it resizes an image and crops it, the files
        have a frame that it takes away.

        Arguments:
            directory: made when missing.
            force: replace a set of synthetic images that is there.

        Raises:
            DataError: Pillow is not installed.
            ExportError: the directory must not be replaced, or a file cannot be written.
        """
        with replacing(directory, force, synthetic_directory()) as new:
            self.write_into(new)

    def write_into(self, directory: Path) -> None:
        """Write the files of `save` into a directory that does not exist yet, or is empty.

        Raises:
            DataError, ExportError: see `save`.
        """
        with told_as(ExportError, f"{directory} cannot be written"):
            directory.mkdir(exist_ok=True)
            for number, pixels in enumerate(self.pixels):
                self.preprocessing.framed(pixels).save(directory / name_of(number))
        write_file(directory / ABOUT_SYNTHESIS, json.dumps(self.about, indent=1).encode())


class SynthesisStoppedError(CalibrationError):
    """The loss of a synthesis became NaN or infinite.

    Arguments:
        problem: when, and what to do.
        images: as they were in the iteration before.
    """

    def __init__(self, problem: str, images: SyntheticImages) -> None:
        super().__init__(problem)
        self.images = images


@torch.inference_mode(False)
@in_own_precision
def synthesize(
    model: nn.Module,
    count: int = 32,
    method: str = USUAL,
    *,
    settings: Sequence[str] | Mapping[str, Any] = (),
    preprocessing: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    memory: float = 4.0,
    time_limit: float = math.inf,
    work: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> SyntheticImages:
    """Make images for a model from the model alone; the model is not changed.

    Arguments:
        model: any module with attention that takes one batch of images.
        count: how many, at most 10,000.
        method: `psaq-vit-leaves`; `psaq-vit` as published, which takes ten times as long; or a baseline, one of
            `NOISES`.
        settings: of the method, see `PatchSimilaritySettings`: {"iterations": 100}, or ["iterations=100"].
        preprocessing: of the model, with the keys of timm's data configuration: the size of the images, and how pixels
            are normalized. The common one for ImageNet when None.
        seed: of all random draws. An image depends on the seed and its number, not on how many others there are.
        progress: called with the entropy and the loss, the iterations that are done, and their number.
        memory: gigabytes for what gradients need; the result depends on it by the rounding of sums only.
        time_limit: seconds, after which the images so far are the result.
        work: a directory in which the state is saved: after an interruption the same call continues there. It can be
            removed afterwards.
        ranks: divides the images among the processes of torch's default process group, all of which have to call this,
            and get all images: `Ranks.of_this_process()`.

    Raises:
        RecipeError: there is no such method or setting, or a number is out of range.
        ModelError: the model has no parameters, or no attention between patches.
        CalibrationError: torch cannot differentiate the model, or the memory is too small for one image.
        SynthesisStoppedError: a loss became NaN or infinite; the error holds the images of the iteration before.
        CheckpointError: the work directory belongs to another run.
        WorkerError: another process of the group was lost.

    Source: PSAQ-ViT, Li et al., ECCV 2022; what `psaq-vit-leaves` begins with is ours. docs/psaq-vit.md.

    Pitfall: the images show what the model has learned from its training images; they are not free of these.
    """
    deadline = time.monotonic() + time_limit
    chosen = check_synthesis(count, method, settings)
    if not 0 < memory < math.inf or not time_limit >= 0:
        raise RecipeError(f"memory = {memory}, time_limit = {time_limit}: gigabytes above 0, and seconds of 0 or more")
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
        noise = NOISES[method]
        images = (noise(steps.input_size, _limits(steps), generator_for(seed, f"image {n}")) for n in range(count))
        return SyntheticImages(torch.stack([_pixels(each, steps) for each in images]), about, steps)
    subject = _Subject.of(unwrapped(model), steps, chosen)
    done: list[_Made] = []
    with ExitStack() as held:
        kept = None
        if work is not None:
            run = {"model": subject.identity, "synthesis": {**about, "vitquant": None}, "process": asdict(ranks)}
            own = Path(work) if ranks.count == 1 else Path(work) / f"process-{ranks.rank}"
            kept = held.enter_context(WorkDirectory.opened(own, run))
        numbers = ranks.part(count)
        sets = [numbers[first : first + _SET] for first in range(0, len(numbers), _SET)]
        at_once: int | None = None
        for number, each in enumerate(sets):
            if done and (done[-1].stopped or time.monotonic() >= deadline):
                break
            draws = Draws.of(seed, each, steps.input_size, _limits(steps), subject.objective.classes, chosen)
            if at_once is None:
                at_once = images_at_once(subject.objective, draws, memory)
            found = optimize(
                subject.objective,
                draws,
                _limits(steps, subject.device),
                at_once,
                work=WorkState(kept, f"set-{number}"),
                out_of_time=lambda: time.monotonic() >= deadline,
                progress=_among(progress, number, len(sets), chosen.steps),
            )
            done.append(_Made(_pixels(found.images, steps), found.trace, found.stopped))
    made = [each for part in ranks.gathered(done) for each in part]
    about["iterations"] = chosen.steps
    about["losses"] = [{name: [row[n] for row in each.trace] for n, name in enumerate(_TRACED)} for each in made]
    result = SyntheticImages(torch.cat([each.pixels for each in made]), about, steps)
    stopped = next((each.stopped for each in made if each.stopped), "")
    if stopped:
        raise SynthesisStoppedError(f"{stopped}; lower the rate", result)
    return result


class _Made(NamedTuple):
    """A set of images: their pixels, the parts of their loss in every iteration, and why they ended early."""

    pixels: Tensor
    trace: list[list[float]]
    stopped: str


@dataclass(frozen=True)
class _Subject:
    """A model that images are made for.

    Arguments:
        objective: of the images.
        device: of the model.
        identity: the digest of its weights and graph.
    """

    objective: Objective
    device: torch.device
    identity: str

    @classmethod
    def of(cls, model: nn.Module, steps: Preprocessing, settings: PatchSimilaritySettings) -> _Subject:
        like = next((each for each in model.parameters() if each.is_floating_point()), None)
        if like is None:
            raise ModelError("the model has no parameters, and nothing to learn images from; noise needs none")
        example = torch.randn(2, *steps.input_size, generator=torch.Generator().manual_seed(0)).to(like)
        captured = copy.deepcopy(CapturedModel(capture(model, example), steps.input_size)).requires_grad_(False)
        logits = task_of(model, captured.outputs).logits(captured.outputs)
        identity = float_digest(captured)
        return cls(Objective.of(captured.to(settings.dtype), settings, logits), like.device, identity)


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
    if method not in METHODS:
        near = get_close_matches(str(method), METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they are: {', '.join(METHODS)}"
        raise RecipeError(f"synthesis {str(method)[:80]!r} is unknown; {hint}")
    usual = METHODS[method]
    values = dict(settings) if isinstance(settings, Mapping) else dict(map(_assigned, settings))
    known = {name: of_type(hint) for name, hint in get_type_hints(type(usual)).items()}
    check(values, Table({}, known), RecipeError, method)
    return replace(usual, **values)


def _assigned(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"synthesis {text!r}: write KEY=VALUE, as in iterations=100")
    return key.strip(), parse_value(value, RecipeError)


def synthetic_directory() -> Directory:
    """The kind of directory that `SyntheticImages.save` writes, with a contact sheet or without one."""
    names = (ABOUT_SYNTHESIS, CONTACT_SHEET, *map(name_of, range(MOST)))
    return Directory("set of synthetic images", dict.fromkeys(names), lambda path: (path / ABOUT_SYNTHESIS).is_file())


def name_of(number: int) -> str:
    """The file name of an image."""
    return f"{number:04d}.png"


def _among(progress: Progress, number: int, sets: int, steps: int) -> Progress:
    return lambda what, done, total: progress(what, number * steps + done, sets * steps)


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def _limits(steps: Preprocessing, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """What black and white are after normalization, (3, 1, 1) each."""
    centre, scale = _channels(steps.mean).to(device), _channels(steps.std).to(device)
    return (0 - centre) / scale, (1 - centre) / scale


def _pixels(images: Tensor, steps: Preprocessing) -> Tensor:
    pixels = images.detach().cpu().float() * _channels(steps.std) + _channels(steps.mean)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)
