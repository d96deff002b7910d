"""What the teacher said at each state, kept for the update: written down once, in little more memory than it takes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_env.divergence import LOG_ZERO
from distill_env.teacher_scorer import PAD

_BLOCK = 2**25  # numbers in a block; one so large goes back to the system when it is given up


class TeacherBuffer:
    """The teacher's log-probabilities at the states of N answers, in whatever order they come.

    They are copied into few large blocks, which are given up one by one while the result is written. Kept as the small
    tensors that they come in, they would be in memory twice at the end, and leave it full of holes.

    Args:
        states: at most so many will come.
    """

    def __init__(self, states: int) -> None:
        self._states = states
        self._blocks: list[tuple[Tensor, Tensor | None]] = []  # log p [m, S] and ids [m, S - 1], the last one partly
        self._filled = 0  # rows of the last one
        self._episodes: list[NDArray[np.int64]] = []
        self._positions: list[NDArray[np.int64]] = []

    def put(self, episodes: NDArray[np.int64], positions: NDArray[np.int64], rows: Tensor, ids: Tensor | None) -> None:
        """Keep rows [m, S], on the supports `ids` [m, S - 1] if there are any, of these positions of these answers."""
        self._episodes.append(episodes)
        self._positions.append(positions)
        begin = 0
        while begin < len(rows):
            if not self._blocks or self._blocks[-1][0].shape[1:] != rows.shape[1:] or not self._room():
                self._open(rows, ids)
            block, block_ids = self._blocks[-1]
            count = min(len(rows) - begin, self._room())
            here = slice(self._filled, self._filled + count)
            block[here] = rows[begin : begin + count]
            if block_ids is not None and ids is not None:
                block_ids[here] = ids[begin : begin + count]
            self._filled += count
            begin += count

    def _room(self) -> int:
        return len(self._blocks[-1][0]) - self._filled

    def _open(self, rows: Tensor, ids: Tensor | None) -> None:
        """Begin a block for rows like these."""
        self._close()
        size = max(1, min(self._states, _BLOCK // rows.shape[1]))
        empty_ids = None if ids is None else ids.new_empty(size, ids.shape[1])
        self._blocks.append((rows.new_empty(size, rows.shape[1]), empty_ids))
        self._filled = 0

    def _close(self) -> None:
        """Cut the last block to what was written."""
        if self._blocks:
            block, ids = self._blocks.pop()
            self._blocks.append((block[: self._filled], None if ids is None else ids[: self._filled]))

    def take(self) -> tuple[Tensor, Tensor | None]:
        """All rows, answer by answer, position by position, and their supports; then nothing is kept any more.

        The support of a nucleus differs in size from part to part: places without an id hold log 0; the tail stays
        last.
        """
        self._close()
        key = np.concatenate(self._positions), np.concatenate(self._episodes)
        order = np.lexsort(key)
        if len(self._blocks) == 1 and (order[1:] > order[:-1]).all():
            return self._blocks.pop()
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        ends = np.cumsum([0, *(len(block) for block, _ in self._blocks)])
        widest = max(block.shape[1] for block, _ in self._blocks)
        first, first_ids = self._blocks[0]
        teacher = first.new_empty(len(order), widest)
        support = None if first_ids is None else first_ids.new_full((len(order), widest - 1), PAD)
        del first, first_ids
        for begin, end in pairwise(ends):
            rows = torch.from_numpy(place[begin:end])
            block, ids = self._blocks.pop(0)
            if support is not None and ids is not None:
                missing = widest - block.shape[1]
                support[rows, : widest - 1 - missing] = ids
                block = torch.cat([block[:, :-1], block.new_full((len(block), missing), LOG_ZERO), block[:, -1:]], 1)
            teacher[rows] = block
            del block, ids
        return teacher, support
