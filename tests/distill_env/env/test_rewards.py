"""What tokens, rewrites and grades pay."""

from __future__ import annotations

import numpy as np
import pytest

from distill_env.env import DistillVectorEnv
from distill_env.ragged import PAD
from distill_env.tasks.base import Prompt
from distill_env.tasks.sums import SumsTask
from tests.helpers.environments import one_state_env


def test_an_own_token_pays_the_teachers_log_probability_and_a_rewrite_its_price() -> None:
    env = one_state_env([0.5, 0.3, 0.2], rewrite_cost=0.75)
    _, info = env.reset(seed=0)
    np.testing.assert_allclose(np.exp(info["teacher_log_probs"][0]), [0.5, 0.3, 0.2], atol=1e-7)
    assert env.step(np.array([1]))[1] == pytest.approx(np.log(0.3))
    _, reward, _, _, info = env.step(np.array([3]))
    assert reward == -0.75
    assert info["rewritten"].tolist() == [[True]]
    assert info["tokens"][0, 0] in range(3)


def test_rewards_are_floored_and_the_floor_counted() -> None:
    env = one_state_env([0.9, 0.1 - 1e-9, 1e-9, 0.0], 4, log_prob_floor=-10.0, rewrite_cost=1.0, chunk=3)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.array([[0, 0, 1], [2, 0, 2], [0, 3, PAD], [4, PAD, PAD]]))
    assert info["floored"].tolist() == [0, 2, 1, 0]
    expected = [2 * np.log(0.9) + np.log(0.1), -20 + np.log(0.9), np.log(0.9) - 10, -1.0]
    np.testing.assert_allclose(reward, expected, atol=1e-6)
    np.testing.assert_allclose(info["token_rewards"].sum(1), reward)


def test_a_whole_step_is_written_at_one_price() -> None:
    """Up to and including the token that ends it, the end token, or the horizon."""
    env = one_state_env([0.15, 0.7, 0.15], 300, rewrite_span="step", rewrite_cost=2.0, max_new_tokens=5)  # `a` ends it
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(np.full(300, 3))
    cut_off = info["cut_off"] & info["_cut_off"]
    assert set(reward.tolist()) == {-2.0}
    for row, tokens in enumerate(info["tokens"].tolist()):
        written = [t for t in tokens if t >= 0]
        assert all(t == 1 for t in written[:-1])
        assert written[-1] in (0, 2) or len(written) == 5
        assert info["_cut_off"][row] == terminated[row] == (written[-1] == 2 or len(written) == 5)
        assert cut_off[row] == (len(written) == 5 and written[-1] != 2)
    assert not truncated.any()
    assert cut_off.any()
    assert (terminated & ~cut_off).any()
    assert not terminated.all()


def test_the_task_pays_at_the_end() -> None:
    """`task_reward` times the grade, whoever wrote, once, on top of the rest."""
    prompt = Prompt(SumsTask.encode_problem(([7, 2], None)), "7+2=")
    for answer, grade in (
        ([2, 9], 0.0),
        (SumsTask.encode_completion([2, 7]), 1.0),
        (SumsTask.encode_completion([7, 2])[:-1], 0.0),
    ):
        plain, paid = (DistillVectorEnv(1, "sums", "sums", task_reward=w, max_new_tokens=6) for w in (0.0, 5.0))
        for env in (plain, paid):
            env.reset(options={"prompts": [prompt]})
        actions = [*answer, *[0] * (6 - len(answer))] if len(answer) < 6 else answer
        difference = 0.0
        for i, token in enumerate(actions):
            before = plain.step(np.array([token]))[1]
            _, after, terminated, truncated, info = paid.step(np.array([token]))
            difference += float(after[0] - before[0])
            assert ("grade" in info) == bool((terminated | truncated)[0]) == (i == len(actions) - 1)
        assert difference == pytest.approx(5.0 * grade)
        assert info["grade"][0] == grade
