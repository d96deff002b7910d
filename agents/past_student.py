"""The student as it was some iterations ago, as its own teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from distill_env.models.base import TrainableModel


class PastStudent:
    """A frozen copy of a student. Weights that are not trained, such as those under an adapter, are shared.

    Args:
        student: to copy.

    Attributes:
        model: the copy.
    """

    def __init__(self, student: TrainableModel) -> None:
        module: Any = getattr(student, "model", student)
        memo: dict[int, Any] = {id(p): p for p in module.parameters() if not p.requires_grad}
        self.model: TrainableModel = copy.deepcopy(student.fork(), memo)
        self._pairs = [(memo[id(p)], p) for p in student.parameters()]
        for mine, _ in self._pairs:
            mine.requires_grad_(False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the student's present weights."""
        for mine, now in self._pairs:
            mine.copy_(now)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, by number."""
        return {str(i): mine for i, (mine, _) in enumerate(self._pairs)}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take what `tensors` returned. Raises KeyError or RuntimeError if it is not of such a student."""
        for i, (mine, _) in enumerate(self._pairs):
            mine.copy_(tensors[str(i)])
