"""An output is there whole, or it is what it was: whoever ends the run, and whenever."""

import os
import shutil
import signal
import socket
import stat
import time
from pathlib import Path

import pytest
from killing import contents, killed_at_every_change

from vitquant.errors import ExportError
from vitquant.files import Directory, discard, recover, replacing, write_file, writing

PAIR = Directory("pair", {"one": None, "two": None, "deeper": {"three": None}}, lambda path: (path / "one").is_file())


def write_pair(path, content, force=False):
    with replacing(path, force, PAIR) as new:
        (new / "deeper").mkdir(parents=True)
        for name in ("one", "two", "deeper/three"):
            (new / name).write_text(content)


def write_text(path, content, force=False):
    write_file(path, content.encode(), force)


@pytest.fixture
def out(tmp_path):
    """In a folder of its own, so that what is beside it shows."""
    (tmp_path / "there").mkdir()
    return tmp_path / "there" / "out"


def beside(out):
    return sorted(each.name for each in out.parent.iterdir())


# Killed


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize(
    ("write", "exchanges"), [(write_text, True), (write_pair, True), (write_pair, False)], ids=["file", "pair", "moved"]
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_and_the_next_run_leaves_nothing_else(
    out, monkeypatch, write, exchanges, replaces
):
    monkeypatch.setattr("os.fsync", lambda _: None)  # of no matter to a process that ends, and slow
    if not exchanges:
        monkeypatch.setattr("vitquant.files.writing.exchange", lambda *_: False)
    write(out, "new")
    new = contents(out)
    shutil.rmtree(out.parent)
    out.parent.mkdir()
    if replaces:
        write(out, "old")
    old, found = contents(out), []
    for _ in killed_at_every_change(lambda: write(out, "new", force=replaces), out.parent):
        recover(out)  # as every command that reads does
        found.append(contents(out))
        assert found[-1] in (old, new)
        write(out, "newer", force=True)
        assert beside(out) == ["out"]
        assert set(contents(out).values() if write is write_pair else [contents(out)]) == {b"newer"}
    assert found.count(old) > 4
    assert found.count(new) > 4


def test_where_directories_are_exchanged_there_is_no_moment_without_one(out, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    write_pair(out, "old")
    for _ in killed_at_every_change(lambda: write_pair(out, "new", force=True), out.parent):
        assert len(contents(out)) == 3
        assert len(set(contents(out).values())) == 1


@pytest.mark.parametrize("made_anew", [False, True], ids=["missing", "made anew by its user"])
def test_between_two_renames_the_old_one_comes_back(out, monkeypatch, made_anew):
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("vitquant.files.writing.exchange", lambda *_: False)
    write_pair(out, "old")
    old, moments = contents(out), 0
    for _ in killed_at_every_change(lambda: write_pair(out, "new", force=True), out.parent):
        if not out.exists():
            moments += 1
            if made_anew:
                out.mkdir()
                with replacing(out, True, PAIR):
                    assert contents(out) == old
            else:
                recover(out / "one")
                assert contents(out) == old
            assert beside(out) == ["out"]
    assert moments


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_place(out):
    told, tell = os.pipe()
    run = os.fork()
    if run == 0:
        try:
            with replacing(out):
                if worker := os.fork():
                    os.write(tell, worker.to_bytes(4, "little"))
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    worker = int.from_bytes(os.read(told, 4), "little")
    assert worker
    try:
        with pytest.raises(ExportError, match="another run is writing"):
            write_file(out, b"second")
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        write_file(out, b"third")
    finally:
        os.kill(worker, signal.SIGKILL)
    assert (out.read_bytes(), beside(out)) == (b"third", ["out"])


def test_a_forked_child_that_leaves_the_block_leaves_its_parent_s_work(out):
    test = os.getpid()
    try:
        with replacing(out) as new:
            child = os.fork()
            if child == 0:
                raise SystemExit
            os.waitpid(child, 0)
            new.write_text("whole")
    finally:
        if os.getpid() != test:
            os._exit(0)
    assert out.read_text() == "whole"


def test_only_what_is_ours_is_swept(out):
    mine = [".out.partial", ".out.vitquant.bak", ".other.vitquant", ".out.abc.old"]
    for name in mine:
        (out.parent / name).mkdir()
        (out.parent / name / "thesis").write_text("years of work")
    write_pair(out, "new")
    write_pair(out, "newer", force=True)
    assert beside(out) == sorted([*mine, "out"])
    assert all((out.parent / name / "thesis").exists() for name in mine)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_has_the_hidden_name_and_is_not_ours_is_refused(out, tmp_path, kind):
    hidden = out.with_name(".out.vitquant")
    (tmp_path / "mine" / "new").mkdir(parents=True)
    hidden.write_text("mine") if kind == "file" else hidden.symlink_to(tmp_path / "mine")
    with pytest.raises(ExportError, match=r"\.out\.vitquant is in the way"):
        write_file(out, b"new")
    assert (tmp_path / "mine" / "new").is_dir()
    assert not out.exists()


@pytest.mark.parametrize("kind", ["new is a link", "new is a file", "lock is a directory", "lock is a link"])
def test_what_lies_in_the_hidden_directory_and_is_no_run_s_is_named(out, tmp_path, kind):
    (hidden := out.with_name(".out.vitquant")).mkdir()
    (tmp_path / "mine").mkdir()
    name, _, what = kind.partition(" is a ")
    inside = hidden / name
    {"link": lambda: inside.symlink_to(tmp_path / "mine"), "file": inside.touch, "directory": inside.mkdir}[what]()
    with pytest.raises(ExportError, match=r"remove .*/\.out\.vitquant$"):
        write_file(out, b"new")
    assert (tmp_path / "mine").is_dir()
    assert not out.exists()


# At one time


def test_of_two_runs_into_one_output_the_second_is_refused_at_once(out):
    with replacing(out, directory=PAIR) as new:
        new.mkdir()
        for force in (False, True):
            with pytest.raises(ExportError, match=r"another run is writing .*out; wait until it ends"):
                write_pair(out, "second", force)
        (new / "one").write_text("first")
    assert contents(out) == {"one": b"first"}
    assert beside(out) == ["out"]


def test_by_a_link_it_is_the_same_output(out):
    write_pair(out, "old")
    (out.parent / "link").symlink_to(out)
    with replacing(out, True, PAIR), pytest.raises(ExportError, match="another run"):
        write_pair(out.parent / "link", "new", force=True)


def test_a_directory_is_not_replaced_while_a_run_writes_in_it(out):
    write_pair(out, "old")
    with replacing(out / "two", force=True) as new:
        with pytest.raises(ExportError, match="of a run that writes in"):
            write_pair(out, "new", force=True)
        new.write_text("exported")
    assert (out / "two").read_text() == "exported"


def write_beside_another(out):
    with replacing(out) as new:
        new.write_text("ours")
        out.write_text("theirs")


def test_what_another_program_writes_meanwhile_is_kept(out):
    with pytest.raises(ExportError, match="out exists; give another path"):
        write_beside_another(out)
    assert (out.read_text(), beside(out)) == ("theirs", ["out"])


def test_not_even_at_the_last_moment(out, monkeypatch):
    monkeypatch.setattr("vitquant.files.writing.check", lambda *_: None)
    with pytest.raises(ExportError, match="could not be written: File exists"):
        write_beside_another(out)
    assert (out.read_text(), beside(out)) == ("theirs", ["out"])


# Ended otherwise


def test_a_file_is_written_and_replaced_only_when_asked(tmp_path):
    path = tmp_path / "new" / "a.bin"
    write_file(path, b"one")
    with pytest.raises(ExportError, match=r"a\.bin exists; .*--force \(force=True\)"):
        write_file(path, b"two")
    assert path.read_bytes() == b"one"
    write_file(path, b"two", force=True)
    assert path.read_bytes() == b"two"
    assert [each.name for each in path.parent.iterdir()] == ["a.bin"]


def test_nothing_is_left_when_writing_fails(out, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    write_file(out, b"before")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ExportError, match="could not be written: No space left"):
        write_file(out, b"after", force=True)
    assert (out.read_bytes(), beside(out)) == (b"before", ["out"])


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_interrupt_as_old_and_new_change_places_leaves_one_of_them(out, monkeypatch, exchanges):
    rename = Path.rename

    def interrupted(self, target):
        if self.parent.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    def exchange(*_):
        if exchanges:
            raise KeyboardInterrupt
        return False

    write_pair(out, "old")
    monkeypatch.setattr(Path, "rename", interrupted)
    monkeypatch.setattr("vitquant.files.writing.exchange", exchange)
    with pytest.raises(KeyboardInterrupt):
        write_pair(out, "new", force=True)
    assert set(contents(out).values()) == {b"old"}
    assert beside(out) == ["out"]


def fail_to_write(path):
    with replacing(path) as new:
        new.write_text("half")
        raise ExportError(f"{new} is no good")


def test_a_block_that_ends_by_an_error_or_writes_nothing_changes_nothing(tmp_path):
    path = tmp_path / "new" / "deep" / "out"
    with pytest.raises(ExportError, match=f"^{path} is no good$"):
        fail_to_write(path)
    with replacing(path):
        pass
    for directory in (None, PAIR):
        with replacing(path, directory=directory) as new:
            new.mkdir() if directory else new.write_text("broken promise")
            discard(new)
    assert not any(tmp_path.iterdir())


def test_content_is_on_the_disk_before_its_name_is(out, monkeypatch):
    """A computer that loses power must not have a name without content."""
    write_pair(out, "old")
    seen, sync, exchange = [], os.fsync, writing.exchange

    def fsync(descriptor):
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("vitquant.files.writing.exchange", lambda *both: [seen.append("exchange"), exchange(*both)][1])
    write_pair(out, "new", force=True)
    moment = seen.index("exchange")
    assert {path.name for path in seen[:moment]} == {"out", "one", "two", "deeper", "three"}
    assert out.parent in seen[moment:]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_are_those_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a.bin", b"one")
        with replacing(tmp_path / "out", directory=PAIR) as new:
            new.mkdir()
            (new / "one").touch(mode=0o600)  # as safetensors writes
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"out": 0o777 & ~umask, "a.bin": 0o666 & ~umask, "one": 0o666 & ~umask}


# What is no place for an output


def named(tmp_path, kind):
    """A path of each kind that a user may give."""
    path = tmp_path / "out"
    match kind:
        case "dangling link":
            path.symlink_to(tmp_path / "unmounted")
        case "link to itself":
            path.symlink_to(path)
        case "below a dangling link":
            path.symlink_to(tmp_path / "unmounted")
            return path / "out"
        case "pipe":
            os.mkfifo(path)
        case "socket":
            server = socket.socket(socket.AF_UNIX)
            monkey = Path.cwd()
            os.chdir(tmp_path)  # names of sockets are short
            server.bind("out")
            os.chdir(monkey)
            server.close()
        case "device":
            return Path("/dev/null")
        case "root":
            return Path("/")
        case "name too long":
            return tmp_path / ("x" * 300)
        case "path too long":
            return tmp_path.joinpath(*["x" * 200] * 15)
        case "below a file":
            path.write_text("")
            return path / "out"
        case "above what is missing":
            return tmp_path / "missing" / ".." / "out"
        case "above a file":
            (tmp_path / "file").touch()
            return tmp_path / "file" / ".." / "out" / "deeper"
        case "null":
            return tmp_path / "a\0b"
        case "process":
            return Path("/proc/self/out")
        case "standard output":  # a link to whatever that goes to, be it a file
            return Path("/dev/stdout")
    return path


KINDS = [
    "dangling link", "link to itself", "below a dangling link", "pipe", "socket", "device", "root", "name too long",
    "path too long", "below a file", "above what is missing", "above a file", "null", "process", "standard output",
]  # fmt: skip


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("directory", [None, PAIR], ids=["file", "directory"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_an_output_is_refused_beforehand(tmp_path, kind, directory, force):
    path = named(tmp_path, kind)
    before = {each: each.lstat().st_mtime_ns for each in tmp_path.rglob("*")}
    with pytest.raises(ExportError) as refused, replacing(path, force, directory):
        pytest.fail("the work was begun")
    assert "\n" not in str(refused.value)
    assert {each: each.lstat().st_mtime_ns for each in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["", ".", "..", "../.."])
def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(ExportError, match="is the current directory or holds it"):
        write_pair(name, "new", force=True)
    with pytest.raises(ExportError, match="is a directory"):
        write_text(name, "new", force=True)


def test_where_a_disk_is_mounted_is_not_replaced(monkeypatch, tmp_path):
    with pytest.raises(ExportError, match="is a mount point"):
        write_pair("/dev/shm" if Path("/dev/shm").is_mount() else "/proc", "new", force=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission_is_refused_beforehand(out):
    write_pair(out, "old")
    for closed in (out.parent, out, out / "deeper"):
        closed.chmod(0o500)
        try:
            with pytest.raises(ExportError, match="cannot be written"), replacing(out, True, PAIR):
                pytest.fail("the work was begun")
        finally:
            closed.chmod(0o700)
    assert beside(out) == ["out"]


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "a b\nc", "-out", "out.vitquant", ".hidden", "lock", "new"])
def test_unusual_names_are_names(tmp_path, name):
    for write in (write_text, write_pair):
        for content in ("old", "new"):
            write(tmp_path / name, content, force=True)
        assert [each.name for each in tmp_path.iterdir()] == [name]
        recover(tmp_path / name)
        shutil.rmtree(tmp_path / name) if write is write_pair else (tmp_path / name).unlink()


def test_a_link_is_followed_and_stays(out, tmp_path):
    (tmp_path / "big").mkdir()
    for write, name in ((write_pair, "pair"), (write_text, "text")):
        write(tmp_path / "big" / name, "old")
        link = out.with_name(name)
        link.symlink_to(Path("..", "big", name))
        write(link, "new", force=True)
        assert link.is_symlink()
        assert "new" in str(contents(tmp_path / "big" / name))
        assert "old" not in str(contents(tmp_path / "big" / name))
    assert sorted(each.name for each in (tmp_path / "big").iterdir()) == ["pair", "text"]


# What is never replaced


def test_force_replaces_a_directory_of_the_kind_and_nothing_else(out):
    write_pair(out, "old")
    (out / ".DS_Store").write_text("")
    (out / ".two.vitquant" / "new").mkdir(parents=True)  # a run that wrote it alone was killed
    write_pair(out, "new", force=True)
    assert set(contents(out).values()) == {b"new"}
    for name in ("thesis.tex", "deeper/thesis.tex", "images/1.png", ".git/HEAD", ".three.vitquant/thesis.tex"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("years of work")
        with pytest.raises(ExportError, match="which is not of a pair and would be lost"):
            write_pair(out, "newer", force=True)
        assert (out / name).read_text() == "years of work"
        (out / name).unlink()
        if (out / name).parent not in (out, out / "deeper"):
            (out / name).parent.rmdir()


@pytest.mark.parametrize("kinds", [("file", "directory"), ("directory", "file"), ("file", "link")])
def test_what_is_of_another_kind_than_the_layout_says_is_kept(out, tmp_path, kinds):
    expected, found = kinds
    write_pair(out, "old")
    path = out / ("two" if expected == "file" else "deeper")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    match found:
        case "file":
            path.write_text("mine")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(tmp_path)
    with pytest.raises(ExportError, match=f"holds {path.name}, which is not of a pair"):
        write_pair(out, "new", force=True)
