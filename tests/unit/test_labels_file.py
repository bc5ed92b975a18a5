"""labels.csv as data: what is no list of files and class indices is refused in one line, by the number of its line."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitquant.errors import DataError
from vitquant.tasks.images import Item, batches, load_listing
from vitquant.tasks.labels_file import read_labels
from vitquant.tasks.preprocessing import Preprocessing

FEW = settings(max_examples=60, deadline=None)

FILES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map(lambda t: f"x{t.strip()}/a.jpg")


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


@FEW
@given(st.lists(st.tuples(FILES, st.integers(0, 10**9 - 1)), min_size=1, unique_by=lambda r: os.path.normpath(r[0])))
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    lines = [f"{label},mine,{quoted(file)}\r\n" for file, label in rows]
    path.write_text("".join(["class_index,author,file\r\n", *lines]), encoding="utf-8-sig", newline="")
    assert read_labels(path) == [(path.parent / file, label) for file, label in rows]


@FEW
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    path.write_bytes(b"file,class_index\n" + content)
    said = ""
    try:
        read_labels(path)
    except DataError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
    assert len(said) < 500


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,label\na.jpg,1\n", "no column class_index"),
        ("", "no column class_index or file"),
        ("file,class_index\n", "no rows"),
        ("file;class_index\na.jpg;1\n", "separated by ';', save it with commas"),
        ("file\tclass_index\na.jpg\t1\n", "separated by"),
        ("file,class_index,file\na.jpg,1,b.jpg\n", "two columns file"),
        ("file,class_index\na.jpg,1\nb.jpg,cat\n", "line 3: .*'cat'"),
        ("file,class_index\na.jpg,-1\n", "line 2"),
        ("file,class_index\na.jpg,+1\n", "line 2"),
        ("file,class_index\na.jpg,1.0\n", "line 2"),
        ("file,class_index\na.jpg,1_0\n", "line 2"),
        ("file,class_index\na.jpg,٣\n", "line 2"),
        ("file,class_index\na.jpg,²\n", "line 2"),
        ("file,class_index\na.jpg," + "9" * 5000 + "\n", r"line 2: .*'9{20}'\.\.\."),
        ("file,class_index\na.jpg," + "9" * 10 + "\n", "line 2"),
        ("file,class_index\na.jpg\n", "line 2"),
        ("file,class_index\n,3\n", "line 2"),
        ("file,class_index\na,b.jpg,3\n", "line 2: 3 columns, not 2"),
        ("file,class_index\na\0.jpg,3\n", "line 2: a control character"),
        ('file,class_index\n"a\nb.jpg",3\n', "line 3: a control character"),
        ("file,class_index\na.jpg,3\n./a.jpg,3\n", "line 3: ./a.jpg is in line 2 as well"),
        ("file,class_index\na.jpg,3\nb.jpg,3\na.jpg,4\n", "line 4: a.jpg is in line 2 as well"),
        ('file,class_index\n"a.jpg,3\nb.jpg,4\n', "cannot be read: unexpected end"),
        ("file,class_index\n" + "a" * 200_000 + ",3\n", "cannot be read: field larger"),
    ],
)
def test_a_bad_labels_file_is_refused_by_line(tmp_path, text, said):
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"labels.csv.*{said}"):
        load_listing(tmp_path)


def test_an_image_has_one_label_whichever_way_it_is_named(tmp_path):
    (tmp_path / "labels.csv").write_text(f"file,class_index\na.jpg,1\n{tmp_path}/a.jpg,0\n")
    with pytest.raises(DataError, match="in line 2 as well"):
        read_labels(tmp_path / "labels.csv")


def test_another_encoding_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("file,class_index\na.jpg,1\n", encoding="utf-16")
    with pytest.raises(DataError, match="not UTF-8 text"):
        load_listing(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / "labels.csv")
    with pytest.raises(DataError, match=r"labels\.csv"):
        load_listing(tmp_path)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "labels.csv").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(DataError, match="268,435,457 bytes are too many"):
        load_listing(tmp_path)


def test_a_file_elsewhere_is_only_ever_taken_for_an_image(tmp_path):
    (tmp_path / "labels.csv").write_text("file,class_index\n/etc/passwd,1\n../absent.png,2\n/dev/zero,3\n")
    items = load_listing(tmp_path)
    assert items[0] == Item(tmp_path / "/etc/passwd", 1)
    with pytest.raises(DataError, match=r"2 of 3 images cannot be read \(first: .*absent\.png: no such file"):
        batches(items, Preprocessing(), 1)
    with pytest.raises(DataError, match=r"first: /etc/passwd: cannot identify image file"):
        list(batches(items[:1], Preprocessing(), 1))


def test_a_name_that_no_file_can_have_is_an_image_that_cannot_be_read(tmp_path):
    (tmp_path / "labels.csv").write_text(f"file,class_index\n{'a' * 5000},1\n")
    with pytest.raises(DataError, match=r"1 of 1 images cannot be read .*name too long"):
        batches(load_listing(tmp_path), Preprocessing(), 1)
