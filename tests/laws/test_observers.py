"""The laws of observers: exact statistics, whatever the batching, in bounded memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitquant.errors import CalibrationError, RecipeError
from vitquant.observers import OBSERVERS, build_observer
from vitquant.observers.best_percentile import BestPercentile
from vitquant.observers.histogram import Histogram
from vitquant.observers.mse import Omse, shrink_factors
from vitquant.observers.observer import extremes
from vitquant.observers.percentile import Percentile, tails
from vitquant.quantizers import build_quantizer, params_from_range
from vitquant.quantizers.quantizer import channel_axis
from vitquant.spec import (
    Granularity,
    Log2,
    LogSqrt2,
    PerAxis,
    PerHead,
    PerTensor,
    PowerOfTwoFactor,
    PowerOfTwoScale,
    QParams,
    QuantSpec,
    Uniform,
)

law = settings(max_examples=50, deadline=None)
SEEDS = st.integers(0, 2**31)
GRANULARITIES = (PerTensor(), PerAxis(-1), PerAxis(1), PerHead())


def batches(seed: int, count: int = 3, spread: float = 3.0) -> list[Tensor]:
    """Tensors of (2..4, 3, 4, 5) whose magnitudes differ by orders."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2 + i % 3, 3, 4, 5, generator=random)
        * torch.exp(spread * torch.randn(1, 1, 1, 5, generator=random))
        + torch.randn((), generator=random)
        for i in range(count)
    ]


def rows(x: Tensor, granularity: Granularity) -> Tensor:
    axis = channel_axis(granularity)
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def equal_params(a: QParams, b: QParams) -> bool:
    return torch.equal(a.scale, b.scale) and (
        a.zero_point is b.zero_point
        or (a.zero_point is not None and b.zero_point is not None and torch.equal(a.zero_point, b.zero_point))
    )


@law
@given(SEEDS, st.sampled_from(GRANULARITIES), st.booleans())
def test_minmax_is_the_global_range_whatever_the_batching(seed: int, granularity: Granularity, signed: bool) -> None:
    spec = QuantSpec(8, signed, granularity=granularity)
    observer = build_observer("minmax", spec)
    data = batches(seed)
    for x in data:
        observer.update(x)
    every = rows(torch.cat(data), granularity).double()
    low, high = every.amin(1), every.amax(1)
    if granularity == PerTensor():
        low, high = low[0], high[0]
    assert torch.equal(torch.stack(observer.observed_range()), torch.stack([low, high]))
    assert equal_params(observer.estimate(), params_from_range(low, high, spec))


@law
@given(SEEDS, st.sampled_from(GRANULARITIES))
def test_moving_average_is_its_formula(seed: int, granularity: Granularity) -> None:
    observer = build_observer("moving-average", QuantSpec(8, granularity=granularity))
    data = batches(seed)
    low, high = extremes(data[0], granularity)
    for i, x in enumerate(data):
        observer.update(x)
        current = extremes(x, granularity)
        if i:
            low, high = low + 0.01 * (current[0] - low), high + 0.01 * (current[1] - high)
    torch.testing.assert_close(torch.stack(observer.observed_range()), torch.stack([low, high]), rtol=1e-12, atol=0)


@law
@given(
    SEEDS,
    st.sampled_from((1, 2, 5, 511, 512, 513, 5000, 40000)),
    st.sampled_from((0.6, 0.9, 0.99, 0.9999, 0.99999)),
    st.sampled_from(("normal", "ties", "constant", "sorted")),
)
def test_percentile_is_that_of_numpy(seed: int, size: int, alpha: float, kind: str) -> None:
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "ties":
            x = (2 * x).round()
        case "constant":
            x = torch.full_like(x, 0.3)
        case "sorted":
            x = x.sort(dim=1).values
    quantiles = [1 - alpha, alpha]
    whole = Percentile(QuantSpec(8), alpha)
    whole.update(x)
    expected = np.quantile(x.double().numpy(), quantiles)
    np.testing.assert_allclose(torch.stack(whole.observed_range()).numpy(), expected, rtol=1e-9, atol=1e-9)
    by_row = Percentile(QuantSpec(8, granularity=PerAxis(0)), alpha)
    by_row.update(x)
    expected = np.quantile(x.double().numpy(), quantiles, axis=1)
    np.testing.assert_allclose(torch.stack(by_row.observed_range()).numpy(), expected, rtol=1e-9, atol=1e-9)


@law
@given(SEEDS, st.integers(1, 20000), st.integers(1, 200), st.booleans())
def test_tails_are_those_of_a_sort(seed: int, size: int, count: int, ties: bool) -> None:
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    x = x.round() if ties else x
    count = min(count, size)
    bottom, top = tails(x, count)
    ascending = x.sort(dim=1).values
    assert torch.equal(bottom, ascending[:, :count])
    assert torch.equal(top, ascending.flip(1)[:, :count])


