"""The command line among streams, signals, shells and terminals as users have them."""

import errno
import io
import os
import pty
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from vitquant.cli import main
from vitquant.cli.completing import measures, recipe_names
from vitquant.cli.streams import Stream
from vitquant.cli.widths import forget_senseless_widths
from vitquant.printable import one_line
from vitquant.report.tables import facts

INTERRUPTED = "interrupted; nothing was written\n"
LIGHT = [["recipes"], ["recipes", "--json"], ["--version"], ["--help"], ["quantize", "-h"]]


def command(words, code="from vitquant.cli import main; main()"):
    return [sys.executable, "-c", code, *words]


@pytest.fixture
def refused(run):
    def refused(*words):
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        return err

    return refused


# Streams


@pytest.mark.parametrize("words", LIGHT)
def test_a_reader_that_has_enough_is_no_fault(words):
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(command(words), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("words", [["recipes"], ["--version"], ["-h"]])
def test_a_closed_stdout_is_said_and_a_closed_stderr_is_nothing(words):
    def shell(redirection):
        line = f'exec "$@" {redirection}'
        return subprocess.run(["bash", "-c", line, "bash", *command(words)], capture_output=True, text=True)

    ended = shell(">&-")
    assert (ended.returncode, ended.stderr) == (2, "error: the result cannot be written to stdout: it is closed\n")
    ended = shell("2>&-")
    assert (ended.returncode, bool(ended.stdout)) == (0, True)
    assert shell("<&-").returncode == 0
    assert shell("<&- >&- 2>&-").returncode == 2


def test_a_file_does_not_take_the_place_of_a_closed_stdout(tmp_path):
    code = "import sys; from vitquant.cli.streams import Streams\nwith Streams():\n open(sys.argv[1], 'w').write('x')"
    line = 'exec "$@" >&-'
    words = ["bash", "-c", line, "bash", *command([tmp_path / "file"], f"{code}; import os; os.write(2, b'y')")]
    assert subprocess.run(words, capture_output=True, text=True).stderr == "y"
    assert (tmp_path / "file").read_text() == "x"


class Broken:
    """A stream that fails as one of the system would."""

    def __init__(self, number, descriptor):
        self.failure, self.descriptor, self.calls = OSError(number, os.strerror(number)), descriptor, 0

    def write(self, text=""):
        self.calls += 1
        raise self.failure

    flush = write

    def fileno(self):
        return self.descriptor


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO])
def test_a_stream_that_fails_once_is_left_alone(number):
    descriptor = os.open(os.devnull, os.O_WRONLY)
    broken = Broken(number, descriptor)
    stream = Stream(broken)
    assert [stream.write("one"), stream.write("three")] == [3, 5]
    stream.flush()
    os.close(descriptor)
    assert broken.calls == 1
    assert (stream.lost == "") is (number == errno.EPIPE)


def test_streams_are_given_back_as_they_were(run):
    before = sys.stdout, sys.stderr, sys.stdout.errors, sys.stderr.errors
    assert run("--version")[0] == 0
    assert (sys.stdout, sys.stderr, sys.stdout.errors, sys.stderr.errors) == before


def test_a_broken_promise_is_said_although_nobody_reads_the_table(monkeypatch, capsys):
    def fails(words):
        print("a table")
        return 1

    monkeypatch.setattr("vitquant.cli.app.run", fails)
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE, os.open(os.devnull, os.O_WRONLY)))
    with pytest.raises(SystemExit) as ended:
        main(["parity"])
    assert ended.value.code == 1


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("name", ["münchen-写真", "evil\x1b[31m\nname", b"bytes-\xff".decode(errors="surrogateescape")])
@pytest.mark.parametrize("terminal", [ASCII, {"PYTHONIOENCODING": "utf-8"}])
def test_names_that_a_terminal_lacks_are_escaped(name, terminal):
    environment = {**os.environ, **terminal, "COLUMNS": "20", "TERM": "dumb"}
    words = command(["inspect", os.fsencode(name)])
    ended = subprocess.run(words, capture_output=True, env=environment)
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"error: ")
    assert ended.stderr.count(b"\n") == 1
    assert b"\x1b" not in ended.stderr


