"""The interface of an agent: everything that the experiments call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Metrics = dict[str, float]
Callback = Callable[[int, Metrics], None]
"""Called after every iteration with its number, from 1, and its metrics, whose keys begin with `rollout/`, `train/`,
`cost/` or `time/`. An exception ends the training."""


class Agent(Protocol):
    """An agent for the environments of `distill_env`.

    Evaluation and validation measure what the agent writes alone: in an environment without a teacher, which refuses
    REWRITE, and whose `info` has nothing of a teacher.

    Optional members:
        `iteration`: iterations done, including those before `save` and `load`. With it a run calls `learn` once per
            checkpoint; without it, once.
        `log_probs(observation)`: log-probabilities [n, V] of the tokens that `act` samples, nats. Without it
            perplexity, entropy and D_t are reported as n/a.
        `reseed(seed)`: seeds the draws of `act`.
        `act_on_call(observation, info)`: as `act`, but with the teacher on call. It may choose REWRITE and read the
            teacher in `info`. What it writes is evaluated apart.
    """

    def learn(self, env: Any, iterations: int, callback: Callback | None = None) -> Agent:
        """Train for `iterations` more iterations in a vector environment. Returns the agent itself."""

    def act(self, observation: NDArray[np.int64], info: dict[str, Any] | None = None) -> NDArray[np.int64]:
        """Sample tokens [n] for observations [n, T], never REWRITE. `info` may be None."""

    def save(self, path: str | Path) -> None:
        """Write a folder with everything that `load` needs."""

    @classmethod
    def load(cls, path: str | Path) -> Agent:
        """Load what `save` wrote."""
        ...
