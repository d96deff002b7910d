"""Pickles and deep copies continue as the original does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from distill_env.env import DistillVectorEnv
from distill_env.models.tabular import markov
from distill_env.ragged import PAD
from tests.helpers.environments import (
    KINDS,
    MODES,
    REWRITE,
    TOLERANCE,
    Kind,
    V,
    arguments_of,
    assert_equal,
    ended,
    random_actions,
)
from tests.helpers.tables import Ragged


def played_for_a_while(kind: Kind, **kwargs: Any) -> DistillVectorEnv:
    """An environment in mid-episode, some rows further than others, and some at an end."""
    env = DistillVectorEnv(4, **arguments_of(kind, **kwargs))
    env.reset(seed=0)
    rng = np.random.default_rng(1)
    for _ in range(3):
        step_somehow(env, rng)
    return env


def step_somehow(env: DistillVectorEnv, rng: np.random.Generator) -> Any:
    """Random actions; rows that wait for a reset go on waiting."""
    actions = random_actions(env, rng, env.num_envs)
    if env.autoreset_mode is AutoresetMode.DISABLED:
        actions[ended(env)] = PAD
    return env.step(actions)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_as_the_original_does(kind: Kind, mode: str, how: str) -> None:
    env = played_for_a_while(kind, autoreset_mode=mode)
    copied = pickle.loads(pickle.dumps(env)) if how == "pickle" else copy.deepcopy(env)
    rngs = np.random.default_rng(2), np.random.default_rng(2)
    for step in range(10):
        if mode == "Disabled" and step == 5:
            options = {"reset_mask": ended(env)}
            assert options["reset_mask"].any()
            assert_equal(copied.reset(options=options), env.reset(options=options), TOLERANCE[kind])
        assert_equal(step_somehow(copied, rngs[0]), step_somehow(env, rngs[1]), TOLERANCE[kind])


def test_copies_of_single_chunked_and_live_environments() -> None:
    """Wrapped by `make`; with a chunk; and with a teacher that was handed over as an object."""
    single = gym.make("Distill/Categorical-v0", rewrite_cost=0.5)
    single.reset(seed=0)
    single.step(REWRITE)
    copied = pickle.loads(pickle.dumps(single))
    for action in (REWRITE, 0, 1):
        assert_equal(copied.step(action), single.step(action))
    chunked = DistillVectorEnv(3, Ragged(V, 6), markov(V, 2), chunk=3)
    chunked.reset(seed=0)
    actions = np.array([[0, 1, REWRITE], [2, REWRITE, 0], [1, 1, 1]])
    chunked.step(actions)
    copied = pickle.loads(pickle.dumps(chunked))
    for _ in range(4):
        assert_equal(copied.step(actions), chunked.step(actions))


def test_a_copy_is_small() -> None:
    """By name and state: no weights and no cache go into a pickle."""
    assert len(pickle.dumps(played_for_a_while("language model"))) < 20_000
