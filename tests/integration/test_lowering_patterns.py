"""Odd patterns around one block of attention: the program is the simulation, or the pattern is refused by name."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import vitquant
from vitquant.engines import default_engine
from vitquant.errors import LoweringError
from vitquant.lowering import lower
from vitquant.lowering.codes import _integers
from vitquant.lowering.scaled import Scaled, Term
from vitquant.model.simulation import ExactSimulation
from vitquant.program.instructions import Linear, Product, Requantize
from vitquant.quantizers import build_quantizer
from vitquant.quantizers.twin_uniform import TwinUniformQuantizer
from vitquant.runtime.on_images import interpreted
from vitquant.spec import PerAxis, PerHead, QParams, QuantSpec, TwinUniform


class Block(nn.Module):
    """A patch embedding, one attention with a residual addition, and then `body` of (batch, 16 tokens, 16 channels).

    `mix` is what becomes of probabilities and values.
    """

    def __init__(self, body, prepare, mix=torch.matmul):
        super().__init__()
        self.body, self.prepare, self.mix = body, prepare, mix
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc, self.bare, self.narrow = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 8)
        self.other, self.conv = nn.Linear(16, 8), nn.Conv2d(16, 16, 3, padding=1)
        self.gain, self.position = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(1, 16, 16))
        self.token, self.head = nn.Parameter(torch.randn(1, 2, 16)), nn.Linear(16, 5)
        self.register_buffer("later", torch.ones(16, 16, dtype=torch.bool).triu(1))

    def forward(self, x):
        x = self.patches(self.prepare(x)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        probs = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
        x = x + self.proj(self.mix(probs, v).transpose(1, 2).flatten(2))
        return self.head(self.body(self, x).mean(1))


def same(x):
    return x


def quantized(body=lambda s, x: x, prepare=same, recipe="fq-vit", mix=torch.matmul, settings=()):
    torch.manual_seed(0)
    data = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    return vitquant.quantize(Block(body, prepare, mix).eval(), recipe, data, settings=settings, simulated=True)


def masked(before=same, after=same, mask=lambda s, x: s.later, fill=-math.inf, first=same):
    """An attention whose scores are moved before the mask and between it and the softmax, and moved back."""

    def body(s, x):
        h = s.fc(x).unflatten(-1, (2, 8)).transpose(1, 2)
        scores = before(first(h @ h.mT).masked_fill(mask(s, x), fill))
        return (after(scores.softmax(-1)) @ h).transpose(1, 2).flatten(2)

    return body


def over_the_batch(s, x):
    """Masked scores of one row, which a softmax takes for all images together."""
    return (x[:, :1] @ x.mT).masked_fill(s.later[2], -math.inf).flatten().softmax(0).view(-1, 1, 16) @ x


BODIES = {
    "padding beside a constant": lambda s, x: s.fc(functional.pad(s.bare(x) + 0.5, (0, 0, 1, 2))),
    "padding beside a constant of each channel": lambda s, x: s.fc(functional.pad(s.bare(x) + s.gain, (0, 0, 1, 2))),
    "gains of either sign on both branches": lambda s, x: s.norm(x * s.gain - s.fc(x) * s.gain.flip(0)),
    "a gain of zero": lambda s, x: x + s.fc(x) * (s.gain * 0),
    "channels of two sizes joined before a norm": lambda s, x: s.norm(torch.cat([s.narrow(x), s.other(x) * 6], -1)),
    "a mask that grows with the batch along the second axis": masked(
        after=lambda probs: probs.transpose(0, 1),
        first=lambda scores: scores.transpose(0, 1),
        mask=lambda s, x: s.later.expand(2, len(x), 16, 16),
    ),
    "a constant joined along the tokens": lambda s, x: s.fc(torch.cat([x, s.token.expand(len(x), -1, -1), s.fc(x)], 1)),
    "a repeated sum joined": lambda s, x: s.fc(torch.cat([s.fc(x).mean(1, keepdim=True) * 2 + s.token, x], 1)),
    "positions moved on": lambda s, x: (
        s.conv((s.fc(x) + s.position).transpose(1, 2).reshape(-1, 16, 4, 4)).flatten(2).mT
    ),
    "positions in windows": lambda s, x: s.fc((s.fc(x) + s.position).reshape(-1, 4, 16)).reshape(-1, 16, 16),
    "half of it turned": lambda s, x: s.fc(torch.cat([-s.fc(x)[..., 8:], s.fc(x)[..., :8]], -1) * s.gain),
    "a gate": lambda s, x: s.fc(s.fc(x) * functional.silu(s.bare(x))),
    "a batch along the second axis": lambda s, x: s.fc(x.transpose(0, 1)).transpose(0, 1),
    "an empty part": lambda s, x: s.fc(torch.cat([x[:, :0], x * 2], 1)),
    "chunks of which the last is narrower": lambda s, x: s.fc(
        torch.cat([part * (1 + number) for number, part in enumerate(x.chunk(3, 1))], 1)
    ),
    "one layer twice": lambda s, x: s.fc(s.fc(x)),
    "masked scores moved twice": masked(
        lambda scores: scores.transpose(1, 2).flatten(1, 2), lambda probs: probs.unflatten(1, (16, 2)).transpose(1, 2)
    ),
    "constant minus tensor": lambda s, x: s.fc(s.position - s.fc(x)),
}


@pytest.mark.parametrize("name", BODIES)
def test_odd_patterns_give_the_codes_of_the_simulation(name):
    check(quantized(BODIES[name]))


TWINS = [f"twin-steps.{key}" for key in ("bits=6", "shift=2", "observer=minmax")]


@pytest.mark.parametrize("name", BODIES)
def test_odd_patterns_of_twin_steps_give_the_codes_of_the_simulation(name):
    model = quantized(BODIES[name], recipe="fq-vit+twin-steps", settings=TWINS)
    assert isinstance(model.quantizers["blocks.0.attn.context:value"], TwinUniformQuantizer)
    check(model)


@pytest.mark.parametrize("shift", [1, 2, 3])
@pytest.mark.parametrize("bits", [2, 4, 5])
def test_twin_steps_of_any_width_that_fits_give_the_codes_of_the_simulation(bits, shift):
    check(quantized(recipe="fq-vit+twin-steps", settings=[f"twin-steps.bits={bits}", f"twin-steps.shift={shift}"]))


@pytest.mark.parametrize(("bits", "shift", "most"), [(7, 2, 319), (8, 1, 383), (6, 3, 287)])
def test_twin_steps_that_span_more_than_8_bits_are_refused(bits, shift, most):
    model = quantized(recipe="fq-vit+twin-steps", settings=[f"twin-steps.bits={bits}", f"twin-steps.shift={shift}"])
    said = f"{bits} bits of twin_uniform with shift {shift} are integers up to {most}, and products are of 8 bits; give"
    with pytest.raises(LoweringError, match=f"blocks.0.attn.scores:query: {said} it fewer bits or a lower shift"):
        lower(model)


def twin(model, name, granularity=None, zeros=1):
    """The model with twin steps at one more place."""
    old, axis = model.quantizers[name], granularity or model.quantizers[name].spec.granularity
    scale = old.scale.flatten()[:1].expand(zeros) if zeros > 1 else old.scale.flatten()[0]
    zero = torch.arange(zeros, dtype=torch.int32) + 8 if zeros > 1 else torch.tensor(8)
    spec = QuantSpec(6, granularity=axis, scheme=TwinUniform())
    model.insert({name: build_quantizer(spec, QParams(scale.clone(), zero))})
    return model


@pytest.mark.parametrize(
    ("name", "granularity", "zeros", "said"),
    [
        ("patch_embed:input", None, 1, "the image has twin steps"),
        ("blocks.0.attn.scores:query", PerAxis(-1), 8, "its twin steps begin elsewhere in every channel"),
    ],
)
def test_twin_steps_that_integers_do_not_have_are_refused(name, granularity, zeros, said):
    with pytest.raises(LoweringError, match=said):
        lower(twin(quantized(), name, granularity, zeros))


def test_weights_may_have_twin_steps():
    model = quantized(settings=["weights.symmetric=false", "weights.signed=false", "weights.per=axis"])
    name, old = "blocks.0.attn.proj:weight", model.quantizers["blocks.0.attn.proj:weight"]
    params = QParams(old.scale * 4, torch.arange(24, 40, dtype=torch.int32))
    model.insert({name: build_quantizer(replace(old.spec, bits=6, scheme=TwinUniform()), params)})
    check(model)


MIXES = {
    "a part of it": lambda p, v: p[..., 1:] @ v[..., 1:, :],
    "turned": lambda p, v: p.transpose(-1, -2) @ v,
    "rolled": lambda p, v: p.roll(3, -1) @ v,
    "padded": lambda p, v: functional.pad(p, (0, 1))[..., 1:] @ v,
    "scaled": lambda p, v: (p * 0.5) @ v,
    "on the right": lambda p, v: (v.mT @ p.mT).mT,
    "as a gate": lambda p, v: (p @ v) * p[..., :8],
    "in a sum": lambda p, v: (p @ v) - p[..., :8],
}


@pytest.mark.parametrize("scheme", ["log2", "log_sqrt2"])
@pytest.mark.parametrize("name", MIXES)
def test_powers_may_be_moved_and_read_by_products_and_sums(name, scheme):
    check(quantized(mix=MIXES[name], settings=[f"attention-probs.scheme={scheme}"]))


def test_a_pooling_of_powers_of_the_root_of_two_is_refused():
    model = quantized(mix=lambda p, v: p.mean(-1, keepdim=True) + p @ v, settings=["attention-probs.scheme=log_sqrt2"])
    with pytest.raises(LoweringError, match="pool: its input is powers of the root of two, which only products"):
        lower(model)


@pytest.mark.parametrize(
    "prepare",
    [lambda x: functional.pad(x[..., 1:-1, 1:-1], (1, 1, 1, 1)), lambda x: x.transpose(2, 3).roll(1, 2)],
    ids=["cut and padded", "turned"],
)
def test_an_image_may_be_moved_before_it_is_quantized(prepare):
    model = quantized(prepare=prepare)
    assert model.image_quantizer is not None
    check(model)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_may_have_zero_points(bits):
    model = quantized(settings=["weights.symmetric=false", f"weights.bits={bits}"])
    assert model.quantizers["blocks.0.attn.qkv:weight"].zero_point.any()
    check(model)


def varied(model, name, granularity, count, symmetric=True):
    """The model with a scale for each index of an axis of one value, none like another."""
    old = model.quantizers[name]
    spec = replace(old.spec, granularity=granularity, signed=symmetric, symmetric=symmetric)
    zero = torch.zeros(count, dtype=torch.int32) if symmetric else torch.arange(count, dtype=torch.int32) + 120
    model.insert({name: build_quantizer(spec, QParams(old.scale.flatten()[:1] * torch.linspace(1, 2, count), zero))})
    return model


ATTENTION = "blocks.0.attn"
VARIED = {
    "query by head": (f"{ATTENTION}.scores:query", PerHead(), 2),
    "key by head": (f"{ATTENTION}.scores:key", PerHead(), 2),
    "value by head": (f"{ATTENTION}.context:value", PerHead(), 2),
    "query by token": (f"{ATTENTION}.scores:query", PerAxis(-2), 16),
    "key by token": (f"{ATTENTION}.scores:key", PerAxis(-1), 16),
    "value by channel": (f"{ATTENTION}.context:value", PerAxis(-1), 8),
    "input of a layer by token": (f"{ATTENTION}.proj:input", PerAxis(-2), 16),
    "a branch of a residual addition by token": ("blocks.0.residual1:rhs", PerAxis(-2), 16),
}


def multipliers_of(program, register):
    """The shapes of the multipliers by which a register's sums become codes."""
    readers = [each for each in program.instructions if isinstance(each, Requantize) and register in each.inputs]
    return {tuple(program.constants[name].shape) for each in readers for name in each.multipliers}


