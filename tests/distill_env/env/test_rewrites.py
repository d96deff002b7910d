"""How the teacher draws the tokens that it writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distill_env.env import DistillVectorEnv
from distill_env.ragged import PAD
from distill_env.randomness import episode_keys
from distill_env.tasks.base import Prompt
from tests.helpers.environments import REWRITE, arguments_of, one_state_env


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"rewrite": "sample"}, [0.1, 0.4, 0.3, 0.15, 0.05]),
        ({"rewrite": "argmax"}, [0, 1, 0, 0, 0]),
        ({"rewrite": "nucleus", "rewrite_top_p": 0.69}, [0, 4 / 7, 3 / 7, 0, 0]),
        ({"rewrite": "nucleus", "rewrite_top_p": 0.71}, [0, 40 / 85, 30 / 85, 15 / 85, 0]),
        ({"rewrite": "nucleus", "rewrite_top_p": 1.0}, [0.1, 0.4, 0.3, 0.15, 0.05]),
    ],
)
def test_how_the_teacher_draws(arguments: dict[str, Any], expected: list[float]) -> None:
    n = 20_000
    env = one_state_env([0.1, 0.4, 0.3, 0.15, 0.05], n, reveal_teacher=False, **arguments)
    env.reset(seed=0)
    info = env.step(np.full(n, 5))[4]
    frequencies = np.bincount(info["tokens"][:, 0], minlength=5) / n
    np.testing.assert_allclose(frequencies, expected, atol=0.012)
    assert not frequencies[np.array(expected) == 0].any()


def test_a_draw_depends_on_episode_and_position_alone() -> None:
    """Not on the row, on who shares the batch, or on what was drafted and dropped before."""
    arguments = arguments_of("table", autoreset_mode="Disabled")
    keys, prompts = episode_keys(9, np.arange(3)), [Prompt((i,), "") for i in range(3)]
    env = DistillVectorEnv(3, **arguments)
    env.reset(options={"episode_keys": keys, "prompts": prompts})
    expected = [env.step(np.full(3, REWRITE))[4]["tokens"][:, 0] for _ in range(2)]
    order = [2, 0]
    fewer = DistillVectorEnv(2, **arguments)
    fewer.reset(options={"episode_keys": keys[order], "prompts": [prompts[i] for i in order]})
    for tokens in expected:
        fewer.lookahead(torch.tensor([[0, 1], [1, PAD]]))
        np.testing.assert_array_equal(fewer.step(np.full(2, REWRITE))[4]["tokens"][:, 0], tokens[order])
