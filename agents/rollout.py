"""What a rollout returns: completions, who wrote each token, what the teacher scored, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from distill_env.tasks.base import Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RolloutCost:
    """What a rollout cost, in tokens, teacher calls and seconds.

    `calls`, `processed`, `reprocessed` and `scored` are what the gate alone asks for, as in deployment: nobody else
    wants the teacher's distributions there. `teacher_passes` and `teacher_positions` are what was computed here, where
    the environment pays for every token and the update reads every position.
    """

    drafted: int = 0  # tokens that the student drew
    accepted: int = 0  # of those, the ones that were committed
    teacher_passes: int = 0
    teacher_positions: int = 0
    teacher_tokens: int = 0  # tokens that the teacher wrote
    calls: int = 0  # times that a completion asked the teacher; what it writes without a break is one call
    processed: int = 0  # positions that it read for these calls, each prefix once, as with a prefix cache
    reprocessed: int = 0  # positions of all calls, each with its whole prefix, as without a prefix cache
    scored: int = 0  # positions at which the gate asked for its distribution
    student_seconds: float = 0.0
    teacher_seconds: float = 0.0  # environment steps and look-aheads
    seconds: float = 0.0

    @property
    def wasted(self) -> int:
        return self.drafted - self.accepted


@dataclass(kw_only=True)
class Rollout:
    """N finished completions, in the order of their prompts. T is the length of the longest."""

    prompts: list[Prompt]
    tokens: Tensor  # int64 [N, T], padded with -1
    rewritten: Tensor  # bool [N, T], whether the teacher wrote the token, or the data did
    rewards: Tensor  # float64 [N, T], paid by the environment, the task's reward included
    token_log_prob: Tensor  # float64 [N, T], of the student's tokens; 0 elsewhere
    score: Tensor  # float64 [N, T], read by the teacher's gate; NaN where it read nothing
    grades: Tensor  # float64 [N]
    teacher: Tensor | None  # [M, S] log p at the M valid positions, row by row, on a support of S - 1 ids and a tail
    support: Tensor | None  # int64 [M, S - 1], padded with -1; None: S is V and nothing is truncated
    from_data: bool = False  # whether they are reference completions, which neither model wrote
    divergence: Tensor | None = None  # float64 [N, T], D_t over the whole vocabulary, if the gate read it everywhere
    step_end_ids: tuple[int, ...] = ()  # tokens that end a reasoning step
    cost: RolloutCost = field(default_factory=RolloutCost)
    cached_cost: RolloutCost | None = None  # what it cost when it was written, if it was read from disk

    @property
    def mask(self) -> Tensor:
        """bool [N, T], the valid tokens, the end token included."""
        return self.tokens >= 0


class Parts(NamedTuple):
    """One completion. The lists have an entry per token."""

    prompt: Prompt
    tokens: list[int]
    rewritten: list[bool]
    scores: list[float]


def completions_of(rollout: Rollout) -> Iterator[Parts]:
    """The completions of a rollout, one by one."""
    r = rollout
    for prompt, mask, *rows in zip(r.prompts, r.mask, r.tokens, r.rewritten, r.score, strict=True):
        yield Parts(prompt, *(row[mask].tolist() for row in rows))
