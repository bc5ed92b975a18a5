"""Powers as integers that sums are made of."""

import pytest
import torch

from vitquant.lowering.scaled import Powers, numerators
from vitquant.quantizers import build_quantizer
from vitquant.spec import Log2, LogSqrt2, QParams, QuantSpec


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [(Log2(), 2), (Log2(), 4), (Log2(True), 4), (LogSqrt2(), 2), (LogSqrt2(), 4), (LogSqrt2(True), 4), (LogSqrt2(), 5)],
)
def test_numerators_and_their_scales_are_the_levels_of_the_quantizer(scheme, bits):
    quantizer = build_quantizer(QuantSpec(bits, scheme=scheme), QParams(torch.tensor(0.37)))
    powers = Powers("codes", torch.tensor(quantizer.zero_code), quantizer.scale.double(), steps=quantizer.steps)
    codes = torch.arange(quantizer.zero_code + 1)
    tables = numerators(powers)
    assert len(tables) == quantizer.steps
    assert torch.stack([table for table, _ in tables]).count_nonzero(0).tolist() == [1] * (len(codes) - 1) + [0]
    assert all(int(table.min()) >= 0 and int(table.max()) <= 2**15 for table, _ in tables)
    found = sum(table * scale for table, scale in tables)
    torch.testing.assert_close(found, quantizer.decode(codes, torch.float64), rtol=1e-15, atol=0)
