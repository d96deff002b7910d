"""Evaluation: let an agent write without its teacher, and put together what `agents/metrics.py` says of its answers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from agents import metrics as measures
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
    steps: int = 0  # reasoning steps


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
            answer.steps = measures.count_steps(answer.tokens, env.task.step_end_ids, env.task.eos_token_id)
            if env.task.graded:
                answer.grade = env.task.grade(answer.prompt, answer.tokens)
        answers += written
        if progress is not None:
            progress(len(written))
    return answers


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
    log_probs: list[float] = []
    scored, end = 1, min(window, len(ids))
    while scored < len(ids):
        begin = max(0, end - window)
        log_probs += token_log_probs(model, [ids[begin:scored]], [ids[scored:end]])[0]
        if progress is not None:
            progress(end - scored)
        scored, end = end, min(end + stride, len(ids))
    return measures.perplexity(log_probs)


@torch.no_grad()
def token_log_probs(
    model: TrainableModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[list[float]]:
    """log p of every token of given answers under a model that reads them, nats: a list an answer."""
    width = max(map(len, answers))
    tokens = torch.full((len(answers), width), PAD)  # [n, T]
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    features = model.features(prompts, tokens, tokens != PAD)
    flat: list[float] = []
    for part, ids in zip(features.split(HEAD_POSITIONS), tokens[tokens != PAD].split(HEAD_POSITIONS), strict=True):
        log_probs = model.head(part)  # [m, V]
        flat += log_probs.gather(1, ids.to(part.device)[:, None])[:, 0].double().tolist()
    ends = np.cumsum([len(a) for a in answers])
    return [flat[end - len(a) : end] for a, end in zip(answers, ends, strict=True)]


def reference_log_probs(model: TrainableModel, prompts: Sequence[Prompt], rows: int) -> list[list[float]]:
    """log p of the tokens of the prompts' reference answers, nats, `rows` at a time; none for a prompt without one.

    A reference that exceeds the model's context is read as far as that.
    """
    longest = getattr(model, "max_length", None)
    cut = [(p.ids, (p.ids + p.reference)[len(p.ids) : longest]) for p in prompts if p.reference]
    pairs = [(ids, reference) for ids, reference in cut if reference]
    found: list[list[float]] = []
    for begin in range(0, len(pairs), rows):
        ids, references = zip(*pairs[begin : begin + rows], strict=True)
        found += token_log_probs(model, ids, references)
    return found


def by_prompt(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Answers grouped by prompt, in order."""
    groups: dict[tuple[int, ...], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.prompt.ids].append(answer)
    return list(groups.values())


def answer_metrics(answers: Sequence[Answer], tau: float) -> Metrics:
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


def _right(answers: Sequence[Answer], groups: Sequence[Sequence[Answer]], samples: int) -> Metrics:
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
    if not any(g.correct and g.vote is None for g in grades):  # else the task names no values
        votes = [[a.grade.vote if a.grade else None for a in g] for g in groups]
        correct = [[a.grade is not None and a.grade.correct for a in g] for g in groups]
        for k in measures.sizes_up_to(samples):
            metrics[f"majority@{k}"] = measures.mean(
                measures.majority_at_k(v, c, k) for v, c in zip(votes, correct, strict=True)
            )
    for difficulty in sorted({a.prompt.difficulty for a in answers}):
        chosen = [is_right(a.grade) for a in answers if a.prompt.difficulty == difficulty]
        metrics[f"{'correct_chains' if chains else 'accuracy'}/{difficulty}"] = measures.accuracy(chosen)
    return metrics


def _hard(answers: Sequence[Answer], tau: float) -> Metrics:
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
) -> tuple[Metrics, list[Answer], list[Answer]]:
    """The metrics of the agent's own answers, and what it makes of texts that others wrote.

    The latter: `perplexity` and `divergence_on_teacher_prefix` on an answer of the teacher to each prompt, and
    `exposure_gap`, by how much D_t is larger on own answers (nats); `reference_perplexity` on the task's reference
    answers if it has some and the agent has a `student`. `self_bleu`, too slow for validations, with several samples.

    Returns:
        the metrics, the agent's answers, `samples` to each prompt, and the teacher's, if the agent could read along.
    """
    repeated = [p for p in prompts for _ in range(samples)]
    answers = write_answers(agent, env, repeated, seed, progress=progress)
    metrics = answer_metrics(answers, tau)
    if samples > 1:
        metrics["self_bleu"] = measures.mean(measures.self_bleu([a.tokens for a in g]) for g in by_prompt(answers))
    held_out: list[Answer] = []
    metrics["perplexity"] = math.nan
    if hasattr(agent, "log_probs"):
        held_out = write_answers(agent, env, prompts, seed + 1, teacher_writes=True, progress=progress)
        metrics["perplexity"] = measures.perplexity([x for a in held_out for x in a.log_probs])
        teachers = [x for a in held_out for x in a.divergences]
        metrics["divergence_on_teacher_prefix"] = measures.mean(teachers)
        metrics["exposure_gap"] = measures.exposure_gap([x for a in answers for x in a.divergences], teachers)
    if hasattr(agent, "student"):
        read = reference_log_probs(agent.student, prompts, env.num_envs)
        if read:
            metrics["reference_perplexity"] = measures.perplexity([x for log_probs in read for x in log_probs])
    return metrics, answers, held_out
