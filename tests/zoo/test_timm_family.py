"""The committed list of timm's Vision Transformers is true for the code as it is now."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import timm
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "timm_family.py"


def load():
    """The script that makes the list; no package holds it."""
    spec = importlib.util.spec_from_file_location("timm_family", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


timm_family = load()
LIST = timm_family.read_document(timm_family.DOCUMENT.read_text())
MADE_WITH = timm_family.versions_of_document(timm_family.DOCUMENT.read_text())


def same_timm():
    return pytest.mark.skipif(timm.__version__ != MADE_WITH["timm"], reason=f"the list is of timm {MADE_WITH['timm']}")


@same_timm()
def test_every_name_of_the_family_is_listed_once():
    text = timm_family.DOCUMENT.read_text()
    names = [name for _, name in timm_family.family()]
    assert names
    assert sorted(LIST) == sorted(names)
    assert all(text.count(f"`{name}`") == 1 for name in names)


@same_timm()
def test_every_module_of_timm_with_attention_in_its_name_is_in_the_family_or_left_out():
    left_out = {name for modules in timm_family.LEFT_OUT for name in modules.replace(",", " ").split()}
    transformers = [
        module for module in timm.list_modules() if "vit" in module or "former" in module or "swin" in module
    ]
    assert set(transformers) <= set(timm_family.SMALLEST) | left_out


def test_most_are_captured():
    captured = [name for name, (captured, *_) in LIST.items() if captured]
    assert len(captured) >= 0.97 * len(LIST)


def test_the_plain_families_run_in_integers():
    for family in ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        assert LIST[family][-1], family


@same_timm()
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("module", timm_family.SMALLEST)
def test_the_list_is_true(module):
    """Two names of each module, others every day."""
    torch.set_num_threads(1)
    names = timm.list_models(module=module)
    for name in random.sample(names, min(2, len(names))):
        finding = timm_family.examine_apart(module, name, {})
        found = finding.captured, finding.sites, finding.attention, finding.unnamed
        assert found == LIST[name][:-1], f"{name}: {finding}"
        assert LIST[name][-1] in (finding.lowers, None), f"{name}: {finding}"
