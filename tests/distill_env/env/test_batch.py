"""A batch is many single environments, and rows do not disturb each other."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from distill_env.env import DistillEnv, DistillVectorEnv
from distill_env.models.tabular import markov
from tests.helpers.environments import (
    KINDS,
    MODES,
    REWRITE,
    TOLERANCE,
    Kind,
    V,
    arguments_of,
    assert_equal,
    random_actions,
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("span", ["token", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_equals_single_environments_step_by_step(kind: Kind, span: str, mode: str) -> None:
    n, tolerance = 4, TOLERANCE[kind]
    arguments = arguments_of(kind, rewrite_span=span)
    batch = DistillVectorEnv(n, **arguments, autoreset_mode=mode)
    singles = SyncVectorEnv([lambda: DistillEnv(**arguments)] * n, autoreset_mode=mode)
    rng = np.random.default_rng(0)
    assert_equal(batch.reset(seed=3), singles.reset(seed=3), tolerance)
    ended = 0
    for _ in range(16 if kind == "language model" else 40):
        actions = random_actions(batch, rng, n)
        ours, theirs = batch.step(actions), singles.step(actions)
        assert_equal(ours, theirs, tolerance)
        done = ours[2] | ours[3]
        ended += int(done.sum())
        if mode == "Disabled" and done.any():
            mask = {"reset_mask": done}
            assert_equal(batch.reset(options=mask), singles.reset(options=dict(mask)), tolerance)
            assert mask["reset_mask"] is done  # the caller's dictionary is left alone
    assert ended > n


def test_same_seed_same_episode() -> None:
    """And another seed another one; without a seed the stream of episodes continues."""

    def play(env: gym.Env[Any, Any], seed: int | None, episodes: int = 3) -> list[Any]:
        seen: list[Any] = []
        for episode in range(episodes):
            seen.append(env.reset(seed=seed if episode == 0 else None)[0].tolist())
            done = False
            while not done:
                observation, reward, terminated, truncated, _ = env.step(REWRITE)
                seen.append((observation.tolist(), reward))
                done = terminated or truncated
        return seen

    first, second = gym.make("Distill/Categorical-v0"), gym.make("Distill/Categorical-v0")
    assert play(first, 1) == play(second, 1) == play(first, 1)
    assert play(first, 1) != play(second, 2)
    one, two = play(first, None, 20), play(second, None, 20)  # both go on where they were
    assert one != two


def test_environments_on_one_live_teacher_do_not_disturb_each_other() -> None:
    teacher = markov(V, 2)
    one, other = (DistillVectorEnv(2, "categorical", teacher) for _ in range(2))
    alone = DistillVectorEnv(2, "categorical", markov(V, 2))
    one.reset(seed=0)
    alone.reset(seed=0)
    other.reset(seed=1)
    for action in ([0, 1], [REWRITE, 2], [3, 3]):
        other.step(np.array([4, 4]))
        assert_equal(one.step(np.array(action)), alone.step(np.array(action)))