@pytest.mark.parametrize("name", VARIED)
def test_scales_may_differ_by_head_row_and_channel_that_nothing_sums_over(name):
    value, granularity, count = VARIED[name]
    check(varied(quantized(), value, granularity, count))


def test_the_multipliers_that_follow_differ_as_the_scales_do():
    model = quantized()
    varied(varied(model, f"{ATTENTION}.scores:query", PerHead(), 2), f"{ATTENTION}.scores:key", PerAxis(-1), 16)
    varied(model, f"{ATTENTION}.proj:input", PerAxis(-2), 16)
    program = lower(model)
    scores, proj = (
        next(each.output for each in program.instructions if isinstance(each, kind) and each.site == f"{ATTENTION}.{n}")
        for kind, n in ((Product, "scores"), (Linear, "proj"))
    )
    assert multipliers_of(program, scores) == {(1, 2, 1, 16)}
    assert multipliers_of(program, proj) == {(1, 16, 16)}
    layer = next(each for each in program.instructions if each.output == proj)
    assert layer.bias is None  # no one scale of its accumulators
    check(model)


@pytest.mark.parametrize("name", ["query by head", "value by head"])
def test_heads_with_zero_points_of_their_own_are_refused(name):
    value, granularity, count = VARIED[name]
    with pytest.raises(LoweringError, match="has several zero points; use per = tensor, or symmetric = true"):
        lower(varied(quantized(), value, granularity, count, symmetric=False))


