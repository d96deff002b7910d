"""Completions that an agent writes without its teacher, and measurements at each of their positions."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from agents import metrics as measures
from agents.base import Agent
from distill_env.divergence import entropy, reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.gate import DraftBlock, GateState, raw_score, read_and_decide
from distill_env.gate_settings import Gate
from distill_env.ragged import PAD
from distill_env.randomness import episode_keys
from distill_env.tasks.base import Grade, Prompt


@dataclass
class Completion:
    """A completion and what was measured at each of its positions, in nats."""

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)  # the agent's, of these tokens
    teacher_log_probs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)  # of the agent
    divergences: list[float] = field(default_factory=list)  # D_t = KL(agent || teacher)
    scores: list[float] = field(default_factory=list)  # of the gate, before it clips or smooths them
    hard: list[bool] = field(default_factory=list)  # whether the gate would be hard
    grade: Grade | None = None
    ended: bool = False  # by the end token
    steps: int = 0  # reasoning steps


def generate(
    agent: Agent | None,
    env: DistillVectorEnv,
    prompts: Sequence[Prompt],
    seed: int,
    teacher_writes: bool = False,
    gate: Gate | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """One completion for each prompt, in batches of the environment's rows.

    Args:
        agent: who writes, or who only reads along if the teacher writes; None for the teacher alone.
        env: made with `chunk=1`, autoreset disabled and the teacher's log-probabilities in `info`.
        prompts: N prompts.
        seed: of the draws.
        teacher_writes: every action is REWRITE.
        gate: says which positions are hard, without deciding anything.
        progress: called with the number of completions of each batch.
    """
    log_probs = getattr(agent, "log_probs", None)
    completions: list[Completion] = []
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
            student = torch.from_numpy(log_probs(observation)[live]) if log_probs is not None else None
            actions = np.full(env.num_envs, PAD)
            if teacher_writes:
                actions[live] = env.rewrite_action
            else:
                assert agent is not None
                actions[live] = agent.act(observation, info)[live]
            observation, _, terminated, truncated, info = env.step(actions)
            tokens = torch.from_numpy(info["tokens"][live, 0])
            measured = {"tokens": tokens, "teacher_log_probs": teacher.gather(1, tokens[:, None])[:, 0]}
            if student is not None:
                measured["log_probs"] = student.gather(1, tokens[:, None])[:, 0]
                measured["entropies"] = entropy(student)
                measured["divergences"] = reverse_kl(student, teacher.double()).clamp(min=0)
                if gate is not None:
                    alone = DraftBlock(tokens[:, None], tokens[:, None] >= 0, tokens[:, None].double(), tokens.double())
                    measured["scores"] = raw_score(gate, student[:, None], teacher[:, None].double(), alone)[:, 0]
            for name, values in measured.items():
                for row, value in zip(live, values.tolist(), strict=True):
                    getattr(written[row], name).append(value)
            for row, token in zip(live, tokens.tolist(), strict=True):
                written[row].ended |= token == env.task.eos_token_id
            active &= ~(terminated | truncated)
        for completion in written:
            completion.steps = measures.count_steps(completion.tokens, env.task.step_end_ids, env.task.eos_token_id)
            if env.task.graded:
                completion.grade = env.task.grade(completion.prompt, completion.tokens)
            if gate is not None and completion.scores:
                completion.hard = hard_positions(gate, completion, env.task.step_end_ids)
        completions += written
        if progress is not None:
            progress(len(written))
    return completions


def hard_positions(gate: Gate, completion: Completion, step_end_ids: frozenset[int]) -> list[bool]:
    """Where the hard gate would be hard along a completion."""
    score = torch.tensor([completion.scores], dtype=torch.float64)
    starts = torch.tensor([[True, *(t in step_end_ids for t in completion.tokens[:-1])]])
    decision, _ = read_and_decide(gate, score, starts, torch.zeros_like(score), GateState.start(1))
    return decision.hard[0].tolist()


def by_prompt(completions: Sequence[Completion]) -> list[list[Completion]]:
    """Completions grouped by prompt, in order."""
    groups: dict[tuple[int, ...], list[Completion]] = defaultdict(list)
    for completion in completions:
        groups[completion.prompt.ids].append(completion)
    return list(groups.values())
