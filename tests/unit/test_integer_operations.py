"""Operations on codes beside the float operation and its quantizer; what replaces them, refuses them and keeps them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import vitquant
from vitquant.errors import CalibrationError, LoweringError, RecipeError
from vitquant.integer_modules import (
    Arithmetic,
    IntegerLayerNorm,
    IntegerOperation,
    IntegerSoftmax,
    LogIntSoftmax,
    NotIntegerError,
    PublishedLayerNorm,
    PublishedLogIntSoftmax,
    TableActivation,
)
from vitquant.model import QuantizedModel
from vitquant.quantizers import Quantizer, build_quantizer, params_from_range
from vitquant.quantizers.quantizer import channel_axis
from vitquant.spec import (
    Log2,
    Logarithmic,
    LogSqrt2,
    PerAxis,
    PerHead,
    PowerOfTwoFactor,
    QParams,
    QuantSpec,
    TwinUniform,
)

U8, U4 = QuantSpec(8), QuantSpec(4)
S8 = QuantSpec(8, signed=True, symmetric=True)
PTF = QuantSpec(8, granularity=PerAxis(-1), scheme=PowerOfTwoFactor())
CHANNELS = QuantSpec(8, granularity=PerAxis(-1))
POWERS, POWERS_AND_ZERO = QuantSpec(4, scheme=Log2()), QuantSpec(4, scheme=Log2(separate_zero=True))
ROOTS, ROOTS_AND_ZERO = QuantSpec(5, scheme=LogSqrt2()), QuantSpec(4, scheme=LogSqrt2(separate_zero=True))
WIDTH = 48


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covering(x: Tensor, spec: QuantSpec) -> Quantizer:
    """The quantizer whose range is that of `x`."""
    axis = channel_axis(spec.granularity)
    if isinstance(spec.scheme, Logarithmic):
        return build_quantizer(spec, QParams(torch.ones(() if axis is None else (x.shape[axis],))))
    others = [i for i in range(x.ndim) if axis is None or i != axis % x.ndim]
    return build_quantizer(spec, params_from_range(x.amin(others), x.amax(others), spec))


# Beside the float operation

Make = Callable[[Quantizer, Quantizer], IntegerOperation]
SOFTMAXES: dict[str, tuple[Make, QuantSpec, float, float]] = {
    # the operation, what its result is, how many codes it may be off, how many elements at least are equal
    "powers": (lambda a, b: LogIntSoftmax(a, b, "exact"), POWERS, 1, 0.99),
    "powers and zero": (lambda a, b: LogIntSoftmax(a, b, "exact"), POWERS_AND_ZERO, 1, 0.99),
    "roots": (lambda a, b: LogIntSoftmax(a, b, "exact"), ROOTS, 1, 0.99),
    "roots and zero": (lambda a, b: LogIntSoftmax(a, b, "exact"), ROOTS_AND_ZERO, 1, 0.99),
    "3 bits": (lambda a, b: LogIntSoftmax(a, b, "exact"), QuantSpec(3, scheme=Log2()), 1, 0.99),
    "published": (lambda a, b: PublishedLogIntSoftmax(a, b, "polynomial"), POWERS_AND_ZERO, 2, 0.7),
    "8 bits": (lambda a, b: IntegerSoftmax(a, b, "exact"), U8, 1, 0.97),
    "8 bits and a sign": (lambda a, b: IntegerSoftmax(a, b, "exact"), QuantSpec(8, signed=True), 1, 0.97),
    "4 bits": (lambda a, b: IntegerSoftmax(a, b, "exact"), U4, 1, 0.99),
}


# On coarser scores than those of 8 bits the published exponential is another function.
@pytest.mark.parametrize(
    ("kind", "scores"),
    [(kind, bits) for kind in SOFTMAXES for bits in (U8, S8, U4) if (kind, bits) != ("published", U4)],
)
def test_softmax_is_the_float_one_and_its_quantizer_within_a_code(kind: str, scores: QuantSpec) -> None:
    make, spec, off, equal = SOFTMAXES[kind]
    x = 2 * random(4, 3, 17, 17)
    source = covering(x, scores)
    x = source(x)
    probs = x.softmax(-1)
    operation = make(source, covering(probs, spec))
    assert_close(operation, x, operation.result.encode(probs), off, equal)


@pytest.mark.parametrize("kind", SOFTMAXES)
def test_hidden_scores_have_the_code_of_zero_and_the_others_those_of_a_shorter_row(kind: str) -> None:
    make, spec, *_ = SOFTMAXES[kind]
    x = covering(random(4, 9), U8)(random(4, 9))
    operation = make(covering(x, U8), covering(x.softmax(-1), spec))
    masked = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.bool)
    codes = operation.codes(x.masked_fill(masked, -torch.inf))
    assert bool((codes[:, masked] == operation.result.encode(torch.zeros(()))).all())
    assert torch.equal(codes[:, ~masked], operation.codes(x[:, ~masked]))
    assert not operation(x.masked_fill(masked, -torch.inf))[:, masked].any()


def test_probabilities_beyond_the_result_s_range_are_clamped() -> None:
    x = 2 * random(4, 9)
    source = covering(x, U8)
    x = source(x)
    operation = IntegerSoftmax(source, covering(0.3 * x.softmax(-1), U8), "exact")
    expected = operation.result.encode(x.softmax(-1))
    assert (expected == 255).sum() > 3
    assert_close(operation, x, expected, 1, 0.9)


def assert_close(
    operation: IntegerOperation, x: Tensor, expected: Tensor, off: float, equal: float, *more: Tensor
) -> None:
    with torch.no_grad():
        y = operation(x, *more)
    codes = operation.codes(x, *more)
    difference = (codes - expected.long()).abs()
    assert difference.max() <= off
    assert (difference == 0).float().mean() >= equal
    assert codes.dtype == torch.int64
    assert torch.equal(y, operation.result.decode(codes))
    assert torch.equal(operation.result.encode(y).long(), codes)  # they are codes of that quantizer


@pytest.mark.parametrize("source", [PTF, U8, S8])
@pytest.mark.parametrize("result", [U8, S8, U4, CHANNELS, PTF])
def test_layer_norm_is_the_float_one_and_its_quantizer_within_a_code(source: QuantSpec, result: QuantSpec) -> None:
    x = random(3, 17, WIDTH) * 2.0 ** torch.arange(WIDTH).remainder(4) + random(WIDTH, seed=1)
    quantizer = covering(x, source)
    x = quantizer(x)
    gain, bias = 1 + 0.3 * random(WIDTH, seed=2), random(WIDTH, seed=3)
    gain[:4] = torch.tensor([0.0, -1.0, 1e-6, 0.0])
    for weight, shift in ((gain, bias), (gain, None), (None, None)):
        y = functional.layer_norm(x, (WIDTH,), weight, shift, 1e-6)
        operation = IntegerLayerNorm(quantizer, covering(y, result), 1e-6)
        assert_close(operation, x, operation.result.encode(y), 1, 0.99, weight, shift)  # type: ignore[arg-type]


def test_layer_norm_of_many_channels_with_factors_up_to_128_does_not_overflow() -> None:
    """Integers of 15 bits: the digits that guard the root are fewer."""
    spec = QuantSpec(8, granularity=PerAxis(-1), scheme=PowerOfTwoFactor(8))
    x = random(5, 512).sign() * torch.ones(512).index_fill(0, torch.arange(20), 2**-8)
    source = covering(x, spec)
    x = source(x)
    y = functional.layer_norm(x, (512,))
    operation = IntegerLayerNorm(source, covering(y, U8), 1e-5)
    assert_close(operation, x, operation.result.encode(y), 1, 0.99, None, None)  # type: ignore[arg-type]


def test_layer_norm_minds_its_epsilon() -> None:
    x = 1e-3 * random(5, WIDTH)
    source = covering(x, PTF)
    x = source(x)
    codes = []
    for epsilon in (1e-12, 1e-6, 1e-4):
        y = functional.layer_norm(x, (WIDTH,), eps=epsilon)
        operation = IntegerLayerNorm(source, covering(y, U8), epsilon)
        assert_close(operation, x, operation.result.encode(y), 1, 0.99, None, None)  # type: ignore[arg-type]
        codes.append(IntegerLayerNorm(source, covering(random(9, 9), U8), epsilon).codes(x, None, None))
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[1], codes[2])


def test_layer_norm_of_constant_rows_is_its_bias() -> None:
    x, bias = torch.full((2, WIDTH), 0.7), random(WIDTH)
    source, result = covering(torch.cat([x, random(2, WIDTH)]), U8), covering(bias, U8)
    y = IntegerLayerNorm(source, result, 1e-6)(source(x), torch.full((WIDTH,), 5.0), bias)
    assert (y - bias).abs().max() <= 0.501 * result.scale


def test_published_layer_norm_is_the_float_one_but_for_its_8_bit_multipliers() -> None:
    x = random(3, 17, WIDTH) * 2.0 ** torch.arange(WIDTH).remainder(4)
    source = covering(x, PTF)
    x, gain, bias = source(x), 1 + 0.3 * random(WIDTH, seed=2), random(WIDTH, seed=3)
    y = functional.layer_norm(x, (WIDTH,), gain, bias)
    operation = PublishedLayerNorm(source, covering(y, U8), 1e-5)
    assert_close(operation, x, operation.result.encode(y), 2, 0.6, gain, bias)


ACTIVATIONS = [functional.gelu, functional.relu, functional.silu, functional.hardswish, torch.tanh]


@pytest.mark.parametrize("function", ACTIVATIONS)
@pytest.mark.parametrize(("source", "result"), [(U8, U8), (S8, U4), (U4, S8), (POWERS, U8)])
def test_a_table_is_the_float_activation_and_its_quantizer_bit_for_bit(
    function: Callable[[Tensor], Tensor], source: QuantSpec, result: QuantSpec
) -> None:
    x = 3 * random(1000)
    quantizer = covering(x, source)
    x = quantizer(x)
    operation = TableActivation(quantizer, covering(function(x), result), function)
    # The table is made of real values: rounded to float32 one may fall on the other side of a half.
    exact = quantizer.decode(quantizer.encode(x), torch.float64)
    assert_close(operation, x, operation.result.encode(function(exact)), 0, 1)


# Gradients


def operations() -> dict[str, tuple[IntegerOperation, Tensor, list[Tensor]]]:
    """One of each, its input on the grid, and its parameters."""
    scores, x = 2 * random(2, 3, 5, 5), random(2, 5, WIDTH)
    on_scores, on_x, factors = covering(scores, U8), covering(x, U8), covering(x, PTF)
    probs, y = scores.softmax(-1), functional.layer_norm(x, (WIDTH,))
    affine = [1 + 0.3 * random(WIDTH, seed=2), random(WIDTH, seed=3)]
    return {
        "powers": (LogIntSoftmax(on_scores, covering(probs, POWERS), "exact"), on_scores(scores), []),
        "levels": (IntegerSoftmax(on_scores, covering(probs, U8), "exact"), on_scores(scores), []),
        "layer norm": (IntegerLayerNorm(factors, covering(2 * y, U8), 1e-6), factors(x), affine),
        "published": (PublishedLayerNorm(factors, covering(2 * y, U8), 1e-6), factors(x), affine),
        "activation": (TableActivation(on_x, covering(x, U8), functional.gelu), on_x(x), []),
    }


@pytest.mark.parametrize("kind", operations())
def test_gradients_are_those_of_the_float_operation(kind: str) -> None:
    operation, x, parameters = operations()[kind]
    upstream = random(*x.shape, seed=5)
    found, expected = ([t.clone().requires_grad_() for t in (x, *parameters)] for _ in range(2))
    operation(*found).backward(upstream)
    operation.reference(*expected).backward(upstream)
    for left, right in zip(found, expected, strict=True):
        assert left.grad is not None
        assert torch.equal(left.grad, right.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", operations())
def test_with_gradients_the_values_are_the_same_to_the_last_bit(kind: str) -> None:
    operation, x, parameters = operations()[kind]
    with torch.no_grad():
        expected = operation(x, *parameters)
    assert torch.equal(operation(x.requires_grad_(), *parameters), expected)


def test_parameters_have_gradients_where_the_input_has_none() -> None:
    operation, x, parameters = operations()["layer norm"]
    gain, bias = (parameter.requires_grad_() for parameter in parameters)
    operation(x, gain, bias).sum().backward()
    assert gain.grad is not None
    assert bias.grad is not None


# What they refuse


def quantizer(spec: QuantSpec) -> Quantizer:
    return covering(random(2, 3, 5, WIDTH), spec)


TWIN = QuantSpec(6, scheme=TwinUniform())
SIXTEEN, HEADS = QuantSpec(16), QuantSpec(8, granularity=PerHead())
HEADS_OF_POWERS = QuantSpec(4, granularity=PerHead(), scheme=Log2())


@pytest.mark.parametrize(
    ("make", "source", "result", "reason"),
    [
        (
            lambda a, b: LogIntSoftmax(a, b, "exact"),
            SIXTEEN,
            POWERS,
            "its input has 16 bits: above 8 is simulated only",
        ),
        (lambda a, b: IntegerSoftmax(a, b, "exact"), U8, SIXTEEN, "its result has 16 bits"),
        (lambda a, b: LogIntSoftmax(a, b, "exact"), HEADS, POWERS, "its input has more than one scale"),
        (lambda a, b: LogIntSoftmax(a, b, "exact"), PTF, POWERS, "its input has more than one scale"),
        (lambda a, b: LogIntSoftmax(a, b, "exact"), POWERS, POWERS, "its input has more than one scale"),
        (lambda a, b: LogIntSoftmax(a, b, "exact"), U8, U8, "its result is not quantized to powers of two"),
        (lambda a, b: LogIntSoftmax(a, b, "exact"), U8, HEADS_OF_POWERS, "its result has more than one scale"),
        (lambda a, b: LogIntSoftmax(a, b, "exact"), U8, QuantSpec(5, scheme=Log2()), r"has 5 bits.*\(s4 in"),
        (
            lambda a, b: LogIntSoftmax(a, b, "exact"),
            U8,
            QuantSpec(6, scheme=LogSqrt2()),
            r"has 6 bits.*\(s5 in",
        ),
        (
            lambda a, b: LogIntSoftmax(a, b, "exact"),
            U8,
            QuantSpec(8, scheme=Log2(True)),
            r"has 8 bits.*\(s4 in",
        ),
        (
            lambda a, b: LogIntSoftmax(a, b, "exact"),
            U8,
            QuantSpec(5, scheme=LogSqrt2(True)),
            r"5 bits.*\(s4 in",
        ),
        (lambda a, b: PublishedLogIntSoftmax(a, b, "exact"), U8, ROOTS, "the published code rounds to powers of two"),
        (lambda a, b: IntegerSoftmax(a, b, "exact"), U8, POWERS, "its result has more than one scale"),
        (lambda a, b: IntegerSoftmax(a, b, "exact"), U8, HEADS, "its result has more than one scale"),
        (lambda a, b: IntegerLayerNorm(a, b, 1e-6), CHANNELS, U8, "its input has a scale for each channel"),
        (lambda a, b: IntegerLayerNorm(a, b, 1e-6), POWERS, U8, "its input is not on equally spaced levels"),
        (lambda a, b: IntegerLayerNorm(a, b, 1e-6), U8, POWERS, "its result is not on equally spaced levels"),
        (lambda a, b: IntegerLayerNorm(a, b, 1e-6), U8, HEADS, "its result has a scale for each channel"),
        (lambda a, b: PublishedLayerNorm(a, b, 1e-6), U8, U8, "there are no power-of-two factors"),
        (lambda a, b: TableActivation(a, b, torch.tanh), CHANNELS, U8, "its input has more than one scale"),
        (lambda a, b: TableActivation(a, b, torch.tanh), U8, PTF, "its result has more than one scale"),
        (lambda a, b: TableActivation(a, b, torch.tanh), SIXTEEN, U8, "its input has 16 bits"),
        (lambda a, b: TableActivation(a, b, torch.tanh), TWIN, U8, "its input has twin steps"),
        (lambda a, b: LogIntSoftmax(a, b, "exact"), TWIN, POWERS, "its input has more than one scale"),
        (lambda a, b: IntegerSoftmax(a, b, "exact"), U8, TWIN, "its result has more than one scale"),
        (lambda a, b: IntegerLayerNorm(a, b, 1e-6), TWIN, U8, "its input is not on equally spaced levels"),
        (lambda a, b: IntegerLayerNorm(a, b, 1e-6), U8, TWIN, "its result is not on equally spaced levels"),
    ],
)
def test_quantizers_that_have_no_integer_definition_are_refused(
    make: Make, source: QuantSpec, result: QuantSpec, reason: str
) -> None:
    with pytest.raises(NotIntegerError, match=reason):
        make(quantizer(source), quantizer(result))


def test_the_published_rounding_is_of_powers_of_two_that_begin_at_1() -> None:
    with pytest.raises(NotIntegerError, match="begin at 1: use the scheme log2 and the observer unit"):
        PublishedLogIntSoftmax(quantizer(U8), build_quantizer(POWERS, QParams(torch.tensor(0.9))), "exact")


@pytest.mark.parametrize("scale", [0.0, 2.0**-33, 2.0**33, torch.inf, torch.nan])
def test_powers_that_begin_nowhere_near_a_probability_are_refused(scale: float) -> None:
    """A masked entry, 64 octaves down, must stay zero."""
    with pytest.raises(NotIntegerError, match=r"the scale of its result, .*, is not between"):
        LogIntSoftmax(quantizer(U8), build_quantizer(POWERS, QParams(torch.tensor(scale))), "exact")


def test_a_refused_connection_leaves_the_operation_as_it_was() -> None:
    source, result = quantizer(U8), quantizer(U8)
    operation = TableActivation(source, result, torch.tanh)
    for refused in (SIXTEEN, CHANNELS):
        with pytest.raises(NotIntegerError):
            operation.connect(quantizer(refused), quantizer(U4))
    assert operation.source is source
    assert operation.result is result


def test_other_words_for_the_arithmetic_are_refused() -> None:
    for key in ("exponential", "softmax", "layer_norm", "activation"):
        with pytest.raises(RecipeError, match=f"{key} = 'exakt': it is one of"):
            Arithmetic(**{key: "exakt"})


# In a model


SIZES = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", **SIZES)


def timm_swin() -> nn.Module:
    import timm

    sizes = {"depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "img_size": 32, "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=5)


def made(make_model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter *= 8  # some scores far from others
    return model


def photos(count: int = 4, seed: int = 0) -> Tensor:
    return random(count, 3, 32, 32, seed=seed)


@pytest.fixture(scope="module")
def shared_vit() -> QuantizedModel:
    return vitquant.quantize(made(timm_vit), "fq-vit", [photos()])


@pytest.fixture
def vit(shared_vit: QuantizedModel) -> QuantizedModel:
    return copy.deepcopy(shared_vit)


SOFTMAX, INPUT = "blocks.0.attn.softmax", "blocks.0.attn.softmax:input"


def doubled(quantizer: Quantizer) -> Quantizer:
    return build_quantizer(quantizer.spec, QParams(2 * quantizer.scale, quantizer.zero_point, quantizer.factor))


def test_every_operation_stands_between_the_quantizers_around_it(vit: QuantizedModel) -> None:
    expected = {
        "blocks.0.norm1": ("blocks.0.norm1:input", "blocks.0.attn.qkv:input"),
        SOFTMAX: (INPUT, "blocks.0.attn.context:probs"),
        "blocks.0.norm2": ("blocks.0.norm2:input", "blocks.0.mlp.fc1:input"),
        "blocks.0.mlp.act": ("blocks.0.mlp.act:input", "blocks.0.mlp.fc2:input"),
        "norm": ("norm:input", "head:input"),
    }
    assert vit.float_reasons == {}
    assert set(vit.integer_operations) == set(expected)
    for name, (source, result) in expected.items():
        operation = vit.integer_operations[name]
        assert operation.source is vit.quantizers[source]
        assert operation.result is vit.quantizers[result]


def test_operations_take_the_quantizers_that_are_inserted_later(vit: QuantizedModel) -> None:
    x = photos(2, seed=1)
    before = vit(x)
    replaced = {INPUT: doubled(vit.quantizers[INPUT]), "head:input": doubled(vit.quantizers["head:input"])}
    vit.insert(replaced)
    assert vit.integer_operations[SOFTMAX].source is replaced[INPUT]
    assert vit.integer_operations["norm"].result is replaced["head:input"]
    assert not torch.equal(vit(x), before)
    seen: dict[str, Tensor] = {}
    vit.run(x, {"blocks.0.attn.context:probs": lambda y: seen.update(probs=y.clone())})
    table = vit.integer_operations[SOFTMAX].exponential  # type: ignore[attr-defined]
    assert table.octaves[1] == round(replaced[INPUT].scale.item() / 0.6931471805599453 * 2**12)
    assert set(torch.unique(seen["probs"]).tolist()) <= {0.0, *(2.0**-k for k in range(16))}


def test_operations_follow_scales_that_change_in_place(vit: QuantizedModel) -> None:
    before, inserted = vit(photos(2, seed=1)), copy.deepcopy(vit)
    inserted.insert({INPUT: doubled(inserted.quantizers[INPUT])})
    vit.quantizers[INPUT].scale.mul_(2)
    x = photos(2, seed=1)
    assert torch.equal(vit(x), inserted(x))
    assert not torch.equal(vit(x), before)


def test_a_quantizer_that_codes_cannot_use_is_refused_by_the_name_of_its_operation(vit: QuantizedModel) -> None:
    wide = build_quantizer(QuantSpec(12), QParams(torch.tensor(0.1), torch.tensor(0)))
    with pytest.raises(
        LoweringError, match=r"blocks\.0\.attn\.softmax is computed on codes, but its input has 12 bits"
    ):
        vit.insert({INPUT: wide})


def test_a_copy_has_operations_of_its_own(vit: QuantizedModel) -> None:
    x = photos(2, seed=1)
    before, copied = vit(x), copy.deepcopy(vit)
    assert torch.equal(copied(x), before)
    assert copied.integer_operations[SOFTMAX].source is copied.quantizers[INPUT]
    copied.quantizers[INPUT].scale.mul_(4)
    assert not torch.equal(copied(x), before)
    assert torch.equal(vit(x), before)


def test_computing_in_integers_once_more_is_refused_and_changes_nothing(vit: QuantizedModel) -> None:
    x = photos(2, seed=1)
    before = vit(x)
    with pytest.raises(CalibrationError, match="quantize it again"):
        vit.compute_in_integers(Arithmetic(exponential="polynomial"))
    assert torch.equal(vit(x), before)


def test_operations_hold_no_tensors(vit: QuantizedModel) -> None:
    state = vit.graph_module.state_dict()
    assert not [name for name in state if name.startswith("operations.")]
    assert vit.integer_operations
    assert all(not list(operation.parameters()) for operation in vit.integer_operations.values())


def test_gradients_reach_every_parameter(vit: QuantizedModel) -> None:
    vit(photos(2)).square().sum().backward()
    for name, parameter in vit.graph_module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_outputs_do_not_depend_on_gradients_or_on_the_batch(vit: QuantizedModel) -> None:
    x = photos(3, seed=1)
    with torch.inference_mode():
        expected = vit(x)
    assert torch.equal(vit(x), expected)
    assert torch.equal(vit.run(x, {}), expected)
    torch.testing.assert_close(vit(x[1:2]), expected[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("make_model", [timm_vit, timm_swin])
@pytest.mark.parametrize("recipe", ["fq-vit", "fq-vit-published"])
def test_saved_and_loaded_it_gives_the_same_bits(make_model, recipe: str, tmp_path: Path) -> None:
    model = made(make_model)
    quantized = vitquant.quantize(model, recipe, photos(6).split(3))
    x = photos(3, seed=1)
    with torch.no_grad():
        expected = quantized(x)
        torch.testing.assert_close(quantized.run(x, {}, quantized=False), model(x), rtol=0, atol=1e-5)
    quantized.save(tmp_path / "out")
    loaded = vitquant.load(tmp_path / "out", model=made(make_model))
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded(x[:1]), quantized(x[:1]))
    assert loaded.arithmetic == quantized.arithmetic
    assert loaded.float_reasons == quantized.float_reasons
    assert [type(operation) for operation in loaded.integer_operations.values()] == [
        type(operation) for operation in quantized.integer_operations.values()
    ]


def test_an_activation_keeps_its_own_constants() -> None:
    import timm

    torch.manual_seed(0)
    activation = partial(nn.LeakyReLU, negative_slope=0.3)
    model = timm.create_model("vit_tiny_patch16_224", **SIZES, act_layer=activation).eval()
    quantized = vitquant.quantize(model, "fq-vit", [photos()])
    x = photos(2, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(quantized.run(x, {}, quantized=False), model(x), rtol=0, atol=1e-5)
    operation = quantized.integer_operations["blocks.0.mlp.act"]
    every = operation.source.decode(torch.arange(256))
    expected = operation.result.encode(functional.leaky_relu(every, 0.3))
    assert torch.equal(operation.codes(every), expected.long())


def reasons(*settings: str, model: nn.Module | None = None, recipe: str = "fq-vit") -> dict[str, str]:
    model = model or made(timm_vit)
    return vitquant.quantize(model, recipe, [photos()], settings=settings, simulated=True).float_reasons


def test_what_the_recipe_leaves_in_float_says_so() -> None:
    found = reasons(
        "integer-operations.softmax=float",
        "integer-operations.layer_norm=float",
        "integer-operations.activation=float",
    )
    assert len(found) == 5
    assert set(found.values()) == {"the recipe computes it in float"}


def test_neighbours_in_float_are_named() -> None:
    found = reasons("norm-inputs.float=true")
    assert found == dict.fromkeys(("blocks.0.norm1", "blocks.0.norm2", "norm"), "its input is in float")
    found = reasons("activations.operand=['value', 'query', 'key', 'lhs', 'rhs']", "stream.optional=true")
    assert found["blocks.0.norm1"] == "its result is read in float"
    assert found[SOFTMAX] == "its input is in float"


def test_published_arithmetic_keeps_what_the_published_code_keeps() -> None:
    found = reasons(recipe="fq-vit-published+uniform-probs+uniform-norm-inputs")
    assert "the published code keeps softmax in float" in found[SOFTMAX]
    assert "the published code keeps LayerNorm in float" in found["norm"]
    assert found["blocks.0.mlp.act"] == "its input is in float"


class Odd(nn.Module):
    """Operations that look like those computed on codes and are not."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.two_axes = nn.LayerNorm((16, 16))
        self.qkv = nn.Linear(16, 48)
        self.parametric = nn.PReLU()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.two_axes(x)).chunk(3, -1)
        scores = key @ query.transpose(-2, -1) * 0.25
        x = x + scores.softmax(-2).transpose(-2, -1) @ value
        return self.head(self.parametric(x).mean(1))