@pytest.mark.parametrize(
    ("name", "granularity", "count"),
    [("scores:query", PerAxis(-1), 8), ("scores:key", PerAxis(-2), 8), ("context:value", PerAxis(-2), 16),
     ("proj:input", PerAxis(-1), 16)],
)  # fmt: skip
def test_scales_that_are_summed_over_are_refused(name, granularity, count):
    with pytest.raises(LoweringError, match=f"has {count} scales, and its sums run over them; use per = tensor"):
        lower(varied(quantized(), f"{ATTENTION}.{name}", granularity, count))


def test_a_mean_over_things_with_a_scale_each_is_refused():
    model = quantized()
    tokens = model.quantizers["pool:input"]
    scales = QParams(tokens.scale * torch.linspace(1, 2, 16), tokens.zero_point.expand(16).clone())
    model.insert({"pool:input": build_quantizer(replace(tokens.spec, granularity=PerAxis(1)), scales)})
    with pytest.raises(LoweringError, match=r"pool: its input has a scale for each thing that it sums"):
        lower(model)


def test_codes_with_a_constant_beside_them_are_no_codes_of_one_quantizer():
    codes = Term("x", torch.tensor(3), torch.tensor(0.5).double())
    assert Scaled((codes,), torch.zeros(16).double()).single is codes
    assert Scaled((codes,), torch.tensor([0, 0.5]).double()).single is None
    assert Scaled((codes, codes), torch.zeros(()).double()).single is None


