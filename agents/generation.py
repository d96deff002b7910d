"""Completions that an agent writes without its teacher, and what was measured at each of their states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from agents import metrics as measures
from agents.base import Agent
from distill_env.divergence import entropy, reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.ragged import PAD
from distill_env.randomness import episode_keys
from distill_env.tasks.base import Grade, Prompt


@dataclass
class Completion:
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


def generate(
    agent: Agent | None,
    env: DistillVectorEnv,
    prompts: Sequence[Prompt],
    seed: int,
    teacher_writes: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
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
    answers: list[Completion] = []
    for batch, begin in enumerate(range(0, len(prompts), env.num_envs)):
        chosen = list(prompts[begin : begin + env.num_envs])
        written = [Completion(p) for p in chosen]
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


def by_prompt(answers: Sequence[Completion]) -> list[list[Completion]]:
    """Answers grouped by prompt, in order."""
    groups: dict[tuple[int, ...], list[Completion]] = defaultdict(list)
    for answer in answers:
        groups[answer.prompt.ids].append(answer)
    return list(groups.values())
