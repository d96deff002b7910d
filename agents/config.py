"""Configurations of the agents. Light to import: a sentence under every field is its flag's help."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from agents.methods import Method
from distill_env.checks import check_range, check_types

LARGEST_SEED = 2**63 - 1  # of torch's generators


@dataclass(frozen=True)
class DistillConfig:
    """The agent: a method, and how it is optimised."""

    method: Method = field(default_factory=Method)
    batch_size: int = 64
    """Answers an iteration."""
    learning_rate: float = 1e-3
    """Step size of AdamW."""
    warmup_iterations: int = 10
    """Iterations over which the step size rises linearly: AdamW's first steps are as large as its later ones."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the step size falls over `decay_iterations`: not at all, linearly, or by half a cosine."""
    decay_iterations: int = 0
    """Iterations over which the step size falls to a hundredth; 0 keeps it."""
    weight_decay: float = 0.0
    """Share of a weight, times the step size, that a step takes off; of matrices only, embeddings among them, not of
    biases and norms."""
    adam_beta1: float = 0.9
    """Weight of the past in AdamW's average of the gradient, in [0, 1)."""
    adam_beta2: float = 0.999
    """Weight of the past in AdamW's average of its square, in [0, 1)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    micro_batch: int = 0
    """Answers in one forward and backward pass; their gradients are accumulated to that of the batch, which stays the
    same. 0 takes the whole batch."""
    chunk_positions: int = 0
    """Positions whose distributions over the vocabulary exist at a time in the update. 0: as many as make 4 million
    numbers, on a GPU 64 million, but a multiple of 64 from 64 to 1,024."""
    draft_length: int = 0
    """Tokens the student drafts before the teacher looks; 0 adapts it, 1 is token by token. It changes no result."""
    seed: int = 0
    """Seed of prompts and of all draws."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "seed", least=0, most=LARGEST_SEED)
        check_range(self, "learning_rate", finite=True)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size} is not at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("warmup_iterations", "decay_iterations", "micro_batch", "draft_length", "chunk_positions"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: {self.weight_decay}; accepted: at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1)")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule: {self.schedule!r} is unknown; accepted: constant, linear, cosine")
        if self.schedule == "constant" and self.decay_iterations:
            raise ValueError(f"decay_iterations: {self.decay_iterations} with schedule constant; accepted: 0")
        if self.schedule == "cosine" and not self.decay_iterations:
            raise ValueError("decay_iterations: 0 with schedule cosine; accepted: at least 1, as a rule --iterations")

    def positions_at_a_time(self, vocab_size: int, on_gpu: bool) -> int:
        """`chunk_positions`, chosen by the size of a distribution if it is 0."""
        numbers = 2**26 if on_gpu else 2**22
        return self.chunk_positions or min(max(numbers // vocab_size // 64 * 64, 64), 1024)


@dataclass(frozen=True)
class PluginConfig:
    """Options of somebody else's agent: it is made as `Class(env, seed=seed)`."""

    batch_size: int = 64
    """Rows of its vector environment."""
    seed: int = 0
    """Seed that it is given."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "batch_size", least=1)
        check_range(self, "seed", least=0, most=LARGEST_SEED)


@dataclass(frozen=True)
class SB3Config:
    """PPO or A2C of Stable-Baselines3 on the student, with REWRITE as an action that it may learn to use."""

    algorithm: Literal["ppo", "a2c"] = "ppo"
    """Whose update it is."""
    batch_size: int = 64
    """Answers an iteration, were all as long as the horizon; shorter ones make room for more."""
    learning_rate: float = 1e-3
    """Step size of Adam (ppo) or RMSprop (a2c)."""
    tau: float = 0.5
    """Price of a rewrite unless --rewrite-cost says otherwise, and the threshold by which steps count as hard, nats."""
    gamma: float = 0.0
    """Discount of what follows, in [0, 1]; only 0 makes the entropy bonus a reverse KL."""
    ent_coef: float = 1.0
    """Weight of the entropy bonus; 1 makes the per-step objective a reverse KL, 0 learns to end at once."""
    normalize_advantage: bool = False
    """Normalise advantages in a minibatch, which moves the optimum."""
    n_epochs: int = 4
    """Passes over a batch (ppo)."""
    minibatches: int = 4
    """Parts of a batch, one step of the optimiser each (ppo); fewer if the batch does not divide so."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    seed: int = 0
    """Seed of prompts and of all draws."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "seed", least=0, most=LARGEST_SEED)
        check_range(self, "learning_rate", "ent_coef", finite=True)
        for name in ("batch_size", "n_epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive")
        for name in ("tau", "ent_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not at least 0")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: {self.gamma} is not in [0, 1]")
