"""A frozen model that computes the distribution after a prefix once, and looks it up ever after.

On a task with some thousands of prompts, many runs visit the same states. A pass over them is a walk along a table, as
of a finite automaton that grows while it is used; the model itself reads only rows that have left the table.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distill_env.models.stacked import StackedLM
from distill_env.ragged import PAD, Bools, Ints, slice_rows

BYTES = 2**29  # of the largest table


class PrefixTable:
    """A tree of prefixes, each with the distribution that follows it, once that is known.

    Args:
        vocab_size: V.
        dtype: of the log-probabilities.
        limit: the most prefixes; by default as many as `BYTES` hold.
    """

    def __init__(self, vocab_size: int, dtype: torch.dtype = torch.float32, limit: int | None = None) -> None:
        self.vocab_size, self.size = vocab_size, 1  # number 0 is the empty prefix
        self.limit = BYTES // (vocab_size * (4 + dtype.itemsize)) if limit is None else limit
        self.children = np.full((1024, vocab_size), -1, np.int32)
        self.log_probs = torch.full((1024, vocab_size), torch.nan, dtype=dtype)

    def step(self, prefixes: Ints, tokens: Ints) -> Ints:
        """The numbers of the prefixes [n] that these tokens [n] extend; -1 for one that found no room, and after it.
        Padding leaves a number as it is."""
        present = (tokens != PAD) & (prefixes >= 0)
        after = np.where(present, self.children[prefixes, tokens], prefixes).astype(np.int64)
        new = np.flatnonzero(present & (after < 0))
        if len(new):
            pairs, which = np.unique(prefixes[new] * self.vocab_size + tokens[new], return_inverse=True)
            numbers = self.size + np.arange(len(pairs))
            numbers[numbers >= self.limit] = -1
            self.size = min(self.size + len(pairs), self.limit)
            self._grow()
            self.children.reshape(-1)[pairs] = numbers
            after[new] = numbers[which]
        return after

    def _grow(self) -> None:
        if self.size > len(self.children):
            more = max(self.size, 2 * len(self.children)) - len(self.children)
            self.children = np.concatenate([self.children, np.full((more, self.vocab_size), -1, np.int32)])
            self.log_probs = torch.cat([self.log_probs, self.log_probs.new_full((more, self.vocab_size), torch.nan)])

    def look_up(self, prefixes: Ints) -> Tensor:
        """log p after the prefixes, [...] -> [..., V]; NaN where it is not known."""
        known: Tensor = self.log_probs[torch.from_numpy(np.maximum(prefixes, 0))]
        off = torch.from_numpy(prefixes < 0)
        return known.masked_fill(off[..., None], torch.nan) if off.any() else known

    def remember(self, prefixes: Ints, log_probs: Tensor) -> None:
        """Enter log p [m, V] after the prefixes [m]."""
        on = prefixes >= 0
        self.log_probs[torch.from_numpy(prefixes[on])] = log_probs[torch.from_numpy(on)]


class RememberedLM:
    """A `TokenModel` over a frozen one, whose forks share what they have computed.

    Its log-probabilities are those of the first pass that computed them, so they equal the model's to rounding, and
    which rounding depends on what was computed before.

    Args:
        model: the frozen model.
        limit: the most prefixes that are remembered.
    """

    def __init__(self, model: StackedLM, limit: int | None = None) -> None:
        self.model = model
        self.vocab_size, self.eos_token_id, self.max_length = model.vocab_size, model.eos_token_id, model.max_length
        self.table = PrefixTable(model.vocab_size, model.dtype, limit)
        self._clear(0)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def fork(self) -> RememberedLM:
        """Another batch, still empty, with the same memory."""
        twin = copy.copy(self)
        twin.model = self.model.fork()
        twin._clear(0)
        return twin

    def _clear(self, n: int) -> None:
        self.model.start_none(n)
        self._prompts: list[Sequence[int]] = [()] * n
        self._tokens = np.full((n, 0), PAD, np.int64)  # of each completion, [N, T]
        self._path = np.zeros((n, 1), np.int64)  # the number of each prefix of it, [N, T + 1]
        self._lengths = np.zeros(n, np.int64)
        self._read = np.full(n, -1)  # tokens of it that the model has read; -1 if not even the prompt

    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        if rows is None:
            self._clear(len(prompts))
        index = np.arange(len(prompts)) if rows is None else np.asarray(rows, np.int64)
        for row, prompt in zip(index.tolist(), prompts, strict=True):
            self._prompts[row] = prompt
        self._lengths[index], self._read[index] = 0, -1
        lengths = np.array([len(p) for p in prompts])
        columns = np.full((len(prompts), int(lengths.max(initial=0))), PAD)
        columns[np.arange(columns.shape[1]) < lengths[:, None]] = [token for prompt in prompts for token in prompt]
        prefixes = np.zeros(len(prompts), np.int64)
        for column in columns.T:
            prefixes = self.table.step(prefixes, column)
        self._path[index, 0] = prefixes
        log_probs = self.table.look_up(prefixes)
        unknown = log_probs[:, 0].isnan()
        if unknown.any():
            here = np.flatnonzero(unknown.numpy())
            log_probs[unknown] = self.model.start([prompts[i] for i in here.tolist()], index[here].tolist())
            self._read[index[here]] = 0
            self.table.remember(prefixes[here], log_probs[unknown])
        return log_probs

    def extend(self, tokens: Tensor) -> Tensor:
        block = tokens.numpy()
        n, k = block.shape
        before, counts = self._lengths, (block >= 0).sum(1)
        self._lengths = before + counts
        if (missing := int(before.max(initial=0)) + k - self._tokens.shape[1]) > 0:
            self._tokens = np.pad(self._tokens, ((0, 0), (0, missing + 8)), constant_values=PAD)
            self._path = np.pad(self._path, ((0, 0), (0, missing + 8)))
        rows, numbers = np.arange(n), np.empty((n, k), np.int64)
        prefixes = self._path[rows, before]
        for j, column in enumerate(block.T):
            prefixes = numbers[:, j] = self.table.step(prefixes, column)
            self._tokens[rows, before + j] = column
            self._path[rows, before + j + 1] = prefixes
        log_probs = self.table.look_up(numbers)
        unknown = log_probs[..., 0].isnan().numpy() & (block >= 0)
        if unknown.any():
            self._compute(unknown, numbers, before, log_probs)
        return log_probs

    def _compute(self, unknown: Bools, numbers: Ints, before: Ints, log_probs: Tensor) -> None:
        """Let the model read the rows with an unknown position [N, K] and enter what it says there."""
        needed = unknown.any(1)
        if len(new := np.flatnonzero(needed & (self._read < 0))):
            self.model.start([self._prompts[i] for i in new.tolist()], new.tolist())
            self._read[new] = 0
        stop = np.where(needed, before, self._read)
        if (stop > self._read).any():  # a pass of its own: few rows have much to catch up with
            self.model.extend(torch.from_numpy(slice_rows(self._tokens, self._read, stop)))
        self._read = np.where(needed, self._lengths, self._read)
        start = np.where(needed, before, stop)
        after = self.model.extend(torch.from_numpy(slice_rows(self._tokens, start, self._read)))
        rows, columns = (torch.from_numpy(x) for x in np.nonzero(unknown))
        log_probs[rows, columns] = after[rows, columns]
        self.table.remember(numbers[unknown], after[rows, columns])

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        keep = np.asarray(lengths)
        self._lengths = np.minimum(self._lengths, np.maximum(keep, 0))
        self._read = np.minimum(self._read, keep)
        self.model.rewind(torch.from_numpy(self._read))
