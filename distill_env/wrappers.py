"""Gates for agents that do not see the teacher: a token that it finds implausible is replaced by REWRITE."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray

Step = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]


class RewriteImplausible(VectorWrapper):
    """Replace an own token that the teacher finds implausible by REWRITE.

    A token is implausible if it is not among the teacher's `top_k` likeliest, or if its log-probability is below
    `min_log_prob`. The teacher then writes a token instead, and the agent pays the price of a rewrite. The agent learns
    from the reward alone; it never sees the teacher.

    Args:
        env: a `DistillVectorEnv`, made with `chunk=1` and `reveal_teacher=True`.
        top_k: how many of the teacher's likeliest tokens are plausible; 0 means all.
        min_log_prob: the lowest plausible log-probability under the teacher, nats.

    Raises:
        ValueError: if `top_k` is negative; at `reset`, if `info` has no `teacher_log_probs`.
    """

    def __init__(self, env: VectorEnv, top_k: int = 0, min_log_prob: float = -np.inf) -> None:
        super().__init__(env)
        self._log_probs = np.zeros((env.num_envs, 1), np.float32)  # of the current states, [n, V] after reset
        self._limits = _check_top_k(top_k), min_log_prob

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        _teacher(info)
        self._remember(info)
        return observation, info

    def step(self, actions: Any) -> Step:
        actions = np.asarray(actions)
        rewrite = self.single_action_space.n - 1  # type: ignore[attr-defined]
        hand_over = implausible(self._log_probs, actions, *self._limits)
        observation, reward, terminated, truncated, info = super().step(np.where(hand_over, rewrite, actions))
        self._remember(info)
        return observation, reward, terminated, truncated, info

    def _remember(self, info: dict[str, Any]) -> None:
        if "teacher_log_probs" in info:  # of rows whose completions have not ended
            shown = info["_teacher_log_probs"][:, None]
            self._log_probs = np.where(shown, info["teacher_log_probs"], self._log_probs)


class SingleRewriteImplausible(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """`RewriteImplausible` for a `DistillEnv`; the arguments are the same."""

    def __init__(self, env: gym.Env[Any, Any], top_k: int = 0, min_log_prob: float = -np.inf) -> None:
        RecordConstructorArgs.__init__(self, top_k=top_k, min_log_prob=min_log_prob)
        gym.Wrapper.__init__(self, env)
        self._limits = _check_top_k(top_k), min_log_prob

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._log_probs: NDArray[np.float32] | None = _teacher(info)
        return observation, info

    def step(self, action: Any) -> tuple[NDArray[np.int64], Any, bool, bool, dict[str, Any]]:
        if self._log_probs is not None and implausible(self._log_probs[None], np.array([action]), *self._limits)[0]:
            action = self.action_space.n - 1  # type: ignore[attr-defined]
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._log_probs = info.get("teacher_log_probs")
        return observation, reward, terminated, truncated, info


def implausible(
    log_probs: NDArray[np.float32], tokens: NDArray[np.int64], top_k: int, min_log_prob: float
) -> NDArray[np.bool_]:
    """Which of the tokens [n] the teacher, [n, V], finds implausible; never padding or REWRITE."""
    own = (tokens >= 0) & (tokens < log_probs.shape[1])
    chosen = np.take_along_axis(log_probs, np.where(own, tokens, 0)[:, None], 1)  # [n, 1]
    rank = (log_probs > chosen).sum(1)  # 0 is the likeliest
    return own & ((rank >= (top_k or np.inf)) | (chosen[:, 0] < min_log_prob))


def _check_top_k(top_k: int) -> int:
    if top_k < 0:
        raise ValueError(f"top_k: {top_k}; expected a number of tokens, or 0 for all")
    return top_k


def _teacher(info: dict[str, Any]) -> NDArray[np.float32]:
    if "teacher_log_probs" not in info:
        raise ValueError("env: no teacher_log_probs in info; expected chunk=1 and reveal_teacher=True")
    return info["teacher_log_probs"]
