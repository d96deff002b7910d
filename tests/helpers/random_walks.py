"""Random histories of a `CausalLM`, compared with each row alone under the model's own forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def alone(model: Any, sequence: list[int], vocab_size: int | None = None) -> Tensor:
    """The oracle: log p after each token of one sequence, without batch, padding or cache, [len, V]."""
    logits = model.eval()(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, :, :vocab_size]
    return torch.log_softmax(logits, -1)


class RandomWalk:
    """Starts, ragged extensions, rewinds and give-ups at random, of rows of up to `longest` tokens.

    Attributes:
        log_prob: the largest difference of a log-probability from the oracle so far.
        total_variation: the same of a distribution.
    """

    def __init__(self, lm: Any, seed: int, longest: int, n: int = 5, prompt: int = 9) -> None:
        self.lm, self.rng, self.longest, self.n, self.prompt = lm, np.random.default_rng(seed), longest, n, prompt
        self.prompts: list[list[int]] = [[] for _ in range(n)]  # an empty one: given up
        self.answers: list[list[int]] = [[] for _ in range(n)]
        self.log_prob = self.total_variation = 0.0

    def run(self, operations: int) -> RandomWalk:
        """Start all rows, then do so many operations."""
        self.start(list(range(self.n)), whole=True)
        for _ in range(operations - 1):
            kind = self.rng.choice(["all", "some", "extend", "rewind"], p=[0.03, 0.17, 0.5, 0.3])
            if kind == "all":
                self.start(list(range(self.n)), whole=True)
            elif kind == "some":
                self.start(self.rng.permutation(self.n)[: self.rng.integers(1, 4)].tolist(), whole=False)
            elif kind == "extend":
                self.extend(int(self.rng.integers(1, 5)))
            else:
                self.rewind()
        return self

    def start(self, rows: list[int], whole: bool) -> None:
        for i in rows:
            length = min(int(self.rng.integers(1, self.prompt + 1)), self.longest)
            self.prompts[i], self.answers[i] = self._tokens(length), []
        first = self.lm.start([self.prompts[i] for i in rows], None if whole else rows)
        for i, log_probs in zip(rows, first, strict=True):
            self._compare(i, log_probs[None])

    def extend(self, width: int) -> None:
        tokens = torch.full((self.n, width), -1)
        for i in (i for i in range(self.n) if self.prompts[i]):
            room = self.longest - len(self.prompts[i]) - len(self.answers[i])
            new = self._tokens(min(int(self.rng.integers(0, width + 1)), room))
            self.answers[i] += new
            tokens[i, : len(new)] = torch.tensor(new, dtype=torch.long)
        after = self.lm.extend(tokens)
        assert after.shape == (self.n, width, self.lm.vocab_size)
        for i, count in enumerate((tokens >= 0).sum(1).tolist()):
            if count:
                self._compare(i, after[i, :count])

    def rewind(self) -> None:
        least = -1 if self.rng.random() < 0.3 else 0
        lengths = [int(self.rng.integers(least, len(answer) + 3)) for answer in self.answers]
        for i, length in enumerate(lengths):
            self.answers[i] = self.answers[i][: max(length, 0)]
            self.prompts[i] = self.prompts[i] if length >= 0 else []
        self.lm.rewind(lengths)

    def _tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, self.lm.vocab_size, count).tolist()

    def _compare(self, row: int, actual: Tensor) -> None:
        expected = alone(self.lm.model, self.prompts[row] + self.answers[row], self.lm.vocab_size)[-len(actual) :]
        self.log_prob = max(self.log_prob, float((actual - expected).abs().max()))
        distance = (actual.double().exp() - expected.double().exp()).abs().sum(-1) / 2
        self.total_variation = max(self.total_variation, float(distance.max()))