def test_percentile_averages_over_batches() -> None:
    observer = Percentile(QuantSpec(8), 0.75)
    observer.update(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
    observer.update(torch.tensor([100.0, 101.0, 102.0, 103.0, 104.0]))
    assert [float(end) for end in observer.observed_range()] == pytest.approx([2.0, 4.0])


def direct_histogram(histogram: Histogram, channel: int, x: Tensor) -> Tensor:
    """The counts that float64 numpy arithmetic gives on the window that the histogram ended with."""
    width = 2.0 ** int(histogram.exponent[channel])
    j = np.floor(x.double().numpy() / width).astype(int) - int(histogram.first[channel])
    return torch.from_numpy(np.bincount(j.ravel(), minlength=histogram.bins))


@law
@given(SEEDS, st.sampled_from(GRANULARITIES), st.sampled_from((16, 64, 2048)), st.integers(1, 6))
def test_histogram_counts_are_exact_whatever_the_batching(
    seed: int, granularity: Granularity, bins: int, count: int
) -> None:
    data = batches(seed, count)
    apart, shuffled, together = Histogram(bins), Histogram(bins), Histogram(bins)
    for x in data:
        apart.update(x, *extremes(x, granularity), granularity)
    for x in reversed(data):
        shuffled.update(x, *extremes(x, granularity), granularity)
    every = torch.cat(data)
    together.update(every, *extremes(every, granularity), granularity)
    for other in (apart, shuffled):
        assert torch.equal(other.counts, together.counts)
        assert torch.equal(other.centers(), together.centers())
    for channel, x in enumerate(rows(every, granularity)):
        assert torch.equal(apart.counts[channel], direct_histogram(apart, channel, x))


@law
@given(SEEDS, st.sampled_from((16, 2048)), st.floats(2**-60, 2**60), st.booleans())
def test_half_of_the_bins_are_in_use(seed: int, bins: int, magnitude: float, one_sided: bool) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * magnitude
    x = x.abs() if one_sided else x
    histogram = Histogram(bins)
    histogram.update(x, *extremes(x, PerTensor()), PerTensor())
    width = 2.0 ** int(histogram.exponent)
    span = float(x.max().clamp(min=0).double() - x.min().clamp(max=0).double())
    assert bins / 2 - 1 <= span / width <= bins
    used = histogram.counts[0].nonzero()
    assert int(histogram.counts.sum()) == 1000
    centers = histogram.centers()[0].double()
    if one_sided:
        assert abs(float(centers[used[-1]]) - float(x.max())) <= width / 2


@settings(max_examples=15, deadline=None)
@given(
    SEEDS,
    st.sampled_from(GRANULARITIES),
    st.booleans(),
    st.booleans(),
    st.sampled_from((Uniform(), PowerOfTwoScale())),
    st.integers(2, 8),
)
def test_omse_is_the_best_candidate_on_its_histogram(
    seed: int, granularity: Granularity, signed: bool, symmetric: bool, scheme: Uniform | PowerOfTwoScale, bits: int
) -> None:
    spec = QuantSpec(bits, signed, symmetric, granularity, scheme)
    observer, minmax = Omse(spec), build_observer("minmax", spec)
    observer.histogram = Histogram(512)  # the law does not depend on the bins; the time does
    for x in batches(seed, spread=1.0):
        observer.update(x)
        minmax.update(x)
    centers, counts = observer.histogram.centers().double(), observer.histogram.counts
    by_row = replace(spec, granularity=PerAxis(0))

    def error(params: QParams) -> Tensor:
        rounded = build_quantizer(by_row, params)(centers)
        return ((rounded - centers).square() * counts).sum(1)

    low, high = minmax.observed_range()
    candidates = torch.stack(
        [error(params_from_range(factor * low, factor * high, spec)) for factor in shrink_factors(low.device)]
    )
    # candidates that all but tie may be told apart differently in float32
    chosen = error(observer.estimate())
    assert bool((chosen <= candidates.amin(0) * (1 + 1e-4)).all())
    assert bool((chosen <= error(minmax.estimate()) * (1 + 1e-4)).all())


def test_omse_tries_the_published_factors() -> None:
    factors = shrink_factors(torch.device("cpu"))
    assert len(factors) == 90
    assert (float(factors[0]), float(factors[-1])) == (1.0, pytest.approx(0.11))


def test_omse_fits_each_of_many_channels_by_itself() -> None:
    """50 channels are more than one block of the search holds."""
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(4, signed=True, symmetric=True, granularity=PerAxis(0))
    together = Omse(spec)
    together.update(x)
    scale = together.estimate().scale
    for i in (0, 22, 49):
        alone = Omse(spec)
        alone.update(x[i : i + 1])
        assert torch.equal(alone.estimate().scale, scale[i : i + 1])


def test_omse_cuts_an_outlier_and_says_how_much() -> None:
    x = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([10.0])])
    spec = QuantSpec(4, signed=True, symmetric=True)
    observer = Omse(spec)
    observer.update(x)
    low, high = observer.observed_range()
    assert 1.0 <= float(high) <= 1.5
    assert float(low) == pytest.approx(-float(high) / 10)  # shrunk jointly
    params = observer.estimate()
    best = min(
        float((build_quantizer(spec, params_from_range(f * x.min(), f * x.max(), spec))(x) - x).square().sum())
        for f in shrink_factors(x.device)
    )
    assert float((build_quantizer(spec, params)(x) - x).square().sum()) == pytest.approx(best, rel=1e-2)


