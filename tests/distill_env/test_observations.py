"""Forms of observations, by argument and by wrapper."""

from __future__ import annotations

from typing import Any, get_args

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv, VectorEnv

from distill_env.env import DistillEnv, DistillVectorEnv
from distill_env.env_arguments import ObservationForm
from distill_env.observations import EncodeObservation, SingleEncodeObservation, encode
from tests.helpers.environments import MODES, arguments_of, assert_equal, random_actions

FORMS: tuple[ObservationForm, ...] = get_args(ObservationForm)


def test_forms_of_ids() -> None:
    ids = np.array([[2, 0, -1]])
    assert_equal(encode(ids, "ids", 3), ids)
    assert_equal(encode(ids, "float", 3), np.array([[2.0, 0.0, -1.0]], np.float32))
    assert_equal(encode(ids, "one_hot", 3), np.array([[0, 0, 1, 1, 0, 0, 0, 0, 0]], np.float32))
    for form in FORMS:
        assert not np.shares_memory(encode(ids, form, 3), ids)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_the_argument_does_what_the_wrapper_does(form: ObservationForm, mode: str) -> None:
    """Single and vector, in the observations at ends, too."""
    arguments = arguments_of("ragged table")
    envs: list[VectorEnv[Any, Any, Any]] = [
        DistillVectorEnv(3, **arguments, observation=form, autoreset_mode=mode),
        EncodeObservation(DistillVectorEnv(3, **arguments, autoreset_mode=mode), form),
        SyncVectorEnv([lambda: DistillEnv(**arguments, observation=form)] * 3, autoreset_mode=mode),
        SyncVectorEnv([lambda: SingleEncodeObservation(DistillEnv(**arguments), form)] * 3, autoreset_mode=mode),
    ]
    first = envs[0].reset(seed=0)
    assert envs[0].observation_space.contains(first[0])
    for env in envs[1:]:
        assert env.single_observation_space == envs[0].single_observation_space
        assert env.observation_space == envs[0].observation_space
        assert_equal(env.reset(seed=0), first)
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(20):
        actions = random_actions(envs[0].unwrapped, rng, 3)  # type: ignore[arg-type]
        results = [env.step(actions) for env in envs]
        assert envs[0].observation_space.contains(results[0][0])
        for result in results[1:]:
            assert_equal(result, results[0])
        done = results[0][2]
        ends += int(done.sum())
        if mode == "Disabled" and done.any():
            again = [env.reset(options={"reset_mask": done.copy()}) for env in envs]
            for reset in again[1:]:
                assert_equal(reset, again[0])
    assert ends > 3


def test_the_wrapper_takes_any_observation_of_ids() -> None:
    lake = SingleEncodeObservation(gym.make("FrozenLake-v1"), "one_hot")
    observation, _ = lake.reset(seed=0)
    assert observation.tolist() == [1.0] + [0.0] * 15
    assert lake.spec is not None
    assert isinstance(gym.make(EnvSpec.from_json(lake.spec.to_json())), SingleEncodeObservation)
    cards = EncodeObservation(gym.make_vec("Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3", 2), "float")
    assert cards.observation_space.contains(cards.reset(seed=0)[0])
    with pytest.raises(ValueError, match=r"^env: "):
        SingleEncodeObservation(gym.make("CartPole-v1"), "float")
    with pytest.raises(ValueError, match=r"^form: "):
        SingleEncodeObservation(gym.make("FrozenLake-v1"), "letters")  # type: ignore[arg-type]
