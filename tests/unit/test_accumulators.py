"""What an accumulator can hold is what is said of it."""

import pytest
import torch
from small_programs import one, program

from vitquant.program import instructions as p
from vitquant.report.accumulators import Accumulator, accumulators


@pytest.mark.parametrize(
    ("type", "low", "high", "bits"),
    [
        ("s32", -(2**31), 0, 0),
        ("s32", 0, 2**31 - 1, 0),
        ("s32", -(2**30), 2**30 - 1, 1),
        ("s32", 0, 2**30, 0),
        ("s32", -1, 0, 31),
        ("s32", 0, 255, 23),
        ("s16", -129, 127, 7),
    ],
)
def test_free_bits_are_those_that_no_value_needs(type, low, high, bits):
    assert Accumulator(type, low, high).headroom == bits
    least, most = p.type_limits(type)
    assert least <= low << bits
    assert high << bits <= most
    assert low << bits + 1 < least or high << bits + 1 > most


def test_a_layers_range_is_that_of_its_own_weights():
    weight = torch.tensor([[1, -2, 3, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    layer = p.Linear("y", "here", "x", "w", "b", 3, None)
    program = one(layer, p.Register("s32", (-1, 4, 2)), w=weight, b=torch.tensor([10, -1000]))
    found = accumulators(program)["here"]
    # Codes 0..255 less 3: from -3 * (1 + 3) - 2 * 252 + 10, or -3 - 1000; to 252 * (1 + 3) + 2 * 3 + 10.
    assert (found.low, found.high) == (min(-506, -1003), 1024)
    assert found.to_dict() == {"type": "s32", "low": -1003, "high": 1024, "headroom_bits": 20}


@pytest.mark.parametrize("order", [("small", "large"), ("large", "small")])
def test_of_a_site_that_sums_several_times_the_fullest_is_told(order):
    weights = {"small": torch.ones(6, 6).long(), "large": torch.full((6, 6), 100)}
    steps = [p.Linear(f"y{name}", "here", "x", name, None, 0, None) for name in order]
    written = {step.output: p.Register("s32", (-1, 4, 6)) for step in steps}
    found = accumulators(program(*steps, registers=written, constants=weights))["here"]
    assert (found.low, found.high) == (0, 6 * 255 * 100)
