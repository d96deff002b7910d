"""Keyed randomness: uniform, independent, the same whoever asks; draws follow the distribution exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from distill_env.randomness import (
    Purpose,
    cumulative_distribution,
    episode_key,
    episode_keys,
    inverse_cdf,
    inverse_cdf_number,
    uniform,
    uniform_number,
)

# All numbers are fixed, so a test either always passes or always fails. A good generator falls below this p-value in
# one of a thousand sequences; a biased one falls far below it.
P_VALUE = 1e-3
NUMBERS = np.arange(10, 60)
KEYS = episode_keys(7, NUMBERS)
POSITIONS = np.arange(2000)


def table(purpose: Purpose, keys: NDArray[np.uint64] = KEYS, shift: int = 0) -> NDArray[np.float64]:
    return uniform(keys[:, None], POSITIONS + shift, purpose)


@pytest.mark.parametrize("purpose", Purpose)
def test_uniform(purpose: Purpose) -> None:
    """Over positions of one episode, over episodes at one position, and over all, in [0, 1)."""
    draws = table(purpose)
    assert draws.min() >= 0
    assert draws.max() < 1
    first = uniform(episode_keys(3, np.arange(100_000)), 0, purpose)
    for sample, bins in ((draws.ravel(), 256), (first, 256), (draws[0], 32)):
        counts, _ = np.histogram(sample, bins, (0, 1))
        assert stats.chisquare(counts).pvalue > P_VALUE


@pytest.mark.parametrize(
    "other",
    [
        *(table(p) for p in Purpose if p != Purpose.STUDENT),
        table(Purpose.STUDENT, shift=1),
        table(Purpose.STUDENT, shift=2),
        table(Purpose.STUDENT, episode_keys(7, NUMBERS + 1)),
        table(Purpose.STUDENT, episode_keys(8, NUMBERS)),
        table(Purpose.STUDENT, episode_keys(NUMBERS, 7)),
    ],
    ids=[
        *(p.name for p in Purpose if p != Purpose.STUDENT),
        "next",
        "next but one",
        "next episode",
        "next seed",
        "seed and episode exchanged",
    ],
)
def test_independent(other: NDArray[np.float64]) -> None:
    """Purposes, positions, episodes and seeds: pairs of their numbers fill the unit square evenly."""
    counts, _, _ = np.histogram2d(table(Purpose.STUDENT).ravel(), other.ravel(), 16, ((0, 1), (0, 1)))
    assert stats.chisquare(counts.ravel()).pvalue > P_VALUE


def test_keys_are_distinct() -> None:
    """No two of 200,000 episodes share a key (by chance: one in a billion), whatever their seeds."""
    keys = episode_keys(np.arange(200)[:, None], np.arange(1000))
    assert len(np.unique(keys)) == keys.size


@given(st.permutations(range(12)), st.integers(0, 2**62))
@settings(deadline=None, max_examples=25)
def test_numbers_do_not_depend_on_the_batch(order: list[int], seed: int) -> None:
    """Alone, in any batch and in any order, a (key, position, purpose) has one number."""
    keys = episode_keys(seed, np.arange(12))
    whole = uniform(keys[:, None], np.arange(5), Purpose.GATE)
    assert (uniform(keys[order][:, None], np.arange(5), Purpose.GATE) == whole[order]).all()
    for row in order[:3]:
        for position in range(5):
            assert uniform(keys[[row]], position, Purpose.GATE)[0] == whole[row, position]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**20), st.sampled_from(Purpose))
@settings(deadline=None, max_examples=200)
def test_one_number_is_that_of_an_array(seed: int, episode: int, position: int, purpose: Purpose) -> None:
    """Python's integers and numpy's arrays wrap around alike, and draws from both are the same."""
    key = episode_key(seed, episode)
    assert key == int(episode_keys(np.uint64(seed), np.uint64(episode))[0])
    number = uniform_number(key, position, purpose)
    assert number == uniform(np.uint64(key), position, purpose)[0]
    log_p = torch.tensor([0.1, 0.0, 0.25, 0.05, 0.6], dtype=torch.float64).log()
    assert inverse_cdf_number(cumulative_distribution(log_p).tolist(), number) == int(inverse_cdf(log_p, number))


def test_draws_are_exact() -> None:
    """Over an even grid of n uniforms each token is drawn p n times, up to one for each end of its interval."""
    p = torch.tensor([0.1, 0.0, 0.25, 0.05, 0.6], dtype=torch.float64)
    n = 100_000
    grid = (np.arange(n) + 0.5) / n
    for scale in (1.0, 3.0):  # need not be normalised
        counts = torch.bincount(inverse_cdf((scale * p).log().expand(n, -1), grid), minlength=5)
        assert float((counts - n * p).abs().max()) <= 1
    cumulative = p.cumsum(0)
    below = np.nextafter(cumulative.numpy(), 0)
    assert inverse_cdf(p.log().expand(5, -1), np.minimum(below, 1 - 2**-53)).tolist() == [0, 0, 2, 3, 4]


def test_keyed_draws_follow_the_distribution() -> None:
    log_p = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    draws = uniform(episode_keys(1, np.arange(300))[:, None], np.arange(100), Purpose.TEACHER).ravel()
    counts = torch.bincount(inverse_cdf(log_p.expand(len(draws), -1), draws), minlength=9)
    assert stats.chisquare(counts.numpy(), len(draws) * log_p.exp().numpy()).pvalue > P_VALUE


@given(st.lists(st.sampled_from([0.0, 1e-300, 1e-20, 0.1, 1.0]), min_size=1, max_size=8).filter(any), st.data())
@settings(deadline=None, max_examples=200)
def test_what_has_no_probability_is_never_drawn(weights: list[float], data: st.DataObject) -> None:
    """Not even by the smallest and the largest uniform, at the edges between tokens, or after rounding."""
    p = torch.tensor(weights, dtype=torch.float64)
    edges = [float(c / p.sum()) for c in p.cumsum(0)]
    u = data.draw(st.sampled_from([0.0, 1 - 2**-53, *(e for e in edges if e < 1)]) | st.floats(0, 1, exclude_max=True))
    for dtype in (torch.float64, torch.float32):
        log_p = p.log().to(dtype)
        if bool((log_p > -700).any()):  # whose exponential is not 0
            assert weights[int(inverse_cdf(log_p, u))] > 0
            assert weights[inverse_cdf_number(cumulative_distribution(log_p).tolist(), u)] > 0


def test_draws_do_not_depend_on_the_batch() -> None:
    log_p = torch.randn(40, 7, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    u = uniform(episode_keys(2, np.arange(40)), 3, Purpose.STUDENT)
    whole = inverse_cdf(log_p, u)
    assert whole.tolist() == [int(inverse_cdf(row, x)) for row, x in zip(log_p, u, strict=True)]
    assert whole.tolist() == inverse_cdf(log_p[:, None], u[:, None])[:, 0].tolist()


def test_a_draw_in_blocks_is_the_draw_of_one_cumulative_sum() -> None:
    """On 20,000 states of 1,500 and 5,000 ids: all but draws within rounding of an edge."""
    generator = torch.Generator().manual_seed(0)
    for vocab_size in (1500, 5000):
        log_probs = (3 * torch.randn(10_000, vocab_size, generator=generator)).log_softmax(-1)
        uniforms = torch.rand(10_000, generator=generator, dtype=torch.float64)
        cumulative = log_probs.double().exp().cumsum(-1)
        expected = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
        drawn = inverse_cdf(log_probs, uniforms)
        apart = (drawn != expected).nonzero()[:, 0]
        edges = cumulative.gather(1, torch.minimum(drawn, expected)[:, None])[apart, 0]
        assert len(apart) <= 20
        assert bool(((edges / cumulative[apart, -1] - uniforms[apart]).abs() < 1e-6).all())


def test_a_draw_in_blocks_never_takes_a_token_without_mass() -> None:
    log_probs = torch.full((1000, 3000), -torch.inf)
    log_probs[:, 7] = log_probs[:, 2900] = 0.0
    drawn = inverse_cdf(log_probs, torch.linspace(0, 1 - 1e-16, 1000, dtype=torch.float64))
    assert drawn.unique(return_counts=True)[0].tolist() == [7, 2900]
    assert abs(int((drawn == 7).sum()) - 500) <= 1
