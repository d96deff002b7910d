"""A user's mistakes are refused by name, in one line, and change nothing."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from distill_env.env import DistillEnv, DistillVectorEnv
from tests.helpers.environments import REWRITE, V, arguments_of, assert_equal


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("task", {"task": "poetry"}),
        ("split", {"split": "dev"}),
        ("split", {"task": "instruct", "teacher": "sums", "split": "ood"}),  # which has no prompts
        ("teacher", {"task": "sums"}),  # of another vocabulary
        ("rewrite", {"rewrite": "beam"}),
        ("rewrite_span", {"rewrite_span": "line"}),
        ("rewrite_top_p", {"rewrite_top_p": 0.0}),
        ("rewrite_top_p", {"rewrite_top_p": 1.1}),
        ("rewrite_cost", {"rewrite_cost": -0.1}),
        ("rewrite_cost", {"rewrite_cost": float("nan")}),
        ("log_prob_floor", {"log_prob_floor": 0.0}),
        ("log_prob_floor", {"log_prob_floor": -float("inf")}),
        ("task_reward", {"task_reward": float("inf")}),
        ("task_reward", {"task_reward": float("nan")}),
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("max_new_tokens", {"task": "sums", "teacher": "sums", "max_new_tokens": 60}),  # more than the context
        ("chunk", {"chunk": 0}),
        ("chunk", {"chunk": 1.5}),
        ("num_envs", {"num_envs": 0}),
        ("render_mode", {"render_mode": "human"}),
        ("observation", {"observation": "letters"}),
        ("task", {"task": "nowhere:Task"}),
        ("teacher", {"teacher": "distill_env.env:Nothing"}),
        ("autoreset_mode", {"autoreset_mode": "Later"}),
        ("path", {"task": "instruct", "teacher": "sums", "task_kwargs": {"path": "nowhere.txt"}}),
    ],
)
def test_a_bad_argument_is_named_in_one_line(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: ") as error:
        DistillVectorEnv(**({"num_envs": 2} | arguments))
    assert "\n" not in str(error.value)


def test_an_unknown_argument_is_refused() -> None:
    for kind in (DistillEnv, DistillVectorEnv):
        with pytest.raises(TypeError, match="tau"):
            kind(tau=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="num_envs"):
        DistillEnv(num_envs=2)  # type: ignore[call-arg]


def test_a_teacher_that_is_not_there() -> None:
    with pytest.raises(OSError, match=r"\./nowhere") as error:
        DistillVectorEnv(2, "sums", "./nowhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("prompts", {"options": {"prompts": [(0,)]}}),
        ("prompts", {"options": {"prompts": [(0,), (V,)]}}),
        ("prompts", {"options": {"prompts": [(0,), (0, 1)]}}),
        ("prompts", {"options": {"prompts": [(0,), ("a",)]}, "seed": 1}),
        *(("prompts", {"options": {"prompts": [(0,), prompt]}}) for prompt in ((-1,), (0.5,), "you", 4)),
        ("episode_keys", {"options": {"episode_keys": np.zeros(3, np.uint64)}}),
        ("reset_mask", {"options": {"reset_mask": np.zeros(2, np.bool_)}}),
        ("reset_mask", {"options": {"reset_mask": np.ones(3, np.bool_)}}),
        ("reset_mask", {"options": {"reset_mask": np.ones(2)}}),
        ("options", {"options": {"prompt": [(0,), (1,)]}}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": [1, 2, 3]}),
        ("seed", {"seed": [1, 2**64]}),
        ("seed", {"seed": [1, -1]}),
    ],
)
def test_a_bad_reset_is_refused_and_changes_nothing(name: str, arguments: dict[str, Any]) -> None:
    env, untouched = (DistillVectorEnv(2, **arguments_of("table")) for _ in range(2))
    env.reset(seed=0)
    untouched.reset(seed=0)
    with pytest.raises(ValueError, match=rf"^{name}: "):
        env.reset(**arguments)
    for action in (0, REWRITE, V - 1, 0, 0):
        assert_equal(env.step(np.full(2, action)), untouched.step(np.full(2, action)))
    assert_equal(env.reset(), untouched.reset())


def test_an_empty_prompt_of_a_language_model_is_refused() -> None:
    env = DistillVectorEnv(2, "sums", "sums")
    with pytest.raises(ValueError, match="prompt"):
        env.reset(options={"prompts": [(1,), ()]})


def test_a_bad_step_is_refused_and_changes_nothing() -> None:
    env, untouched = (DistillVectorEnv(2, **arguments_of("table"), chunk=2) for _ in range(2))
    for call in (lambda: env.step(np.zeros((2, 2), np.int64)), lambda: env.lookahead(torch.zeros(2, 1).long())):
        with pytest.raises(gym.error.ResetNeeded):
            call()
    env.reset(seed=0)
    untouched.reset(seed=0)
    for actions in (
        np.zeros((2, 3), np.int64),
        np.zeros(2, np.int64),
        np.zeros((3, 1), np.int64),
        np.zeros((2, 1)),
        np.full((2, 1), V + 1),
        np.full((2, 1), -2),
        np.full((2, 1), 2**62),
        np.zeros((2, 0), np.int64),
        np.array([["a"], ["b"]]),
    ):
        with pytest.raises(ValueError, match="actions"):
            env.step(actions)
    drafts = (torch.zeros(3, 1).long(), torch.zeros(2, 1), torch.tensor([[-1, 0]] * 2))
    for draft in (*drafts, torch.full((2, 1), V), torch.full((2, 1), -2)):
        with pytest.raises(ValueError, match="tokens"):
            env.lookahead(draft)
    assert_equal(env.step(np.array([[0, 1], [2, REWRITE]])), untouched.step(np.array([[0, 1], [2, REWRITE]])))
    with pytest.raises(ValueError, match="reset_mask"):
        DistillVectorEnv(2, **arguments_of("table")).reset(options={"reset_mask": np.array([True, False])})
