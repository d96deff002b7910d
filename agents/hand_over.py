"""The hand-over head, trained beside its student: an update knows D_t at every position, so its target is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agents.base import Metrics
from agents.checkpoint import optimizer_tensors, restore_optimizer
from agents.distributed import ProcessGroup
from agents.metrics import auroc
from distill_env.models.base import TrainableModel
from distill_env.models.hand_over import OFFSET, HandOverHead

STEPS = 8  # of the head's optimiser in an update
LEARNING_RATE = 3e-3


def target(divergence: Tensor) -> Tensor:
    """log(D_t + c), what the head predicts; [...] -> [...], float32."""
    return (divergence.float() + OFFSET).log()


class HandOverTrainer:
    """Trains a student's head on the positions of each update, by least squares. The student does not change.

    Args:
        head: in place.
    """

    def __init__(self, head: HandOverHead) -> None:
        self.head = head
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self._inputs: list[Tensor] = []
        self._divergence: list[Tensor] = []

    @classmethod
    def of(cls, student: TrainableModel, width: int, seed: int) -> HandOverTrainer | None:
        """A trainer of the student's own head, or of a new one if it has none of this width.

        None, and no head, with width 0 and for a student without hidden states.
        """
        model: Any = student
        if not hasattr(model, "hand_over"):
            return None
        if model.hand_over is None or model.hand_over.width != width:
            model.hand_over = (
                HandOverHead(model.width, model.vocab_size, width, seed).to(model.device) if width else None
            )
        return None if model.hand_over is None else cls(model.hand_over)

    def add(self, states: Tensor, log_probs: Tensor, divergence: Tensor) -> None:
        """Positions of this update: hidden states [m, d], log q [m, V] and D_t [m], nats."""
        self._inputs.append(self.head.inputs(states.detach(), log_probs.detach()))
        self._divergence.append(divergence)

    def update(self, hard_from: float, processes: ProcessGroup) -> Metrics:
        """A few steps on the positions that were added, over all processes.

        Args:
            hard_from: D_t from which a position is hard, nats.
            processes: that share the batch; each has the whole head, also beside a sharded student.

        Returns:
            The squared error, and how well the head finds hard positions (AUROC; absent if all or none are hard), both
            before the head has learned from these positions.
        """
        inputs, divergence = torch.cat(self._inputs), torch.cat(self._divergence)
        self._inputs, self._divergence = [], []
        wanted, whole = target(divergence), replace(processes, mesh=None)
        count = whole.all_reduce_sum({"n": float(len(wanted))})["n"]
        sums = {"error": 0.0, "auroc": 0.0, "n": 0.0}
        for step in range(STEPS):
            self.optimizer.zero_grad()
            prediction = self.head(inputs)
            error = (prediction - wanted).square().sum()
            (error / count).backward()
            whole.sum_gradients(self.head.parameters())
            self.optimizer.step()
            if step == 0:
                value = auroc(prediction.detach(), divergence >= hard_from)
                known = float(value == value)
                sums = {"error": float(error.detach()), "auroc": value if known else 0.0, "n": known}
        self.optimizer.zero_grad()
        sums = whole.all_reduce_sum(sums)
        metrics = {"train/hand_over_loss": sums["error"] / count}
        return metrics | ({"train/hand_over_auroc": sums["auroc"] / sums["n"]} if sums["n"] else {})

    def tensors(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The optimiser's state, for `restore`."""
        return optimizer_tensors(self.optimizer)

    def restore(self, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        restore_optimizer(self.optimizer, tensors, groups)


@torch.no_grad()
def predict(student: Any, prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor) -> Tensor | None:
    """D_t at the positions of completions as the student's head predicts it, nats [m]; None without a head.

    Arguments as for `TrainableModel.features`.
    """
    head: HandOverHead | None = getattr(student, "hand_over", None)
    if head is None:
        return None
    features = student.features(prompts, tokens, mask)
    return head.divergence(features, student.head(features))
