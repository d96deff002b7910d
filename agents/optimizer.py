"""The optimiser: AdamW with a learning-rate schedule, whose steps are in float32 also for a bfloat16 student."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from agents.checkpoint import optimizer_tensors, restore_optimizer
from agents.config import OptimizerConfig
from agents.distributed import shard_like

FINAL_SHARE = 0.01  # of the learning rate, at the end of the schedule


def learning_rate(config: OptimizerConfig, iteration: int) -> float:
    """The learning rate of an iteration, from 0: the smaller of a linear warm-up and a decay to a hundredth.

    The decay is linear or half a cosine (Loshchilov & Hutter 2017, "SGDR", 1608.03983).
    """
    if config.schedule in ("linear", "cosine") and not config.decay_iterations:
        raise ValueError(
            f"decay_iterations: 0 with schedule {config.schedule}; expected at least 1, usually all iterations"
        )
    warmup = min(1.0, (iteration + 1) / (config.warmup_iterations + 1))
    decay = 1.0
    if config.decay_iterations:
        done = iteration / config.decay_iterations
        if config.schedule == "cosine":
            decay = FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        else:
            decay = max(1 - done, FINAL_SHARE)
    return config.learning_rate * min(warmup, decay)


class MasterAdamW(torch.optim.AdamW):
    """AdamW with float32 master copies of narrower weights (Micikevicius et al. 2018, "Mixed precision training",
    1710.03740).

    A step below half the spacing of bfloat16 numbers (2^-8 of the weight) would be lost. It is added to the master, and
    the weight is the master rounded. Gradients of several backward passes are also summed in float32. Weight decay
    applies to matrices, embeddings included, and not to biases and norms.

    Args:
        weights: the student's trainable parameters, on any device.
        config: learning rate, betas and weight decay.
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

    def move_gradients(self) -> None:
        """Add the gradients of narrow weights to those of their masters. Call it after every backward pass."""
        for weight, master in self.narrow:
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                weight.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        for master in self.masters:  # the fused kernel does not count its changes
            torch.autograd.graph.increment_version(master)
        for weight, master in self.narrow:
            weight.copy_(master)
        return loss

    def tensors(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The state and the masters as a flat dict, and the parameter groups, for `restore`."""
        tensors, groups = optimizer_tensors(self)
        return tensors | {f"master.{i}": master for i, (_, master) in enumerate(self.narrow)}, groups

    def restore(self, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        """Restore what `tensors` returned. Raises KeyError if a master is missing."""
        with torch.no_grad():
            for i, (_, master) in enumerate(self.narrow):
                master.copy_(shard_like(tensors[f"master.{i}"], master))
        restore_optimizer(self, {k: v for k, v in tensors.items() if not k.startswith("master.")}, groups)
