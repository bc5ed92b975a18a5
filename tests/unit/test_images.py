import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vitquant.errors import DataError
from vitquant.tasks.classes import ClassNames
from vitquant.tasks.images import Item, batches, check_labels, fingerprint, load_listing, subset
from vitquant.tasks.preprocessing import Preprocessing

SMALL = Preprocessing((3, 8, 8), crop_pct=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def save(path, level=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(level).integers(0, 2, (40, 40, 3), dtype=np.uint8) + np.uint8(level)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def five(tmp_path):
    """Five readable images, the level of each five times its position."""
    return [Item(save(tmp_path / f"{i}.png", 5 * i), i) for i in range(5)]


def truncate(path):
    path.write_bytes(path.read_bytes()[:600])


def test_a_labels_file_gives_files_in_its_order_and_ignores_other_columns(tmp_path):
    (tmp_path / "labels.csv").write_text(
        "\ufefffile,author,class_index\nb/two.jpg,x,7\none.jpg,y,0\n", encoding="utf-8"
    )
    assert load_listing(tmp_path) == [Item(tmp_path / "b/two.jpg", 7), Item(tmp_path / "one.jpg", 0)]


def test_class_folders_are_numbered_as_torchvision_does(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("cat/2.JPG", "cat/1.png", "Bird/9.jpeg", "cat/deeper/0.png", "dog/4.webp"):
        save(tmp_path / name)
    expected = ImageFolder(str(tmp_path)).samples
    listing = load_listing(tmp_path, ClassNames(3))
    assert sorted((str(item.path), item.label) for item in listing) == sorted(expected)
    assert listing.notes == (
        "folders are classes 0 to 2 by their sorted names, Bird to dog; --classes FILE says otherwise",
    )
    assert [item.label for item in load_listing(tmp_path)] == [None] * 5  # the model's classes are not known


def test_images_alone_are_listed_by_name_without_labels(tmp_path):
    for name in ("b.png", "a.jpg", ".hidden.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert load_listing(tmp_path) == [Item(tmp_path / "a.jpg"), Item(tmp_path / "b.png")]


def test_directories_without_a_meaning_are_refused(tmp_path):
    with pytest.raises(DataError, match="absent: no such directory"):
        load_listing(tmp_path / "absent")
    with pytest.raises(DataError, match="no images"):
        load_listing(tmp_path)
    save(tmp_path / "a.png")
    save(tmp_path / "class" / "b.png")
    with pytest.raises(DataError, match=r"both here and in folders \(class\)"):
        load_listing(tmp_path)


def test_the_subset_is_the_references(shared):
    items = load_listing(shared / "images" / "photos_calibration")
    reference = json.loads((shared / "reference" / "calibration_files.json").read_text())
    assert [item.path.name for item in subset(items, 32, seed=0)] == reference["files32"]


def test_the_subset_shuffles_rows_by_the_seed_and_leaves_the_listing_alone(five):
    rows = list(range(5))
    random.Random(3).shuffle(rows)
    assert subset(five, 3, seed=3) == [five[row] for row in rows[:3]]
    assert [item.label for item in five] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, -1, 6])
def test_a_subset_of_more_or_none_is_refused(five, count):
    with pytest.raises(DataError, match=f"{count} images asked for, 5 listed"):
        subset(five, count, seed=0)


def test_labels_are_checked_and_the_first_file_is_named(five):
    check_labels(five, 5)
    with pytest.raises(DataError, match=r"3\.png: class index 3, but the model has 3 classes"):
        check_labels(five, 3)
    with pytest.raises(DataError, match=r"0\.png: no label"):
        check_labels([Item(five[0].path), *five], 5)


def test_the_fingerprint_moves_with_names_contents_and_order_but_not_with_the_place(five, tmp_path):
    first = fingerprint(five)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copies = [Item(moved / item.path.name) for item in five]
    for item in five:
        shutil.copy(item.path, moved)
    assert fingerprint(copies) == first
    assert fingerprint(five[::-1]) != first
    assert fingerprint(five[:4]) != first
    renamed = copies[2].path.rename(moved / "2b.png")
    assert fingerprint([*copies[:2], Item(renamed), *copies[3:]]) != first
    save(five[2].path, 77)
    assert fingerprint(five) != first
    five[1].path.unlink()
    with pytest.raises(DataError, match=r"1\.png"):
        fingerprint(five)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_in_order_with_labels_and_again(five, workers):
    stream = batches(five, SMALL, batch_size=2, workers=workers)
    for _ in range(2):
        got = list(stream)
        assert [labels.tolist() for _, labels in got] == [[0, 1], [2, 3], [4]]
        levels = torch.cat([images for images, _ in got]).mul(255).amin((1, 2, 3)).round().int()
        assert levels.tolist() == pytest.approx([0, 5, 10, 15, 20], abs=1)
    assert got[0][0].shape == (2, 3, 8, 8)
    assert got[0][0].dtype == torch.float32
    assert len(stream) == 3


def test_any_image_mode_becomes_three_colours_and_no_label_minus_one(tmp_path):
    items = [Item(save(tmp_path / f"{mode}.png", 3, mode)) for mode in ("L", "RGBA", "P", "1", "LA")]
    [(images, labels)] = batches(items, SMALL, batch_size=5)
    assert images.shape == (5, 3, 8, 8)
    assert labels.tolist() == [-1] * 5


def test_reading_leaves_the_global_generator_alone(five):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(batches(five, SMALL, batch_size=2))
    assert torch.rand(1) == expected


def test_one_batch_at_a_time_is_read(five, monkeypatch):
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **_: opened.append(path) or original(path))
    stream = iter(batches(five, SMALL, batch_size=2))
    assert not opened
    next(stream)
    assert len(opened) == 2


def test_missing_and_empty_files_are_counted_before_anything_is_read(five, tmp_path):
    five[3].path.unlink()
    five[4].path.write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 5 images .*first: .*3\.png: no such file\); --skip-bad-images"):
        batches(five, SMALL, batch_size=2)
    stream = batches(five, SMALL, batch_size=2, skip_bad_images=True)
    assert [bad.path.name for bad in stream.skipped] == ["3.png", "4.png"]
    assert [labels.tolist() for _, labels in stream] == [[0, 1], [2]]


