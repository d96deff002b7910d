"""Intervals and tests over runs: golden numbers by hand, identities, and what rliable gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from experiments.comparing.statistics import (
    Estimate,
    bootstrap,
    holm,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
)

# two strata in columns, five runs of x and four of y; one tie in each, 0.754 and 0.47
X = np.array([[0.733, 0.41], [0.718, 0.39], [0.754, 0.52], [0.801, 0.47], [0.690, 0.44]])
Y = np.array([[0.822, 0.43], [0.699, 0.37], [0.754, 0.35], [0.740, 0.47]])


def test_interquartile_mean_by_hand() -> None:
    """floor(n / 4) values go at either end, whatever the order."""
    assert interquartile_mean([100, 2, 4, -50]) == 3
    assert interquartile_mean([9, 1, 2, 3, 90]) == pytest.approx(14 / 3)
    assert interquartile_mean([[8, 1, 2, 3], [4, 5, 6, 700]]) == 4.5
    assert interquartile_mean([1, 2, 9]) == 4
    assert interquartile_mean([0.3]) == 0.3


@pytest.mark.parametrize("n", range(1, 14))
def test_interquartile_mean_is_the_trimmed_mean(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25))
    symmetric = np.concatenate([3 + values, 3 - values])
    assert interquartile_mean(symmetric) == pytest.approx(symmetric.mean()) == pytest.approx(3)


def test_bootstrap_of_two_runs_by_hand() -> None:
    """Means of resamples of {0, 1} are 0, 1/2, 1 with 1/4, 1/2, 1/4: the interval is [0, 1]."""
    assert bootstrap([[0, 1]], np.mean) == Estimate(0.5, 0, 1)


def test_bootstrap_resamples_within_strata() -> None:
    """Runs that agree within every stratum leave no doubt, however far apart the strata are."""
    apart = [[1.0, 1.0, 1.0], [100.0, 100.0]]
    assert bootstrap(apart, np.mean) == Estimate(40.6, 40.6, 40.6)
    joined = bootstrap([np.concatenate(apart)], np.mean)
    assert joined.low < 40 < 42 < joined.high


def test_bootstrap_moves_with_the_runs() -> None:
    """Shifted and scaled runs have the shifted and scaled interval; the same seed gives the same one."""
    one, other = bootstrap(X.T, seed=3), bootstrap(5 + 2 * X.T, seed=3)
    assert one == bootstrap(X.T, seed=3) != bootstrap(X.T, seed=4, draws=50)
    for name in ("value", "low", "high"):
        assert getattr(other, name) == pytest.approx(5 + 2 * getattr(one, name))


@pytest.mark.parametrize("statistic", [np.mean, interquartile_mean])
def test_bootstrap_covers_the_mean_of_normal_data(statistic: Callable[..., float]) -> None:
    """Nominal 95 %; with two strata of eight runs the percentile interval is too narrow by some points."""
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(200):
        found = bootstrap([rng.normal(1, 1, 8), rng.normal(1, 1, 8)], statistic, draws=300, seed=i)
        hits += found.low <= 1 <= found.high
    assert 0.85 <= hits / 200 <= 0.98


def test_one_run_has_no_interval() -> None:
    found = bootstrap([[0.4]])
    assert found.value == 0.4
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(bootstrap([[0.4, 0.5], [0.1]]).low)
    better = probability_of_improvement([[2.0]], [[1.0, 3.0, 1.5]])
    assert better.value == pytest.approx(2 / 3)
    assert math.isnan(better.low)
    pair = paired_difference([2.0], [1.0])
    assert (pair.estimate.value, pair.p_value, pair.n) == (1, 1, 1)
    assert math.isnan(pair.estimate.low)


def test_probability_of_improvement_by_hand() -> None:
    """First stratum: 3 wins and a tie of 4; second: none."""
    assert probability_of_improvement([[2, 3]], [[1, 2]]).value == 3.5 / 4
    assert probability_of_improvement([[2, 3], [0, 0]], [[1, 2], [5, 6]]).value == 3.5 / 8
    assert probability_of_improvement([[2, 2]], [[2, 2]]) == Estimate(0.5, 0.5, 0.5)
    assert probability_of_improvement([[3, 4, 5]], [[1, 2]]) == Estimate(1, 1, 1)


def test_probability_of_improvement_and_of_its_reverse() -> None:
    rng = np.random.default_rng(7)
    x, y = [rng.integers(0, 4, 5), rng.normal(size=3)], [rng.integers(0, 4, 6), rng.normal(size=2)]
    forward, backward = probability_of_improvement(x, y), probability_of_improvement(y, x)
    assert forward.value + backward.value == pytest.approx(1)
    by_ranks = [stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y, strict=True)]
    assert forward.value == pytest.approx(np.mean(by_ranks))


def test_probability_of_improvement_interval_by_indices() -> None:
    """Counting how often a run is drawn is drawing it: against resampled runs, to one of the 108 steps of the share."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(0.5, 1, 12), rng.normal(0, 1, 9)
    a, b = rng.choice(x, (50_000, 12)), rng.choice(y, (50_000, 9))
    direct = (a[:, :, None] > b[:, None, :]).mean((1, 2))
    found = probability_of_improvement([x], [y], draws=50_000)
    assert [found.low, found.high] == pytest.approx(np.percentile(direct, [2.5, 97.5]).tolist(), abs=1.01 / 108)


