"""Small problems on tables, and their laws written down independently of the code under test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agents.rollout import Rollout
from distill_env.gate_settings import Gate
from distill_env.models.tabular import TabularModel
from distill_env.tasks.base import Grade, Prompt, Split
from distill_env.tasks.categorical import CategoricalTask

NO_PROMPT = Prompt((), "")
Answer = tuple[tuple[int, ...], tuple[bool, ...]]  # tokens, and which of them the teacher wrote


class Ragged(CategoricalTask):
    """Categorical with prompts of 0 to 3 tokens, graded by the number of `a`s."""

    graded = True

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        ids = [(), (0,), (1, 2), (2,), (3, 0, 1), (1,), (2, 2, 0)]
        return tuple(Prompt(i, self.decode(i)) for i in ids)

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        return Grade(sum(t == 0 for t in tokens) / self.max_new_tokens, False, False)


def at(model: TabularModel, history: Sequence[int]) -> Tensor:
    """log p of the token after a history, [V], differentiable."""
    return model.log_table()[model.walk(history)]


def perturbed(model: TabularModel, scale: float, seed: int = 0) -> TabularModel:
    """A model with normal noise of that scale on its logits: near in some states, far in others."""
    noise = torch.randn(model.table.shape, generator=torch.Generator().manual_seed(seed), dtype=model.table.dtype)
    return TabularModel(model.next_state, model.table.detach() + scale * noise, model.eos_token_id)


def naive_read(gate: Gate, raw: Sequence[float], starts: Sequence[bool], rewritten: Sequence[bool] = ()) -> float:
    """The score of the last of these states as a gate reads it: clipped, smoothed or set against the average before,
    over the step or since the last of the states before it that were rewritten; no carry."""
    clipped = [min(score, gate.score_clip) for score in raw]
    averages: list[float] = []
    for i, score in enumerate(clipped):
        if gate.smoothing:
            averages.append(gate.smoothing * averages[-1] + (1 - gate.smoothing) * score if averages else score)
        else:
            averages.append(sum(clipped[: i + 1]) / (i + 1))
    values = averages if gate.smoothing else clipped
    if gate.relative:
        values = [0.0, *(score / average for score, average in zip(clipped[1:], averages, strict=False))]
    if gate.cumulative:
        return sum(values[max((i + 1 for i, flag in enumerate(rewritten) if flag), default=0) :])
    step = values[max(i for i, start in enumerate(starts) if start) :]
    reduced = {"none": step[-1], "first": step[0], "mean": sum(step) / len(step), "max": max(step), "sum": sum(step)}
    return reduced[gate.step_reduction]


def naive_score(gate: Gate, log_q: Tensor, log_p: Tensor, token: int) -> float:
    """The score as is, from log-probabilities [V] without zeros."""
    q, p = log_q.exp(), log_p.exp()
    if gate.screen and naive_score(Gate(gate.screen), log_q, log_p, token) < gate.screen_tau:
        return 0.0
    likeliest = sorted(q.tolist())
    if gate.score == "student_entropy":
        return float(-(q * q.log()).sum())
    if gate.score == "least_confidence":
        return 1 - likeliest[-1]
    if gate.score == "margin":
        return 1 - likeliest[-1] + likeliest[-2]
    if gate.score == "divergence":
        return float((q * (q / p).log()).sum())
    if gate.score == "forward_kl":
        return float((p * (p / q).log()).sum())
    if gate.score == "jensen_shannon":
        m = (p + q) / 2
        return float((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    if gate.score == "teacher_entropy":
        return float(-(p * p.log()).sum())
    return float(sum(x > p[token] for x in p))


def argmax(p: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(p.argmax(), len(p)).to(p.dtype)


def nucleus(mass: float) -> Callable[[Tensor], Tensor]:
    def draw(p: Tensor) -> Tensor:
        kept: list[int] = []
        for token in p.argsort(descending=True).tolist():
            if sum(float(p[t]) for t in kept) < mass:
                kept.append(token)
        q = torch.zeros_like(p)
        q[kept] = p[kept]
        return q / q.sum()

    return draw


@torch.no_grad()
def gated_law(
    student: TabularModel,
    teacher: TabularModel,
    gate: Gate,
    horizon: int,
    prompt: Sequence[int] = (),
    draw: Callable[[Tensor], Tensor] = lambda p: p,
    span: str = "token",
    step_ends: Sequence[int] = (0,),
) -> dict[Answer, float]:
    """The exact probability of every answer, by whom each token was written included, under token-by-token gating.

    `draw` turns the teacher's distribution into the one that it writes from.
    """
    eos = teacher.eos_token_id
    law: dict[Answer, float] = {}

    def rewrite_probability(raw: list[float], starts: list[bool], decided: list[bool]) -> float:
        if gate.score == "uniform":
            return 1 - gate.tau if 0 <= gate.tau <= 1 else float(gate.always)
        if gate.hand_over_rest and any(decided):
            return 1.0
        score = naive_read(gate, raw, starts, decided)
        if math.isinf(gate.alpha):
            return float(score >= gate.tau)
        return 1 - 1 / (1 + math.exp(-gate.alpha * (gate.tau - score)))

    def go_on(
        p: float,
        tokens: tuple[int, ...],
        flags: tuple[bool, ...],
        raw: list[float],  # of the states that the gate looked at, as are the next two
        starts: list[bool],
        decided: list[bool],
    ) -> None:
        if p == 0:
            return
        if len(tokens) == horizon or tokens[-1:] == (eos,):
            law[tokens, flags] = law.get((tokens, flags), 0.0) + p
            return
        log_q, log_p = at(student, (*prompt, *tokens)), at(teacher, (*prompt, *tokens))
        written = draw(log_p.exp())

        def rewrite(p: float, raw: list[float], starts: list[bool], decided: list[bool]) -> None:
            for token, mass in enumerate(written.tolist()):
                go_on(p * mass, (*tokens, token), (*flags, True), raw, starts, decided)

        if span == "step" and flags[-1:] == (True,) and tokens[-1] not in step_ends:
            return rewrite(p, raw, starts, decided)
        new = not tokens or tokens[-1] in step_ends
        for token, q in enumerate(log_q.exp().tolist()):  # the rank looks at the drafted token
            seen = [*raw, 0.0 if gate.score == "uniform" else naive_score(gate, log_q, log_p, token)]
            r = rewrite_probability(seen, [*starts, new], decided)
            go_on(p * q * (1 - r), (*tokens, token), (*flags, False), seen, [*starts, new], [*decided, False])
            rewrite(p * q * r, seen, [*starts, new], [*decided, True])

    go_on(1.0, (), (), [], [], [])
    return law


def rollout_of(
    answers: Sequence[Answer],
    student: TabularModel,
    teacher: TabularModel,
    rewrite_cost: float = 0.0,
    prompt: Prompt = NO_PROMPT,
) -> Rollout:
    """The rollout in which these answers were written, put together by hand."""
    longest = max(len(tokens) for tokens, _ in answers)
    shape = (len(answers), longest)
    tokens, rewritten = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
    rewards, own = torch.zeros(2, *shape, dtype=torch.float64)
    rows = []
    for i, (ids, flags) in enumerate(answers):
        for t, (token, by_teacher) in enumerate(zip(ids, flags, strict=True)):
            history = (*prompt.ids, *ids[:t])
            rows.append(at(teacher, history).detach())
            tokens[i, t], rewritten[i, t] = token, by_teacher
            rewards[i, t] = -rewrite_cost if by_teacher else rows[-1][token]
            own[i, t] = 0.0 if by_teacher else at(student, history)[token].detach()
    nothing = torch.full(shape, torch.nan, dtype=torch.float64)
    grades = torch.zeros(len(answers), dtype=torch.float64)
    return Rollout(
        prompts=[prompt] * len(answers),
        tokens=tokens,
        rewritten=rewritten,
        rewards=rewards,
        token_log_prob=own,
        score=nothing,
        grades=grades,
        teacher=torch.stack(rows),
        support=None,
        step_end_ids=(0,),
    )
