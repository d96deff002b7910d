"""Evaluation: let an agent write without its teacher, and measure. Metrics are pure functions of the answers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from agents.base import Agent, Metrics
from distill_env.divergence import entropy, reverse_kl
from distill_env.env import PAD, DistillVectorEnv
from distill_env.models import TrainableModel
from distill_env.randomness import episode_keys
from distill_env.tasks import Grade, Prompt

HEAD_POSITIONS = 256  # positions of the vocabulary's logits in memory at a time


@dataclass
class Answer:
    """An answer and what was measured at each of its states, nats."""

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)  # the agent's, of these tokens
    teacher_log_probs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)  # of the agent
    divergences: list[float] = field(default_factory=list)  # D_t = KL(agent || teacher)
    grade: Grade | None = None
    ended: bool = False  # by the end token


def write_answers(
    agent: Agent | None,
    env: DistillVectorEnv,
    prompts: Sequence[Prompt],
    seed: int,
    teacher_writes: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """One answer to each prompt, in batches of the environment's rows.

    Args:
        agent: who writes, or who only reads along if the teacher does; None for the teacher alone.
        env: made with `chunk=1`, autoreset disabled, the teacher's log-probabilities in `info`.
        prompts: N prompts.
        seed: of the draws.
        teacher_writes: every action is REWRITE.
        progress: is told how many answers each batch has finished.
    """
    reads = getattr(agent, "log_probs", None)
    answers: list[Answer] = []
    for batch, begin in enumerate(range(0, len(prompts), env.num_envs)):
        chosen = list(prompts[begin : begin + env.num_envs])
        written = [Answer(p) for p in chosen]
        rows = [*chosen, *[chosen[-1]] * (env.num_envs - len(chosen))]
        keys = episode_keys(seed, np.arange(begin, begin + env.num_envs))
        if agent is not None and hasattr(agent, "reseed"):
            agent.reseed(seed * 100_003 + batch)
        observation, info = env.reset(options={"prompts": rows, "episode_keys": keys})
        active = np.arange(env.num_envs) < len(chosen)
        while active.any():
            live = np.flatnonzero(active)
            teacher = torch.from_numpy(info["teacher_log_probs"][live])
            student = torch.from_numpy(reads(observation)[live]) if reads is not None else None
            actions = np.full(env.num_envs, PAD)
            if teacher_writes:
                actions[live] = env.rewrite_action
            else:
                assert agent is not None
                actions[live] = agent.act(observation, info)[live]
            observation, _, terminated, truncated, info = env.step(actions)
            tokens = info["tokens"][live, 0]
            if student is not None:
                divergence = reverse_kl(student, teacher.double()).clamp(min=0).tolist()
                spread = entropy(student).tolist()
                own = student[torch.arange(len(live)), torch.from_numpy(tokens)].tolist()
            paid = teacher[torch.arange(len(live)), torch.from_numpy(tokens)].tolist()
            for i, row in enumerate(live):
                answer = written[row]
                answer.tokens.append(int(tokens[i]))
                answer.teacher_log_probs.append(paid[i])
                if student is not None:
                    answer.log_probs.append(own[i])
                    answer.entropies.append(spread[i])
                    answer.divergences.append(divergence[i])
                answer.ended |= bool(terminated[row])
            active &= ~(terminated | truncated)
        for answer in written:
            if env.task.graded:
                answer.grade = env.task.grade(answer.prompt, answer.tokens)
        answers += written
        if progress is not None:
            progress(len(written))
    return answers


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k answers drawn from `samples` is right: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, "Evaluating large language models trained on code" (arXiv 2107.03374), eq. 1: unbiased.
    """
    if not 0 < k <= samples:
        raise ValueError(f"k: {k}; accepted: 1 to the number of samples, {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams: Li et al. 2016, "A diversity-promoting objective" (arXiv 1510.03055)."""
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def perplexity(answers: Sequence[Answer]) -> float:
    """exp of the mean negative log-likelihood of the tokens under the agent."""
    log_probs = [x for a in answers for x in a.log_probs]
    return math.exp(min(-float(np.mean(log_probs)), 700.0)) if log_probs else math.nan


def corpus_perplexity(
    model: TrainableModel,
    ids: Sequence[int],
    window: int,
    stride: int,
    progress: Callable[[int], None] | None = None,
) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, each counted once, without the first, of no context.

    Args:
        model: any model with `features` and `head`.
        ids: the text, at least two tokens.
        window: tokens that a forward pass reads.
        stride: tokens that it scores (the first pass: all it reads); so each has at least `window - stride` before it,
            if the text has.
        progress: is told how many tokens each pass has scored.

    Raises:
        ValueError: for a window that the model cannot read, a stride that it does not hold, or a text too short.
    """
    longest = getattr(model, "max_length", None)
    if window < 2 or (longest is not None and window > longest):
        raise ValueError(f"window: {window}; accepted: at least 2, and at most the model's context of {longest} tokens")
    if not 1 <= stride < window:
        raise ValueError(f"stride: {stride}; accepted: 1 to {window - 1}, less than the window")
    if len(ids) < 2:
        raise ValueError(f"ids: {len(ids)} tokens; accepted: at least 2")
    total, scored, end = 0.0, 1, min(window, len(ids))
    while scored < len(ids):
        begin = max(0, end - window)
        answer = torch.tensor([ids[scored:end]])  # [1, T]
        with torch.no_grad():
            features = model.features([ids[begin:scored]], answer, torch.ones_like(answer, dtype=torch.bool))
            for part, tokens in zip(features.split(HEAD_POSITIONS), answer[0].split(HEAD_POSITIONS), strict=True):
                log_probs = model.head(part)  # [m, V]
                total -= float(log_probs.gather(1, tokens.to(part.device)[:, None]).double().sum())
        if progress is not None:
            progress(end - scored)
        scored, end = end, min(end + stride, len(ids))
    return math.exp(min(total / (len(ids) - 1), 700.0))


def by_prompt(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Answers grouped by prompt, in order."""
    groups: dict[tuple[int, ...], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.prompt.ids].append(answer)
    return list(groups.values())


def answer_metrics(answers: Sequence[Answer], tau: float) -> Metrics:
    """What the agent's own answers show; several answers to a prompt make diversity and pass@k visible.

    Keys: `accuracy` (final value), `correct_chains` if the task checks steps, `undecided` if grading gave some answers
    up, `pass@k` (of chains, else of final values) with k the number of answers to a prompt, `entropy`
    (nats a token), `distinct_ways` (right ones, per prompt), `collapse` (share of prompts all of whose answers are the
    same), `distinct_2`, `divergence` (mean D_t, nats), `hard_share` (D_t >= tau), `teacher_log_prob` (nats a token),
    `length`, `ended`; `correct_chains/<difficulty>` or `accuracy/<difficulty>`.
    """
    groups = by_prompt(answers)
    samples = min(len(g) for g in groups)
    metrics: Metrics = {}
    grades = [a.grade for a in answers if a.grade is not None]
    if grades:
        metrics["accuracy"] = float(np.mean([g.correct for g in grades]))
        chains = all(g.chain_correct is not None for g in grades)
        if chains:
            metrics["correct_chains"] = float(np.mean([g.chain_correct for g in grades]))
            ways = [len({a.grade.way for a in g if a.grade is not None and a.grade.way}) for g in groups]
            metrics["distinct_ways"] = float(np.mean(ways))
        if any(g.undecided for g in grades):
            metrics["undecided"] = float(np.mean([g.undecided for g in grades]))

        def is_right(grade: Grade | None) -> bool:
            return grade is not None and bool(grade.chain_correct if chains else grade.correct)

        right = [sum(is_right(a.grade) for a in g) for g in groups]
        rates = [pass_at_k(len(g), c, samples) for g, c in zip(groups, right, strict=True)]
        metrics[f"pass@{samples}"] = float(np.mean(rates))
        for difficulty in sorted({a.prompt.difficulty for a in answers}):
            chosen = [is_right(a.grade) for a in answers if a.prompt.difficulty == difficulty]
            metrics[f"{'correct_chains' if chains else 'accuracy'}/{difficulty}"] = float(np.mean(chosen))
    if samples > 1:
        metrics["collapse"] = float(np.mean([len({tuple(a.tokens) for a in g}) == 1 for g in groups]))
    metrics["distinct_2"] = distinct_n([a.tokens for a in answers], 2)
    metrics["entropy"] = _mean([x for a in answers for x in a.entropies])
    divergences = [x for a in answers for x in a.divergences]
    metrics["divergence"] = _mean(divergences)
    metrics["hard_share"] = _mean([d >= tau for d in divergences])
    metrics["teacher_log_prob"] = _mean([x for a in answers for x in a.teacher_log_probs])
    metrics["length"] = float(np.mean([len(a.tokens) for a in answers]))
    metrics["ended"] = float(np.mean([a.ended for a in answers]))
    return metrics


def evaluate(
    agent: Agent,
    env: DistillVectorEnv,
    prompts: Sequence[Prompt],
    samples: int,
    tau: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Metrics, list[Answer]]:
    """The metrics of the agent's own answers, and `perplexity` on answers that the teacher writes.

    Returns:
        the metrics and the agent's answers, `samples` to each prompt.
    """
    repeated = [p for p in prompts for _ in range(samples)]
    answers = write_answers(agent, env, repeated, seed, progress=progress)
    metrics = answer_metrics(answers, tau)
    if hasattr(agent, "log_probs"):
        held_out = write_answers(agent, env, prompts, seed + 1, teacher_writes=True, progress=progress)
        metrics["perplexity"] = perplexity(held_out)
        metrics["divergence_on_teacher_prefix"] = _mean([x for a in held_out for x in a.divergences])
    else:
        metrics["perplexity"] = math.nan
    return metrics, answers


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
