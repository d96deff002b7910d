"""Estimates and tests over runs: values worked out by hand, identities, and the coverage of the intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from experiments.comparing.statistics import (
    Estimate,
    holm,
    interquartile_mean,
    mean,
    paired_difference,
    probability_of_improvement,
    proportion,
)


def test_text_of_an_estimate() -> None:
    assert Estimate(0.5, 0.25, 0.75).text("{:.0%}") == "50% [25%, 75%]"
    assert Estimate(1.0, 0.5, 1.25).text("{:+.1f}") == "+1.0 [+0.5, +1.2]"
    assert Estimate(0.5).text("{:.2f}") == "0.50"  # no interval
    assert Estimate(0.5, 0.499, 0.501).text("{:.1f}") == "0.5"  # none to be seen
    assert Estimate(1, 0, 3).scaled(-2) == Estimate(-2, -6, 0)
    assert Estimate(0.9, -0.2, 1.1).clipped(0, 1) == Estimate(0.9, 0, 1)


def test_mean_by_hand() -> None:
    """Of 1, 2, 3: variance 1, standard error 1 / sqrt(3); the quantile of t with two degrees of freedom is 4.3027."""
    half = 4.302653 / math.sqrt(3)
    found = mean([1, 3, 2])
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))
    x = np.random.default_rng(0).normal(size=9)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (mean(x).low, mean(x).high) == pytest.approx((low, high))


def test_interquartile_mean_by_hand() -> None:
    """Without floor(n / 4) values at either end. Of -9, 1, 3, 4, 80 remain 1, 3, 4. The squared deviations of the
    winsorised 1, 1, 3, 4, 4 from 2.6 sum to 9.2: a standard error of sqrt(9.2 / (3 * 2)), two degrees of freedom."""
    assert interquartile_mean([100, 2, 4, -50]).value == 3
    assert interquartile_mean([[8, 1, 2, 3], [4, 5, 6, 700]]).value == 4.5
    found, half = interquartile_mean([4, -9, 3, 80, 1]), 4.302653 * math.sqrt(9.2 / 6)
    assert (found.value, found.low, found.high) == pytest.approx((8 / 3, 8 / 3 - half, 8 / 3 + half))
    assert interquartile_mean([1, 2, 9]) == mean([1, 2, 9])
    x = np.random.default_rng(3).normal(size=(2, 13))
    moved = interquartile_mean(5 + 2 * x)
    assert moved.value == pytest.approx(5 + 2 * stats.trim_mean(x.ravel(), 0.25))
    assert moved.high - moved.low == pytest.approx(2 * (interquartile_mean(x).high - interquartile_mean(x).low))


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("estimate", [mean, interquartile_mean])
def test_intervals_cover(estimate: Callable[..., Estimate], n: int) -> None:
    """95 % of intervals from normal runs contain the true mean, within 2 points; of percentile bootstraps 83 and 90."""
    draws = np.random.default_rng(n).normal(1, 2, (1000, n))
    hits = [found.low <= 1 <= found.high for found in map(estimate, draws)]
    assert 0.93 <= np.mean(hits) <= 0.97


def test_the_interval_of_the_probability_of_improvement_covers() -> None:
    """Also where nearly all runs of one are better, which a percentile bootstrap calls certain."""
    rng = np.random.default_rng(0)
    for theta in (0.5, 0.85):
        shift = math.sqrt(2) * stats.norm.ppf(theta)
        found = [probability_of_improvement(rng.normal(shift, 1, 5), rng.normal(0, 1, 5)) for _ in range(200)]
        assert 0.92 <= np.mean([e.low <= theta <= e.high for e in found]) <= 0.99


def test_one_run_has_no_interval() -> None:
    for found in (mean([0.4]), interquartile_mean([0.4]), probability_of_improvement([0.4], [0.1])):
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert probability_of_improvement([2.0], [1.0, 3.0, 1.5]).value == pytest.approx(2 / 3)
    pair = paired_difference([2.0], [1.0])
    assert (pair.estimate.value, pair.p_value, pair.n) == (1, 1, 1)
    assert math.isnan(pair.estimate.low)


def test_wilson_interval() -> None:
    """Against the quadratic that defines it, |p - x| = z sqrt(x (1 - x) / n), and at the ends."""
    found = proportion([1, 1, 1, 0, 1, 1, 0, 1, 1, 1])
    for bound in (found.low, found.high):
        assert abs(0.8 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 10))
    perfect = proportion([1.0] * 8)
    assert perfect.high == 1.0
    assert perfect.low == pytest.approx(8 / (8 + 1.959964**2))


def test_probability_of_improvement_by_hand() -> None:
    """Wins and half of the ties over all pairs; the roots of Newcombe's equation at 3 of 4."""
    found = probability_of_improvement([2, 3], [1, 2])
    assert found.value == 3.5 / 4
    for theta in (found.low, found.high):
        spread = theta * (1 - theta) / 4 * (1 + (1 - theta) / (2 - theta) + theta / (1 + theta))
        assert abs(found.value - theta) == pytest.approx(1.959964 * math.sqrt(spread))
    certain = probability_of_improvement([3, 4, 5], [1, 2])
    assert (certain.value, certain.high) == (1, 1)
    assert 0.3 < certain.low < 0.9
    rng = np.random.default_rng(7)
    x, y = rng.integers(0, 4, 5), rng.integers(0, 4, 6)
    forward, backward = probability_of_improvement(x, y), probability_of_improvement(y, x)
    assert (forward.value, forward.low) == pytest.approx((1 - backward.value, 1 - backward.high))
    assert forward.value == pytest.approx(np.mean((np.sign(x[:, None] - y) + 1) / 2))


