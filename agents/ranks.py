"""One student, several processes: each writes and learns from its part of every batch, and the gradients are summed.

`accelerate launch` starts the processes. All hold the whole student and the whole optimiser (data parallel): sums of
gradients and of metrics are all that is exchanged, so that any number of processes ends at the same weights, to
rounding. Alone, everything here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=1)  # the others wait while the first validates


class Ended(Exception):
    """The first process has ended the training."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many. The first decides and writes to disk."""

    number: int = 0
    count: int = 1
    device: str = "cpu"  # of what is exchanged

    def part(self, size: int) -> slice:
        """This process's share of a batch of `size` answers; shares differ by one answer at most."""
        return slice(size * self.number // self.count, size * (self.number + 1) // self.count)

    def go_on(self, wanted: bool = True) -> None:
        """The first says whether there is another iteration; the others hear it.

        Raises:
            Ended: in the others, if there is none.
        """
        if self.count == 1:
            return
        import torch
        from torch import distributed

        word = torch.tensor(int(wanted), device=self.device)
        distributed.broadcast(word, 0)
        if self.number and not word:
            raise Ended

    def agree(self, text: str) -> str:
        """The first one's text."""
        if self.count == 1:
            return text
        from torch import distributed

        told = [text]
        distributed.broadcast_object_list(told, 0)
        return told[0]

    def total(self, numbers: dict[str, float]) -> dict[str, float]:
        """The sums over all processes; each gives the same keys."""
        if self.count == 1:
            return numbers
        import torch
        from torch import distributed

        values = torch.tensor([numbers[key] for key in sorted(numbers)], dtype=torch.float64, device=self.device)
        distributed.all_reduce(values)
        return dict(zip(sorted(numbers), values.tolist(), strict=True))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the processes."""
        if self.count == 1:
            return
        from torch import distributed

        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)


def join() -> Ranks:
    """The processes that `accelerate launch` (or torchrun) started this one with; alone if it did not.

    Raises:
        ValueError: if accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    import torch

    try:
        from accelerate import PartialState
    except ImportError:
        raise ValueError('accelerate: several processes need it; pip install -e ".[distributed]"') from None
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return Ranks(state.process_index, state.num_processes, str(state.device))


def is_first() -> bool:
    """Before `join`."""
    return os.environ.get("RANK", "0") == "0"
