"""Evaluation: an agent writes without its teacher, and its completions become metrics."""

import math
from collections.abc import Callable, Sequence

from agents import metrics as measures
from agents.base import Agent, Metrics
from agents.generation import Completion, by_prompt, generate, write_on_call
from agents.likelihood import reference_log_probs
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import Gate
from distill_env.tasks.base import Grade, Prompt


def completion_metrics(completions: Sequence[Completion]) -> Metrics:
    """Metrics of the agent's own completions. Several completions per prompt give diversity, pass@k and majority@k.

    Keys, with k the powers of two up to the number n of completions per prompt, and n:
        correctness: `accuracy` (final value), `correct_chains` if the task checks steps, `undecided` if grading ran
            into a limit, `pass@k` (of chains, else of final values), `majority@k` (of final values, if the task names
            them), `distinct_ways` (correct ones per prompt); `correct_chains/<difficulty>` or `accuracy/<difficulty>`.
        diversity: `entropy` (nats per token), `distinct_1`, `distinct_2`, `distinct_3`; with n > 1 `distinct_answers`
            (share of distinct completions) and `collapse` (share of prompts whose completions are all the same).
        divergence: `divergence` (mean D_t, nats), `high_divergence_share` (of D_t >= 0.5 nats), `teacher_log_prob`
            (nats per token); with a gate `hard_share`, also per difficulty, and `hard_share_quarter/1` to `4`.
        form: `length` (tokens), `steps`, `ended`, `repetition` (mean share of repeated 4-grams), `loops` (share of
            completions most of whose 4-grams are repeated).
    """
    groups = by_prompt(completions)
    samples = min(len(g) for g in groups)
    metrics = _right(completions, groups, samples)
    tokens = [[c.tokens for c in g] for g in groups]
    if samples > 1:
        metrics["collapse"] = measures.mean(measures.is_collapsed(g) for g in tokens)
        metrics["distinct_answers"] = measures.mean(measures.distinct_answers(g) for g in tokens)
    for n in (1, 2, 3):
        metrics[f"distinct_{n}"] = measures.distinct_n([c.tokens for c in completions], n)
    metrics["entropy"] = measures.mean(x for c in completions for x in c.entropies)
    metrics |= _hard(completions)
    metrics["teacher_log_prob"] = measures.mean(x for c in completions for x in c.teacher_log_probs)
    metrics["length"] = measures.mean(len(c.tokens) for c in completions)
    metrics["steps"] = measures.mean(c.steps for c in completions)
    metrics["ended"] = measures.mean(c.ended for c in completions)
    repetitions = measures.repetitions([c.tokens for c in completions])
    metrics["repetition"] = measures.mean(repetitions)
    metrics["loops"] = measures.mean(r > 0.5 for r in repetitions)
    return metrics


def _right(completions: Sequence[Completion], groups: Sequence[Sequence[Completion]], samples: int) -> Metrics:
    """Metrics of the grades."""
    grades = [c.grade for c in completions if c.grade is not None]
    if not grades:
        return {}
    metrics: Metrics = {"accuracy": measures.accuracy([g.correct for g in grades])}
    chains = all(g.chain_correct is not None for g in grades)
    if chains:
        metrics["correct_chains"] = measures.mean(bool(g.chain_correct) for g in grades)
        ways = [len({c.grade.way for c in g if c.grade is not None and c.grade.way}) for g in groups]
        metrics["distinct_ways"] = measures.mean(ways)
    if any(g.undecided for g in grades):
        metrics["undecided"] = measures.mean(g.undecided for g in grades)

    def is_right(grade: Grade | None) -> bool:
        return grade is not None and bool(grade.chain_correct if chains else grade.correct)

    right = [[is_right(c.grade) for c in g] for g in groups]
    for k in measures.sizes_up_to(samples):
        metrics[f"pass@{k}"] = measures.mean(measures.pass_at_k(len(g), sum(g), k) for g in right)
    if not any(g.correct and g.final_value is None for g in grades):  # else the task names no values
        votes = [[c.grade.final_value if c.grade else None for c in g] for g in groups]
        correct = [[c.grade is not None and c.grade.correct for c in g] for g in groups]
        for k in measures.sizes_up_to(samples):
            majority = map(measures.majority_at_k, votes, correct, [k] * len(groups))
            metrics[f"majority@{k}"] = measures.mean(majority)
    for difficulty in sorted({c.prompt.difficulty for c in completions}):
        chosen = [is_right(c.grade) for c in completions if c.prompt.difficulty == difficulty]
        metrics[f"{'correct_chains' if chains else 'accuracy'}/{difficulty}"] = measures.accuracy(chosen)
    return metrics