def test_odd_forms_stay_in_float_and_say_why() -> None:
    torch.manual_seed(0)
    found = reasons("norm-inputs.scheme=uniform", "norm-inputs.per=tensor", model=Odd().eval())
    assert sorted(found.values()) == [
        "it does not run over the last axis",
        "it has parameters",
        "it normalizes other than the last axis",
    ]


class Rearranging(nn.Module):
    """A stream that is read whole, and by a LayerNorm whose channels are not the stream's."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.qkv = nn.Linear(16, 48)
        width = {"a part": 8, "regrouped": 8, "padded": 20, "merged": 64, "tokens": 16}[how]
        self.other_norm, self.back = nn.LayerNorm(width), nn.Linear(width, 5)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(x).chunk(3, -1)
        x = x + (query @ key.transpose(-2, -1) * 0.25).softmax(-1) @ value
        match self.how:
            case "a part":
                y = x[..., :8]
            case "regrouped":
                y = x.reshape(len(x), 32, 8)
            case "padded":
                y = functional.pad(x, (0, 4))
            case "merged":
                y = x.reshape(len(x), 2, 2, 2, 2, 16).permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
            case _:
                y = x.transpose(1, 2)
        return self.head(self.norm(x).mean(1)) + self.back(self.other_norm(y).mean(1))


@pytest.mark.parametrize("how", ["a part", "regrouped", "padded", "merged", "tokens"])
def test_factors_of_other_channels_than_a_norm_s_own_are_not_used(how: str) -> None:
    """One value has one quantizer, whose factors belong to the channels of the stream."""
    torch.manual_seed(0)
    model = Rearranging(how).eval()
    with torch.no_grad():
        model.patches.weight *= 2.0 ** torch.arange(16).remainder(4)[:, None, None, None]
    x, outputs = photos(3, seed=1), []
    for form in ("integer", "float"):
        settings = [f"integer-operations.layer_norm={form}"]
        quantized = vitquant.quantize(model, "fq-vit", [photos()], settings=settings, simulated=True)
        with torch.no_grad():
            outputs.append(quantized(x))
    assert (outputs[0] - outputs[1]).norm() < 0.02 * outputs[1].norm()


def test_a_norm_with_two_results_that_stays_in_float_is_computed_once() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1, num_classes=5)
    counts = {}
    for form in ("integer", "float"):
        setting = f"integer-operations.layer_norm={form}"
        quantized = vitquant.quantize(model.eval(), "fq-vit", [photos()], settings=[setting])
        graph = quantized.graph_module.graph
        counts[form] = sum("layer_norm" in str(node.name) and "quantizers" not in node.name for node in graph.nodes)
    assert counts == {"integer": 4, "float": 3}
