"""What an agent is: all that the experiments need of anything that is plugged in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Metrics = dict[str, float]
Callback = Callable[[int, Metrics], None]
"""Called after every iteration with its number (from 1) and what was measured, keys in families `rollout/`, `train/`,
`time/`. An exception raised in it ends the training."""


class Agent(Protocol):
    """An agent for the environments of `distill_env`.

    It may also have `log_probs(observation) -> float array [n, V]`, nats, the distribution that it writes from; without
    it perplexity, entropy and D_t are reported as n/a. And `reseed(seed)`, after which `act` repeats itself.
    """

    def learn(self, env: Any, iterations: int, callback: Callback | None = None) -> Agent:
        """Train for that many more iterations in a vector environment.

        A run calls it from checkpoint to checkpoint if the agent has an `iteration`, the number done, loaded ones too.
        """

    def act(self, observation: NDArray[np.int64], info: dict[str, Any] | None = None) -> NDArray[np.int64]:
        """Tokens [n] for observations [n, T]; sampled, and never REWRITE: the teacher is not there when deployed."""

    def save(self, path: str | Path) -> None:
        """Write a folder, all that `load` needs."""

    @classmethod
    def load(cls, path: str | Path) -> Agent: ...
