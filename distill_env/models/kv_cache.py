"""A key/value cache for rows of different lengths, with free rewinding."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache


class SlotCache(Cache):
    """Keys and values in slots: the token at position p of a row is always in slot p.

    A token that is taken back needs no clearing: no query attends past its own slot, and the next token overwrites it.
    So rows of different lengths share one rectangle without holes. Before each forward pass `set_write_slots` says
    where it writes; the pass needs a slot-wise attention mask, [n, 1, K, width].
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.buffers: dict[int, list[Tensor]] = {}  # keys and values of each layer, [B, heads, capacity, d]

    def set_write_slots(self, n_rows: int, rows: Tensor, slots: Tensor, width: int) -> None:
        """The next pass computes `rows` [n] of the cache's `n_rows`, writes `slots` [n, K] and reads the first `width`
        slots."""
        self.n_rows, self.rows, self.slots, self.width = n_rows, rows, slots, width

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write a layer's new keys and values, [n, heads, K, d], and return all that the pass attends to."""
        states = (key_states, value_states)
        if layer_idx not in self.buffers:
            self.buffers[layer_idx] = [x.new_zeros(self.n_rows, x.shape[1], 0, x.shape[3]) for x in states]
        buffers = self.buffers[layer_idx]
        rows, slots = self.rows.to(key_states.device), self.slots.to(key_states.device)  # layers may be on any device
        for i, x in enumerate(states):
            missing = self.width - buffers[i].shape[2]
            if missing > 0:
                # By half, so that growing is rare; with zeros, since a masked NaN would still spoil a row.
                buffers[i] = F.pad(buffers[i], (0, 0, 0, missing + self.width // 2))
            buffers[i].transpose(1, 2)[rows[:, None], slots] = x.transpose(1, 2)
        if self.slots.shape[1] == self.width:  # no earlier tokens
            return states
        if len(self.rows) == self.n_rows:
            return tuple(buffer[:, :, : self.width] for buffer in buffers)
        return tuple(buffer[rows, :, : self.width] for buffer in buffers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of earlier tokens, as Transformers asks for it."""
        return self.width - self.slots.shape[1]

    def select(self, source: Tensor, width: int) -> None:
        """Make row i a copy of row `source[i]`, in new memory for `width` slots."""
        for buffers in self.buffers.values():
            buffers[:] = [buffer[:, :, :width][source.to(buffer.device)] for buffer in buffers]
