"""What recipes make of real models is, bit for bit, what it was when `tests/golden.json` was made.

`python tests/helpers/golden.py write` makes it again after a change that means to change numbers.
"""

import json

import golden
import pytest

GOLDEN = json.loads(golden.FILE.read_text())
# The rest of the embedded model's, and the real DeiT-Tiny's, take minutes.
QUICK = {"minmax", "fq-vit", "default"}


def cases():
    for run in golden.RUNS:
        quick = run.model == "embedded" and run.recipe in QUICK and run.bits is None
        yield pytest.param(run, id=run.name, marks=() if quick else pytest.mark.slow)


def test_every_run_has_its_digests():
    assert [run.name for run in golden.RUNS] == list(GOLDEN["runs"])


@pytest.mark.parametrize("run", cases())
def test_the_numbers_are_what_they_were(run, request):
    if run.model == "deit":
        request.getfixturevalue("shared")
    if golden.probe() != GOLDEN["probe"]:
        pytest.skip(f"float sums here are not those that golden.json was made with (torch {GOLDEN['torch']})")
    assert golden.digests(run) == GOLDEN["runs"][run.name]