def test_a_ratio_just_below_a_power_of_two_keeps_31_bits():
    zero, one = torch.tensor(0), torch.tensor(1.0).double()
    for ratio in (1 - 2.0**-40, -1 + 2.0**-40):
        (multiplier,), _, shift = _integers(Scaled((Term("x", zero, ratio * one),), 0 * one), Term("y", zero, one))
        assert (abs(int(multiplier)), shift) == (2**31 - 1, 31)


def check(model, images=None):
    images = torch.randn(6, 3, 16, 16) if images is None else images
    with torch.inference_mode():
        logits, simulated = interpreted(lower(model))(images), ExactSimulation(model)(images).float()
    assert torch.equal(logits, simulated)
    assert logits.unique().numel() > 10


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (lambda s, x: s.fc(s.fc(x) + torch.arange(x.shape[0]).float().view(-1, 1, 1)), "not repeated image by image"),
        (lambda s, x: s.fc((x.mean(1, keepdim=True) + s.fc(x)).transpose(1, 2)), "a part is repeated"),
        (lambda s, x: s.fc(s.fc(x) / x.shape[0]), "which is no tensor"),
        (lambda s, x: s.fc(s.fc(x).to(torch.bfloat16).float()), "has no integer form"),
        (lambda s, x: s.fc(s.fc(x).max(1, keepdim=True)[0] + x), "max has no integer form"),
        (lambda s, x: s.fc(x) - torch.mean(x, dim=None, keepdim=True), "averages over the batch"),
        (
            lambda s, x: s.fc((s.fc(x) + s.position).transpose(0, 1).reshape(-1, 16)).view(16, -1, 16).transpose(0, 1),
            "has the images inside",
        ),
        (
            lambda s, x: s.norm(torch.cat([s.narrow(x), 6 * s.gain[:8].expand(len(x), 16, 8)], -1)),
            "a constant is joined along the axis of the scales",
        ),
        (lambda s, x: s.fc(functional.pad(s.bare(x), (0, 0, 1, 2), value=1.0)), "padding with other than zeros"),
        (lambda s, x: s.bare(functional.pad(s.fc(x), (1, 2), "reflect")[..., :16]), "padding with other than zeros"),
        (lambda s, x: s.fc(torch.add(s.fc(x), s.position, alpha=2)), "it adds a multiple"),
        (lambda s, x: s.fc(torch.div(s.fc(x), 0.5, rounding_mode="floor")), "divides by whole numbers"),
        (masked(fill=-5.0), "fills with -5.0, which is no mask"),
        (masked(lambda scores: scores.mT, lambda probs: probs.mT), "rows of masked scores are rearranged"),
        (
            masked(lambda scores: scores.flatten(), lambda probs: probs.view(-1, 2, 16, 16)),
            "rows of masked scores are rearranged",
        ),
        (
            lambda s, x: x + s.bare(over_the_batch(s, s.fc(x))),
            "rows of masked scores are rearranged",
        ),
        (
            masked(
                after=lambda probs: probs[0].unflatten(0, (-1, 2)),
                first=lambda scores: scores.flatten(0, 1)[None],
                mask=lambda s, x: torch.stack([s.later, s.later.T]).repeat(len(x), 1, 1)[None],
            ),
            "its mask grows with the batch along another axis than the first",
        ),
    ],
)
def test_what_has_no_integer_form_is_refused_for_what_it_is(body, said):
    with pytest.raises(LoweringError, match=said):
        lower(quantized(body))


