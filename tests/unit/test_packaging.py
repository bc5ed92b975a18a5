"""What is installed: the wheel holds the whole package, and there is one version."""

import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import vitquant
from vitquant.cli.app import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    backend = pytest.importorskip("hatchling.build", reason="the extra `test` holds hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = backend.build_wheel(str(folder))
    with zipfile.ZipFile(folder / name) as opened:
        yield opened


def test_the_wheel_holds_every_file_of_the_package(wheel):
    package = ROOT / "src" / "vitquant"
    files = {path.relative_to(ROOT / "src").as_posix() for path in package.rglob("*") if path.is_file()}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name for name in files if "__pycache__" not in name}
    assert "vitquant/py.typed" in held


def test_the_version_is_the_same_everywhere(wheel, capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"vitquant {vitquant.__version__}\n"
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert Parser().parsestr(wheel.read(metadata).decode())["Version"] == vitquant.__version__