def test_a_table_with_a_name_that_a_terminal_lacks_is_printed():
    code = "from vitquant.cli.streams import Streams\nwith Streams(): print('m\\xfcnchen')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, **ASCII})
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"m\\xfcnchen\n", b"")


def test_a_name_that_is_too_long_is_one_line_and_no_fault_of_ours(refused):
    for words in (["inspect", "x" * 300], ["evaluate", "x" * 300, "--data", "."], ["parity", "a" * 5000]):
        refused(*words)


def test_tables_show_no_control_characters():
    shown = io.StringIO()
    Console(file=shown).print(facts({"saved": "a\x1b[32mb\nc\u202e"}))
    assert shown.getvalue().strip() == "saved  a\\x1b[32mb c\\u202e"


@pytest.mark.parametrize("variable", ["COLUMNS", "TERMINAL_WIDTH"])
def test_a_width_in_which_nothing_can_be_read_is_forgotten(variable, monkeypatch):
    for columns in ("0", "", "1", "39", "00", "-1", "wide", "²", "1000000000", "1" * 5000):
        monkeypatch.setenv(variable, columns)
        forget_senseless_widths()
        assert variable not in os.environ, columns
    for columns in ("40", "9999"):
        monkeypatch.setenv(variable, columns)
        forget_senseless_widths()
        assert os.environ[variable] == columns


@pytest.mark.parametrize(("words", "variable"), [(["recipes"], "COLUMNS"), (["-h"], "TERMINAL_WIDTH")])
def test_no_width_prints_what_is_printed_when_none_is_given(words, variable):
    def printed(**widths):
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "TERMINAL_WIDTH")}
        ended = subprocess.run(command(words), capture_output=True, text=True, env={**environment, **widths})
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout

    assert printed(**{variable: "0"}) == printed() != printed(**{variable: "50"})


def test_a_terminal_that_is_too_narrow_gets_a_table_all_the_same():
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 1))
    code = "from vitquant.cli.terminal import Terminal\nwith Terminal(False, False) as t: t.result({}, 'a few words')"
    ended = subprocess.run([sys.executable, "-c", code], stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    assert (ended.returncode, os.read(leader, 1000)) == (0, b"a few words\r\n")
    os.close(leader)


def test_one_line_is_one_line_of_what_can_be_printed():
    assert one_line("a\n b\tc") == "a b c"
    assert one_line("a\x1b[31m\udcff é") == "a\\x1b[31m\\udcff é"


# Signals


def started(code):
    """Run Python in a process that listens to signals, which one in a script's background, or under nohup, does not."""
    listening = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    )
    return subprocess.run(command([], listening + code), capture_output=True, text=True, timeout=300)


DURING = """
import signal, sys
from vitquant.cli import main

class AtImport:
    def find_spec(self, name, *_):
        if name == "{module}":
            signal.raise_signal(signal.{signal})

sys.meta_path.insert(0, AtImport())
main(["recipes"])
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_typer_is_imported_is_one_line(name):
    ended = started(DURING.format(module="typer", signal=name))
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", INTERRUPTED)


def test_an_ignored_signal_stays_ignored():
    ended = started(
        f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN){DURING}".format(module="typer", signal="SIGINT")
    )
    assert ended.returncode == 0


@pytest.mark.parametrize(
    "meets",
    [
        "try: signal.raise_signal(signal.SIGINT)\n    except KeyboardInterrupt: raise ImportError('numpy')",
        "type('Dropped', (), {'__del__': lambda self: signal.raise_signal(signal.SIGINT)})(); time.sleep(5)",
    ],
)
def test_an_interrupt_that_something_else_is_made_of_is_an_interrupt(meets):
    code = f"""
import signal, time
from vitquant.cli import app, main

def command(words):
    {meets}

app.run = command
main(["recipes"])
"""
    ended = started(code)
    assert (ended.returncode, ended.stderr) == (130, INTERRUPTED)


def test_a_process_that_decodes_images_ends_without_a_word():
    code = """
