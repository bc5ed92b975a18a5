"""Class folders: finding them, and the class of each."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitquant.errors import DataError
from vitquant.tasks.classes import ClassNames

# Left by operating systems and file servers; hidden names (.DS_Store, ._photo.jpg, .@__thumb) are skipped anyway.
_SYSTEM_FOLDERS = frozenset(
    (
        *("__macosx", "__pycache__", "network trash folder", "temporary items"),
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found"),
    )
)
_SYSTEM_FILES = frozenset(["thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"])
ABOUT_SYNTHESIS, CONTACT_SHEET = "synthesis.json", "contact-sheet.png"  # beside images that vitquant makes
_SPLIT = re.compile(
    r"(?P<of>.*[-_ ])?"
    r"(?P<part>train|trn|trainval|val|valid|validation|test|tst|eval|evaluation|dev|holdout)(ing)?"
    r"([-_ ]?(set|data|images?|imgs?|\d+))*",
    re.IGNORECASE,
)
_MAP = "give --classes FILE, with lines of folder,class_index"


@dataclass(frozen=True)
class Tree:
    """The images of a directory and of the folders in it, and its other files.

    Arguments:
        root: the directory.
        here: the images directly in it.
        folders: for each visible folder, sorted by name, its images at any depth.
        nested: the folders whose images are all in subfolders.
        left_out: the number of files that are not images by their extension, "" for files without one.
    """

    root: Path
    here: list[Path]
    folders: Mapping[str, list[Path]]
    nested: Collection[str]
    left_out: Counter[str]


def scan(root: Path, endings: Collection[str]) -> Tree:
    """List a directory without opening a file; a link to a directory above or already visited is not followed.

    Arguments:
        endings: the extensions of image files.

    Raises:
        DataError: a directory cannot be read.
    """
    left_out: Counter[str] = Counter()
    above = [root.resolve(), *root.resolve().parents]
    names, files = _visible(root)
    here = list(_images(root, files, endings, left_out))
    folders: dict[str, list[Path]] = {}
    nested = set()
    for name in names:
        found = [
            path for folder, inside in _walk(root / name, above) for path in _images(folder, inside, endings, left_out)
        ]
        # in a reproducible order, on which a random subset of the listing depends: by folder, then by name
        folders[name] = sorted(found, key=lambda path: (str(path.parent), path.name))
        if found and all(path.parent != root / name for path in found):
            nested.add(name)
    return Tree(root, here, folders, nested, left_out)


def classes_of_folders(tree: Tree, classes: ClassNames | None) -> tuple[dict[str, int | None], list[str]]:
    """The class of every folder that has images, and notes for the user.

    Names that are numbers are class indices. Other names are looked up if the names of the model's classes are known.
    If they are not, and there are as many folders as classes, folders are numbered by their sorted names, as in
    torchvision's ImageFolder, unless they may be the splits of a data set that contain the class folders.

    Arguments:
        classes: of the model; None if not known, and then folders whose names are not numbers have no class.

    Raises:
        DataError: the folders are splits of a data set (train, val), or their classes are ambiguous.
    """
    known = classes if classes is not None and classes.names else None
    if parts := _parts(tree, known):
        raise DataError(f"{_not_classes(tree, parts)}; where they are classes, --classes FILE says so")
    full = [name for name, images in tree.folders.items() if images]
    empty = [name for name, images in tree.folders.items() if not images]
    try:
        if known is not None and known.by_file:
            return _looked_up(full, known), _without_image(empty)
        if all(map(_is_number, full)):
            return _numbered(full, classes), _without_image(empty)
        if classes is None:
            return dict.fromkeys(full), []
        _refuse_holders(tree, known)
        if known is not None:
            return _looked_up(full, known), _without_image(empty)
        return _sorted_names(full, empty, classes.count)
    except DataError as error:
        raise DataError(f"{tree.root}: {error}") from error


def refuse_parts(tree: Tree) -> None:
    """Refuse folders that are splits of a data set, for images whose classes do not matter.

    Raises:
        DataError: folders are splits of a data set (train, val). A single one of two is not: `valid` beside `invalid`.
    """
    parts = _parts(tree, None)
    if parts and (len(parts) > 1 or len(tree.folders) != 2 or parts[0] in tree.nested):
        raise DataError(_not_classes(tree, parts))


def left_out_text(left_out: Counter[str]) -> str:
    """A text with the number of files of each extension that were not read."""
    by_count = sorted(left_out.items(), key=lambda each: (-each[1], each[0]))
    shown = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in by_count[:8])
    return shown + (", ..." if len(by_count) > 8 else "")


def _numbered(names: list[str], classes: ClassNames | None) -> dict[str, int | None]:
    numbers: dict[int, str] = {}
    for name in names:
        if int(name) in numbers and classes is not None:
            raise DataError(f"folders {numbers[int(name)]} and {name} are both class {int(name)}; {_MAP}")
        numbers[int(name)] = name
        by_name = classes.index(name) if classes is not None else None
        if by_name not in (None, int(name)):
            raise DataError(f"folder {name} is a class index, and the name of class {by_name}; {_MAP}")
        if classes is not None and int(name) >= classes.count:
            raise DataError(
                f"folder {name} is no class index: the model has {classes.count} classes, from 0; "
                f"where folders count from 1, {_MAP}"
            )
    return {name: int(name) for name in names}


def _looked_up(names: list[str], classes: ClassNames) -> dict[str, int | None]:
    try:
        found = {name: classes.index(name) for name in names}
    except DataError as error:
        raise DataError(f"folder {error}; {_MAP}") from error
    if unknown := [name for name, index in found.items() if index is None]:
        others = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        what = "not in" if classes.by_file else f"no class index, and none of the {classes.count} names of"
        raise DataError(f"folder {unknown[0]!r}{others} is {what} {classes.origin}; {_MAP}")
    return found


def _sorted_names(full: list[str], empty: list[str], count: int) -> tuple[dict[str, int | None], list[str]]:
    names = sorted([*full, *empty])
    if len(names) != count:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(
            f"{len(names)} class folders ({shown}), but the model has {count} classes, "
            f"and nothing says which these are; {_MAP}"
        )
    if empty:
        raise DataError(f"no image in folder {empty[0]!r}, and nothing says whether it is a class; {_MAP}")
    if names != sorted(names, key=_by_value):
        raise DataError(f"folders such as {names[0]!r} sort by text in one order, by number in another; {_MAP}")
    found: dict[str, int | None] = {name: index for index, name in enumerate(names)}
    if all(re.findall(r"[0-9]+", name) == [str(index)] for name, index in found.items()):  # class_0, class_1, ...
        return found, []
    note = f"folders are classes 0 to {count - 1} by their sorted names, {names[0]} to {names[-1]}"
    return found, [f"{note}; --classes FILE says otherwise"]


def _without_image(empty: list[str]) -> list[str]:
    shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
    return [f"no image in {len(empty)} of the folders: {shown}"] if empty else []


def _parts(tree: Tree, known: ClassNames | None) -> list[str]:
    """Folders that are splits such as `train` and `val`, unless these are names of classes: CIFAR-100 has trains."""
    found = {
        name: match
        for name, images in tree.folders.items()
        if images and (match := _SPLIT.fullmatch(name)) and (known is None or not known.has(name))
    }
    kinds = {match["part"].lower() for match in found.values()}
    # `bullet_train` alone is a class, `set1_train` beside `set1_val` is a split
    parts = [name for name, match in found.items() if not match["of"] or len(kinds) > 1]
    others = [name for name, images in tree.folders.items() if images and name not in parts]
    # a single `train` beside folders with names and not numbers is a class, the vehicle
    named = known is None and bool(others) and not any(map(_is_number, others))
    alone = len(parts) == 1 and parts[0].lower() == "train" and parts[0] not in tree.nested
    return [] if alone and named else parts


def _refuse_holders(tree: Tree, known: ClassNames | None) -> None:
    """Refuse folders that may contain class folders, such as fold1 and fold2; a single subfolder `images` is fine."""
    several = [name for name in sorted(tree.nested) if len({path.parent for path in tree.folders[name]}) > 1]
    if holders := [name for name in several if known is None or not known.has(name)]:
        shown = " and ".join(holders[:5]) + (", ..." if len(holders) > 5 else "")
        raise DataError(
            f"{shown} hold folders of images: where those are the classes, give {tree.root / holders[0]}; "
            f"where these are, {_MAP}"
        )


def _not_classes(tree: Tree, parts: list[str]) -> str:
    where = " or ".join(str(tree.root / name) for name in parts)
    return f"{tree.root} holds {' and '.join(parts)}, parts of a data set rather than classes: give {where}"


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= 9  # a longer one is a date, or a name


def _by_value(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts `class_2` before `class_10`."""
    parts = re.split(r"([0-9]+)", name)
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts if part]


