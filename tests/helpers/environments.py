"""Small environments, and equality of what they return."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from distill_env.env import DistillVectorEnv
from distill_env.models.tabular import TabularModel, suffix_automaton
from distill_env.tasks.categorical import CategoricalTask
from tests.helpers.tables import Ragged

MODES = [mode.value for mode in AutoresetMode]
V, REWRITE = 6, 6  # of Distill/Categorical-v0
Kind = Literal["table", "ragged table", "language model"]
KINDS: list[Kind] = ["table", "ragged table", "language model"]
TOLERANCE = {"table": 0.0, "ragged table": 0.0, "language model": 1e-4}


def arguments_of(kind: Kind, **kwargs: Any) -> dict[str, Any]:
    """A short environment over a table, one with prompts of 0 to 3 tokens and grades, or the shipped language model."""
    if kind != "language model":
        table = {"vocab_size": V, "order": 2, "seed": 1, "sharpness": 1.0}
        task = "categorical" if kind == "table" else Ragged(V, 6)
        return {"task": task, "teacher": "markov", "teacher_kwargs": table, "task_reward": 0.5} | kwargs
    few = {"lengths": (2, 3), "ood_lengths": (4,), "prompts_per_length": 5}
    return {"task": "sums", "teacher": "sums", "task_kwargs": few, "max_new_tokens": 6, "task_reward": 0.5} | kwargs


def one_state(probabilities: list[float]) -> TabularModel:
    v = len(probabilities)
    return TabularModel(suffix_automaton(v, 0), torch.tensor([probabilities], dtype=torch.float64).log(), v - 1)


def one_state_env(probabilities: list[float], n: int = 1, max_new_tokens: int = 4, **kwargs: Any) -> DistillVectorEnv:
    """No prompt, and the same distribution everywhere."""
    task = CategoricalTask(len(probabilities), max_new_tokens, empty_prompt=True)
    return DistillVectorEnv(n, task, one_state(probabilities), autoreset_mode="Disabled", **kwargs)


def random_actions(env: DistillVectorEnv, rng: np.random.Generator, n: int, rewrites: float = 0.3) -> NDArray[np.int64]:
    """Tokens and REWRITEs [n]."""
    rewrite = env.rewrite_action
    return np.where(rng.random(n) < rewrites, rewrite, rng.integers(0, rewrite, n))


def ended(env: DistillVectorEnv) -> NDArray[np.bool_]:
    """Rows that wait for a reset."""
    return env.completions.ended.copy()


def assert_equal(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Of observations, rewards, flags and infos, however nested; floats to within `tolerance`, all else exactly."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal(actual[key], expected[key], tolerance)
    elif isinstance(expected, tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other, tolerance)
    elif isinstance(expected, np.ndarray) and expected.dtype == object:
        assert actual.shape == expected.shape
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other, tolerance)
    elif isinstance(expected, np.ndarray):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        if tolerance and np.issubdtype(expected.dtype, np.floating):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
        else:
            np.testing.assert_array_equal(actual, expected)
    else:
        assert type(actual) is type(expected)
        assert actual == pytest.approx(expected, abs=tolerance) if tolerance else actual == expected
