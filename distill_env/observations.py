"""Observations in the form that an agent takes: token ids, the same as floating-point numbers, or one-hot vectors."""

from __future__ import annotations

from typing import Any, get_args

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from distill_env.env_arguments import ObservationForm
from distill_env.ragged import PAD


def observation_space(form: ObservationForm, vocab_size: int, length: int) -> gym.spaces.Box:
    """The space of T = `length` ids below V = `vocab_size`, padded with -1, in this form."""
    if form == "one_hot":
        return gym.spaces.Box(0.0, 1.0, (length * vocab_size,), np.float32)
    return gym.spaces.Box(PAD, vocab_size - 1, (length,), np.int64 if form == "ids" else np.float32)


def encode(ids: NDArray[Any], form: ObservationForm, vocab_size: int) -> NDArray[Any]:
    """Ids [..., T] in this form, a new array: [..., T], or [..., T * V] with zeros for padding if it is `one_hot`."""
    if form == "one_hot":
        hot = ids[..., None] == np.arange(vocab_size)
        return hot.reshape(*ids.shape[:-1], -1).astype(np.float32)
    return ids.astype(np.int64 if form == "ids" else np.float32)


class EncodeObservation(VectorWrapper):
    """Observations of ids as floating-point numbers or one-hot vectors.

    Args:
        env: any vector environment whose single observations are ids from -1 (padding) or 0 on: a `Box` of integers, a
            `MultiDiscrete` or a `Discrete`.
        form: `ids`, `float`, or `one_hot`, which is flat: zeros and ones, V for each id.

    Raises:
        ValueError: for another observation space or another form.
    """

    def __init__(self, env: VectorEnv, form: ObservationForm) -> None:
        super().__init__(env)
        self._form, (self._count, length) = form, _count_and_length(env.single_observation_space, form)
        self.single_observation_space = observation_space(form, self._count, length)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(self, **kwargs: Any) -> tuple[NDArray[Any], dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        return self._encode(observation), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(actions)
        if "final_obs" in info:
            for row in np.flatnonzero(info["_final_obs"]):
                info["final_obs"][row] = self._encode(info["final_obs"][row][None])[0]
        return self._encode(observation), reward, terminated, truncated, info

    def _encode(self, ids: Any) -> NDArray[Any]:
        return encode(np.asarray(ids).reshape(len(ids), -1), self._form, self._count)


class SingleEncodeObservation(gym.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """`EncodeObservation` for a single environment; the arguments are the same."""

    def __init__(self, env: gym.Env[Any, Any], form: ObservationForm) -> None:
        RecordConstructorArgs.__init__(self, form=form)
        gym.ObservationWrapper.__init__(self, env)
        self._form, (self._count, length) = form, _count_and_length(env.observation_space, form)
        self.observation_space = observation_space(form, self._count, length)

    def observation(self, observation: Any) -> NDArray[Any]:
        return encode(np.asarray(observation).reshape(-1), self._form, self._count)


def _count_and_length(space: gym.Space[Any], form: ObservationForm) -> tuple[int, int]:
    """How many ids there are, and how many of them an observation has."""
    if form not in get_args(ObservationForm):
        raise ValueError(f"form: {form!r}; expected one of {', '.join(get_args(ObservationForm))}")
    if isinstance(space, gym.spaces.Discrete) and space.start >= PAD:
        return int(space.start + space.n), 1
    if isinstance(space, gym.spaces.MultiDiscrete) and space.start.min() >= PAD:
        return int((space.start + space.nvec).max()), int(space.nvec.size)
    if isinstance(space, gym.spaces.Box) and space.dtype.kind in "iu" and space.low.min() >= PAD:
        return int(space.high.max()) + 1, int(np.prod(space.shape))
    raise ValueError(
        f"env: observations {space}; expected ids: a Box of integers, MultiDiscrete or Discrete from {PAD} on"
    )
