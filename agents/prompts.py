"""Which prompts are taken, and in which order."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_env.tasks.base import Prompt, Split


class PromptStream:
    """An endless stream of prompts. Each epoch is a permutation that depends on the seed and the epoch's number.

    Args:
        prompts: of an epoch.
        seed: of the permutations.
        repeats: times that each prompt comes, one after the other.
    """

    def __init__(self, prompts: tuple[Prompt, ...], seed: int, repeats: int = 1) -> None:
        self.prompts, self.seed, self.repeats = prompts, seed, repeats

    def take(self, start: int, count: int) -> list[Prompt]:
        """Prompts `start` to `start + count - 1` of the stream."""
        first, last = start // self.repeats, (start + count - 1) // self.repeats
        distinct = self._distinct(first, last - first + 1)
        return [distinct[i // self.repeats - first] for i in range(start, start + count)]

    def _distinct(self, start: int, count: int) -> list[Prompt]:
        taken = []
        for epoch in range(start // len(self.prompts), (start + count - 1) // len(self.prompts) + 1):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
            low = max(start - epoch * len(order), 0)
            taken += [self.prompts[i] for i in order[low : max(start + count - epoch * len(order), 0)]]
        return taken


class OwnPrompts:
    """A task with prompts of the user's own, in every split. Nothing is graded, since nobody knows the answers."""

    graded = False

    def __init__(self, task: Any, prompts: Sequence[Prompt]) -> None:
        self._task, self._prompts = task, tuple(prompts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return self._prompts


def evenly_spaced(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts from the first to the last, some of them twice where there are fewer."""
    return [prompts[i] for i in np.linspace(0, len(prompts) - 1, count).round().astype(int)]