def test_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: of 8 sign patterns only +++ and --- reach 6. With -1 instead of 1, |sum| is 4 or 6 in 4."""
    found = paired_difference([2, 4, 6], [1, 2, 3])
    assert (found.estimate, found.p_value, found.n) == (mean([1, 2, 3]), 0.25, 3)
    assert paired_difference([0, 4, 6], [1, 2, 3]).p_value == 0.5
    equal = paired_difference([1, 2, 3], [1, 2, 3])
    assert (equal.estimate, equal.p_value) == (Estimate(0, 0, 0), 1)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_sign_flip_by_brute_force(n: int) -> None:
    """All sign patterns, with differences that are multiples of 0.1, whose equal sums differ by rounding."""
    rng = np.random.default_rng(n)
    tenths = rng.integers(-3, 6, n)
    extreme = [abs(np.dot(s, tenths)) >= abs(tenths.sum()) for s in itertools.product([-1, 1], repeat=n)]
    base = rng.random(n)
    forward, backward = paired_difference(base + tenths / 10, base), paired_difference(base, base + tenths / 10)
    assert forward.p_value == backward.p_value == np.mean(extreme)


def test_sign_flip_beyond_enumeration() -> None:
    """Thirteen pairs are exact, 2 / 2^13 at the least; more are drawn, near what all 2^17 signs give."""
    assert paired_difference(np.ones(13), np.zeros(13)).p_value == 2**-12
    x = np.random.default_rng(2).normal(0.4, 1, 17)
    signs = 2 * (np.arange(2**17)[:, None] >> np.arange(17) & 1) - 1
    exact = np.mean(np.abs(signs @ x) >= abs(x.sum()) - 1e-9)
    assert 0.01 < exact < 0.5
    assert paired_difference(x, np.zeros(17)).p_value == pytest.approx(exact, abs=0.015)
    assert paired_difference(np.ones(30), np.zeros(30)).p_value <= 2 / 10_000


def test_sign_flip_is_level() -> None:
    """Without an effect p <= 0.25 comes no more often than in a quarter of studies, up to chance."""
    rng = np.random.default_rng(3)
    p = [paired_difference(rng.normal(size=6), rng.normal(size=6)).p_value for _ in range(200)]
    assert 0.17 <= np.mean(np.array(p) <= 0.25) <= 0.32


def test_holm_by_hand() -> None:
    """0.01 x 4; 0.02 x 3; 0.03 x 2 = 0.06 too; 0.9. In the order given."""
    found = holm({"c": 0.03, "a": 0.01, "d": 0.9, "b": 0.02})
    assert list(found) == ["c", "a", "d", "b"]
    assert found == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.9})
    assert holm({"a": 0.04, "b": 0.03}) == {"a": 0.06, "b": 0.06}
    assert holm({"a": 0.6, "b": 0.6, "c": 0.0}) == {"a": 1, "b": 1, "c": 0}
    assert holm({"a": 0.3}) == {"a": 0.3}
    assert holm({}) == {}


def test_holm_rejects_what_its_steps_reject() -> None:
    """The definition: go up while p_(i) <= level / (m - i + 1), and stop at the first that is not."""
    rng = np.random.default_rng(7)
    for level in (0.01, 0.05, 0.2):
        p = {str(i): float(v) for i, v in enumerate(rng.random(7) ** 4)}
        rejected = set()
        for i, name in enumerate(sorted(p, key=lambda n: p[n])):
            if p[name] > level / (7 - i):
                break
            rejected.add(name)
        assert {name for name, v in holm(p).items() if v <= level} == rejected


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: mean([1, math.nan]), "values"),
        (lambda: interquartile_mean([]), "values"),
        (lambda: proportion([2.0]), "values"),
        (lambda: probability_of_improvement([1], [math.inf]), "y"),
        (lambda: paired_difference([1, 2], [1]), "x, y"),
        (lambda: paired_difference([math.nan], [1]), "x"),
        (lambda: holm({"a": math.nan}), "p_values"),
        (lambda: holm({"a": 1.5}), "p_values"),
    ],
)
def test_refusals_name_the_argument(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: [^\n]+$"):
        call()