def test_what_rliable_gives() -> None:
    """Golden numbers of rliable 1.2.0, `get_interval_estimates` with 50,000 resamples after np.random.seed(0).

    Its own bounds differ by up to 0.0033 (interquartile mean) and 0.0125 (probability) between seeds 0 and 1.
    """
    for scores, value, low, high in (
        (X, 0.5951666666666666, 0.5646666666666667, 0.624),
        (Y, 0.5847499999999999, 0.5445, 0.61525),
    ):
        found = bootstrap(scores.T, draws=10_000)
        assert found.value == pytest.approx(value, abs=1e-12)
        assert [found.low, found.high] == pytest.approx([low, high], abs=0.004)
    found = probability_of_improvement(X.T, Y.T, draws=10_000)
    assert found.value == pytest.approx(0.55, abs=1e-12)
    assert [found.low, found.high] == pytest.approx([0.275, 0.8125], abs=0.026)


def test_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: of 8 sign patterns only +++ and --- reach 6. With -1 instead of 1, |sum| is 4 or 6 in 4."""
    found = paired_difference([2, 4, 6], [1, 2, 3])
    assert (found.estimate.value, found.p_value, found.n) == (2, 0.25, 3)
    assert (found.estimate.low, found.estimate.high) == (1, 3)
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
    assert forward.estimate.value == pytest.approx(tenths.mean() / 10)


def test_sign_flip_beyond_enumeration() -> None:
    """Sixteen pairs are exact, 2 / 2^16 at the least; seventeen are drawn, near what all 2^17 signs give."""
    assert paired_difference(np.ones(16), np.zeros(16)).p_value == 2**-15
    x = np.random.default_rng(2).normal(0.4, 1, 17)
    signs = 2 * (np.arange(2**17)[:, None] >> np.arange(17) & 1) - 1
    exact = np.mean(np.abs(signs @ x) >= abs(x.sum()) - 1e-9)
    assert 0.01 < exact < 0.5
    assert paired_difference(x, np.zeros(17), draws=20_000).p_value == pytest.approx(exact, abs=0.01)
    assert paired_difference(np.ones(30), np.zeros(30), draws=999).p_value == 1 / 1000


def test_sign_flip_is_level() -> None:
    """Without an effect p <= 0.25 comes no more often than in a quarter of studies, up to chance."""
    rng = np.random.default_rng(3)
    p = [paired_difference(rng.normal(size=6), rng.normal(size=6), draws=10).p_value for _ in range(400)]
    assert 0.18 <= np.mean(np.array(p) <= 0.25) <= 0.32


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
    ("call", "message"),
    [
        (lambda: interquartile_mean([1, math.nan]), "values: contains nan; accepted: finite numbers"),
        (lambda: bootstrap([[1, 2], [math.nan]]), "strata: contains nan; accepted: finite numbers"),
        (lambda: bootstrap([[1, 2], []]), "strata: empty; accepted: finite numbers"),
        (lambda: bootstrap([]), "strata: no strata; accepted: at least one"),
        (lambda: probability_of_improvement([[1]], [[math.inf]]), "y: contains inf; accepted: finite numbers"),
        (
            lambda: probability_of_improvement([[1]], [[1], [2]]),
            "x, y: 1 and 2 strata; accepted: the same strata of both",
        ),
        (lambda: paired_difference([1, 2], [1]), "x, y: 2 and 1 values; accepted: pairs"),
        (lambda: paired_difference([math.nan], [1]), "x: contains nan; accepted: finite numbers"),
        (lambda: holm({"a": math.nan}), "p_values: nan of 'a'; accepted: numbers in [0, 1]"),
        (lambda: holm({"a": 1.5}), "p_values: 1.5 of 'a'; accepted: numbers in [0, 1]"),
    ],
)
def test_refusals_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        call()
    assert str(raised.value) == message
