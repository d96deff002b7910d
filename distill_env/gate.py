"""The gate: which steps the teacher writes, and how the two KLs are weighed. Scores and decisions are pure functions.

A gate is a score, a threshold and a sharpness. A step is *hard* where `score >= threshold`:

    hard gate (alpha=None)   rewrite where hard;                   reverse weight 1 where easy, 0 where hard
    soft gate (alpha)        rewrite with probability 1 - lambda;  reverse weight lambda = sigmoid(alpha (tau - score))

`always`, `never` and `random` are gates as well, over a constant or a uniform score. All that comes out is detached: a
loss must not fall by moving the gate. (torch is imported where it is used: every `--help` reads the settings here.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from distill_env.checks import check_types

if TYPE_CHECKING:
    from torch import Tensor

ScoreName = Literal["divergence", "forward_kl", "teacher_entropy", "rank", "uniform", "episode_uniform"]
OverStep = Literal["none", "mean", "max", "sum"]
SMALLEST_AVERAGE = 1e-12  # a relative score is read against at least this, so that 0 after zeros is not hard


@dataclass(frozen=True)
class Gate:
    """A score, a threshold and a sharpness, and how the score is read.

    Args:
        score: `divergence` (D_t), `forward_kl`, `teacher_entropy` (nats), `rank` of the drafted token under the teacher
            (0 is the likeliest), `uniform` (a number per step) or `episode_uniform` (one number per answer).
        threshold: tau; a step is hard where its score reaches it.
        alpha: sharpness of the soft gate; None is the hard one.
        over_step: read the score as its causal mean, max or sum over the reasoning step so far, up to and including
            the present state.
        smoothing: weight of the past in an exponential moving average over the answer, in [0, 1).
        clip: scores above it are read as it.
        relative: read the score as a multiple of the average of the preceding ones in the answer (their mean, or the
            moving average if it smooths); the first state reads 0.
        cumulative: read the score as its sum since the last rewrite, up to and including the present state. A hard
            gate on D_t as is then bounds where the answers go: each stretch between two rewrites adds less than tau, so
            KL(behaviour || teacher) < tau (1 + E[rewrites of an answer]), if the teacher rewrites by `sample`.
        lasting: the first hard step hands the rest of the answer over.
    """

    score: ScoreName = "divergence"
    threshold: float = math.inf
    alpha: float | None = None
    over_step: OverStep = "none"
    smoothing: float = 0.0
    clip: float = math.inf
    relative: bool = False
    cumulative: bool = False
    lasting: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.score in ("divergence", "forward_kl", "teacher_entropy", "rank") and self.threshold < 0:
            raise ValueError(f"tau: {self.threshold} is negative; a threshold on {self.score} is at least 0")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: {self.alpha} is not positive and finite; a larger alpha is a harder gate")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: {self.smoothing} is not in [0, 1)")
        if not self.clip > 0:
            raise ValueError(f"score_clip: {self.clip} is not positive")
        if self.cumulative and self.over_step != "none":
            raise ValueError(f"over_step: {self.over_step!r} does not go with cumulative; accepted: none")
        if self.remembers and self.score in ("uniform", "episode_uniform"):
            raise ValueError(f"score: a gate with memory reads the models, not {self.score!r}")

    @property
    def remembers(self) -> bool:
        """Whether a decision depends on the states before."""
        return self.smoothing > 0 or self.over_step != "none" or self.relative or self.feeds_back

    @property
    def feeds_back(self) -> bool:
        """Whether a decision depends on the decisions before."""
        return self.cumulative or self.lasting

    @property
    def reads_models(self) -> bool:
        """Whether the decision needs log-probabilities; otherwise it is known before anything is drafted."""
        return self.score not in ("uniform", "episode_uniform") and math.isfinite(self.threshold)

    @property
    def always(self) -> bool:
        return self.threshold == -math.inf

    @property
    def never(self) -> bool:
        return self.threshold == math.inf


NEVER = Gate("uniform", math.inf)
ALWAYS = Gate("uniform", -math.inf)


def random_gate(rate: float, per_answer: bool = False) -> Gate:
    """Rewrite each step, or each whole answer, with probability `rate`."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: {rate} is not in [0, 1]")
    if rate in (0, 1):
        return ALWAYS if rate else NEVER
    return Gate("episode_uniform" if per_answer else "uniform", 1 - rate)


