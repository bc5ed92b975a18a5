"""Folders of images as batches of tensors, never more of them in memory than asked for."""

from __future__ import annotations

import csv
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitquant.errors import DataError
from vitquant.tasks.preprocessing import Preprocessing

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass(frozen=True)
class Item:
    """One image file and its class index, or None without a label."""

    path: Path
    label: int | None = None


@dataclass(frozen=True)
class BadImage:
    """One image file that cannot be read, and why."""

    path: Path
    reason: str


def load_listing(directory: str | Path) -> list[Item]:
    """List the images of a directory, without opening any.

    Three layouts: a `labels.csv` with the columns `file` and `class_index` (others are ignored); one
    folder per class, whose sorted names are the indices, as torchvision has it; or images alone,
    sorted by name, without labels.

    Raises:
        DataError: no such directory, no images, images both beside and inside folders, or a bad row.

    Pitfall: with class folders, a class that is missing on disk shifts the indices after it.
    """
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"{root}: no such directory")
    if (root / "labels.csv").exists():
        return _read_labels(root / "labels.csv")
    flat = [Item(path) for path in _images_in(root)]
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    labelled = [
        Item(path, label)
        for label, folder in enumerate(folders)
        for parent, _, _ in sorted(os.walk(folder, followlinks=True))
        for path in _images_in(Path(parent))
    ]
    if flat and labelled:
        raise DataError(f"{root}: images both here and in folders ({labelled[0].path.parent.name}); move one kind away")
    if not flat and not labelled:
        raise DataError(f"{root}: no images ({' '.join(EXTENSIONS)}) and no labels.csv")
    return flat or labelled


def _images_in(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))


def _read_labels(path: Path) -> list[Item]:
    items = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := {"file", "class_index"} - set(rows.fieldnames or ()):
                raise DataError(f"{path}: no column {' or '.join(sorted(missing))}")
            for row in rows:
                label = (row["class_index"] or "").strip()
                if not row["file"] or not label.isascii() or not label.isdigit():
                    raise DataError(f"{path}, line {rows.line_num}: needs a file and a class_index of 0 or more")
                items.append(Item(path.parent / row["file"], int(label)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not items:
        raise DataError(f"{path}: no rows")
    return items


def subset(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """The first `count` items after `random.Random(seed).shuffle`.

    Raises:
        DataError: fewer than `count` items, or `count` below 1.
    """
    if not 1 <= count <= len(items):
        raise DataError(f"{count} images asked for, {len(items)} listed")
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def check_labels(items: Sequence[Item], num_classes: int) -> None:
    """Raise DataError, naming the first file, where a label is absent or not below `num_classes`."""
    for item in items:
        if item.label is None:
            raise DataError(f"{item.path}: no label; evaluation needs a labels.csv or one folder per class")
        if not 0 <= item.label < num_classes:
            raise DataError(f"{item.path}: class index {item.label}, but the model has {num_classes} classes")


def fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 over the files' names and contents, in the order given; it does not move with the directory.

    Raises:
        DataError: a file cannot be read.

    Pitfall: labels are no part of it.
    """
    if not items:
        raise DataError("no images to fingerprint")
    root = os.path.commonpath([item.path.parent for item in items])
    digest = hashlib.sha256()
    for item in items:
        try:
            with item.path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise DataError(f"{item.path}: cannot be read: {error.strerror}") from error
        digest.update(Path(os.path.relpath(item.path, root)).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()


class ImageDataset(Dataset):
    """Preprocessed images by index: `(tensor, label)` with label -1 for none, or a `BadImage`."""

    def __init__(self, items: Sequence[Item], preprocessing: Preprocessing) -> None:
        self.items = list(items)
        self.transform = preprocessing.transform()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | BadImage:
        from PIL import Image

        item = self.items[index]
        try:
            with Image.open(item.path) as file:
                image = file.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, ...
            return BadImage(item.path, " ".join(str(error).split()) or type(error).__name__)
        return self.transform(image), -1 if item.label is None else item.label


class ImageBatches:
    """The batches of `batches()`, as often as iterated; `skipped` grows while images are left out."""

    def __init__(
        self, items: Sequence[Item], preprocessing: Preprocessing, batch_size: int, workers: int, skip: bool
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch size {batch_size}: must be 1 or more")
        self.skipped: list[BadImage] = []
        self._skip = skip
        missing = [
            BadImage(item.path, "no such file" if not item.path.exists() else "not a file with content")
            for item in items
            if not item.path.is_file() or not item.path.stat().st_size
        ]
        self._refuse_or_skip(missing, str(len(items)))
        absent = {bad.path for bad in missing}
        self.items = [item for item in items if item.path not in absent]
        if not self.items:
            raise DataError("no images" if not items else f"none of {len(items)} images can be read")
        self._loader = DataLoader(
            ImageDataset(self.items, preprocessing),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),  # or each epoch would draw from the global one
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        read = good = 0
        for samples in self._loader:
            read += len(samples)
            self._refuse_or_skip([s for s in samples if isinstance(s, BadImage)], f"the first {read}")
            samples = [s for s in samples if not isinstance(s, BadImage)]
            good += len(samples)
            if samples:
                images, labels = zip(*samples, strict=True)
                yield torch.stack(images), torch.tensor(labels)
        if not good:
            raise DataError(f"none of {read} images can be read")

    def path(self, position: int) -> Path:
        """The file of the image at `position` among those given so far, not counting those left out."""
        skipped = {bad.path for bad in self.skipped}
        return [item.path for item in self.items if item.path not in skipped][position]

    def _refuse_or_skip(self, bad: list[BadImage], among: str) -> None:
        if bad and not self._skip:
            first = f"first: {bad[0].path}: {bad[0].reason}"
            raise DataError(f"{len(bad)} of {among} images cannot be read ({first}); --skip-bad-images leaves them out")
        known = {image.path for image in self.skipped}
        self.skipped += [image for image in bad if image.path not in known]


def batches(
    items: Sequence[Item],
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int = 0,
    skip_bad_images: bool = False,
) -> ImageBatches:
    """Batches `(images, labels)` in the order of `items`, one held at a time (two more per worker).

    Missing and empty files are found and counted here, before anything is decoded. Files that do not
    decode are found when their batch is read, and counted up to that batch: to know them earlier,
    the whole set would be read twice.

    Arguments:
        workers: processes that decode; 0 decodes in this one.
        skip_bad_images: leave out what cannot be read; `.skipped` lists it.

    Raises:
        DataError: images that cannot be read, at once or while iterating; or none that can.

    Pitfall: batches are shorter where images are left out. Labels are -1 where there are none.
    """
    return ImageBatches(items, preprocessing, batch_size, workers, skip_bad_images)
