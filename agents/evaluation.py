"""Evaluation: let an agent write without its teacher, and put together what `agents/metrics.py` says of its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from agents import metrics as measures
from agents.base import Agent, Metrics
from agents.generation import Completion, by_prompt, generate
from agents.likelihood import reference_log_probs
from distill_env.env import DistillVectorEnv
from distill_env.tasks.base import Grade, Prompt


def completion_metrics(answers: Sequence[Completion], tau: float) -> Metrics:
    """What the agent's own answers show; several answers to a prompt make diversity, pass@k and majority@k visible.

    Keys, with k the powers of two up to the number of answers to a prompt, and that number:
        right: `accuracy` (final value), `correct_chains` if the task checks steps, `undecided` if grading gave some
            answers up, `pass@k` (of chains, else of final values), `majority@k` (of final values, if the task names
            them), `distinct_ways` (right ones, per prompt); `correct_chains/<difficulty>` or `accuracy/<difficulty>`.
        diverse: `entropy` (nats a token), `distinct_1`, `distinct_2`, `distinct_3`; with several answers to a prompt
            `distinct_answers` (their share) and `collapse` (share of prompts all of whose answers are the same).
        in the teacher's eyes: `divergence` (mean D_t, nats), `hard_share` (D_t >= tau), also `/<difficulty>` if there
            are several and `hard_share_quarter/1` to `4` (of an answer), `teacher_log_prob` (nats a token).
        in form: `length` (tokens), `steps`, `ended`, `repetition` (mean share of repeated 4-grams), `loops` (share of
            answers most of whose 4-grams are repeated).
    """
    groups = by_prompt(answers)
    samples = min(len(g) for g in groups)
    metrics = _right(answers, groups, samples)
    tokens = [[a.tokens for a in g] for g in groups]
    if samples > 1:
        metrics["collapse"] = measures.mean(measures.is_collapsed(g) for g in tokens)
        metrics["distinct_answers"] = measures.mean(measures.distinct_answers(g) for g in tokens)
    for n in (1, 2, 3):
        metrics[f"distinct_{n}"] = measures.distinct_n([a.tokens for a in answers], n)
    metrics["entropy"] = measures.mean(x for a in answers for x in a.entropies)
    metrics |= _hard(answers, tau)
    metrics["teacher_log_prob"] = measures.mean(x for a in answers for x in a.teacher_log_probs)
    metrics["length"] = measures.mean(len(a.tokens) for a in answers)
    metrics["steps"] = measures.mean(a.steps for a in answers)
    metrics["ended"] = measures.mean(a.ended for a in answers)
    repetitions = measures.repetitions([a.tokens for a in answers])
    metrics["repetition"] = measures.mean(repetitions)
    metrics["loops"] = measures.mean(r > 0.5 for r in repetitions)
    return metrics


def _right(answers: Sequence[Completion], groups: Sequence[Sequence[Completion]], samples: int) -> Metrics:
    """What the grades say."""
    grades = [a.grade for a in answers if a.grade is not None]
    if not grades:
        return {}
    metrics: Metrics = {"accuracy": measures.accuracy([g.correct for g in grades])}
    chains = all(g.chain_correct is not None for g in grades)
    if chains:
        metrics["correct_chains"] = measures.mean(bool(g.chain_correct) for g in grades)
        ways = [len({a.grade.way for a in g if a.grade is not None and a.grade.way}) for g in groups]
        metrics["distinct_ways"] = measures.mean(ways)
    if any(g.undecided for g in grades):
        metrics["undecided"] = measures.mean(g.undecided for g in grades)

    def is_right(grade: Grade | None) -> bool:
        return grade is not None and bool(grade.chain_correct if chains else grade.correct)

    right = [sum(is_right(a.grade) for a in g) for g in groups]
    for k in measures.sizes_up_to(samples):
        metrics[f"pass@{k}"] = measures.mean(
            measures.pass_at_k(len(g), c, k) for g, c in zip(groups, right, strict=True)
        )
    if not any(g.correct and g.final_value is None for g in grades):  # else the task names no values
        votes = [[a.grade.final_value if a.grade else None for a in g] for g in groups]
        correct = [[a.grade is not None and a.grade.correct for a in g] for g in groups]
        for k in measures.sizes_up_to(samples):
            metrics[f"majority@{k}"] = measures.mean(
                measures.majority_at_k(v, c, k) for v, c in zip(votes, correct, strict=True)
            )
    for difficulty in sorted({a.prompt.difficulty for a in answers}):
        chosen = [is_right(a.grade) for a in answers if a.prompt.difficulty == difficulty]
        metrics[f"{'correct_chains' if chains else 'accuracy'}/{difficulty}"] = measures.accuracy(chosen)
    return metrics


def _hard(answers: Sequence[Completion], tau: float) -> Metrics:
    """Mean D_t and the share of hard steps: of all, by difficulty, by quarter of the answer."""
    divergences = [x for a in answers for x in a.divergences]
    metrics = {"divergence": measures.mean(divergences), "hard_share": measures.hard_share(divergences, tau)}
    if not divergences:
        return metrics
    buckets = sorted({a.prompt.difficulty for a in answers})
    for difficulty in buckets if len(buckets) > 1 else ():
        chosen = [x for a in answers if a.prompt.difficulty == difficulty for x in a.divergences]
        metrics[f"hard_share/{difficulty}"] = measures.hard_share(chosen, tau)
    quarters = measures.hard_share_by_part([a.divergences for a in answers], tau)
    return metrics | {f"hard_share_quarter/{i}": share for i, share in enumerate(quarters, 1)}


def evaluate(
    agent: Agent,
    env: DistillVectorEnv,
    prompts: Sequence[Prompt],
    samples: int,
    tau: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Metrics, list[Completion], list[Completion]]:
    """The metrics of the agent's own answers, and what it makes of texts that others wrote.

    The latter: `perplexity` and `divergence_on_teacher_prefix` on an answer of the teacher to each prompt, and
    `exposure_gap`, by how much D_t is larger on own answers (nats); `reference_perplexity` on the task's reference
    answers if it has some and the agent has a `student`. `self_bleu`, too slow for validations, with several samples.

    Returns:
        the metrics, the agent's answers, `samples` to each prompt, and the teacher's, if the agent could read along.
    """
    repeated = [p for p in prompts for _ in range(samples)]
    answers = generate(agent, env, repeated, seed, progress=progress)
    metrics = completion_metrics(answers, tau)
    if samples > 1:
        metrics["self_bleu"] = measures.mean(measures.self_bleu([a.tokens for a in g]) for g in by_prompt(answers))
    held_out: list[Completion] = []
    metrics["perplexity"] = math.nan
    if hasattr(agent, "log_probs"):
        held_out = generate(agent, env, prompts, seed + 1, teacher_writes=True, progress=progress)
        metrics["perplexity"] = measures.perplexity([x for a in held_out for x in a.log_probs])
        teachers = [x for a in held_out for x in a.divergences]
        metrics["divergence_on_teacher_prefix"] = measures.mean(teachers)
        metrics["exposure_gap"] = measures.exposure_gap([x for a in answers for x in a.divergences], teachers)
    if hasattr(agent, "student"):
        read = reference_log_probs(agent.student, prompts, env.num_envs)
        if read:
            metrics["reference_perplexity"] = measures.perplexity([x for log_probs in read for x in log_probs])
    return metrics, answers, held_out