class Halves(nn.Module):
    """A patch embedding of an image's left half and one of its right half."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, (4, 2), (4, 2)), nn.Conv2d(3, 16, (4, 2), (4, 2))

    def forward(self, x):
        return self.left(x[..., :8]) + self.right(x[..., 8:])


def test_two_quantizers_of_one_image_are_refused():
    torch.manual_seed(0)
    model = Block(lambda s, x: x, same)
    model.patches = Halves()
    halves = torch.tensor([1.0, 3.0]).repeat_interleave(8)
    with pytest.raises(LoweringError, match="the image has two quantizers"):
        lower(vitquant.quantize(model.eval(), "fq-vit", [torch.randn(4, 3, 16, 16) * halves for _ in range(2)]))


def test_the_exact_simulation_has_the_codes_of_images_and_weights_that_float32_has():
    model = quantized()
    quantizer = model.image_quantizer
    halves = (torch.arange(-90, 90) + 0.5) * quantizer.scale
    images = torch.cat([halves, halves.nextafter(torch.tensor(9.0)), halves.nextafter(torch.tensor(-9.0))])
    images = images.repeat(9)[: 6 * 3 * 16 * 16].view(6, 3, 16, 16)
    assert not torch.equal(copy.deepcopy(quantizer).double().encode(images.double()), quantizer.encode(images))
    check(model, images)


@pytest.mark.parametrize("recipe", ["fq-vit", "minmax"])
def test_a_model_that_normalizes_its_images_is_simulated(recipe):
    model = quantized(prepare=lambda x: (x - 0.5) / 0.25, recipe=recipe)
    name, _, reason = default_engine(model)
    assert name == "simulated"
    assert "image" in reason or "computes it in float" in reason
