"""The order of the training prompts."""

from __future__ import annotations

import numpy as np

from distill_env.tasks.base import Prompt


class PromptStream:
    """An endless stream of prompts. Each epoch is a permutation that depends on the seed and the epoch's number."""

    def __init__(self, prompts: tuple[Prompt, ...], seed: int) -> None:
        self.prompts, self.seed = prompts, seed

    def take(self, start: int, count: int) -> list[Prompt]:
        """Prompts `start` to `start + count - 1` of the stream."""
        taken = []
        for epoch in range(start // len(self.prompts), (start + count - 1) // len(self.prompts) + 1):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
            low = max(start - epoch * len(order), 0)
            taken += [self.prompts[i] for i in order[low : max(start + count - epoch * len(order), 0)]]
        return taken
