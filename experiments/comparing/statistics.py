"""Estimates from a handful of runs: means with intervals, paired sign-flip tests, the chance of improvement, Holm.

Pure functions of arrays of finite numbers, one number a run. All intervals are nominal 95 %. scipy is imported where it
is used, so that the help of a command stays quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from experiments.running.metric_display import Metric

K = TypeVar("K")
Z = 1.959964  # 97.5 % quantile of the normal distribution
RESAMPLES = 9999  # a sign-flip test of up to 13 pairs enumerates all signs, a larger one draws this many


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; both bounds are NaN where one number gives no interval."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def text(self, form: str = "{:.3f}") -> str:
        """`value [low, high]`, each number in this format; the value alone where the interval has no width."""
        value, low, high = (form.format(x) for x in (self.value, self.low, self.high))
        return value if math.isnan(self.low) or low == high else f"{value} [{low}, {high}]"

    def shown_as(self, metric: Metric, sign: bool = False) -> str:
        """`value [low, high]` in the unit of the metric's title; with `sign` for a difference."""
        return self.scaled(metric.scale).text(metric.number_form(sign))

    def scaled(self, factor: float) -> Estimate:
        """The estimate of `factor` times the quantity."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Estimate(self.value * factor, low, high)

    def clipped(self, least: float, most: float) -> Estimate:
        """The same with an interval within [least, most], the range of possible values."""
        low, high = max(self.low, min(least, self.value)), min(self.high, max(most, self.value))
        return Estimate(self.value, low, high)


@dataclass(frozen=True)
class PairedDifference:
    """The mean of x - y over `n` pairs, and the two-sided p-value of the sign-flip test."""

    estimate: Estimate
    p_value: float
    n: int


def mean(values: ArrayLike) -> Estimate:
    """The mean with Student's t interval.

    In 20,000 simulations of 3 to 20 normal values the interval contained the true mean in 94.9 to 95.1 %. It is too
    narrow for skewed values: 88 % (n = 5) and 90 % (n = 10) for exponential ones, 82 and 83 % for lognormal ones with
    sigma 1.
    """
    x = _finite("values", values)
    return _t_interval(float(x.mean()), x, len(x))


def interquartile_mean(values: ArrayLike) -> Estimate:
    """The mean without the floor(n / 4) lowest and highest values (Agarwal et al. 2021, arXiv 2108.13264), with the
    t interval of Tukey and McLaughlin (1963, Sankhya A 25) from the winsorised variance.

    Up to three values give the mean and its t interval. Four values leave two, and a very wide interval. In 20,000
    simulations of 4 to 20 normal values the interval contained the true value in 93.3 to 94.3 %; of exponential values
    in 92 % (n = 5 and 10), of lognormal ones with sigma 1 in 92 and 93 % (the 25 % trimmed mean of the distribution).
    """
    from scipy import stats

    x = np.sort(_finite("values", values))
    cut = len(x) // 4
    winsorised = np.clip(x, x[cut], x[len(x) - cut - 1])
    return _t_interval(float(stats.trim_mean(x, 0.25)), winsorised, len(x) - 2 * cut)


def proportion(values: ArrayLike) -> Estimate:
    """The mean of values in [0, 1], with Wilson's score interval (1927, JASA 22) for as many independent draws.

    For shares of correct answers to independent prompts. It is too wide rather than too narrow if each value is a mean
    over several answers to a prompt: the variance of such values is at most p (1 - p), that of a single answer.
    """
    shares = _finite("values", values)
    if shares.min() < 0 or shares.max() > 1:
        raise ValueError(f"values: from {shares.min()} to {shares.max()}; expected numbers in [0, 1]")
    n, p = len(shares), float(shares.mean())
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))  # rounding at 0 and 1


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> Estimate:
    """P(X > Y) + P(X = Y) / 2 for a run of each, with method 5 of Newcombe (2006, Statistics in Medicine 25).

    Each bound is the value theta whose distance to the estimate is 1.96 of its own standard errors, by the variance of
    Hanley and McNeil (1982). In 1,500 simulations each of 5 and 10 pairs of normal runs with theta from 0.5 to 0.95 the
    interval contained theta in 95 to 97 %; with 3 runs, in 90 to 96 %.

    Args:
        x, y: arrays [runs], independent of each other; the numbers of runs may differ.
    """
    from scipy import optimize, stats

    a, b = _finite("x", x), _finite("y", y)
    pairs, others = len(a) * len(b), (len(a) + len(b)) / 2 - 1
    value = float(stats.mannwhitneyu(a, b).statistic) / pairs
    if min(len(a), len(b)) < 2:
        return Estimate(value)

    def distance(theta: float) -> float:
        spread = theta * (1 - theta) * (1 + others * ((1 - theta) / (2 - theta) + theta / (1 + theta))) / pairs
        return (value - theta) ** 2 - Z**2 * spread

    inside = min(max(value, 1e-9), 1 - 1e-9)  # 0 and 1 are roots themselves
    low = optimize.brentq(distance, 0, inside) if value > 0 else 0.0
    high = optimize.brentq(distance, inside, 1) if value < 1 else 1.0
    return Estimate(value, float(low), float(high))


def paired_difference(x: ArrayLike, y: ArrayLike) -> PairedDifference:
    """The mean of x - y with its t interval (see `mean`), and the sign-flip test of symmetry about 0.

    Fisher's randomisation test (1935, The Design of Experiments): under the null hypothesis every difference could as
    well have the other sign. The smallest exact p is 2^(1 - n): 5 % needs six pairs.

    Args:
        x, y: arrays [pairs]; the same position is the same seed.

    Returns:
        No interval and p = 1 for a single pair.
    """
    from scipy import stats

    a, b = _finite("x", x), _finite("y", y)
    if len(a) != len(b):
        raise ValueError(f"x, y: {len(a)} and {len(b)} values; expected pairs")
    p = 1.0
    if len(a) > 1:
        test = stats.permutation_test(
            (a - b,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True,
            rng=np.random.default_rng(0),
        )  # fmt: skip
        p = float(test.pvalue)
    return PairedDifference(mean(a - b), p, len(a))


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Adjusted p-values of a family of tests, in the order given: Holm 1979, Scandinavian Journal of Statistics 6.

    The i-th smallest of m, times m - i + 1, at least the one before and at most 1.
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"p_values: {p} of {name!r}; expected numbers in [0, 1]")
    adjusted, largest = dict(p_values), 0.0
    for i, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - i) * p))
        adjusted[name] = largest
    return adjusted


def _t_interval(value: float, x: NDArray[np.float64], n: int) -> Estimate:
    """Student's interval about `value`, a mean of `n` numbers whose squared deviations are those of x."""
    from scipy import stats

    if n < 2:
        return Estimate(value)
    half = float(stats.t.ppf(0.975, n - 1)) * math.sqrt(((x - x.mean()) ** 2).sum() / (n * (n - 1)))
    return Estimate(value, value - half, value + half)


def _finite(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """The values as a flat array; refused unless there are some and all are finite."""
    flat = np.asarray(values, np.float64).ravel()
    if not len(flat) or not np.isfinite(flat).all():
        raise ValueError(f"{name}: {'not finite' if len(flat) else 'empty'}; expected finite numbers")
    return flat
