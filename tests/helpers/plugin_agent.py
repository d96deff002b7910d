"""Somebody else's agent, in a file of their own: `--agent plugin_agent:Interrupted`."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np


class Frequencies:
    """Writes tokens as often as the teacher did: it rewrites every step and counts, and forgets all context."""

    def __init__(self, env: Any, seed: int) -> None:
        self.counts = np.ones(env.single_action_space.n - 1)
        self.iteration = 0
        self.rng = np.random.default_rng(seed)

    def learn(self, env: Any, iterations: int, callback: Any = None) -> Frequencies:
        env.reset(seed=0)
        for _ in range(iterations):
            *_, info = env.step(np.full(env.num_envs, env.unwrapped.rewrite_action))
            np.add.at(self.counts, info["tokens"][info["_tokens"], 0], 1)
            self.iteration += 1
            if callback is not None:
                callback(self.iteration, {"rollout/tokens": float(env.num_envs)})
        return self

    def act(self, observation: Any, info: Any = None) -> Any:
        return self.rng.choice(len(self.counts), len(observation), p=self.counts / self.counts.sum())

    def save(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        state = {"counts": self.counts.tolist(), "iteration": self.iteration}
        (Path(path) / "counts.json").write_text(json.dumps(state))

    @classmethod
    def load(cls, path: str | Path) -> Frequencies:
        state = json.loads((Path(path) / "counts.json").read_text())
        agent = cls.__new__(cls)
        agent.counts, agent.iteration = np.array(state["counts"]), state["iteration"]
        agent.rng = np.random.default_rng(0)
        return agent


class Interrupted(Frequencies):
    """Somebody presses Ctrl-C in the third iteration, once."""

    def learn(self, env: Any, iterations: int, callback: Any = None) -> Interrupted:
        def interrupt(iteration: int, metrics: Any) -> None:
            if iteration == 3:
                signal.raise_signal(signal.SIGINT)
            callback(iteration, metrics)

        super().learn(env, iterations, interrupt)
        return self
