"""Which class a folder is: by its number, by its name where names are known, by a file, or not at all."""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitquant.errors import DataError, ModelError
from vitquant.tasks.classes import ClassNames, refuse_features
from vitquant.tasks.classes_file import read_classes
from vitquant.tasks.images import load_listing, load_unlabelled
from vitquant.zoo import ModelSource, architecture, class_names

FEW = settings(max_examples=30, deadline=None)

ANIMALS = ClassNames(
    4, {0: ("n01440764", "tench, Tinca tinca"), 1: ("crane",), 2: ("crane",), 3: ("São Bernardo",)}, "x"
)


def make(root, *files):
    """Files without content: nothing is opened to list them."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def folder(root, name, images=1):
    (root / name).mkdir(parents=True)
    return make(root, *(f"{name}/{i}.png" for i in range(images)))


def labels(root, classes=None):
    """The label of every folder with images."""
    return {str(item.path.relative_to(root).parts[0]): item.label for item in load_listing(root, classes)}


def is_refused(root, classes, said):
    with pytest.raises(DataError, match=said) as caught:
        load_listing(root, classes)
    assert "\n" not in str(caught.value)


@FEW
@given(st.sets(st.integers(0, 1999), min_size=1, max_size=30), st.sampled_from([0, 4]))
def test_numbers_are_indices_whichever_are_there(tmp_path_factory, indices, digits):
    root = tmp_path_factory.mktemp("numbers")
    for index in indices:
        folder(root, str(index).zfill(digits))
    for classes in (None, ClassNames(2000), ClassNames(2000, {0: ("tench",)}, "x")):
        assert {name: int(name) for name in (path.name for path in root.iterdir())} == labels(root, classes)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["1", "10"], "folder 10 is no class index: the model has 10 classes.*count from 1"),
        (["1", "01"], "are both class 1"),
        (["1", "cat"], "nothing says which"),
        (["-1", "2"], "nothing says which"),
        (["٣", "2"], "nothing says which"),
        (["9" * 200], "nothing says which"),
        (["cat", "dog"], r"2 class folders \(cat, dog\), but the model has 10 classes.*--classes FILE"),
    ],
)
def test_numbers_that_are_no_indices_and_names_that_nobody_knows_ask_for_a_mapping(tmp_path, names, said):
    for name in names:
        folder(tmp_path, name)
    is_refused(tmp_path, ClassNames(10), said)
    assert len(load_unlabelled(tmp_path)) == len(names)  # to calibrate on


def test_a_number_that_is_the_name_of_another_class_asks_for_a_mapping(tmp_path):
    folder(tmp_path, "1")
    is_refused(
        tmp_path, ClassNames(2, {0: ("1",), 1: ("2",)}, "x"), "folder 1 is a class index, and the name of class 0"
    )
    assert labels(tmp_path, ClassNames(2, {0: ("0",), 1: ("1",)}, "x")) == {"1": 1}


def test_sorted_names_that_hold_numbers_are_taken_in_one_order_only(tmp_path):
    for index in range(9, 11):
        folder(tmp_path, f"class_{index:03}")
    assert labels(tmp_path, ClassNames(2)) == {"class_009": 0, "class_010": 1}
    for index in range(9, 11):
        folder(tmp_path, f"class_{index}")
    is_refused(tmp_path, ClassNames(4), "by text in one order, by number in another; give --classes FILE")


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("n01440764", 0),
        ("n01440764_tench", 0),
        ("n01440764 tench", 0),
        ("tench", 0),
        ("Tench", 0),
        ("tench, Tinca tinca", 0),
        ("tinca_tinca", 0),
        ("Sa\u0303o-bernardo", 3),  # as macOS writes it
        ("n014407640", None),
        ("trench", None),
    ],
)
def test_names_are_looked_up_without_regard_to_case_and_punctuation(tmp_path, name, index):
    folder(tmp_path, name)
    if index is None:
        is_refused(tmp_path, ANIMALS, f"folder '{name}' is no class index, and none of the 4 names of x")
    else:
        assert labels(tmp_path, ANIMALS) == {name: index}


def test_sorted_names_are_noted_unless_they_say_their_index(tmp_path):
    for name in ("class_0", "class_1"):
        folder(tmp_path, name)
    assert not load_listing(tmp_path, ClassNames(2)).notes
    (tmp_path / "class_0").rename(tmp_path / "class_2")
    assert "by their sorted names, class_1 to class_2" in load_listing(tmp_path, ClassNames(2)).notes[0]


def test_the_name_of_two_classes_asks_for_a_mapping(tmp_path):
    folder(tmp_path, "crane")
    is_refused(tmp_path, ANIMALS, "folder 'crane' is the name of classes 1 and 2 in x; give --classes FILE")


def test_a_first_name_comes_before_another_class_synonym():
    names = ClassNames(2, {0: ("skunk, polecat",), 1: ("polecat, fitch",)}, "x")
    assert (names.index("polecat"), names.index("skunk"), names.index("Fitch")) == (1, 0, 1)


def test_known_names_leave_no_folder_to_guess(tmp_path):
    for name in ("tench", "carp", "pike", "eel"):  # as many as classes
        folder(tmp_path, name)
    is_refused(tmp_path, ANIMALS, r"folder 'carp' \(and 2 more\)")


SYSTEM = ["__MACOSX/cat/._0.jpg", "__MACOSX/cat/1.jpg", "@eaDir/0.jpg/thumb.jpg", "#recycle/0.jpg", ".@__thumb/0.jpg"]
SYSTEM += ["lost+found/0.jpg", "$RECYCLE.BIN/0.jpg", "System Volume Information/0.jpg", ".ipynb_checkpoints/0.jpg"]
SYSTEM += ["cat/@eaDir/0.jpg/thumb.jpg", "cat/.ipynb_checkpoints/0.jpg", "cat/._0.jpg", "cat/.hidden/0.jpg"]
SYSTEM += ["cat/Thumbs.db", ".DS_Store", "cat/.DS_Store", "cat/desktop.ini"]


def test_what_systems_leave_behind_is_neither_class_nor_image(tmp_path):
    make(folder(folder(tmp_path, "cat"), "dog"), *SYSTEM)
    listing = load_listing(tmp_path, ClassNames(2))
    assert [(str(i.path.relative_to(tmp_path)), i.label) for i in listing] == [("cat/0.png", 0), ("dog/0.png", 1)]
    assert not any("not read" in note for note in listing.notes)
    flat = make(tmp_path / "flat", "a.png", "__MACOSX/._a.png", "__MACOSX/a.png")
    assert [item.path.name for item in load_listing(flat)] == ["a.png"]


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["train/cat/0.png", "val/cat/0.png"], "train and val"),
        (["Train/0.png", "test/0.png", "val/0.png"], "Train and test and val"),
        (["cat/0.png", "dog/0.png", "val/cat/0.png"], "val"),
        (["cat/0.png", "dog/0.png", "test/0.png"], "test"),
        (["val/cat/0.png"], "val"),
        (["train/0.png"], "train"),
        (["train/cat/0.png", "cat/0.png"], "train"),
        (["train2017/0.png", "val2017/0.png", "annotations/x.json"], "train2017 and val2017"),
        (["ILSVRC2012_img_train/0.png", "ILSVRC2012_img_val/0.png"], "ILSVRC2012_img_train and ILSVRC2012_img_val"),
        (["train1/0.png", "test1/0.png"], "test1 and train1"),
        (["dev/cat/0.png", "holdout/cat/0.png"], "dev and holdout"),
        (["cat/0.png", "dev/0.png"], "dev"),
        (["set_trn_256/0.png", "set_tst_256/0.png"], "set_trn_256 and set_tst_256"),
    ],
)
@pytest.mark.parametrize("classes", [None, ClassNames(2), ANIMALS])
def test_parts_of_a_data_set_are_no_classes(tmp_path, files, parts, classes):
    make(tmp_path, *files)
    is_refused(tmp_path, classes, f"holds {parts}, .*: give .*/{parts.split()[-1]}")


@pytest.mark.parametrize("names", [["0", "1", "train"], ["00", "01", "Train"], ["0", "cat", "train"]])
def test_a_train_beside_numbers_is_no_class_unless_its_name_is_known(tmp_path, names):
    for name in names:
        folder(tmp_path / "data", name)
    for classes in (None, ClassNames(3), ClassNames(3, {0: ("tench",)}, "x")):
        is_refused(tmp_path / "data", classes, "holds [tT]rain, .*: give .*/[tT]rain; .* --classes FILE says so")
    with pytest.raises(DataError, match="holds"):
        load_unlabelled(tmp_path / "data")
    known = ClassNames(3, {i: (name,) for i, name in enumerate(names)}, "x")
    assert labels(tmp_path / "data", known)[names[2]] == 2
    said = read_classes(written(tmp_path, "".join(f"{name},{i}\n" for i, name in enumerate(names))), 3)
    assert labels(tmp_path / "data", said)[names[2]] == 2


@pytest.mark.parametrize("names", [["fold1", "fold2"], ["fold_0", "fold_1"], ["base", "novel"]])
@pytest.mark.parametrize("classes", [ClassNames(2), ClassNames(10), ANIMALS])
def test_folders_that_hold_folders_of_images_are_no_classes_by_their_order(tmp_path, names, classes):
    for name in names:
        make(tmp_path / "data", f"{name}/cat/0.png", f"{name}/dog/0.png")
    is_refused(
        tmp_path / "data", classes,
        f"{names[0]} and {names[1]} hold folders of images: .*, give .*/{names[0]}; .*, give --classes FILE",
    )  # fmt: skip
    said = read_classes(written(tmp_path, f"{names[0]},1\n{names[1]},0"), 2)
    assert labels(tmp_path / "data", said) == {names[0]: 1, names[1]: 0}
    assert labels(tmp_path / "data", ClassNames(2, {0: (names[0],), 1: (names[1],)}, "x"))[names[1]] == 1


def test_images_may_lie_deeper_in_a_class_folder(tmp_path):
    make(tmp_path, "a/images/0.png", "a/images/1.png", "b/images/0.png", "c/0.png", "c/more/1.png")
    assert set(labels(tmp_path, ClassNames(3)).values()) == {0, 1, 2}
    make(tmp_path / "numbers", "0/left/0.png", "0/right/0.png")
    assert labels(tmp_path / "numbers", ClassNames(3)) == {"0": 0}


def test_valid_beside_invalid_is_enough_to_calibrate_on(tmp_path):
    make(tmp_path / "data", "valid/0.png", "invalid/0.png")
    assert len(load_unlabelled(tmp_path / "data")) == 2
    is_refused(tmp_path / "data", ClassNames(2), "holds valid, .*--classes FILE")
    said = read_classes(written(tmp_path, "valid,0\ninvalid,1"), 2)
    assert labels(tmp_path / "data", said) == {"invalid": 1, "valid": 0}


@pytest.mark.parametrize(
    "files",
    [
        ["train/0.png", "val/0.png"], ["cat/0.png", "dog/0.png", "test/0.png"], ["val/cat/0.png", "other/0.png"],
        ["val/0.png"],
    ],
)  # fmt: skip
def test_parts_of_a_data_set_are_not_calibrated_on_together(tmp_path, files):
    make(tmp_path, *files)
    with pytest.raises(DataError, match="parts of a data set"):
        load_unlabelled(tmp_path)


def test_a_bullet_train_is_a_class(tmp_path):
    make(tmp_path, "bullet_train/0.png", "car/0.png")
    assert labels(tmp_path, ClassNames(2)) == {"bullet_train": 0, "car": 1}


def test_labels_that_nobody_needs_are_noted_and_the_images_found(tmp_path):
    make(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.csv").write_text("id,label\na,cat\n")
    listing = load_unlabelled(tmp_path)
    assert [item.path.name for item in listing] == ["a.png", "b.png"]
    assert any("no column class_index" in note for note in listing.notes)
    with pytest.raises(DataError, match="no column class_index"):
        load_listing(tmp_path)
    is_refused(tmp_path, ClassNames(2), "no column class_index or file")


def test_a_class_of_trains_is_a_class(tmp_path):
    make(tmp_path, "Car/0.png", "Train/0.png")
    assert labels(tmp_path, ClassNames(2)) == {"Car": 0, "Train": 1}
    make(tmp_path, "test/0.png")
    assert labels(tmp_path, ClassNames(3, {0: ("test",), 1: ("train",), 2: ("car",)}, "x"))["Train"] == 1


def test_a_folder_without_an_image_is_named_and_moves_no_other(tmp_path):
    for name in ("0", "2"):
        folder(tmp_path, name)
    folder(tmp_path, "1", images=0)
    make(tmp_path, "notes/read.txt")
    listing = load_listing(tmp_path, ClassNames(3))
    assert sorted({item.label for item in listing}) == [0, 2]
    assert listing.notes[0] == "no image in 2 of the folders: 1, notes"


def test_a_folder_without_an_image_and_without_a_known_name_asks_for_a_mapping(tmp_path):
    folder(folder(tmp_path, "a"), "c")
    folder(tmp_path, "b", images=0)
    for classes in (ClassNames(2), ClassNames(3)):
        is_refused(tmp_path, classes, "--classes FILE")
    is_refused(tmp_path, ClassNames(3), "no image in folder 'b'")


def test_files_that_are_not_read_are_counted_by_ending(tmp_path):
    make(tmp_path, "0/a.png", "0/b.HEIC", "0/c.heic", "1/d.svg", "1/e", "1/f.JPG", "1/g.avif", "1/h.jfif", "1/i.jp2")
    listing = load_listing(tmp_path)
    assert sorted(item.path.name for item in listing) == ["a.png", "f.JPG", "g.avif", "h.jfif", "i.jp2"]
    assert listing.notes == (f"4 files of {tmp_path} are not read as images: 2 .heic, 1 without an ending, 1 .svg",)
    make(tmp_path / "other", "a.heic")
    is_refused(tmp_path / "other", None, r"no images \(.*\.avif.*\) and no labels.csv; what is there: 1 \.heic")


def test_links_that_lead_back_are_followed_once(tmp_path):
    make(tmp_path, "0/a.png", "1/b.png", "1/deep/c.png")
    (tmp_path / "0" / "self").symlink_to(".")
    (tmp_path / "0" / "up").symlink_to("..")
    (tmp_path / "1" / "deep" / "around").symlink_to(tmp_path / "1")
    (tmp_path / "1" / "loop").symlink_to("loop")
    (tmp_path / "2").symlink_to(tmp_path)
    assert [str(item.path.relative_to(tmp_path)) for item in load_listing(tmp_path)] == [
        *("0/a.png", "1/b.png", "1/deep/c.png")
    ]


def test_a_linked_folder_is_read(tmp_path):
    folder(tmp_path / "elsewhere", "many")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "7").symlink_to(tmp_path / "elsewhere" / "many")
    assert labels(tmp_path / "data") == {"7": 7}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    folder(tmp_path, "0")
    (tmp_path / "0").chmod(0)
    is_refused(tmp_path, None, "0: cannot be read: Permission denied")


# Files of classes


def read_or_refused(read):
    """The classes that were read; none when the file was refused in one line."""
    try:
        return set(read())
    except DataError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1
    return set()


def written(tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "dog,1\ncat,0\n",
        "folder,class_index\ncat,0\ndog,1\n",
        "\ufefffolder;class_index\r\ncat;0\r\ndog;1\r\n",
        "0\tcat\n1\tdog\n",
        "cat\ndog\n",
        "cat, Felis catus\ndog, hound\n\n",
        "n02121620 cat, Felis\nn02084071 dog\n",
        '["cat", "dog"]',
        "['cat', 'dog',]",
        "{0: 'cat, Felis catus', 1: 'dog'}",
        '{"cat": 0, "dog": 1}',
        '{"cat": "0", "dog": "1"}',
        '{"0": "cat", "1": "dog"}',
        '{"0": ["n02121620", "cat"], "1": ["n02084071", "dog"]}',
        '{"model_type": "vit", "id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}',
        '{"num_classes": 2, "label_names": ["cat", "dog"]}',
        "cat,0,\ndog,1,\n",
        "folder,class_index,,\ndog,1,,\ncat,0,,\n",
    ],
)
def test_a_file_of_classes_has_many_forms(tmp_path, text):
    folder(folder(tmp_path / "data", "dog"), "cat")
    assert labels(tmp_path / "data", read_classes(written(tmp_path, text), 2)) == {"cat": 0, "dog": 1}


def test_names_may_hold_numbers_that_are_no_indices(tmp_path):
    assert read_classes(written(tmp_path, "boeing 747\ncessna 172"), 2).index("cessna 172") == 1
    assert read_classes(written(tmp_path, "3\n1"), 2).index("1") == 1
    assert read_classes(written(tmp_path, "class 0\nclass 1"), 2).index("class 1") == 1


def test_a_file_names_some_classes_of_many_and_several_folders_of_one(tmp_path):
    for name in ("7", "tabby", "lion"):
        folder(tmp_path / "data", name)
    classes = read_classes(written(tmp_path, "tabby,281\nlion,281\n7,999\n"), 1000)
    assert labels(tmp_path / "data", classes) == {"7": 999, "lion": 281, "tabby": 281}
    folder(tmp_path / "data", "0")
    is_refused(tmp_path / "data", classes, "folder '0' is not in .*classes.txt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no classes"),
        ("cat\ndog\n", "2 names, a class each, but the model has 3 classes"),
        ('["cat", "dog", "cow", "hen"]', "4 names"),
        ("cat\n\ndog\n", "line 2 is empty"),
        ("cat,0\ncat,1\n", "'cat' is there twice"),
        ('{"cat": 0, "cat": 1}', "'cat' is there twice"),
        ("cat,0\ndog,3\n", "class index '3': the model's are 0 to 2"),
        ('{"cat": -1}', "neither|class index -1"),
        ('{"cat": 1.5}', "indices"),
        ('{"cat": true}', "class index True"),
        ('{"cat": null}', "indices"),
        ("cat," + "9" * 5000, r"class index '9+\.\.\."),
        ('{"cat": ' + "9" * 5000 + "}", "neither JSON"),
        ('{"0": 5, "1": [6]}', "name of a class must be text"),
        ('["cat", 5, "dog"]', "name of a class must be text"),
        ("{}", "neither a list"),
        ("[" * 100_000, "nested too deep|neither JSON"),
        ("{'a': __import__('os').system('true')}", "neither JSON"),
        ('"cat,0\ndog,1', "cannot be read as lines"),
        ('{"id2label": {"a": {}}}', "indices"),
        ("cat,1,Felis\ndog,0,Canis\ncow,2,Bos", "line 1, .*neither a name nor folder,class_index"),
        ("0,n02121808,cat\n1,n02084071,dog\n2,n1,cow", "line 1, .*neither"),
        ("cat,1.0\ndog,0.0\ncow,2.0", "line 1, .*whole numbers"),
        ("cat,0\ndog,x\ncow,2", "line 1, .*neither"),
        ("cat,-1\ndog,0\ncow,1", "line 1, .*neither"),
        ("n02119789 1\nn02100735 0\nn02110185 2", "line 1, .*neither"),
        ("n02119789 1 kit_fox\nn02100735 2 setter\nn02110185 3 husky", "line 1, .*neither"),
        ("kit fox 2\nsetter 0\nhusky 1", "numbers 2, 0, .*not those of lines"),
        ("1 cat\n2 dog\n3 cow", "numbers 1, 2, .*not those of lines"),
        ('{"a": 0x' + "f" * 5000 + ', "b": 1}', "class index an integer of 20000 bits"),
    ],
)
def test_a_bad_file_of_classes_is_refused_in_one_line(tmp_path, text, said):
    with pytest.raises(DataError, match=f"classes.txt: .*({said})") as caught:
        read_classes(written(tmp_path, text), 3)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@FEW
@given(st.one_of(st.text(max_size=80), st.from_regex(r"[\[{]('?[a-c0-3]'?[,:\]}\n])+", fullmatch=True)))
def test_any_text_is_a_file_of_classes_or_refused_in_one_line(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("classes") / "classes.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read_or_refused(lambda: read_classes(path, 4).names) <= {0, 1, 2, 3}


def test_a_file_of_classes_that_is_none_is_refused(tmp_path):
    for path, said in ((tmp_path / "absent", "no such file"), (tmp_path, "no such file")):
        with pytest.raises(DataError, match=said):
            read_classes(path, 3)
    (tmp_path / "large").write_bytes(b"\0" * (2**22 + 1))
    with pytest.raises(DataError, match="too many"):
        read_classes(tmp_path / "large", 3)
    make(tmp_path / "data", "labels.csv", "a.png")
    with pytest.raises(DataError, match=r"has a labels\.csv, .*--classes is for class folders"):
        load_listing(tmp_path / "data", read_classes(written(tmp_path, "a\nb\n"), 2))


# What libraries know


def test_timm_knows_the_classes_of_imagenet_when_there_are_as_many():
    source = ModelSource("timm:vit_tiny_patch16_224", weights="random")
    names = class_names(architecture(source), source, 1000)
    assert [names.index(name) for name in ("n01440764", "goldfish", "Carcharodon carcharias")] == [0, 1, 2]
    assert names.index("n03888257") == 701  # parachute
    source = ModelSource("timm:vit_tiny_patch16_224", {"num_classes": 10}, "random")
    assert not class_names(architecture(source), source, 10).names
    assert class_names(nn.Identity(), source, 11821).index("n00005787") == 0


def test_names_that_came_with_weights_of_timm_come_first():
    model = nn.Identity()
    model.pretrained_cfg = {"label_names": ["a1", "b2"], "label_descriptions": {"b2": "bee, wasp"}}
    names = class_names(model, ModelSource("timm:vit_tiny_patch16_224"), 2)
    assert [names.index(name) for name in ("a1", "b2", "Wasp", "c")] == [0, 1, 1, None]
    assert not class_names(model, ModelSource("timm:vit_tiny_patch16_224"), 3).names


def test_torchvision_knows_its_categories():
    source = ModelSource("torchvision:vit_b_16", weights="random")
    names = class_names(nn.Identity(), source, 1000)
    assert (names.index("crane"), names.index("crane bird"), names.index("n01440764")) == (517, 134, 0)
    assert not class_names(nn.Identity(), source, 10).names


def test_transformers_knows_what_the_config_says():
    pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    named = ModelSource("transformers:vit", {**small, "id2label": {"0": "Cat", "1": "dog"}}, "random")
    assert class_names(architecture(named), named, 2).index("cat") == 0
    unnamed = ModelSource("transformers:vit", {**small, "num_labels": 2}, "random")
    assert not class_names(architecture(unnamed), unnamed, 2).names


def test_synsets_name_the_classes_of_any_model_with_as_many_as_imagenet():
    source = ModelSource("python:mine:factory")
    names = class_names(nn.Identity(), source, 1000)
    assert (names.index("n01440764"), names.index("tench")) == (0, None)


class Headed(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


@pytest.mark.parametrize(
    "model",
    [
        lambda: architecture(ModelSource("timm:vit_tiny_patch16_224", {"num_classes": 0, "depth": 1}, "random")),
        lambda: architecture(ModelSource("timm:swin_tiny_patch4_window7_224", {"num_classes": 0}, "random")),
        lambda: Headed(head=nn.Identity(), num_classes=1000),
        lambda: Headed(heads=nn.Sequential(nn.Identity()), num_features=8),
        lambda: Headed(fc=nn.Sequential(nn.Dropout(), nn.Identity())),
    ],
)
def test_features_are_refused(model):
    with pytest.raises(ModelError, match="no head: it gives features, not classes"):
        refuse_features(model())


@pytest.mark.parametrize(
    "model",
    [
        lambda: architecture(ModelSource("timm:vit_tiny_patch16_224", {"num_classes": 10, "depth": 1}, "random")),
        lambda: architecture(ModelSource("timm:levit_128s", {}, "random")),
        lambda: Headed(head=nn.Identity(), classifier=nn.Linear(3, 2)),
        lambda: Headed(layers=nn.Identity()),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)),
    ],
)
def test_classifiers_are_not(model):
    refuse_features(model())


# On real photographs


@pytest.mark.parametrize("kind", ["numbers", "padded", "synsets", "names"])
@pytest.mark.parametrize("data", ["photos_eval", "imagenette_eval"])
def test_the_same_photographs_have_the_same_labels_in_folders_as_in_labels_csv(shared, tmp_path, data, kind):
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    called = {
        "numbers": str,
        "padded": "{:04}".format,
        "synsets": info.index_to_label_name,
        "names": lambda index: info.index_to_description(index).replace("/", " "),
    }[kind]
    listing = load_listing(shared / "images" / data)
    random.Random(0).shuffle(listing)
    unclear = {134, 517}  # both are called crane
    for item in listing:
        if kind != "names" or item.label not in unclear:
            target = tmp_path / called(item.label) / item.path.name
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(item.path)
    source = ModelSource("timm:deit_tiny_patch16_224", weights="random")
    found = {i.path.name: i.label for i in load_listing(tmp_path, class_names(architecture(source), source, 1000))}
    expected = {i.path.name: i.label for i in listing if kind != "names" or i.label not in unclear}
    assert found == expected
