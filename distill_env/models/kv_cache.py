"""A key/value cache for rows of different lengths, with free rewinding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from distill_env.transfer import upload


class SlotCache(Cache):
    """Keys and values in slots: the token at position p of a row is always in slot p.

    A token that is taken back needs no clearing: no query attends past its own slot, and the next token overwrites it.
    So rows of different lengths share one rectangle without holes. Before each forward pass `set_write_slots` says
    where it writes; the pass needs a slot-wise attention mask, [n, 1, K, width].

    Args:
        reserved: slots of a row from the first pass on. Up to these the cache does not move; beyond them it grows.
    """

    def __init__(self, reserved: int = 0) -> None:
        super().__init__(layers=[])
        self.reserved = reserved
        self.buffers: dict[int, list[Tensor]] = {}  # keys and values of each layer, [B, heads, capacity, d]

    def set_write_slots(self, n_rows: int, rows: Tensor, slots: Tensor, width: int) -> None:
        """The next pass computes `rows` [n] of the cache's `n_rows`, writes `slots` [n, K] and reads the first `width`
        slots."""
        self.n_rows, self.rows, self.slots, self.width = n_rows, rows, slots, width
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _places_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows [n, 1] and slots [n, K] on a device: layers may be on any."""
        if device not in self._places:
            everyone = len(self.rows) == self.n_rows
            rows = torch.arange(self.n_rows, device=device) if everyone else upload(self.rows, device)
            self._places[device] = rows[:, None], upload(self.slots, device)
        return self._places[device]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write a layer's new keys and values, [n, heads, K, d], and return all that the pass attends to."""
        states = (key_states, value_states)
        if layer_idx not in self.buffers:
            self.buffers[layer_idx] = [x.new_zeros(self.n_rows, x.shape[1], 0, x.shape[3]) for x in states]
        buffers = self.buffers[layer_idx]
        rows, slots = self._places_on(key_states.device)
        for i, x in enumerate(states):
            capacity = buffers[i].shape[2]
            if capacity < self.width:
                # By half, so that growing is rare; with zeros, since a masked NaN would still spoil a row.
                wanted = self.reserved if self.width <= self.reserved else self.width + self.width // 2
                buffers[i] = F.pad(buffers[i], (0, 0, 0, wanted - capacity))
            buffers[i].transpose(1, 2)[rows, slots] = x.transpose(1, 2)
        if self.slots.shape[1] == self.width:  # no earlier tokens
            return states
        if len(self.rows) == self.n_rows:
            return tuple(buffer[:, :, : self.width] for buffer in buffers)
        return tuple(buffer[rows[:, 0], :, : self.width] for buffer in buffers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of earlier tokens, as Transformers asks for it."""
        return self.width - self.slots.shape[1]

    def select(self, source: Tensor, width: int) -> None:
        """Make row i a copy of row `source[i]`, in new memory for `width` slots, or as many as are reserved."""
        for buffers in self.buffers.values():
            source = upload(source, buffers[0].device)
            missing = max(self.reserved - width, 0)
            buffers[:] = [F.pad(buffer[:, :, :width][source], (0, 0, 0, missing)) for buffer in buffers]

    def copy_rows(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first `width` slots of rows `source` [n] to rows `target` [n]."""
        for buffers in self.buffers.values():
            source, target = upload(source, buffers[0].device), upload(target, buffers[0].device)
            for buffer in buffers:
                buffer[target, :, :width] = buffer[source, :, :width]
