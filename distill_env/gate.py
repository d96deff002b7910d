"""The gate: which positions the teacher writes, and how the two KLs are weighted. All functions are pure.

`apply_gate` scores every position of a drafted block (`raw_score`), reads the scores through the gate's memory
(`read_score`) and compares them with tau (`decide`). Everything it returns is detached: a loss must not fall by moving
the gate. `Gate` itself is in `gate_settings.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill_env.divergence import entropy, forward_kl, jensen_shannon, reverse_kl, tails_apart
from distill_env.gate_settings import SMALLEST_TAU, Gate, ScoreFunction, find_score

SMALLEST_AVERAGE = 1e-12  # a relative score is read against at least this, so that 0 after zeros is not hard


@dataclass(frozen=True)
class DraftBlock:
    """What a gate may know of a block of K drafted tokens besides the two distributions."""

    tokens: Tensor  # int64 [n, K], -1 where nothing is drafted
    step_start: Tensor  # bool [n, K], whether a reasoning step begins at this state
    uniforms: Tensor  # float64 [n, K], a keyed number per state
    episode_uniforms: Tensor  # float64 [n], a keyed number per completion
    student_score: Tensor | None = None  # float64 [n, K], see `student_score`; None computes it where it is needed


class GateState(NamedTuple):
    """The memory of a gate. Fields are float64 [n] going in and [n, K], one for every position, coming out."""

    average: Tensor  # the moving average
    positions: Tensor  # scored in the completion so far
    step_first: Tensor  # at the first position of the reasoning step
    step_sum: Tensor  # over the reasoning step so far
    step_max: Tensor
    step_positions: Tensor
    stretch_sum: Tensor  # since the last rewrite
    handed_over: Tensor  # 1 after the rest was handed over

    @classmethod
    def start(cls, n: int, device: torch.device | str = "cpu") -> GateState:
        return cls(*(torch.zeros(n, dtype=torch.float64, device=device) for _ in cls._fields))

    def at(self, rows: Tensor, positions: Tensor) -> GateState:
        """The state of the given rows at the given positions, [n, K] -> [m]."""
        return GateState(*(x[rows, positions] for x in self))

    def where(self, rows: Tensor, other: GateState) -> GateState:
        """The other state in rows that are set in `rows`, bool [n], and this one elsewhere."""
        return GateState(*(torch.where(rows, y, x) for x, y in zip(self, other, strict=True)))

    def put(self, rows: Tensor, other: GateState) -> GateState:
        """This state with `rows` replaced."""
        return GateState(*(x.index_copy(0, rows, y) for x, y in zip(self, other, strict=True)))


class GateDecision(NamedTuple):
    """[n, K] each, detached."""

    score: Tensor  # float64, after clipping, smoothing and reduction; NaN after a hand-over
    hard: Tensor  # bool, score >= tau
    rewrite: Tensor  # bool
    reverse_weight: Tensor  # float64 in [0, 1]


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """D_t = KL(student || teacher), [n, K, V] -> [n, K], nats."""
    return reverse_kl(student, teacher).clamp(min=0)  # rounding makes it negative for near-equal models


def rank(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """The number of tokens that the teacher finds likelier than the drafted one, [n, K, V] and [n, K] -> [n, K]."""
    return (teacher > teacher.gather(-1, tokens.clamp(min=0)[..., None])).sum(-1)


def margin(student: Tensor) -> Tensor:
    """1 minus the difference of the two largest probabilities, [n, K, V] -> [n, K]."""
    likeliest = student.topk(2, -1).values.exp()
    return 1 - (likeliest[..., 0] - likeliest[..., 1])


SCORES: dict[str, ScoreFunction] = {
    "divergence": divergence,
    "forward_kl": lambda student, teacher: forward_kl(student, teacher).clamp(min=0),
    "jensen_shannon": lambda student, teacher: jensen_shannon(student, teacher, 0.5).clamp(min=0),
    "teacher_entropy": lambda student, teacher: entropy(teacher),
    "rank": rank,
    "student_entropy": lambda student: entropy(student),
    "least_confidence": lambda student: 1 - student.max(-1).values.exp(),
    "margin": margin,
}


def truncated_inputs(gate: Gate, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """What the gate reads where the teacher's distribution is known on a support only.

    D_t, the forward KL and the entropy are lower bounds there. The full Jensen-Shannon divergence is bounded from above
    too, so its score is the upper bound: a position that it finds easy is easy.

    Args:
        gate: the gate.
        student, teacher: log-probabilities [..., k + 1], as `divergence.project` returns them.
    """
    return tails_apart(student, teacher) if gate.score == "jensen_shannon" else (student, teacher)


def student_score(gate: Gate, student: Tensor, predicted: Tensor | None = None) -> Tensor | None:
    """What the gate reads of the student alone, as its score or as its screen; None if it reads no such score.

    Args:
        gate: the gate.
        student: log-probabilities [n, K, V] over the whole vocabulary.
        predicted: D_t as the student's hand-over head predicts it, nats [n, K]; None for a student without one.

    Returns:
        float64 [n, K], on the device of the student.

    Raises:
        ValueError: if the gate reads a head that the student does not have.
    """
    name = gate.student_score
    if not name:
        return None
    if name == "predicted_divergence":
        if predicted is None:
            raise ValueError(
                f"score: {name!r} with a student that has no hand-over head; expected one trained with "
                "--hand-over-width above 0, or another score"
            )
        return predicted.detach().double()
    score: Tensor = (SCORES.get(name) or find_score(name))(student.detach())
    return _checked(name, score, student.shape[:-1])


def _checked(name: str, score: Tensor, shape: torch.Size) -> Tensor:
    if score.shape != shape:
        raise ValueError(f"score: {name!r} returned {list(score.shape)}; expected {list(shape)}, one per position")
    return score.double()


def raw_score(gate: Gate, student: Tensor | None, teacher: Tensor | None, draft: DraftBlock) -> Tensor:
    """The gate's score at every position, before it is clipped or smoothed.

    Args:
        gate: the gate.
        student: log-probabilities [n, K, V]; None for scores that read no model.
        teacher: the same of the teacher.
        draft: the block.

    Returns:
        float64 [n, K], in the unit of the score, on the device of the block.
    """
    if gate.always or gate.never:
        return torch.zeros_like(draft.uniforms)
    if gate.score == "uniform":
        return 1 - draft.uniforms
    if gate.score == "episode_uniform":
        return (1 - draft.episode_uniforms)[:, None].expand_as(draft.uniforms)
    assert student is not None
    own = student_score(gate, student) if draft.student_score is None else draft.student_score
    if not gate.reads_teacher:
        assert own is not None
        return own.to(draft.uniforms.device)
    assert teacher is not None
    inputs = [student.detach(), teacher.detach()]
    if gate.reads_tokens:
        inputs.append(draft.tokens.to(teacher.device))
    score = _checked(gate.score, (SCORES.get(gate.score) or find_score(gate.score))(*inputs), draft.tokens.shape)
    if own is not None:
        score = torch.where(own.to(score.device) >= gate.screen_tau, score, 0.0)
    return score.to(draft.uniforms.device)


def read_score(gate: Gate, score: Tensor, step_start: Tensor, state: GateState) -> tuple[Tensor, GateState]:
    """Clip, smooth and reduce raw scores [n, K] causally, as if none of these positions was rewritten.

    Returns:
        the scores [n, K], and the gate's state after every position.
    """
    score = score.clamp(max=gate.score_clip)
    if not gate.has_memory:
        return score, GateState(*(x[:, None].expand_as(score) for x in state))
    average, positions, step_first, step_sum, step_max, step_positions, stretch_sum, handed_over = state
    scores, states = [], []
    for k in range(score.shape[1]):
        value, before = score[:, k], average
        if gate.smoothing > 0:
            average = torch.where(positions == 0, value, gate.smoothing * before + (1 - gate.smoothing) * value)
        else:
            average = before + (value - before) / (positions + 1)
        if gate.relative:
            value = torch.where(positions == 0, 0.0, value / before.clamp(min=SMALLEST_AVERAGE))
        elif gate.smoothing > 0:
            value = average
        positions = positions + 1
        first = step_start[:, k]
        step_first = torch.where(first, value, step_first)
        step_sum = torch.where(first, value, step_sum + value)
        step_max = torch.where(first, value, torch.maximum(step_max, value))
        step_positions = torch.where(first, 1.0, step_positions + 1)
        stretch_sum = stretch_sum + value
        if gate.cumulative:
            value = stretch_sum
        over_step = {"first": step_first, "mean": step_sum / step_positions, "max": step_max, "sum": step_sum}
        scores.append(over_step.get(gate.step_reduction, value))
        states.append((average, positions, step_first, step_sum, step_max, step_positions, stretch_sum, handed_over))
    return torch.stack(scores, 1), GateState(*(torch.stack(x, 1) for x in zip(*states, strict=True)))


def decide(gate: Gate, score: Tensor, uniforms: Tensor) -> GateDecision:
    """Decisions from scores [n, K]; `uniforms` settle the draws of a soft gate."""
    tau = gate.threshold
    hard = score >= tau
    if math.isinf(gate.alpha) or not math.isfinite(tau):
        return GateDecision(score, hard, hard, (~hard).double())
    reverse_weight = torch.sigmoid(gate.alpha * (tau - score))
    return GateDecision(score, hard, uniforms >= reverse_weight, reverse_weight)


def read_and_decide(
    gate: Gate, score: Tensor, step_start: Tensor, uniforms: Tensor, state: GateState
) -> tuple[GateDecision, GateState]:
    """Decisions from raw scores [n, K], position by position where one decision depends on those before.

    After a rewrite the cumulative sum begins anew; after a hand-over nothing is scored.
    """
    if not gate.feeds_back:
        read, after = read_score(gate, score, step_start, state)
        return decide(gate, read, uniforms), after
    decisions, states = [], []
    for k in range(score.shape[1]):
        column = slice(k, k + 1)
        over = state.handed_over > 0
        read, scored = read_score(gate, score[:, column], step_start[:, column], state)
        decision = GateDecision(*(x[:, 0] for x in decide(gate, read, uniforms[:, column])))
        rewrite = decision.rewrite | over
        after = GateState(*(x[:, 0] for x in scored))
        after = after._replace(
            stretch_sum=torch.where(rewrite, 0.0, after.stretch_sum),
            handed_over=(rewrite & gate.hand_over_rest).double(),
        )
        state = GateState(*(torch.where(over, x, y) for x, y in zip(state, after, strict=True)))
        decisions.append(
            GateDecision(
                torch.where(over, math.nan, decision.score),
                decision.hard & ~over,
                rewrite,
                torch.where(over, 0.0, decision.reverse_weight),
            )
        )
        states.append(state)
    joined = GateDecision(*(torch.stack(x, 1) for x in zip(*decisions, strict=True)))
    return joined, GateState(*(torch.stack(x, 1) for x in zip(*states, strict=True)))


def apply_gate(
    gate: Gate, student: Tensor | None, teacher: Tensor | None, draft: DraftBlock, state: GateState
) -> tuple[GateDecision, GateState]:
    """Decide at every position of a drafted block, as if all its tokens before that position were accepted.

    Args:
        gate: the gate.
        student: log-probabilities [n, K, V], or on a support that both models share; None if the gate reads no model.
        teacher: the same of the teacher.
        draft: the block.
        state: the gate's memory of these completions.
    """
    score = raw_score(gate, student, teacher, draft)
    return read_and_decide(gate, score, draft.step_start, draft.uniforms, state)


def follow_quantile(tau: float, share: float, budget: float) -> float:
    """The threshold after a rollout that rewrote `share` of its tokens, on its way to rewriting `budget` of them.

    Stochastic approximation of a quantile (Robbins & Monro 1951) on a logarithmic scale, so that the score's unit does
    not matter; the fixed point is the (1 - budget)-quantile of the scores. The logarithm of tau adds up the errors, so
    their mean tends to 0 also where scores have atoms and no threshold meets the budget. A rise is at most a factor
    e^2, and tau does not fall below `SMALLEST_TAU` while scores are 0.
    """
    error = (share - budget) / (budget * (1 - budget))
    return max(tau * math.exp(0.2 * min(error, 10.0)), SMALLEST_TAU)
