"""Agents of somebody else's that try one thing each: `--agent tests.helpers.plugin_agents:Class`."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.helpers.plugin_agent import Frequencies


class AsksForEverything(Frequencies):
    """It lets the teacher write its test."""

    def act(self, observation: Any, info: Any = None) -> Any:
        return np.full(len(observation), len(self.counts))


class Copies(Frequencies):
    """It reads the answer in `info`."""

    def act(self, observation: Any, info: Any = None) -> Any:
        return info["teacher_log_probs"].argmax(-1)


class Remembers(Frequencies):
    """It keeps the environment that it was made with, and asks its teacher."""

    def __init__(self, env: Any, seed: int) -> None:
        super().__init__(env, seed)
        self.env = env.unwrapped

    def act(self, observation: Any, info: Any = None) -> Any:
        teacher = self.env.teacher.fork()
        return teacher.start([tuple(row[row >= 0]) for row in observation]).argmax(-1).numpy()


class Silent(Frequencies):
    """It calls no callback."""

    def learn(self, env: Any, iterations: int, callback: Any = None) -> Any:
        return super().learn(env, iterations)


class ImportsLate(Frequencies):
    """It imports a module beside it when it learns, and reports metrics whose names mean something else to it."""

    def learn(self, env: Any, iterations: int, callback: Any = None) -> Any:
        importlib.import_module("beside_it")

        def report(iteration: int, metrics: dict[str, float]) -> None:
            callback(iteration, metrics | {"train/entropy": -1.0, "train/loss": float("inf"), "rollout/loops": 1.0})

        return super().learn(env, iterations, report)


@dataclass(frozen=True)
class Exploration:
    """How it explores."""

    epsilon: float = 0.1
    """Probability of a random action."""


class Configured(Frequencies):
    """It has settings of its own, no seed, and takes the warm student."""

    def __init__(
        self,
        env: Any,
        student: Any,
        smoothing_steps: int = 3,
        mode: Literal["fast", "slow"] = "fast",
        exploration: Exploration = Exploration(),
    ) -> None:
        super().__init__(env, 0)
        assert student.vocab_size == len(self.counts)
        self.settings = {"smoothing_steps": smoothing_steps, "mode": mode, "epsilon": exploration.epsilon}

    def save(self, path: str | Path) -> None:
        super().save(path)
        (Path(path) / "settings.json").write_text(json.dumps(self.settings))


class Needy(Frequencies):
    """It needs what a run does not know."""

    def __init__(self, env: Any, secret: int) -> None:
        super().__init__(env, secret)
