"""The optimiser: AdamW at a scheduled step size, in float32 or better whatever the student's weights are in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from agents.checkpoint import optimizer_tensors, restore_optimizer
from agents.config import OptimizerConfig
from agents.distributed import shard_like

LOWEST = 0.01  # what a fall leaves of the step size


def step_size(config: OptimizerConfig, iteration: int) -> float:
    """The step size of an iteration (from 0): the lower of the warm-up's linear rise and the schedule's fall to a
    hundredth, linear or by half a cosine (Loshchilov & Hutter 2017, "SGDR", 1608.03983)."""
    rise = min(1.0, (iteration + 1) / (config.warmup_iterations + 1))
    fall = 1.0
    if config.decay_iterations:
        done = iteration / config.decay_iterations
        if config.schedule == "cosine":
            fall = LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        else:
            fall = max(1 - done, LOWEST)
    return config.learning_rate * min(rise, fall)


class MasterAdamW(torch.optim.AdamW):
    """AdamW on a student's weights, and on float32 masters of those that are narrower.

    A step smaller than half the spacing of a weight's dtype (in bfloat16 up to 2^-8 of the weight) would be rounded
    away; it adds up in the master, whose rounding the weight is after every step (Micikevicius et al. 2018, "Mixed
    precision training", 1710.03740). Gradients of several backward passes add up in float32, too. Only matrices decay,
    embeddings among them: neither biases nor norms.

    Args:
        weights: the student's trainable parameters, on any device.
        config: step size, betas and weight decay.
    """

    def __init__(self, weights: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        weights = list(weights)
        wide = (torch.float32, torch.float64)
        self.masters = [w if w.dtype in wide else nn.Parameter(w.detach().float()) for w in weights]
        self.narrow = [(w, m) for w, m in zip(weights, self.masters, strict=True) if w is not m]
        groups: list[dict[str, Any]] = [{"params": self.masters}]
        if config.weight_decay:
            matrices = [m for m in self.masters if m.dim() >= 2]
            others = [m for m in self.masters if m.dim() < 2]
            groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others}]
        betas = (config.adam_beta1, config.adam_beta2)
        super().__init__(groups, lr=config.learning_rate, betas=betas, weight_decay=0.0, fused=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight, _ in self.narrow:
            weight.grad = None

    def gather(self) -> None:
        """Move the gradients of narrow weights to their masters; due after every backward pass."""
        for weight, master in self.narrow:
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                weight.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        for master in self.masters:  # the fused kernel does not say that it has changed them
            torch.autograd.graph.increment_version(master)
        for weight, master in self.narrow:
            weight.copy_(master)
        return loss

    def tensors(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """State and masters, flat, and the parameter groups: all that `restore` needs."""
        tensors, groups = optimizer_tensors(self)
        return tensors | {f"master.{i}": master for i, (_, master) in enumerate(self.narrow)}, groups

    def restore(self, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        """Go on where `tensors` was called. Raises KeyError if a master is missing."""
        with torch.no_grad():
            for i, (_, master) in enumerate(self.narrow):
                master.copy_(shard_like(tensors[f"master.{i}"], master))
        restore_optimizer(self, {k: v for k, v in tensors.items() if not k.startswith("master.")}, groups)