@dataclass(frozen=True)
class Draft:
    """What a gate may know of a block of K drafted tokens besides the two distributions."""

    tokens: Tensor  # int64 [n, K], -1 where nothing is drafted
    step_start: Tensor  # bool [n, K], whether a reasoning step begins at this state
    uniforms: Tensor  # float64 [n, K], a keyed number per state
    episode_uniforms: Tensor  # float64 [n], a keyed number per answer


@dataclass(frozen=True)
class GateState:
    """What a gate remembers of an answer. Fields are [n] going in and [n, K], one for every position, coming out."""

    average: Tensor  # the moving average
    seen: Tensor  # states seen in the answer
    step_sum: Tensor  # over the reasoning step so far
    step_max: Tensor
    step_seen: Tensor
    stretch_sum: Tensor  # since the last rewrite
    handed_over: Tensor  # 1 after a lasting hand-over

    @classmethod
    def start(cls, n: int) -> GateState:
        import torch

        return cls(*(torch.zeros(n, dtype=torch.float64) for _ in fields(cls)))

    def at(self, rows: Tensor, positions: Tensor) -> GateState:
        """The carry of the given rows at the given positions, [n, K] -> [m]."""
        return GateState(*(getattr(self, f.name)[rows, positions] for f in fields(self)))

    def put(self, rows: Tensor, other: GateState) -> GateState:
        """This carry with `rows` replaced."""
        return GateState(*(getattr(self, f.name).index_copy(0, rows, getattr(other, f.name)) for f in fields(self)))


@dataclass(frozen=True)
class GateDecision:
    """[n, K] each, detached."""

    score: Tensor  # float64, as read: clipped, smoothed, over the step; nan after a hand-over
    rewrite: Tensor  # bool
    reverse_weight: Tensor  # float64 in [0, 1]


def raw_score(gate: Gate, student: Tensor | None, teacher: Tensor | None, draft: Draft) -> Tensor:
    """The gate's score as is, float64 [n, K], from log-probabilities [n, K, V] (None for scores that read no model)."""
    import torch

    from distill_env.divergence import entropy, forward_kl, reverse_kl

    if gate.always or gate.never:
        return torch.zeros_like(draft.uniforms)
    if gate.score == "uniform":
        return 1 - draft.uniforms
    if gate.score == "episode_uniform":
        return (1 - draft.episode_uniforms)[:, None].expand_as(draft.uniforms)
    assert student is not None
    assert teacher is not None
    student, teacher = student.detach(), teacher.detach()
    if gate.score == "divergence":
        score = reverse_kl(student, teacher).clamp(min=0)  # rounding makes it negative for near-equal models
    elif gate.score == "forward_kl":
        score = forward_kl(student, teacher).clamp(min=0)
    elif gate.score == "teacher_entropy":
        score = entropy(teacher)
    else:
        own = teacher.gather(-1, draft.tokens.clamp(min=0)[..., None])
        score = (teacher > own).sum(-1)
    return score.double()


def read_score(gate: Gate, score: Tensor, step_start: Tensor, carry: GateState) -> tuple[Tensor, GateState]:
    """Clip, smooth and reduce raw scores [n, K] causally, as if nothing among them was rewritten; the carry comes back
    for every position."""
    import torch

    score = score.clamp(max=gate.clip)
    if not gate.remembers:
        return score, GateState(*(getattr(carry, f.name)[:, None].expand_as(score) for f in fields(carry)))
    average, seen, stretch_sum = carry.average, carry.seen, carry.stretch_sum
    step_sum, step_max, step_seen = carry.step_sum, carry.step_max, carry.step_seen
    read, kept = [], []
    for k in range(score.shape[1]):
        value, before = score[:, k], average
        if gate.smoothing > 0:
            average = torch.where(seen == 0, value, gate.smoothing * before + (1 - gate.smoothing) * value)
        else:
            average = before + (value - before) / (seen + 1)
        if gate.relative:
            value = torch.where(seen == 0, 0.0, value / before.clamp(min=SMALLEST_AVERAGE))
        elif gate.smoothing > 0:
            value = average
        seen = seen + 1
        first = step_start[:, k]
        step_sum = torch.where(first, value, step_sum + value)
        step_max = torch.where(first, value, torch.maximum(step_max, value))
        step_seen = torch.where(first, 1.0, step_seen + 1)
        stretch_sum = stretch_sum + value
        if gate.cumulative:
            value = stretch_sum
        read.append({"none": value, "mean": step_sum / step_seen, "max": step_max, "sum": step_sum}[gate.over_step])
        kept.append((average, seen, step_sum, step_max, step_seen, stretch_sum, carry.handed_over))
    return torch.stack(read, 1), GateState(*(torch.stack(values, 1) for values in zip(*kept, strict=True)))


