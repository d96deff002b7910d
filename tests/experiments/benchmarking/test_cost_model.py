"""The cost model of drafting, against enumeration; and the benchmark's own arithmetic."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from agents.rollout import Rollout
from experiments.benchmarking.cost_model import (
    best_length,
    blocks,
    blocks_in_turn,
    blocks_per_rollout,
    committed_per_block,
    interpolated,
    speed_up,
)
from experiments.benchmarking.rollouts import difference


@pytest.mark.parametrize("hard_rate", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 3, 6])
def test_committed_tokens_by_enumeration(hard_rate: float, length: int) -> None:
    """Over all patterns of hard and easy steps: up to the first hard one, or the whole draft."""
    mean = 0.0
    for pattern in itertools.product([False, True], repeat=length):
        chance = math.prod(hard_rate if hard else 1 - hard_rate for hard in pattern)
        mean += chance * (pattern.index(True) + 1 if True in pattern else length)
    assert committed_per_block(hard_rate, length) == pytest.approx(mean)


def expected_blocks(hard_rate: float, length: int, tokens: int) -> float:
    """One row, by recursion over what the first block commits."""
    if tokens <= 0:
        return 0.0
    total = 1.0
    for k in range(1, length + 1):
        chance = hard_rate * (1 - hard_rate) ** (k - 1) if k < length else (1 - hard_rate) ** (length - 1)
        total += chance * expected_blocks(hard_rate, length, tokens - k)
    return total


@pytest.mark.parametrize(("hard_rate", "length", "tokens"), [(0.3, 3, 8), (0.05, 4, 12), (0.6, 2, 7)])
def test_blocks_of_one_row(hard_rate: float, length: int, tokens: int) -> None:
    exact = expected_blocks(hard_rate, length, tokens)
    measured = blocks_per_rollout(hard_rate, length, np.array([tokens]), 1, draws=20_000)
    assert measured == pytest.approx(exact, rel=0.02)


def test_blocks_of_a_batch() -> None:
    """Certain where nothing is random, and a batch waits for its last row."""
    eight, sixteen = np.full(8, 10), np.full(16, 20)
    assert blocks_per_rollout(0.0, 4, eight, 8) == 3
    assert blocks_per_rollout(1.0, 4, eight, 8) == 10
    assert blocks_per_rollout(0.2, 4, sixteen, 16) > blocks_per_rollout(0.2, 4, sixteen[:1], 1)
    assert blocks_per_rollout(0.0, 4, np.array([4, 4, 12, 8]), 2) == 4  # 1 + 3 in one row, 1 + 2 in the other


def test_completions_of_differing_hard_rates() -> None:
    """One hard throughout and one easy throughout take turns; as many hard steps spread evenly take less."""
    lengths = np.array([12, 12])
    assert blocks_per_rollout(np.array([1.0, 0.0]), 4, lengths, 1) == 12 + 3
    assert blocks_per_rollout(np.array([1.0, 0.0]), 4, lengths, 2) == 12
    assert blocks_per_rollout(0.5, 4, lengths, 2) < 10


def test_rows_take_the_next_completion() -> None:
    """In the order of the completions, not in the quickest order."""
    assert blocks_in_turn(np.array([5, 2, 1]), 3) == 5
    assert blocks_in_turn(np.array([5, 2, 1, 4]), 2) == 7  # 5 in one row, 2 + 1 + 4 in the other
    assert blocks_in_turn(np.array([1, 1, 1, 9]), 2) == 10
    assert blocks_in_turn(np.array([3, 4]), 1) == 7


def test_blocks_of_known_completions() -> None:
    """Three tokens a block: |xxH|xxx|x, nothing hard in a row of four, and a row that begins with hard steps."""
    hard = np.array([[0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]], bool)
    assert blocks(hard, np.array([7, 4, 7]), 3).tolist() == [3, 2, 4]
    assert blocks(hard, np.array([7, 4, 7]), 1).tolist() == [7, 4, 7]


def test_speed_up_and_best_length() -> None:
    """A free teacher scores every token, an expensive one few drafts. Drafts of one token change nothing."""
    assert best_length(0.1, 16, 1.0, lambda k: 0.0) == 1
    assert best_length(0.0, 16, 1.0, lambda k: 100.0) == 16
    assert speed_up(0.3, 1, 1.0, lambda k: 5.0) == pytest.approx(1)
    assert speed_up(0.0, 4, 0.0, lambda k: 5.0) == 4
    assert interpolated([1, 3], [10.0, 20.0])(2) == 15


def rollout(tokens: list[list[int]], teacher: torch.Tensor) -> Rollout:
    t = torch.tensor(tokens)
    zeros = torch.zeros(t.shape, dtype=torch.float64)
    return Rollout(
        prompts=[],
        tokens=t,
        rewritten=t < -1,
        rewards=zeros,
        token_log_prob=zeros,
        score=zeros,
        grades=zeros[:, 0],
        teacher=teacher,
        support=None,
    )


def test_where_two_rollouts_differ() -> None:
    """Equal up to the second token of the second completion: 2 + 2 tokens compared, one completion differs."""
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    a, b = rollout([[0, 1], [1, 0]], p.log()), rollout([[0, 1], [1, 1]], q.log())
    a.prompts = b.prompts = [None, None]  # type: ignore[list-item]
    result = difference(a, b)
    assert (result["answers"], result["parted"], result["tokens"]) == (2, 1, 4)
    assert result["largest_total_variation"] == pytest.approx(0.25)
    assert result["mean_total_variation"] == pytest.approx(np.mean([0, 0.25, 0, 0]))
