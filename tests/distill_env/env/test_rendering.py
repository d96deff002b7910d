"""What `render` shows."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from distill_env.env import DistillVectorEnv
from distill_env.rendering import END
from distill_env.tasks.sums import SumsTask
from tests.helpers.environments import arguments_of, one_state_env


def test_ansi_shows_who_wrote() -> None:
    """The prompt dim, what the teacher wrote red, the rest plain."""
    env = one_state_env([0.0, 1.0 - 1e-12, 1e-12], render_mode="ansi", max_new_tokens=5)
    env.reset(seed=0, options={"prompts": [()]})
    for action in (0, 3, 3, 0, 2):
        env.step(np.array([action]))
    assert env.render() == ("\x1b[2m\x1b[0ma\x1b[31mbb\x1b[0ma" + END,)
    single = gym.make("Distill/Sums-v0", render_mode="ansi")
    single.reset(options={"prompts": [SumsTask.encode_problem(([7, 2], None))]})
    for action in (7, 7, 12):
        single.step(action)
    assert single.render() == "\x1b[2m7+2=\x1b[0m77;"
    assert DistillVectorEnv(1, **arguments_of("table")).render() is None
