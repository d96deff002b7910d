"""The teacher's distributions at the states of a rollout, stored for the update in little extra memory."""

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_env.divergence import LOG_ZERO
from distill_env.ragged import PAD
from distill_env.transfer import host_empty, on_host, settle, upload

_BLOCK = 2**25  # numbers in a block; the system takes back the memory of a block that large as soon as it is freed


class TeacherBuffer:
    """The teacher's log-probabilities at the states of N completions, appended in any order.

    They are copied into a few large blocks, which are freed one by one while the result is assembled. A list of the
    small tensors would need the memory twice at the end, and leave it fragmented.

    They stay on the device of the teacher while they fit a budget. Beyond it, blocks lie in main memory, and so does
    the result; the update then reads it chunk by chunk.

    Args:
        states: the largest number of states that will be appended.
        budget: bytes on a device; a CPU has no limit.
    """

    def __init__(self, states: int, budget: float = math.inf) -> None:
        self._states, self._budget = states, budget
        self._bytes = 0  # that would lie on a device without a limit
        self._device = torch.device("cpu")  # of what was appended
        self._blocks: list[list[Tensor]] = []  # log p [m, S] and, if truncated, ids [m, S - 1]; the last is not full
        self._filled = 0  # rows of the last block in use
        self._episodes: list[NDArray[np.int64]] = []
        self._positions: list[NDArray[np.int64]] = []

    def append(
        self, episodes: NDArray[np.int64], positions: NDArray[np.int64], log_probs: Tensor, ids: Tensor | None
    ) -> None:
        """Add states.

        Args:
            episodes: int64 [m], the completion of each state.
            positions: int64 [m], its position there.
            log_probs: [m, S], over the ids and a tail; over the whole vocabulary without ids.
            ids: int64 [m, S - 1], or None.
        """
        self._episodes.append(episodes)
        self._positions.append(positions)
        self._device = log_probs.device
        parts = [log_probs] if ids is None else [log_probs, ids]
        begin = 0
        while begin < len(log_probs):
            if not self._blocks or self._blocks[-1][0].shape[1:] != log_probs.shape[1:] or not self._room():
                self._open_block(parts)
            count = min(len(log_probs) - begin, self._room())
            for block, part in zip(self._blocks[-1], parts, strict=True):
                block[self._filled : self._filled + count].copy_(part[begin : begin + count], non_blocking=True)
            self._filled += count
            begin += count

    def _room(self) -> int:
        return len(self._blocks[-1][0]) - self._filled

    def _open_block(self, parts: list[Tensor]) -> None:
        """Start a block for rows of these widths and dtypes."""
        self._trim_last_block()
        size = max(1, min(self._states, _BLOCK // parts[0].shape[1]))
        needed = sum(size * part.shape[1] * part.element_size() for part in parts)
        self._bytes += needed
        too_much = not on_host(self._device) and self._bytes > self._budget
        shapes = [(size, part.shape[1]) for part in parts]
        if too_much:
            block = [host_empty(s, part.dtype, self._device) for s, part in zip(shapes, parts, strict=True)]
        else:
            block = [part.new_empty(s) for s, part in zip(shapes, parts, strict=True)]
        self._blocks.append(block)
        self._filled = 0

    def _trim_last_block(self) -> None:
        if self._blocks:
            self._blocks[-1] = [block[: self._filled] for block in self._blocks[-1]]

    def pop(self) -> tuple[Tensor, Tensor | None]:
        """Return all states, completion by completion and position by position, and empty the buffer.

        Returns:
            log p [M, S] and the ids int64 [M, S - 1], or None. S is that of the widest state: narrower ones (nuclei
            differ in size) are filled up with id -1 and log 0 before the tail, which stays last.
        """
        self._trim_last_block()
        settle(self._device)
        order = np.lexsort((np.concatenate(self._positions), np.concatenate(self._episodes)))
        if len(self._blocks) == 1 and (order[1:] > order[:-1]).all():
            teacher, *ids = self._blocks.pop()
            return teacher, ids[0] if ids else None
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        ends = np.cumsum([0, *(len(block) for block, *_ in self._blocks)])
        widest = max(block.shape[1] for block, *_ in self._blocks)
        first, *first_ids = self._blocks[-1]  # in main memory if any is
        shape = len(order), widest
        over = on_host(first.device) and not on_host(self._device)
        teacher = host_empty(shape, first.dtype, self._device) if over else first.new_empty(shape)
        support = first_ids[0].new_full((len(order), widest - 1), PAD) if first_ids else None
        del first, first_ids
        for begin, end in pairwise(ends):
            block, *ids = (part.to(teacher.device) for part in self._blocks.pop(0))
            rows = upload(place[begin:end], teacher.device)
            if support is not None:
                missing = widest - block.shape[1]
                support[rows, : widest - 1 - missing] = ids[0]
                block = torch.cat([block[:, :-1], block.new_full((len(block), missing), LOG_ZERO), block[:, -1:]], 1)
            teacher[rows] = block
            del block, ids
        return teacher, support