def _walk(folder: Path, above: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    """A folder and every folder below it, each once, with the names of its files."""
    seen = {(status.st_dev, status.st_ino) for status in (path.stat() for path in above)}
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:  # reached by a link
            continue
        seen.add((status.st_dev, status.st_ino))
        names, files = _visible(folder)
        waiting += [folder / name for name in names]
        yield folder, files


def _visible(folder: Path) -> tuple[list[str], list[str]]:
    """The names of folders and of files in a folder, sorted, without hidden ones and those that are no one's images.

    These are system files, and beside images that were made what says how.
    """
    names, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (names if _is_directory(entry) else files).append(entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    if ABOUT_SYNTHESIS in files:
        files = [name for name in files if name not in (ABOUT_SYNTHESIS, CONTACT_SHEET)]
    return (
        sorted(name for name in names if name.lower() not in _SYSTEM_FOLDERS),
        sorted(name for name in files if name.lower() not in _SYSTEM_FILES),
    )


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _images(folder: Path, files: Iterable[str], endings: Collection[str], left_out: Counter[str]) -> Iterator[Path]:
    """The files that are images by their extension; the extensions of other files are counted in `left_out`."""
    for name in files:
        ending = Path(name).suffix.lower()
        if ending in endings:
            yield folder / name
        else:
            left_out[ending] += 1
