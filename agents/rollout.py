"""Rollouts by draft and verify: the student drafts, one look-ahead scores it, the gate finds the first hard step.

Each row commits its draft up to its first hard step, lets the teacher write that, and goes on from there; what was not
kept is rewound. The outcome is the token-by-token gated rollout, whatever the length of the drafts and whoever shares
the batch, because every draw is a function of (episode, position, purpose).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from distill_env.tasks.base import Prompt


@dataclass
class RolloutCost:
    """What a rollout cost, in tokens, teacher calls and seconds."""

    drafted: int = 0  # tokens that the student drew
    committed: int = 0  # of those, the ones that stand
    teacher_passes: int = 0
    teacher_positions: int = 0
    teacher_tokens: int = 0  # tokens that the teacher wrote
    student_seconds: float = 0.0
    teacher_seconds: float = 0.0  # environment steps and look-aheads
    seconds: float = 0.0

    @property
    def wasted(self) -> int:
        return self.drafted - self.committed


@dataclass
class Rollout:
    """N finished answers, in the order of their prompts. T is the length of the longest."""

    prompts: list[Prompt]
    tokens: Tensor  # int64 [N, T], padded with -1
    rewritten: Tensor  # bool [N, T], the teacher wrote it
    rewards: Tensor  # float64 [N, T], what the environment paid, the task's reward included
    token_log_prob: Tensor  # float64 [N, T], the student's, of own tokens; 0 elsewhere
    score: Tensor  # float64 [N, T], what the writer's gate read; nan where it did not look
    grades: Tensor  # float64 [N]
    teacher: Tensor | None  # [M, S] log p at the M valid positions, row by row, on a support of S - 1 ids and a tail
    support: Tensor | None  # int64 [M, S - 1], padded with -1; None: S is V and nothing is truncated
    step_end_ids: tuple[int, ...] = ()  # a token of these ends a reasoning step
    ledger: RolloutCost = field(default_factory=RolloutCost)
    cached: RolloutCost | None = None  # what it cost when it was written, if it was read from disk

    @property
    def mask(self) -> Tensor:
        """bool [N, T]: the tokens that stand, the end token among them."""
        return self.tokens >= 0