import os, signal
from vitquant.cli import app, main

def command(words):
    child = os.fork()
    if child == 0:
        signal.raise_signal(signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    return 0

app.run = command
main(["recipes"])
"""
    ended = started(code)
    assert (ended.returncode, ended.stderr) == (0, "")


# Words


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", ""],
        ["quantize", "timm:deit_tiny_patch16_224", "--output", "x", "--calibration", ""],
        ["quantize", "timm:deit_tiny_patch16_224", "--output", "", "--calibration", "x"],
        ["quantize", "timm:deit_tiny_patch16_224", "--output", "x", "--calibration", "x", "--weights", ""],
        ["quantize", "timm:deit_tiny_patch16_224", "--output", "x", "--calibration", "x", "--recipe="],
        ["evaluate", "x", "--data", ""],
        ["evaluate", "x", "--data", "x", "--preprocessing", ""],
        ["export", "x", "--format", "program", "--output="],
        ["parity", "x", "--data="],
        ["allocate", "", "--output", "x.toml"],
        ["allocate", "x", "--output", "x.toml", "--figure", ""],
        ["sensitivity", "timm:deit_tiny_patch16_224", "--calibration", "x", "--output", ""],
        ["landscape", "timm:deit_tiny_patch16_224", "--calibration", "x", "--output", ""],
        ["demo", "--output="],
        [""],
    ],
)
def test_an_empty_string_is_no_path(refused, words):
    assert "an empty string after" in refused(*words)


def test_a_value_may_end_in_an_equals_sign(refused):
    assert "an empty string" not in refused("inspect", "no/such=")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantise"], "Did you mean 'quantize'?"),
        (["evaluate", "x", "--dta", "y"], "--data"),
        (["evaluate", "x"], "--data"),
        (["evaluate", "x", "--data", "x", "--batch", str(10**30)], "--batch"),
        (["export", "x", "--format", "onnx-integer", "--batch", str(2**63)], "--batch"),
        (["evaluate", "x", "--data", "x", "--threads", "1000000000"], "--threads"),
        (["evaluate", "x", "--data", "x", "--image-workers", "-1"], "--image-workers"),
        (["evaluate", "x", "--data", "x", "--image-workers", "100000"], "--image-workers"),
        (["quantize", "m", "--output", "x", "--calibration", "x", "--seed", str(2**64)], "--seed"),
        (["quantize", "m", "--output", "x", "--calibration", "x", "--memory-budget", "nan"], "--memory-budget"),
        (["quantize", "m", "--output", "x", "--calibration", "x", "--memory-budget", "inf"], "--memory-budget"),
        (["allocate", "x", "--output", "x.toml", "--mean-bits", "nan"], "--mean-bits"),
        (["demo", "--minutes", "nan"], "--minutes"),
    ],
)
def test_words_are_refused_by_the_option_that_has_them(refused, words, said):
    assert said in refused(*words)


# Shells


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_recipes_without_torch(shell):
    words = "vitquant quantize m --recipe fq"
    asked = {"_VITQUANT_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": "4"}
    asked |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = (
        "import atexit, sys\nfrom vitquant.cli import main\n"
        "atexit.register(lambda: sys.stderr.write('torch' * ('torch' in sys.modules)))\nmain()"
    )
    ended = subprocess.run(command([], code), capture_output=True, text=True, env={**os.environ, **asked})
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "fq-vit-published" in ended.stdout


def test_recipes_complete_and_overlays_behind_a_plus():
    assert recipe_names("fq") == ["fq-vit", "fq-vit-published"]
    assert recipe_names("d") == ["default"]
    assert recipe_names("repq-vit+fully") == ["repq-vit+fully-integer"]
    assert "fully-integer" not in recipe_names("")
    assert measures("nu") == ["nuclear-norm"]


def test_help_has_a_short_name_everywhere(run):
    assert run("-h") == run("--help")
    assert run("quantize", "-h")[0] == 0
    assert "--install-completion" in run("-h")[1]
