"""A student that writes without its teacher: `act` and `log_probs` of an agent."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distill_env.env_arguments import RewriteDraw
from distill_env.models.base import TrainableModel
from distill_env.ragged import PAD
from distill_env.randomness import Purpose, episode_keys, inverse_cdf, uniform
from distill_env.rules import rewrite_distribution
from distill_env.transfer import upload


class StudentActor:
    """Samples tokens from a student, which reads only the new tokens of each observation.

    Args:
        student: the student. After a change of its weights the whole observation is read again.
        seed: the seed of the draws.
    """

    def __init__(self, student: TrainableModel, seed: int) -> None:
        self.student = student
        self.temperature, self.top_p = 1.0, 1.0  # of the draws; `log_probs` are the student's own
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Seed the draws of `act`, which then repeat."""
        self._seed, self._acts = seed, 0
        self._model: TrainableModel | None = None
        self._version = -1
        self._rows: list[tuple[int, ...]] = []

    def act(self, observation: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample a token for every row: [n, T] -> [n]."""
        return self.draw(self.log_probs(observation))

    def draw(self, log_probs: Tensor) -> NDArray[np.int64]:
        """Sample from log-probabilities [n, ...] -> [n], each call with new random numbers."""
        kind: RewriteDraw = "nucleus" if self.top_p < 1 else "sample"
        log_probs = rewrite_distribution(log_probs, kind, self.top_p, temperature=self.temperature)
        draws = uniform(episode_keys(self._seed, np.arange(len(log_probs))), self._acts, Purpose.STUDENT)
        self._acts += 1
        return inverse_cdf(log_probs, draws).cpu().numpy()

    def log_probs(self, observation: NDArray[np.int64]) -> Tensor:
        """log q: [n, T] -> [n, V], nats. Rows that extend the last observation are continued; others are read again."""
        rows = [tuple(row[row != PAD].tolist()) for row in observation]
        version = sum(p._version for p in self.student.parameters())  # counts in-place changes
        if self._model is None or len(rows) != len(self._rows) or version != self._version:
            self._model, self._version = self.student.fork(), version
            self._rows, self._last = rows, self._model.start(rows)
            return self._last
        new = [r[len(s) :] if r[: len(s)] == s else None for r, s in zip(rows, self._rows, strict=True)]
        restarted = [i for i, tokens in enumerate(new) if tokens is None]
        if restarted:
            started = self._model.start([rows[i] for i in restarted], restarted)
            self._last = self._last.index_copy(0, upload(torch.tensor(restarted), started.device), started)
        block = pad_sequence([torch.tensor(t or (), dtype=torch.long) for t in new], True, PAD)
        if block.shape[1]:
            after = self._model.extend(block)
            counts = upload((block >= 0).sum(1), after.device)
            after = after[torch.arange(len(rows), device=after.device), (counts - 1).clamp(min=0)]
            self._last = torch.where((counts > 0)[:, None], after, self._last)
        self._rows = rows
        return self._last