@law
@given(SEEDS, st.sampled_from(GRANULARITIES), st.sampled_from([0.0, 0.001, 0.3, 0.999, 0.99999, 1.0]))
def test_quantiles_of_a_histogram_are_off_by_half_a_bin(seed: int, granularity: Granularity, q: float) -> None:
    histogram, data = Histogram(512), batches(seed)
    for x in data:
        histogram.update(x, *extremes(x, granularity), granularity)
    exact = torch.quantile(rows(torch.cat(data), granularity).double(), q, dim=1)
    bins = torch.exp2(histogram.exponent.double())
    assert bool(((histogram.quantiles([q])[0] - exact).abs() <= bins * (0.5 + 1e-6)).all())


@law
@given(
    SEEDS,
    st.sampled_from(GRANULARITIES),
    st.sampled_from([Uniform(), PowerOfTwoScale(), Log2()]),
    st.integers(2, 8),
)
def test_best_percentile_is_the_best_of_the_published_quantiles(
    seed: int, granularity: Granularity, scheme: Uniform | PowerOfTwoScale | Log2, bits: int
) -> None:
    spec = QuantSpec(bits, granularity=granularity, scheme=scheme)
    observer, data = build_observer("best-percentile", spec), batches(seed, spread=1.0)
    assert isinstance(observer, BestPercentile)
    for x in data:
        observer.update(x)
    x = rows(torch.cat(data), granularity).double()
    by_row = replace(spec, granularity=PerAxis(0))

    def error(x: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Tensor:
        quantizer = build_quantizer(by_row, params_from_range(low.view(-1), high.view(-1), by_row))
        return ((quantizer(x) - x).square() * counts).sum(1)

    # The candidates are the quantiles, but for the histogram, whose values are its bins' centres.
    tried, bins = list(zip(*observer.candidates(), strict=True)), torch.exp2(observer.histogram.exponent.double())
    for (low, high), q in zip(tried, (0.999, 0.9999, 0.99999), strict=True):
        for found, exact in ((low, torch.quantile(x, 1 - q, 1)), (high, torch.quantile(x, q, 1))):
            assert bool(((found - exact).abs() <= bins * (0.5 + 1e-6)).all())
    # The one that is chosen has the least error on these values.
    centers, counts = observer.histogram.centers().double(), observer.histogram.counts
    chosen = observer.observed_range()
    least = torch.stack([error(centers, counts, *each) for each in tried]).amin(0)
    assert bool((error(centers, counts, *chosen) <= least * (1 + 1e-5) + 1e-12).all())
    if isinstance(scheme, Log2):
        return
    # The distance to the nearest level changes by half a bin where a value does: the errors of the values themselves.
    slack, ones = bins * x.shape[1] ** 0.5, torch.ones_like(x)
    least = torch.stack([error(x, ones, *each) for each in tried]).amin(0).sqrt()
    assert bool((error(x, ones, *chosen).sqrt() <= least + slack * (1 + 1e-6)).all())


def test_best_percentile_cuts_an_outlier_that_costs_more_than_it_is_worth() -> None:
    x = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([10.0])])
    low, high = (float(each) for each in _observed("best-percentile", x))
    assert (low, high) == (pytest.approx(-1, abs=0.01), pytest.approx(1, abs=0.01))
    short = torch.linspace(-1, 1, 20)
    assert [float(each) for each in _observed("best-percentile", short)] == pytest.approx([-1, 1], abs=0.01)


def test_best_percentile_of_a_free_range_does_not_depend_on_where_zero_is() -> None:
    centred = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([10.0])])
    for offset in (0.0, 50.0, -300.0):
        observer = build_observer("best-percentile", QuantSpec(4))
        observer.update(centred + offset)
        low, high = (float(each) - offset for each in observer.free_range())
        assert (low, high) == (pytest.approx(-1, abs=0.1), pytest.approx(1, abs=0.1))


