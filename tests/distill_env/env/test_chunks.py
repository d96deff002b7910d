"""Several actions in an environment step, with and without a look-ahead, equal one action at a time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_env.env import DistillVectorEnv
from distill_env.ragged import PAD
from tests.helpers.environments import KINDS, TOLERANCE, Kind, V, arguments_of, assert_equal, ended, random_actions


def single_steps(env: DistillVectorEnv, actions: NDArray[np.int64]) -> list[Any]:
    """A chunk [n, K] one column at a time: a row stops at padding, after a REWRITE, and at its end."""
    going = np.ones(len(actions), np.bool_)
    results = []
    for column in actions.T:
        going = going & (column != PAD) & ~ended(env)
        results.append(env.step(np.where(going, column, PAD)))
        going = going & (column != env.rewrite_action)
    return results


@pytest.mark.parametrize("span", ["token", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_equals_its_steps_one_by_one(kind: Kind, span: str) -> None:
    n, k, tolerance = 5, 4, TOLERANCE[kind]
    arguments = arguments_of(kind, rewrite_span=span, autoreset_mode="Disabled")
    chunked, single = DistillVectorEnv(n, **arguments, chunk=k), DistillVectorEnv(n, **arguments)
    rng = np.random.default_rng(0)
    chunked.reset(seed=0)
    single.reset(seed=0)
    ends = 0
    for _ in range(20):
        width = int(rng.integers(1, k + 1))  # fewer columns than K are accepted
        actions = random_actions(chunked, rng, n * width, 0.15).reshape(n, width)
        actions[rng.random((n, width)) < 0.1] = PAD
        actions[ended(chunked)] = PAD
        observation, reward, terminated, truncated, info = chunked.step(actions)
        results = single_steps(single, actions)
        np.testing.assert_array_equal(observation, results[-1][0])
        np.testing.assert_allclose(reward, sum(r[1] for r in results), rtol=0, atol=max(tolerance, 1e-9))
        np.testing.assert_array_equal(terminated, np.any([r[2] for r in results], 0))
        np.testing.assert_array_equal(truncated, np.any([r[3] for r in results], 0))
        for row in np.flatnonzero(info.get("_tokens", False)):
            parts = [r[4] for r in results if "tokens" in r[4] and r[4]["_tokens"][row]]
            written = info["tokens"][row] >= 0
            for key in ("tokens", "rewritten", "token_rewards"):
                expected = [value for p in parts for value in p[key][row][p["tokens"][row] >= 0]]
                np.testing.assert_allclose(info[key][row][written], expected, rtol=0, atol=tolerance)
            assert not info["token_rewards"][row][~written].any()
            assert info["floored"][row] == sum(p["floored"][row] for p in parts)
        ends += int((terminated | truncated).sum())
        if ended(chunked).sum() > 2:
            mask = {"reset_mask": ended(chunked)}
            chunked.reset(options=mask)
            single.reset(options=mask)
    assert ends > 2 * n


def random_draft(rng: np.random.Generator, room: NDArray[np.int64], width: int, eos: int) -> Tensor:
    """Tokens [n, K], ragged with -1, at most `room` in a row; the end token, the last id, is not among them."""
    tokens = rng.integers(0, eos, (len(room), width))
    lengths = np.minimum(room, rng.integers(0, width + 1, len(room)))
    tokens[np.arange(width) >= lengths[:, None]] = PAD
    return torch.from_numpy(tokens)


def remember(now: NDArray[np.float32], info: dict[str, Any]) -> None:
    """Take the teacher at the present states [n, V] from an info, as far as it shows it."""
    if "teacher_log_probs" in info:
        known = info["_teacher_log_probs"]
        now[known] = info["teacher_log_probs"][known]


@pytest.mark.parametrize("span", ["token", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_looking_ahead_changes_nothing_and_shows_what_stepping_does(kind: Kind, span: str) -> None:
    """With ragged drafts, before and after rewrites and ends; followed afterwards wholly, in part or not at all."""
    n, k, tolerance = 4, 3, max(TOLERANCE[kind], 1e-6)  # info is float32
    arguments = arguments_of(kind, rewrite_span=span, max_new_tokens=8, autoreset_mode="Disabled")
    looking, plain = (DistillVectorEnv(n, **arguments, chunk=k) for _ in range(2))
    stepping = DistillVectorEnv(n, **arguments)  # shows the teacher after every token
    now = np.zeros((n, looking.vocab_size), np.float32)  # the teacher at the present states
    rng = np.random.default_rng(0)
    environments = (looking, plain, stepping)
    for env in environments:
        remember(now, env.reset(seed=4)[1])
    for _ in range(10):
        live = ~ended(looking)
        for width in (0, 2, k):
            room = np.where(live, looking.max_new_tokens - 1 - looking.completions.lengths, 0)
            draft = random_draft(rng, room, width, looking.task.eos_token_id)
            log_probs = looking.lookahead(draft)
            assert log_probs.shape == (n, width + 1, looking.vocab_size)
            np.testing.assert_allclose(log_probs[live, 0], now[live], rtol=0, atol=tolerance)
            walking, there = copy.deepcopy(stepping), now.copy()
            for j, column in enumerate(draft.numpy().T):
                remember(there, walking.step(column)[4])
                read = column != PAD
                np.testing.assert_allclose(log_probs[read, j + 1], there[read], rtol=0, atol=tolerance)
        actions = draft.numpy().copy()  # followed up to a rewrite, another token, or nothing more
        column = rng.integers(0, k, n)
        actions[np.arange(n), column] = rng.choice([looking.rewrite_action, 0, PAD], n)
        actions[~live] = PAD
        if rng.random() < 0.5 and not live.all():
            for env in environments:
                remember(now, env.reset(options={"reset_mask": ~live})[1])
        assert_equal(looking.step(actions), plain.step(actions), TOLERANCE[kind])
        for result in single_steps(stepping, actions):
            remember(now, result[4])


def test_a_draft_may_be_written_over_after_looking() -> None:
    """The environment has its own copy of it."""
    env = DistillVectorEnv(1, "categorical", "markov", teacher_kwargs={"vocab_size": V}, chunk=2)
    other = DistillVectorEnv(1, "categorical", "markov", teacher_kwargs={"vocab_size": V}, chunk=2)
    env.reset(seed=0)
    other.reset(seed=0)
    draft = torch.tensor([[0, 1]])
    env.lookahead(draft)
    draft[:] = torch.tensor([[3, 2]])
    assert_equal(env.step(np.array([[3, 2]])), other.step(np.array([[3, 2]])))
