"""A student that writes alone, as it will when deployed: what `act` and `log_probs` of an agent do."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_env.models.base import TrainableModel
from distill_env.ragged import PAD
from distill_env.randomness import Purpose, episode_keys, inverse_cdf, uniform


class StudentActor:
    """Samples from a student, and keeps what the student has read from one observation to the next.

    Args:
        student: who writes; after its weights have changed everything is read anew.
        seed: of the draws.
    """

    def __init__(self, student: TrainableModel, seed: int) -> None:
        self.student = student
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """After this `act` repeats itself."""
        self._seed, self._acts = seed, 0
        self._reader: TrainableModel | None = None
        self._weights = -1
        self._seen: list[tuple[int, ...]] = []

    def act(self, observation: NDArray[np.int64]) -> NDArray[np.int64]:
        """A token for every row, [n, T] -> [n]."""
        draws = uniform(episode_keys(self._seed, np.arange(len(observation))), self._acts, Purpose.STUDENT)
        self._acts += 1
        return inverse_cdf(self.log_probs(observation), draws).cpu().numpy()

    def log_probs(self, observation: NDArray[np.int64]) -> Tensor:
        """log q, [n, T] -> [n, V]. Rows that go on from what was seen are extended; others are read anew."""
        rows = [tuple(row[row != PAD].tolist()) for row in observation]
        weights = sum(p._version for p in self.student.parameters())  # counts changes in place
        if self._reader is None or len(rows) != len(self._seen) or weights != self._weights:
            self._reader, self._weights = self.student.fork(), weights
            self._seen, self._last = rows, self._reader.start(rows)
            return self._last
        new = [r[len(s) :] if r[: len(s)] == s else None for r, s in zip(rows, self._seen, strict=True)]
        anew = [i for i, tokens in enumerate(new) if tokens is None]
        if anew:
            started = self._reader.start([rows[i] for i in anew], anew)
            self._last = self._last.index_copy(0, torch.tensor(anew), started)
        width = max((len(tokens) for tokens in new if tokens), default=0)
        if width:
            block = torch.full((len(rows), width), PAD)
            for i, tokens in enumerate(new):
                if tokens:
                    block[i, : len(tokens)] = torch.tensor(tokens)
            counts = (block >= 0).sum(1)
            after = self._reader.extend(block)[torch.arange(len(rows)), (counts - 1).clamp(min=0)]
            self._last = torch.where((counts > 0)[:, None], after, self._last)
        self._seen = rows
        return self._last
