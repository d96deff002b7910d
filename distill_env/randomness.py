"""Counter-based randomness: every draw is a function of (episode, position, purpose), never of the call or the row.

This makes a drafted rollout equal to the token-by-token one: the student's draw at position 7 of episode 3 is the same
number in any batch, in any order, and after any rewind. The generator is SplitMix64's finaliser (Steele, Lea & Flood
2014, "Fast splittable pseudorandom number generators"), used as a hash.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

DRAW_BLOCK = 512  # tokens in a block of a two-level draw
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Purpose(IntEnum):
    """What a draw is for. Two purposes never share a number."""

    PROMPT = 1
    STUDENT = 2
    TEACHER = 3
    GATE = 4
    GATE_EPISODE = 5


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _combine(key: NDArray[np.uint64], number: ArrayLike) -> NDArray[np.uint64]:
    # an array, as numpy warns when a scalar wraps around
    counter = np.atleast_1d(np.asarray(number)).astype(np.uint64) + np.uint64(1)
    return _mix(key + counter * _GOLDEN)


def episode_keys(seed: ArrayLike, episode: ArrayLike) -> NDArray[np.uint64]:
    """The keys of episodes number `episode` of the streams `seed` (broadcast against each other)."""
    return _combine(_combine(np.zeros(1, np.uint64), seed), episode)


def uniform(keys: NDArray[np.uint64], positions: ArrayLike, purpose: Purpose) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, one for each of the broadcast `keys` and `positions`."""
    bits = _combine(_combine(np.asarray(keys, np.uint64), int(purpose)), positions)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def inverse_cdf(log_probs: torch.Tensor, uniforms: ArrayLike) -> torch.Tensor:
    """Draw tokens by inverting the cumulative distribution, whose sums are in float64.

    A large vocabulary is searched in two levels, blocks and tokens, so that no float64 copy of it is made.

    Args:
        log_probs: [..., V], nats; need not be normalised.
        uniforms: [...], in [0, 1).

    Returns:
        int64 [...], on the device of `log_probs`; never a token of probability zero.
    """
    size = log_probs.shape[-1]
    draws = torch.as_tensor(np.asarray(uniforms), dtype=torch.float64).to(log_probs.device).unsqueeze(-1)  # [..., 1]
    if size <= 2 * DRAW_BLOCK:
        cumulative = log_probs.double().exp().cumsum(-1)
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


def _search(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative mass exceeds the target, [..., n] and [..., 1] -> [..., 1]."""
    total = cumulative[..., -1:]
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))  # rounding may carry it to the total
    # right=True: an index without mass never exceeds the target first
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)
