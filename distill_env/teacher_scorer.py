"""The teacher beside a batch of completions: drafts are scored in one pass, and no state is computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_env.models.base import TokenModel, extend, start_teacher
from distill_env.ragged import PAD, Bools, Ints, row_and_column
from distill_env.tasks.base import Prompt
from distill_env.transfer import upload


@dataclass
class TeacherUsage:
    """What the teacher has computed since the environment was made."""

    passes: int = 0  # forward passes, those over prompts included
    positions: int = 0  # states whose next-token distribution was computed
    tokens: int = 0  # tokens that the teacher wrote


class Foresight(NamedTuple):
    """What a `step` along a draft will read from the teacher's device; see `DistillVectorEnv.foresee`."""

    tokens: Ints  # int64 [n, width], the draft
    rewrite_at: Ints  # int64 [n], the position of each row's REWRITE; `width` or more for none
    log_probs: NDArray[np.float64]  # [n, width], the teacher's, of the draft
    written: Ints  # int64 [n], what the teacher writes there


class TeacherScorer:
    """A teacher and how far its cache follows each of n completions.

    The cache may lack tokens that were committed since the last `score`, or hold a draft that is not committed yet.
    The part of a draft that is not committed is removed again.

    Args:
        teacher: its rows belong to this scorer alone; a `RoutedModel` has one for each name.
        n: number of rows.
        vocab_size: V.

    Attributes:
        usage: what the teacher has computed and written.
        usage_by_name: the same of each of several teachers.
        cached_lengths: int64 [n], tokens of each completion in the teacher's cache, those of a draft included.
        log_probs: [n, V], log p after the committed tokens in the cache.
    """

    def __init__(self, teacher: TokenModel, n: int, vocab_size: int) -> None:
        self.teacher = teacher
        self.usage = TeacherUsage()
        self.usage_by_name = {name: TeacherUsage() for name in getattr(teacher, "teachers", ())}
        self._names = np.full(n, "", object)  # of each row's teacher, if there are several
        self.cached_lengths = np.zeros(n, np.int64)
        self.log_probs = torch.zeros(n, vocab_size)
        self._scored: tuple[Tensor, Tensor] | None = None  # the last draft [n, K] and log p along it [n, K + 1, V]
        self._counts = np.zeros(n, np.int64)  # how many tokens of each of its rows count

    def start(self, prompts: Sequence[Prompt], rows: Ints) -> None:
        """Begin the completions of `prompts` in `rows`, in ascending order."""
        everyone = len(rows) == len(self.cached_lengths)
        log_probs = start_teacher(self.teacher, prompts, None if everyone else rows.tolist())
        index = upload(rows, log_probs.device)
        self.log_probs = log_probs if everyone else self.log_probs.index_copy(0, index, log_probs)
        self.cached_lengths[rows] = 0
        self._scored = None
        self._names[rows] = [p.teacher for p in prompts]
        self._count(np.isin(np.arange(len(self._names)), rows).astype(np.int64))

    def score(self, unread: Ints, draft: Tensor, counts: Ints, live: Bools) -> Tensor:
        """Extend the cache by committed tokens and then by a draft, in one pass.

        Args:
            unread: int64 [n, w], committed tokens that the cache lacks, left-aligned, padded with -1.
            draft: int64 [n, K], on any device; what follows the first `counts` of a row's tokens has no meaning.
            counts: int64 [n].
            live: bool [n], rows whose completions have not ended; the others are left alone.

        Returns:
            log p [n, K + 1, V] at the present state and after each drafted token.
        """
        n, drafted = draft.shape
        draft = draft.clone()
        pending = np.where(live, (unread >= 0).sum(1), 0)
        counts = np.where(live, counts, 0)
        width = int((pending + counts).max())
        log_probs = self.log_probs[:, None].expand(-1, drafted + 1, -1)
        if width > 0:
            known = np.full((n, width), PAD, np.int64)
            rows, columns = row_and_column(pending)
            known[rows, columns] = unread[rows, columns]
            block = upload(known, draft.device)
            rows, columns = row_and_column(counts)
            if len(rows):
                row, column = upload(rows, draft.device), upload(columns, draft.device)
                block[row, upload(pending[rows] + columns, draft.device)] = draft[row, column]
            after = extend(self.teacher, block, pending + counts)  # [n, width, V]
            self._count(pending + counts)
            # state j is at column pending - 1 + j of `after`; -1 is the state that the cache had reached before
            least, most = int(pending[live].min()), int(pending[live].max())
            if 0 < least == most == width - drafted:  # as a rule one token is pending in every row: nothing is copied
                log_probs = after[:, least - 1 :]
            else:
                states = np.clip(pending[:, None] - 1 + np.arange(drafted + 1), 0, width - 1)  # [n, K + 1]
                log_probs = after[torch.arange(n, device=after.device)[:, None], upload(states, after.device)]
                up_to_date = upload(np.flatnonzero(pending == 0), after.device)
                log_probs[up_to_date, 0] = self.log_probs[up_to_date]
            self.log_probs = log_probs[:, 0].clone()  # a view would keep the whole draft in memory
            self.cached_lengths = self.cached_lengths + pending + counts
        self._scored, self._counts = (draft, log_probs), counts
        return log_probs

    def _count(self, positions: Ints) -> None:
        """A pass over so many positions of each row."""
        self.usage.passes += 1
        self.usage.positions += int(positions.sum())
        for name, usage in self.usage_by_name.items():
            read = int(positions[self._names == name].sum())
            usage.passes += read > 0
            usage.positions += read

    def count_written(self, rows: Ints) -> None:
        """The teacher has written a token in each of these rows."""
        self.usage.tokens += len(rows)
        for name, usage in self.usage_by_name.items():
            usage.tokens += int((self._names[rows] == name).sum())

    def cached(self, tokens: Ints) -> Tensor | None:
        """What the last `score` returned along `tokens` [n, k], [n, k + 1, V]; None if its draft was another."""
        if self._scored is None or self._scored[0].shape[1] < tokens.shape[1]:
            return None
        same = (self._draft()[:, : tokens.shape[1]] == tokens) | (tokens == PAD)
        return self._scored[1][:, : tokens.shape[1] + 1] if same.all() else None

    def _draft(self) -> Ints:
        """The last draft, on the host."""
        assert self._scored is not None
        draft, log_probs = self._scored
        self._scored = draft.cpu(), log_probs
        return np.where(np.arange(draft.shape[1]) < self._counts[:, None], self._scored[0].numpy(), PAD)

    def drafted(self, tokens: Ints) -> None:
        """The last draft [n, K] as the host has it, so that nobody has to wait for it."""
        if self._scored is not None:
            self._scored = torch.from_numpy(tokens[:, : self._scored[0].shape[1]]), self._scored[1]

    def commit(self, tokens: Ints, counts: Ints, lengths: Ints, live: Bools) -> None:
        """The first `counts` of each row's tokens [n, k] follow the first `lengths` of its completion; what else the
        cache holds of a draft is removed."""
        if self._scored is None:
            return
        draft, log_probs = self._draft(), self._scored[1]
        accepted = np.zeros_like(counts)
        if shared := min(tokens.shape[1], draft.shape[1]):
            same = draft[:, :shared] == tokens[:, :shared]
            same &= np.arange(shared) < counts[:, None]
            accepted = np.logical_and.accumulate(same, 1).sum(1)
            device = log_probs.device
            known = upload((accepted == counts) & (counts > 0), device)
            after = log_probs[torch.arange(len(tokens), device=device), upload(accepted, device)]
            self.log_probs = torch.where(known[:, None], after, self.log_probs)
        self.rewind(lengths + accepted, live)

    def rewind(self, lengths: Ints, live: Bools) -> None:
        """Keep at most the first `lengths` tokens of live completions in the cache, and forget the last draft."""
        rest = np.where(live, np.minimum(self.cached_lengths, lengths), self.cached_lengths)
        if (rest != self.cached_lengths).any():
            self.teacher.rewind(torch.from_numpy(np.where(live, rest, -1)))
            self.cached_lengths = rest
        self._scored = None

    def drop(self, ended: Bools) -> None:
        """Completions that have ended cost nothing from now on."""
        self.teacher.rewind(torch.from_numpy(np.where(ended, -1, self.cached_lengths)))