def decide(gate: Gate, score: Tensor, uniforms: Tensor) -> GateDecision:
    """From scores as read [n, K] to decisions; `uniforms` settle the draws of a soft gate."""
    import torch

    if gate.alpha is None or not math.isfinite(gate.threshold):
        rewrite = score >= gate.threshold
        return GateDecision(score, rewrite, (~rewrite).double())
    reverse_weight = torch.sigmoid(gate.alpha * (gate.threshold - score))
    return GateDecision(score, uniforms >= reverse_weight, reverse_weight)


def read_and_decide(
    gate: Gate, score: Tensor, step_start: Tensor, uniforms: Tensor, carry: GateState
) -> tuple[GateDecision, GateState]:
    """From raw scores [n, K] to decisions, state by state where one decision depends on those before.

    A rewritten state is followed by one whose sum begins anew, or after a hand-over by states that nobody looks at.
    """
    import torch

    if not gate.feeds_back:
        read, after = read_score(gate, score, step_start, carry)
        return decide(gate, read, uniforms), after
    decisions, kept = [], []
    for k in range(score.shape[1]):
        column = slice(k, k + 1)
        over = carry.handed_over > 0
        read, seen = read_score(gate, score[:, column], step_start[:, column], carry)
        decision = decide(gate, read, uniforms[:, column])
        rewrite = decision.rewrite[:, 0] | over
        after = replace(
            GateState(*(getattr(seen, f.name)[:, 0] for f in fields(seen))),
            stretch_sum=torch.where(rewrite, 0.0, seen.stretch_sum[:, 0]),
            handed_over=(rewrite & gate.lasting).double(),
        )
        carry = GateState(*(torch.where(over, getattr(carry, f.name), getattr(after, f.name)) for f in fields(carry)))
        decisions.append(
            (
                torch.where(over, math.nan, decision.score[:, 0]),
                rewrite,
                torch.where(over, 0.0, decision.reverse_weight[:, 0]),
            )
        )
        kept.append([getattr(carry, f.name) for f in fields(carry)])
    joined = GateDecision(*(torch.stack(parts, 1) for parts in zip(*decisions, strict=True)))
    return joined, GateState(*(torch.stack(parts, 1) for parts in zip(*kept, strict=True)))


def gate(
    config: Gate, student: Tensor | None, teacher: Tensor | None, draft: Draft, carry: GateState
) -> tuple[GateDecision, GateState]:
    """Decide at every state of a drafted block, as if all its tokens before that state stood.

    Args:
        config: the gate.
        student, teacher: log-probabilities [n, K, V], or on a common support, or None if the gate reads no model.
        draft: the block.
        carry: of the answers so far.
    """
    score = raw_score(config, student, teacher, draft)
    return read_and_decide(config, score, draft.step_start, draft.uniforms, carry)


def follow_quantile(threshold: float, share: float, budget: float) -> float:
    """The threshold after a rollout that rewrote `share` of its steps, on its way to rewriting `budget` of them.

    Stochastic approximation of a quantile (Robbins & Monro 1951) on a logarithmic scale, so that no score's unit
    matters; the fixed point is the score's (1 - budget)-quantile. The threshold's logarithm adds up the errors, so
    their mean goes to 0 also where scores have atoms and no threshold meets the budget. A rise is at most a factor
    e^2, and the threshold does not fall under 1e-6, where scores are 0 for long.
    """
    error = (share - budget) / (budget * (1 - budget))
    return max(threshold * math.exp(0.2 * min(error, 10.0)), 1e-6)