def test_images_that_do_not_decode_are_counted_up_to_their_batch(five):
    truncate(five[2].path)
    five[3].path.write_text("not an image")
    stream = iter(batches(five, SMALL, batch_size=2))
    next(stream)
    with pytest.raises(DataError, match=r"2 of the first 4 images .*first: .*2\.png: .+\); --skip-bad-images"):
        next(stream)


@pytest.mark.parametrize(
    ("crop_mode", "said"), [("border", "0 x 8, nothing is left"), ("center", "takes more than 100000 pixels")]
)
@pytest.mark.parametrize("turned", [False, True])
def test_images_too_narrow_to_resize_are_bad_images(five, crop_mode, said, turned, monkeypatch):
    monkeypatch.setattr("vitquant.tasks.preprocessing.LARGEST_RESIZED", 100_000)
    steps = replace(SMALL, crop_mode=crop_mode)
    size, said = ((30_000, 1), said.replace("0 x 8", "8 x 0")) if turned else ((1, 30_000), said)
    Image.new("RGB", size).save(five[1].path)
    with pytest.raises(DataError, match=rf"1 of .* images cannot be read .*1\.png: {size[0]} x {size[1]} .*{said}"):
        list(batches(five, steps, batch_size=5))
    data = batches(five, steps, batch_size=5, skip_bad_images=True)
    assert [labels.tolist() for _, labels in data] == [[0, 2, 3, 4]]
    assert [bad.path.name for bad in data.skipped] == ["1.png"]


def test_images_left_out_are_named_once_and_the_others_keep_their_labels(five):
    truncate(five[1].path)
    five[3].path.write_text("not an image")
    stream = batches(five, SMALL, batch_size=2, skip_bad_images=True)
    for _ in range(2):
        assert [labels.tolist() for _, labels in stream] == [[0], [2], [4]]
    assert [bad.path.name for bad in stream.skipped] == ["1.png", "3.png"]
    assert all(bad.reason for bad in stream.skipped)
    assert stream.path(1).name == "2.png"


def test_no_images_at_all_is_an_error_even_when_skipping(five):
    with pytest.raises(DataError, match="no images"):
        batches([], SMALL, batch_size=2)
    for item in five:
        item.path.write_text("not an image")
    with pytest.raises(DataError, match="none of 5"):
        list(batches(five, SMALL, batch_size=2, skip_bad_images=True))
    for item in five:
        item.path.unlink()
    with pytest.raises(DataError, match="none of 5"):
        batches(five, SMALL, batch_size=2, skip_bad_images=True)


def test_a_batch_of_none_is_refused(five):
    with pytest.raises(DataError, match="batch size 0"):
        batches(five, SMALL, batch_size=0)
