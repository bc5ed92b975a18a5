"""Programs as functions of images: codes of images are those of the quantizer, logits those that codes stand for."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitquant.errors import LoweringError
from vitquant.program.instructions import IntegerProgram, Register
from vitquant.quantizers import build_quantizer
from vitquant.runtime.on_images import InputQuantization, OnImages, OutputQuantization, interpreted
from vitquant.spec import QParams, QuantSpec


@given(
    scale=st.floats(2**-12, 10, width=32),
    zero=st.integers(0, 255),
    bits=st.sampled_from([6, 8]),
    steps=st.lists(st.floats(-400, 400, width=32), min_size=1, max_size=20),
)
def test_codes_of_images_are_those_of_the_quantizer(scale, zero, bits, steps):
    spec = QuantSpec(bits)
    quantizer = build_quantizer(spec, QParams(torch.tensor(scale), torch.tensor(min(zero, spec.qmax))))
    quantization = InputQuantization(float(quantizer.scale), int(quantizer.zero_point), spec.qmin, spec.qmax)
    # Halves among them, which round to even.
    images = torch.cat([torch.tensor(steps), torch.arange(-300.5, 300.5)]) * quantizer.scale
    assert torch.equal(quantization.encode(images), quantizer.encode(images).to(torch.int64))


def test_logits_are_what_their_codes_stand_for():
    image, logits = InputQuantization(0.5, 3, 0, 255), OutputQuantization((0.25, 0.5), 10)
    model = OnImages(lambda codes: codes + 4, image, {"logits": logits})
    expected = [[(5 + 4 - 10) * 0.25, (7 + 4 - 10) * 0.5]]
    assert model(torch.tensor([[1.0, 2.0]])).tolist() == expected
    both = {"map": OutputQuantization((0.5,), 1), "logits": logits}
    found = OnImages(lambda codes: {"logits": codes + 4, "map": codes[..., None]}, image, both)(
        torch.tensor([[1.0, 2.0]])
    )
    assert list(found) == ["map", "logits"]
    assert (found["logits"].tolist(), found["map"].tolist()) == (expected, [[[2.0], [3.0]]])


def test_a_program_that_does_not_say_what_its_codes_stand_for_is_refused():
    program = IntegerProgram("x", {"output": "x"}, {"x": Register("u8", (-1, 2))}, {}, ())
    with pytest.raises(LoweringError, match="does not say what its codes stand for"):
        interpreted(replace(program, facts={"recipe": "mine"}))
