"""Folders of images as batches of tensors, with no more batches in memory than asked for."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitquant.errors import DataError
from vitquant.tasks.classes import ClassNames
from vitquant.tasks.decoding import decode, readable_endings
from vitquant.tasks.folders import Tree, classes_of_folders, left_out_text, refuse_parts, scan
from vitquant.tasks.labels_file import read_labels
from vitquant.tasks.preprocessing import Preprocessing


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


class Listing(list[Item]):
    """The images of a directory, with notes for the user on how they were found.

    Arguments:
        items: the images.
        notes: one line each.
    """

    def __init__(self, items: Iterable[Item], notes: Iterable[str] = ()) -> None:
        super().__init__(items)
        self.notes = tuple(notes)


def load_listing(directory: str | Path, classes: ClassNames | None = None) -> Listing:
    """List the images of a directory and their labels, without opening any.

    Three layouts: a `labels.csv` with the columns `file` and `class_index` (others are ignored); one folder per class,
    see `classes_of_folders`; or images alone, sorted by name, without labels.

    Arguments:
        classes: of the model. Without them, only images in folders whose name is a class index have a label.

    Raises:
        DataError: there is no such directory, there are no images, images are both beside and inside folders, the
            classes of folders are ambiguous, or a row is not valid.
    """
    root = _existing(directory)
    if os.path.lexists(root / "labels.csv"):
        if classes is not None and classes.by_file:
            raise DataError(f"{root} has a labels.csv, with class indices; --classes is for class folders")
        return _of_labels_file(root)
    tree = scan(root, readable_endings())
    labels, notes = classes_of_folders(tree, classes)
    return _of_tree(tree, labels, notes)


def load_unlabelled(directory: str | Path) -> Listing:
    """List the images of a directory whose labels do not matter, as for calibration.

    The layouts are those of `load_listing`. A `labels.csv` of another format is ignored with a note, and folders need
    not be classes.

    Raises:
        DataError: there is no such directory, there are no images, images are both beside and inside folders, or
            folders are splits of a data set (train, val).
    """
    root = _existing(directory)
    if not os.path.lexists(root / "labels.csv"):
        return _of_any_folders(root)
    try:
        return _of_labels_file(root)
    except DataError as problem:
        try:
            listing = _of_any_folders(root)
        except DataError:
            raise problem from None
        return Listing(listing, (f"{problem}; its images were looked for in the directory", *listing.notes))


def _existing(directory: str | Path) -> Path:
    root = Path(directory)
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such directory")
    return root


def _of_labels_file(root: Path) -> Listing:
    return Listing(Item(path, label) for path, label in read_labels(root / "labels.csv"))


def _of_any_folders(root: Path) -> Listing:
    tree = scan(root, readable_endings())
    refuse_parts(tree)
    return _of_tree(tree, dict.fromkeys(tree.folders), ())


def _of_tree(tree: Tree, labels: Mapping[str, int | None], notes: Iterable[str]) -> Listing:
    """The images in folders with their labels, or those directly in the directory."""
    labelled = [Item(path, label) for name, label in labels.items() for path in tree.folders[name]]
    left_out = left_out_text(tree.left_out)
    if tree.here and labelled:
        inside = labelled[0].path.parent.name
        raise DataError(f"{tree.root}: images both here and in folders ({inside}); move one kind away")
    if not tree.here and not labelled:
        there = f"; what is there: {left_out}" if left_out else ""
        endings = " ".join(sorted(readable_endings()))
        raise DataError(f"{tree.root}: no images ({endings}) and no labels.csv{there}")
    left = [f"{tree.left_out.total()} files of {tree.root} are not read as images: {left_out}"] if left_out else []
    return Listing([Item(path) for path in tree.here] or labelled, (*notes, *left))


def subset(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """The first `count` items after `random.Random(seed).shuffle`.

    Raises:
        DataError: there are fewer than `count` items, or `count` is below 1.
    """
    if not 1 <= count <= len(items):
        raise DataError(f"{count} images asked for, {len(items)} listed")
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def check_labels(items: Sequence[Item], num_classes: int) -> None:
    """Raise a DataError that names the first file whose label is missing or not below `num_classes`."""
    for item in items:
        if item.label is None:
            raise DataError(f"{item.path}: no label; evaluation needs a labels.csv or one folder per class")
        if not 0 <= item.label < num_classes:
            raise DataError(f"{item.path}: class index {item.label}, but the model has {num_classes} classes")


def fingerprint(items: Sequence[Item]) -> str:
    """The SHA-256 over the files' relative names and contents, in the given order, wherever the directory is.

    Raises:
        DataError: a file cannot be read.

    Pitfall: it does not include the labels.
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


class ImageDataset(Dataset[tuple[Tensor, int] | BadImage]):
    """Preprocessed images by index: `(tensor, label)`, with label -1 if there is none, or a `BadImage`."""

    def __init__(self, items: Sequence[Item], preprocessing: Preprocessing) -> None:
        self.items = list(items)
        self.preprocessing = preprocessing
        self.transform = preprocessing.transform()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | BadImage:
        item = self.items[index]
        try:
            image = decode(item.path, self.preprocessing.exif_orientation)
            self.preprocessing.check_size(*image.size)
        except MemoryError:
            raise
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, ...
            return BadImage(item.path, " ".join(str(error).split()) or type(error).__name__)
        return self.transform(image), -1 if item.label is None else item.label


class ImageBatches:
    """The batches that `batches()` returns, which can be iterated repeatedly; `skipped` collects unreadable images."""

    def __init__(
        self, items: Sequence[Item], preprocessing: Preprocessing, batch_size: int, workers: int, skip: bool
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch size {batch_size}: must be 1 or more")
        self.skipped: list[BadImage] = []
        self._skip = skip
        missing = [BadImage(item.path, reason) for item in items if (reason := _missing(item.path))]
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
            generator=torch.Generator(),  # else each epoch would draw from the global generator
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
        """The file of the image at `position` among those yielded so far, without the skipped ones."""
        skipped = {bad.path for bad in self.skipped}
        return [item.path for item in self.items if item.path not in skipped][position]

    def _refuse_or_skip(self, bad: list[BadImage], among: str) -> None:
        if bad and not self._skip:
            first = f"first: {bad[0].path}: {bad[0].reason}"
            raise DataError(f"{len(bad)} of {among} images cannot be read ({first}); --skip-bad-images leaves them out")
        known = {image.path for image in self.skipped}
        self.skipped += [image for image in bad if image.path not in known]


def _missing(path: Path) -> str | None:
    """Why a file cannot be an image, as far as that is known without reading it; None if it may be one."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:  # no permission, a name too long, a null byte in it
        return str(getattr(error, "strerror", None) or error)
    return None if stat.S_ISREG(status.st_mode) and status.st_size else "not a file with content"


def batches(
    items: Sequence[Item],
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int = 0,
    skip_bad_images: bool = False,
) -> ImageBatches:
    """Batches `(images, labels)` in the order of `items`, with one in memory at a time (two more per worker).

    Missing and empty files are found and counted here, before anything is decoded. Files that cannot be
    decoded are found when their batch is read, and counted up to that batch: to find them earlier,
    the whole set would have to be read twice.

    Arguments:
        workers: the number of processes that decode; 0 decodes in this process.
        skip_bad_images: skip images that cannot be read; `.skipped` lists them.

    Raises:
        DataError: images cannot be read, raised here or while iterating; or none can be.

    Pitfall: batches are shorter if images are skipped. Labels are -1 where there are none.
    """
    return ImageBatches(items, preprocessing, batch_size, workers, skip_bad_images)
