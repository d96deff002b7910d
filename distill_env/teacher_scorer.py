"""What the teacher has read of a batch of answers, and what it said: a pass for a block of tokens, no state twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_env.models.base import TokenModel
from distill_env.ragged import PAD


@dataclass
class TeacherUsage:
    """What the teacher has been asked for since the environment was made."""

    passes: int = 0  # forward passes, those over prompts included
    positions: int = 0  # states whose next-token distribution was computed
    tokens: int = 0  # tokens that the teacher wrote


class TeacherScorer:
    """The teacher's place in each of n answers.

    It may be behind an answer (what was committed is read with the next look) or ahead of it (a draft that it has read
    and that may yet stand). Whatever does not stand is rewound.

    Args:
        teacher: its rows are this reader's alone.
        n: number of rows.
        vocab_size: V.
    """

    def __init__(self, teacher: TokenModel, n: int, vocab_size: int) -> None:
        self.teacher = teacher
        self.usage = TeacherUsage()
        self.read = np.zeros(n, np.int64)  # tokens of the answer that it has read, those of a draft included
        self.log_probs = torch.zeros(n, vocab_size)  # log p at the state after the committed ones of them
        self._draft: Tensor | None = None  # of the last look, [n, K], and what the teacher said of it, [n, K + 1, V]
        self._said: Tensor | None = None

    def start(self, prompts: Sequence[Sequence[int]], rows: NDArray[np.intp] | None = None) -> None:
        """Begin the answers to `prompts` in `rows`, or in all."""
        log_probs = self.teacher.start(prompts, None if rows is None else rows.tolist())
        self.log_probs = log_probs if rows is None else self.log_probs.index_copy(0, torch.from_numpy(rows), log_probs)
        self.read[slice(None) if rows is None else rows] = 0
        self._draft = self._said = None
        self.usage.passes += 1
        self.usage.positions += len(prompts)

    def score(self, unread: NDArray[np.int64], draft: Tensor, live: NDArray[np.bool_]) -> Tensor:
        """Read what was committed and then a draft, in one pass.

        Args:
            unread: int64 [n, w], committed tokens not yet read, left-aligned, padded with -1.
            draft: int64 [n, K], ragged with -1.
            live: bool [n], rows whose answers go on; nothing is read in the others.

        Returns:
            log p [n, K + 1, V] at the present state and after each drafted token.
        """
        n, drafted = draft.shape
        pending = np.where(live, (unread >= 0).sum(1), 0)
        counts = np.where(live, (draft.numpy() >= 0).sum(1), 0) if drafted else np.zeros_like(pending)
        width = int((pending + counts).max())
        result = self.log_probs[:, None].expand(-1, drafted + 1, -1)
        if width > 0:
            block = np.full((n, width), PAD, np.int64)
            column = np.arange(width)
            for tokens, start, stop in ((unread, 0 * pending, pending), (draft.numpy(), pending, pending + counts)):
                if tokens.shape[1]:
                    rows, columns = np.nonzero((column >= start[:, None]) & (column < stop[:, None]))
                    block[rows, columns] = tokens[rows, columns - start[rows]]
            after = self.teacher.extend(torch.from_numpy(block))  # [n, width, V]
            self.usage.passes += 1
            self.usage.positions += int(pending.sum() + counts.sum())
            # row j of the result lies at column pending - 1 + j of `after`; -1 is what was known before
            least, most = int(pending[live].min()), int(pending[live].max())
            if 0 < least == most == width - drafted:  # as a rule one token waits in every row: nothing is copied
                result = after[:, least - 1 :]
            else:
                index = torch.from_numpy(pending - 1)[:, None] + torch.arange(drafted + 1)  # [n, K + 1]
                result = after[torch.arange(n)[:, None], index.clamp(0, width - 1)]
                nothing = torch.from_numpy(pending == 0)
                result[nothing, 0] = self.log_probs[nothing]
            self.log_probs = result[:, 0].clone()  # which keeps no draft alive
            self.read = self.read + pending + counts
        self._draft, self._said = draft.clone(), result
        return result

    def cached(self, tokens: NDArray[np.int64]) -> Tensor | None:
        """What the last look said along these tokens [n, k], [n, k + 1, V]; None if its draft was another."""
        if self._draft is None or self._said is None or self._draft.shape[1] < tokens.shape[1]:
            return None
        same = (self._draft.numpy()[:, : tokens.shape[1]] == tokens) | (tokens == PAD)
        return self._said[:, : tokens.shape[1] + 1] if same.all() else None

    def commit(
        self,
        tokens: NDArray[np.int64],
        counts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        live: NDArray[np.bool_],
    ) -> None:
        """The first `counts` of each row's tokens [n, k] now stand after the first `lengths` of its answer."""
        if self._draft is None or self._said is None:
            return
        agrees = np.zeros(len(tokens), np.int64)
        shared = min(tokens.shape[1], self._draft.shape[1])
        if shared:
            same = self._draft.numpy()[:, :shared] == tokens[:, :shared]
            same &= np.arange(shared) < counts[:, None]
            agrees = np.logical_and.accumulate(same, 1).sum(1)
            known = torch.from_numpy((agrees == counts) & (counts > 0))
            after = self._said[torch.arange(len(tokens)), torch.from_numpy(agrees)]
            self.log_probs = torch.where(known[:, None], after, self.log_probs)
        self.rewind(lengths + agrees, live)

    def rewind(self, lengths: NDArray[np.int64], live: NDArray[np.bool_]) -> None:
        """Forget all but the first `lengths` tokens of live answers; with that the last look is over."""
        kept = np.where(live, np.minimum(self.read, lengths), self.read)
        if (kept != self.read).any():
            self.teacher.rewind(torch.from_numpy(np.where(live, kept, -1)))
            self.read = kept
        self._draft = self._said = None

    def drop(self, ended: NDArray[np.bool_]) -> None:
        """Answers that have ended cost nothing from now on."""
        self.teacher.rewind(torch.from_numpy(np.where(ended, -1, self.read)))
