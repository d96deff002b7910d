"""Prompts, keys, masks and autoreset."""

from __future__ import annotations

from collections import Counter

import gymnasium as gym
import numpy as np
import pytest

from distill_env.env import DistillVectorEnv
from distill_env.ragged import PAD
from distill_env.tasks.base import Prompt
from distill_env.tasks.sums import SumsTask
from tests.helpers.environments import REWRITE, V, arguments_of, assert_equal


def test_prompts_and_keys_are_chosen_at_reset() -> None:
    env = DistillVectorEnv(3, **arguments_of("table"), autoreset_mode="Disabled")
    observation, info = env.reset(options={"prompts": [(0,), Prompt((3,), "d"), np.array([4])]})
    assert observation[:, :2].tolist() == [[0, PAD], [3, PAD], [4, PAD]]
    table = env.teacher.log_table()  # type: ignore[attr-defined]
    states = [env.teacher.walk((i,)) for i in (0, 3, 4)]  # type: ignore[attr-defined]
    np.testing.assert_allclose(info["teacher_log_probs"], table[states].detach().float(), atol=1e-7)
    keys = np.array([5, 6, 5], np.uint64)
    env.reset(options={"prompts": [(0,)] * 3, "episode_keys": keys})
    tokens = np.stack([env.step(np.full(3, REWRITE))[4]["tokens"][:, 0] for _ in range(2)], 1)
    assert tokens[0].tolist() == tokens[2].tolist()


def test_a_masked_reset_leaves_the_other_rows_alone() -> None:
    arguments = arguments_of("language model", autoreset_mode="Disabled")
    some, none = DistillVectorEnv(3, **arguments), DistillVectorEnv(3, **arguments)
    some.reset(seed=0)
    none.reset(seed=0)
    actions = np.array([7, some.rewrite_action, 3])
    some.step(actions)
    before = none.step(actions)[0]
    options = {"reset_mask": np.array([False, True, False]), "prompts": [SumsTask.encode_problem(([1, 2], None))]}
    observation, info = some.reset(options=options)
    assert info["_teacher_log_probs"].tolist() == [False, True, False]
    np.testing.assert_array_equal(observation[[0, 2]], before[[0, 2]])
    assert observation[1, :5].tolist() == [*SumsTask.encode_problem(([1, 2], None)), PAD]
    assert set(options) == {"reset_mask", "prompts"}
    after, expected = some.step(actions), none.step(actions)
    for one, other in zip(after[:4], expected[:4], strict=True):
        assert_equal(one[[0, 2]], other[[0, 2]], 1e-4)


def test_prompts_are_drawn_evenly_from_the_split() -> None:
    env = DistillVectorEnv(5000, **arguments_of("table", reveal_teacher=False))
    observation, _ = env.reset(seed=0)
    frequencies = np.bincount(observation[:, 0], minlength=5) / 5000
    np.testing.assert_allclose(frequencies, 0.2, atol=0.02)


def test_every_autoreset_begins_another_episode() -> None:
    env = DistillVectorEnv(2, **arguments_of("table"), autoreset_mode="SameStep")
    env.reset(seed=0)
    begun = Counter[int]()
    for _ in range(40):
        observation, _, terminated, _, info = env.step(np.full(2, V - 1))  # ends at once
        assert terminated.all()
        assert info["final_obs"][0][1] == V - 1
        begun.update(observation[:, 0].tolist())
    assert len(begun) == 5


def test_an_ended_row_waits() -> None:
    """Without autoreset it takes only -1, for which nothing happens."""
    env = DistillVectorEnv(2, **arguments_of("table"), autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(np.array([V - 1, 0]))
    with pytest.raises(gym.error.ResetNeeded, match=r"\[0\]"):
        env.step(np.array([0, 0]))
    observation, reward, terminated, truncated, info = env.step(np.array([PAD, 0]))
    assert (reward[0], terminated[0], truncated[0]) == (0.0, False, False)
    assert info["_tokens"].tolist() == [False, True]
    assert (observation[0] >= 0).sum() == 2


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    """Chat templates close every message with it."""
    env = DistillVectorEnv(2, **arguments_of("table"), autoreset_mode="Disabled")
    env.reset(options={"prompts": [(V - 1,), (0,)]})
    assert not env.step(np.array([PAD, V - 1]))[2][0]
    _, reward, terminated, _, _ = env.step(np.array([0, PAD]))
    assert reward[0] < 0
    assert not terminated.any()
