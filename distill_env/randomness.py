"""Counter-based randomness: every draw is a function of (episode, position, purpose), never of the call or the row.

This makes a drafted rollout equal to the token-by-token one: the student's draw at position 7 of episode 3 is the same
number in any batch, in any order, and after any rewind. The generator is SplitMix64's finaliser (Steele, Lea & Flood
2014, "Fast splittable pseudorandom number generators"), used as a hash.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from distill_env.transfer import upload

DRAW_BLOCK = 512  # tokens in a block of a two-level draw
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
Words = Any  # 64 bits each: uint64 [...], or one int, with which Python is faster


class Purpose(IntEnum):
    """What a draw is for. Two purposes never share a number."""

    PROMPT = 1
    STUDENT = 2
    TEACHER = 3
    GATE = 4
    GATE_EPISODE = 5


def _wrap(x: Words) -> Words:
    """Modulo 2**64, as arrays do by themselves."""
    return x & 0xFFFFFFFFFFFFFFFF if isinstance(x, int) else x


def _mix(x: Words) -> Words:
    x = _wrap((x ^ (x >> 30)) * _MIX_1)
    x = _wrap((x ^ (x >> 27)) * _MIX_2)
    return x ^ (x >> 31)


def _combine(key: Words, number: Words) -> Words:
    return _mix(_wrap(key + _wrap((number + 1) * _GOLDEN)))


def episode_key(seed: Words, episode: Words) -> Words:
    """The key of episode number `episode` of the stream `seed`."""
    return _combine(_combine(0, seed), episode)


def uniform_number(key: Words, position: Words, purpose: Purpose) -> Any:
    """A uniform number in [0, 1) with 53 random bits."""
    bits = _combine(_combine(key, int(purpose)), position) >> 11
    return (bits if isinstance(bits, int) else bits.astype(np.float64)) * 2.0**-53


def episode_keys(seed: ArrayLike, episode: ArrayLike) -> NDArray[np.uint64]:
    """`episode_key` for each of the broadcast seeds and episodes."""
    keys: NDArray[np.uint64] = episode_key(_words(seed), _words(episode))
    return keys


def uniform(keys: ArrayLike, positions: ArrayLike, purpose: Purpose) -> NDArray[np.float64]:
    """`uniform_number` for each of the broadcast `keys` and `positions`."""
    numbers: NDArray[np.float64] = uniform_number(_words(keys), _words(positions), purpose)
    return numbers


def _words(numbers: ArrayLike) -> NDArray[np.uint64]:
    return np.atleast_1d(np.asarray(numbers)).astype(np.uint64)  # numpy warns when a scalar wraps around


def inverse_cdf(log_probs: torch.Tensor, uniforms: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Draw tokens by inverting the cumulative distribution, whose sums are in float64.

    A large vocabulary is searched in two levels, blocks and tokens, so that no float64 copy of it is made.

    Args:
        log_probs: [..., V], nats; need not be normalised.
        uniforms: float64 [...], in [0, 1).

    Returns:
        int64 [...], on the device of `log_probs`; never a token of probability zero.
    """
    size = log_probs.shape[-1]
    numbers = uniforms if isinstance(uniforms, torch.Tensor) else np.asarray(uniforms, np.float64)
    draws = upload(numbers, log_probs.device).unsqueeze(-1)  # [..., 1]
    if size <= 2 * DRAW_BLOCK:
        cumulative = cumulative_distribution(log_probs)
        return _search(cumulative, draws * cumulative[..., -1:]).squeeze(-1)
    blocks = -(-size // DRAW_BLOCK)
    probs = log_probs.new_zeros(*log_probs.shape[:-1], blocks * DRAW_BLOCK)
    torch.exp(log_probs, out=probs[..., :size])
    probs = probs.unflatten(-1, (blocks, DRAW_BLOCK))
    masses = probs.sum(-1, dtype=torch.float64).cumsum(-1)  # [..., blocks]
    target = draws * masses[..., -1:]
    block = _search(masses, target)  # [..., 1]
    before = masses.gather(-1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
    index = block.unsqueeze(-1).expand(*block.shape, DRAW_BLOCK)
    inside = probs.gather(-2, index).squeeze(-2).double().cumsum(-1)  # [..., DRAW_BLOCK]
    return (block * DRAW_BLOCK + _search(inside, target - before)).squeeze(-1)


def cumulative_distribution(log_probs: torch.Tensor) -> torch.Tensor:
    """Cumulative sums of probabilities that need not be normalised, [..., V], in float64."""
    return log_probs.double().exp().cumsum(-1)


def inverse_cdf_number(cumulative: Sequence[float], uniform: float) -> int:
    """`inverse_cdf` of one distribution of at most `2 * DRAW_BLOCK` tokens, given by its `cumulative_distribution`."""
    total = cumulative[-1]
    return min(bisect_right(cumulative, min(uniform * total, math.nextafter(total, 0.0))), len(cumulative) - 1)


def _search(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative mass exceeds the target, [..., n] and [..., 1] -> [..., 1]."""
    total = cumulative[..., -1:]
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))  # rounding may carry it to the total
    # right=True: an index without mass never exceeds the target first
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)