def _hard(completions: Sequence[Completion]) -> Metrics:
    """Mean D_t, the share of high D_t, and the gate's hard share: of all, by difficulty, by quarter."""
    divergences = [x for c in completions for x in c.divergences]
    metrics = {
        "divergence": measures.mean(divergences),
        "high_divergence_share": measures.mean(d >= measures.HIGH_DIVERGENCE for d in divergences),
    }
    if not any(c.hard for c in completions):
        return metrics
    metrics["hard_share"] = measures.mean(x for c in completions for x in c.hard)
    buckets = sorted({c.prompt.difficulty for c in completions})
    for difficulty in buckets if len(buckets) > 1 else ():
        chosen = [x for c in completions if c.prompt.difficulty == difficulty for x in c.hard]
        metrics[f"hard_share/{difficulty}"] = measures.mean(chosen)
    quarters = measures.share_by_part([c.hard for c in completions])
    return metrics | {f"hard_share_quarter/{i}": share for i, share in enumerate(quarters, 1)}


def forward_kl_by_prompt(completions: Sequence[Completion]) -> list[float]:
    """KL(teacher || agent) along each of the teacher's completions, nats per token.

    By the chain rule its sum over a completion has the mean KL(teacher || agent) of whole completions.
    """
    return [measures.mean(c.forward_kls) for c in completions]


def evaluate(
    agent: Agent,
    env: DistillVectorEnv,
    prompts: Sequence[Prompt],
    samples: int,
    seed: int,
    gate: Gate | None = None,
    progress: Callable[[int], None] | None = None,
    written: Sequence[Sequence[int]] | None = None,
    teachers: Sequence[Sequence[int]] | None = None,
) -> tuple[Metrics, list[Completion], list[Completion]]:
    """Evaluate an agent on its own completions and on texts that it did not write.

    Besides `completion_metrics`: `perplexity`, `divergence_on_teacher_prefix` and `forward_kl` on one completion of the
    teacher per prompt, the last as the mean of `forward_kl_by_prompt`; `exposure_gap`, by how much D_t is larger on the
    agent's own completions (nats); `reference_perplexity` on reference completions, if the agent has a `student`;
    `self_bleu` with several samples; `on_call/accuracy`, `on_call/correct_chains` and `on_call/teacher_share`, if the
    agent has `act_on_call` and the task is graded.

    Args:
        agent: the agent.
        env: as for `generate`.
        prompts: the prompts.
        samples: completions per prompt.
        seed: of the draws.
        gate: says which positions are hard, for `hard_share`.
        progress: called with the number of completions of each batch.
        written: the tokens of the completions, if the agent has written them elsewhere.
        teachers: the tokens of the teacher's completions, if an evaluation with these prompts and this seed has shown
            them.

    Returns:
        The metrics, the agent's completions, and the teacher's, if the agent has `log_probs`.
    """
    repeated = [p for p in prompts for _ in range(samples)]
    completions = generate(agent, env, repeated, seed, gate=gate, progress=progress, written=written)
    metrics = completion_metrics(completions)
    if samples > 1:
        metrics["self_bleu"] = measures.mean(measures.self_bleu([c.tokens for c in g]) for g in by_prompt(completions))
    held_out: list[Completion] = []
    metrics["perplexity"] = math.nan
    if hasattr(agent, "log_probs"):
        held_out = generate(agent, env, prompts, seed + 1, teacher_writes=True, progress=progress, written=teachers)
        metrics["perplexity"] = measures.perplexity([x for c in held_out for x in c.log_probs])
        on_teachers = [x for c in held_out for x in c.divergences]
        metrics["divergence_on_teacher_prefix"] = measures.mean(on_teachers)
        metrics["forward_kl"] = measures.mean(forward_kl_by_prompt(held_out))
        own = [x for c in completions for x in c.divergences]
        metrics["exposure_gap"] = measures.exposure_gap(own, on_teachers)
    if hasattr(agent, "student"):
        read = reference_log_probs(agent.student, prompts, env.num_envs)
        if read:
            metrics["reference_perplexity"] = measures.perplexity([x for log_probs in read for x in log_probs])
    if hasattr(agent, "act_on_call") and env.task.graded:
        tokens, share = write_on_call(agent, env, repeated, seed)
        grades = [env.task.grade(prompt, row) for prompt, row in zip(repeated, tokens, strict=True)]
        metrics["on_call/accuracy"] = measures.mean(g.correct for g in grades)
        if all(g.chain_correct is not None for g in grades):
            metrics["on_call/correct_chains"] = measures.mean(bool(g.chain_correct) for g in grades)
        metrics["on_call/teacher_share"] = share
    return metrics, completions, held_out
