"""What `render` shows."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from distill_env.env import DistillVectorEnv
from distill_env.rendering import END, TOKENS_SHOWN, render_rgb
from distill_env.tasks.base import Prompt
from distill_env.tasks.categorical import CategoricalTask
from distill_env.tasks.sums import SumsTask
from tests.helpers.environments import REWRITE, arguments_of, one_state_env


def test_ansi_shows_who_wrote() -> None:
    """The prompt dim, what the teacher wrote red, the rest plain."""
    env = one_state_env([0.0, 1.0 - 1e-12, 1e-12], render_mode="ansi", max_new_tokens=5)
    env.reset(seed=0, options={"prompts": [()]})
    for action in (0, 3, 3, 0, 2):
        env.step(np.array([action]))
    assert env.render() == ("\x1b[2m\x1b[0ma\x1b[31m⟦bb⟧\x1b[0ma" + END,)
    single = gym.make("Distill/Sums-v0", render_mode="ansi")
    single.reset(options={"prompts": [SumsTask.encode_problem(([7, 2], None))]})
    for action in (7, 7, 12):
        single.step(action)
    assert single.render() == "\x1b[2m7+2=\x1b[0m77;"
    assert DistillVectorEnv(1, **arguments_of("table")).render() is None


def red_columns(frame: NDArray[np.uint8]) -> set[int]:
    """Columns of pixels with the colour of the teacher's bars."""
    red, green, blue = frame.astype(int).transpose(2, 0, 1)
    return set(np.flatnonzero(((red > 150) & (green < 60) & (blue < 80)).any(0)).tolist())


def test_a_picture_shows_who_wrote_and_what_it_paid() -> None:
    """Every token of the teacher adds red to the right of what was there, an own token adds none."""
    env = gym.make("Distill/Categorical-v0", render_mode="rgb_array")
    env.reset(seed=0, options={"prompts": [(0,)]})
    frames, written = [env.render()], 0
    for action in (1, REWRITE, 2, REWRITE):
        env.step(action)
        frames.append(env.render())
        before, after = (red_columns(frame) for frame in frames[-2:])  # type: ignore[arg-type]
        written += action == REWRITE
        assert (max(after, default=0) > max(before, default=0)) == (action == REWRITE)
        assert before <= after
    assert written == 2
    for frame in frames:
        assert isinstance(frame, np.ndarray)
        assert (frame.dtype, frame.shape) == (np.uint8, (240, 800, 3))
    batch = DistillVectorEnv(3, **arguments_of("language model"), render_mode="rgb_array")
    batch.reset(seed=0)
    rendered = batch.render()
    assert rendered is not None
    assert [np.shape(frame) for frame in rendered] == [(240, 800, 3)] * 3


def test_a_lower_reward_has_a_longer_bar() -> None:
    task, prompt = CategoricalTask(6), Prompt((0,), "a")
    dark = [(render_rgb(task, prompt, [1, 2], [False, False], [low, -10.0]) < 100).sum() for low in (-9.0, -5.0, -1.0)]
    assert dark == sorted(dark, reverse=True)
    assert len(set(dark)) == 3


def test_any_text_can_be_drawn() -> None:
    """Formulas, control characters, scripts without a glyph, long texts: no warning, and always the same size."""

    class Words(CategoricalTask):
        def decode(self, tokens: Sequence[int]) -> str:
            return "".join(["$x_", "\n", "\u4e2d", "\x00", "{"][t] for t in tokens if t < 5)

    tokens = list(range(6)) * TOKENS_SHOWN
    frame = render_rgb(Words(), Prompt((), "$" * 500), tokens, [True] * len(tokens), [-1.0] * len(tokens))
    assert frame.shape == (240, 800, 3)
