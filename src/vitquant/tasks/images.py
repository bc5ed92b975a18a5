"""Folders of images as batches of tensors, never more of them in memory than asked for."""

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
    """The images of a directory, and what a user should know of how they were found.

    Arguments:
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
        classes: the model's. Without them a class folder is one when its name is a class index; images in other
            folders have no label.

    Raises:
        DataError: no such directory, no images, images both beside and inside folders, folders whose classes cannot be
            told for certain, or a bad row.
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
    """List the images of a directory whose labels do not matter, as to calibrate on them.

    The layouts are those of `load_listing`. A `labels.csv` that is none of ours is passed over with a note, and folders
    need not be classes.

    Raises:
        DataError: no such directory, no images, images both beside and inside folders, or folders that are parts of a
            data set (train, val).
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
    """The images of folders with their labels, or those beside them."""
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


class ImageDataset(Dataset[tuple[Tensor, int] | BadImage]):
    """Preprocessed images by index: `(tensor, label)` with label -1 for none, or a `BadImage`."""

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
    """The batches of `batches()`, as often as iterated; `skipped` grows while images are left out."""

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


def _missing(path: Path) -> str | None:
    """Why a file cannot hold an image, as far as can be told without reading it."""
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
