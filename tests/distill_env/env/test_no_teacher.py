"""An environment without a teacher: the same completions, but nothing of a teacher in them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from distill_env.env import DistillEnv, DistillVectorEnv


@pytest.mark.parametrize("task", ["categorical", "sums"])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_observations_and_ends_are_those_of_the_environment_with_the_teacher(task: str, mode: Any) -> None:
    kwargs: dict[str, Any] = {"task": task, "autoreset_mode": mode, "max_new_tokens": 5}
    if task == "categorical":
        kwargs["task_kwargs"] = {"vocab_size": 6}
    teacher = {"teacher": "sums"} if task == "sums" else {"teacher_kwargs": {"vocab_size": 6}}
    alone, beside = DistillVectorEnv(4, teacher=None, **kwargs), DistillVectorEnv(4, **teacher, **kwargs)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    (one, _), (other, _) = alone.reset(seed=1), beside.reset(seed=1)
    for _ in range(20):
        np.testing.assert_array_equal(one, other)
        actions = rng.integers(0, alone.vocab_size, 4)
        if mode == "Disabled" and (ended := alone.completions.ended.copy()).any():
            (one, _), (other, _) = (env.reset(options={"reset_mask": ended}) for env in (alone, beside))
            continue
        one, rewards, *ends, info = alone.step(actions)
        other, _, *expected, _ = beside.step(actions)
        np.testing.assert_array_equal(ends, expected)
        assert not rewards.any()
        assert "teacher_log_probs" not in info


def test_nothing_can_be_asked_of_a_teacher() -> None:
    env = DistillVectorEnv(2, "sums", None, task_reward=1.0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"^actions: ") as error:
        env.step(np.array([0, env.rewrite_action]))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^lookahead: "):
        env.lookahead(torch.zeros(2, 1, dtype=torch.long))
    single = DistillEnv(task="sums", teacher=None)
    single.reset(seed=0)
    with pytest.raises(ValueError, match=r"^actions: "):
        single.step(single.rewrite_action)


def test_the_grade_is_still_paid() -> None:
    env = DistillEnv(task="sums", teacher=None, task_reward=2.0)
    _, _ = env.reset(seed=0)
    completion = env.batch.completions.prompts[0].reference_completion
    assert completion is not None
    rewards = [env.step(token)[1] for token in completion]
    assert rewards == [0.0] * (len(completion) - 1) + [2.0]


def test_it_is_made_by_name() -> None:
    env = gym.make("Distill/Sums-v0", teacher=None)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"^actions: "):
        env.step(env.unwrapped.rewrite_action)  # type: ignore[attr-defined]