@law
@given(SEEDS, st.sampled_from([-10.0, -3.0, 3.0, 10.0]), st.integers(2, 4))
@example(1733, -3.0, 4)
def test_a_free_range_is_the_best_of_quantizers_without_a_zero(seed: int, offset: float, bits: int) -> None:
    spec = QuantSpec(bits, granularity=PerAxis(1))
    observer, data = build_observer("best-percentile", spec), [x + offset for x in batches(seed, spread=1.0)]
    for x in data:
        observer.update(x)
    x = rows(torch.cat(data), PerAxis(1)).double()

    def error(low: Tensor, high: Tensor) -> Tensor:
        step = ((high - low) / (2**bits - 1)).view(-1, 1)
        first = torch.round(low.view(-1, 1) / step)
        return ((torch.round(x / step) - first).clamp(0, 2**bits - 1).add(first).mul(step) - x).square().sum(1)

    # Of the histogram's quantiles: half a bin beside the exact ones, a zero point may be another.
    tried = list(zip(*observer.candidates(), strict=True))
    for q, (low, high) in zip((0.999, 0.9999, 0.99999), tried, strict=True):
        beside = (x.abs().amax(1) + x.amax(1) - x.amin(1)) / 1024
        assert bool(((low - torch.quantile(x, 1 - q, 1)).abs() <= beside).all())
        assert bool(((high - torch.quantile(x, q, 1)).abs() <= beside).all())
    best = torch.stack([error(low, high) for low, high in tried]).amin(0)
    assert bool((error(*observer.free_range()) <= best * 1.05 + 1e-6).all())


def _observed(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    observer = build_observer(name, QuantSpec(4))
    observer.update(x)
    return observer.observed_range()


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_is_not_finite_is_refused(name: str, bad: float, granularity: Granularity) -> None:
    for size in (3, 5000):
        x = torch.randn(2, 3, size, 5)
        x[1, 2, size // 2, 3] = bad
        observer = build_observer(name, QuantSpec(8, granularity=granularity))
        with pytest.raises(CalibrationError, match="NaN or infinity"):
            observer.update(x)


@pytest.mark.parametrize("name", OBSERVERS)
def test_nothing_seen_is_refused(name: str) -> None:
    with pytest.raises(CalibrationError, match="nothing was observed"):
        build_observer(name, QuantSpec(8, granularity=PerAxis(-1))).estimate()


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.75, -3.0, 1e-30])
def test_constants_work(name: str, granularity: Granularity, dtype: torch.dtype, value: float) -> None:
    spec = QuantSpec(8, granularity=granularity)
    observer = build_observer(name, spec)
    x = torch.full((2, 3, 4, 5), value, dtype=dtype)
    observer.update(x)
    observer.update(x)
    params = observer.estimate()
    axis = channel_axis(granularity)
    assert params.scale.shape == (() if axis is None else (x.shape[axis],))
    assert params.scale.dtype == torch.float32
    if name != "unit":
        assert bool(((build_quantizer(spec, params)(x) - x).abs() <= 0.01 * x.abs() + 1e-7).all())


@pytest.mark.parametrize("name", ["minmax", "moving-average", "percentile", "unit"])
def test_every_scheme_can_be_observed(name: str) -> None:
    x = torch.rand(4, 7, 6)
    for spec in (
        QuantSpec(4, scheme=Log2()),
        QuantSpec(5, scheme=LogSqrt2()),
        QuantSpec(8, granularity=PerAxis(-1), scheme=PowerOfTwoFactor()),
        QuantSpec(8, scheme=PowerOfTwoScale()),
    ):
        observer = build_observer(name, spec)
        observer.update(x)
        quantizer = build_quantizer(spec, observer.estimate())
        assert bool(((quantizer(x) - x).abs() <= quantizer.error_bound(x).clamp(min=0.01)).all())


def test_unit_needs_no_data_for_a_single_scale() -> None:
    assert build_observer("unit", QuantSpec(4, scheme=Log2())).estimate().scale == 1.0
    observer = build_observer("unit", QuantSpec(4, granularity=PerHead(), scheme=Log2()))
    observer.update(torch.rand(2, 3, 4, 4) / 2)
    assert observer.estimate().scale.tolist() == [1.0, 1.0, 1.0]


def test_observing_keeps_no_graph_and_leaves_the_operand() -> None:
    for name in OBSERVERS:
        x = torch.randn(2, 3, 4, 5, requires_grad=True)
        before = x.detach().clone()
        observer = build_observer(name, QuantSpec(8))
        observer.update(x)
        assert not observer.estimate().scale.requires_grad
        assert torch.equal(x.detach(), before)


def test_unknown_names_and_schemes_are_refused() -> None:
    with pytest.raises(RecipeError, match="minmax, moving-average, percentile, omse, best-percentile, unit"):
        build_observer("ema", QuantSpec(8))
    with pytest.raises(RecipeError, match="omse"):
        build_observer("omse", QuantSpec(4, scheme=Log2()))
