"""Answers for the gate viewer: every state with its D_t, both distributions' likeliest tokens, and who wrote.

The data are plain lists and numbers, ready for JSON; text in them is what models wrote and is to be escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agents.config import DistillConfig
from agents.methods import GATED, Method
from distill_env.gate_settings import NEVER, Gate
from distill_env.rendering import END

if TYPE_CHECKING:
    from torch import Tensor

    from agents.rollout import Rollout
    from distill_env.env import DistillVectorEnv
    from distill_env.models.base import TrainableModel
    from distill_env.tasks.base import Prompt, Task
    from experiments.running.config import RunConfig


def see_run(folder: Path, prompts: int = 4, positions_from: int = 100, top: int = 5) -> dict[str, Any]:
    """What a run's student writes, with the teacher on call and alone, and where its steps are hard.

    Returns:
        `tau` (None if it is not finite); `prompts`, their texts; `on_call` and `alone`, an answer to each (see
        `describe`); `hard_by_position`, the share of hard steps at each position of `positions_from` answers that the
        student writes alone.

    Raises:
        ValueError: if the folder holds no run, or no student.
    """
    from experiments.running.build import make_env
    from experiments.running.config_file import load_config

    config = load_config(folder)
    student, method = load_student(folder, config)
    tau = method.gate.tau
    rows = min(positions_from, 16 if config.env == "lm" else 128)
    env = make_env(config, "test", prompts, purpose="evaluate")
    chosen = spread(env.prompts, prompts)
    on_call = write(env, student, chosen, method.hard_gate, method.top_k, method.top_p)
    alone = write(env, student, chosen, NEVER)
    wide = make_env(config, "test", rows, purpose="evaluate")
    many = write(wide, student, spread(wide.prompts, max(positions_from, rows)), NEVER)
    return {
        "tau": tau if math.isfinite(tau) else None,
        "prompts": [p.text for p in chosen],
        "on_call": describe(env, student, on_call, tau, top),
        "alone": describe(env, student, alone, tau, top),
        "hard_by_position": hard_by_position(wide, student, many, tau),
    }


def load_student(folder: Path, config: RunConfig) -> tuple[TrainableModel, Method]:
    """The trained student, and the method with the tau in force at the end; of agents without one, our gate's.

    Raises:
        ValueError: if the folder holds no student.
    """
    from agents.checkpoint import checkpoints, load_checkpoint
    from distill_env.models.load import build_model
    from experiments.running.build import agent_loader
    from experiments.running.lm_arguments import shared_ids, student_arguments

    if isinstance(config.agent_options, DistillConfig) and checkpoints(folder / "checkpoints"):
        agent, _, _ = load_checkpoint(folder / "checkpoints", agent_loader(config))
        return agent.student, agent.method
    if not (folder / "student").is_dir():
        raise ValueError(f"run: {str(folder)!r} holds no student")
    student = build_model(
        folder / "student", **({**shared_ids(config), **student_arguments(config)} if config.env == "lm" else {})
    )
    return student, config.method or GATED


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """That many prompts from first to last, some of them twice where there are too few."""
    return [prompts[i] for i in np.linspace(0, len(prompts) - 1, count).astype(int)]


def write(
    env: DistillVectorEnv,
    student: TrainableModel,
    prompts: Sequence[Prompt],
    writer: Gate,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """One answer to each prompt, token by token; the same keys whoever writes, so that answers part where they must."""
    from agents.collector import collect
    from distill_env.randomness import episode_keys
    from experiments.running.lifecycle import EVALUATION_SEED

    keys = episode_keys(EVALUATION_SEED, np.arange(len(prompts)))
    return collect(env, student, prompts, keys, writer, 1, top_k, top_p, keep_teacher=False)


def read_along(env: DistillVectorEnv, student: TrainableModel, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """log p of the student and of the teacher at every state of the answers, [N, T, V] each.

    Places after an answer's end hold no meaning. N is at most the environment's rows.
    """
    import torch

    n, rows = len(rollout.prompts), env.num_envs
    prompts = [rollout.prompts[min(i, n - 1)] for i in range(rows)]
    tokens = rollout.tokens[:, :-1]
    env.reset(options={"prompts": prompts})
    teacher = env.lookahead(torch.cat([tokens, tokens[-1:].expand(rows - n, -1)]))[:n]
    reader = student.fork()
    first = reader.start([p.ids for p in rollout.prompts])
    after = reader.extend(tokens) if tokens.shape[1] else first[:, None][:, :0]
    return torch.cat([first[:, None], after], 1), teacher.clone()


def describe(
    env: DistillVectorEnv, student: TrainableModel, rollout: Rollout, tau: float, top: int
) -> list[dict[str, Any]]:
    """Every answer as `{"correct": bool or None, "tokens": [...]}`.

    A token: its `text`, `d` (D_t at the state before it, nats), `hard` (d >= tau), `rewritten`, `q` and `p` (its
    probability under student and teacher), `student` and `teacher`: the `top` likeliest tokens as [text, probability].
    """
    from distill_env.divergence import reverse_kl

    student_log_probs, teacher_log_probs = read_along(env, student, rollout)
    divergence = reverse_kl(student_log_probs.double(), teacher_log_probs.double()).clamp(min=0)
    answers = []
    for i, prompt in enumerate(rollout.prompts):
        ids = rollout.tokens[i][rollout.mask[i]].tolist()
        tokens = []
        for t, token in enumerate(ids):
            q, p = student_log_probs[i, t], teacher_log_probs[i, t]
            tokens.append(
                {
                    "text": token_text(env.task, token),
                    "d": round(float(divergence[i, t]), 4),
                    "hard": bool(divergence[i, t] >= tau),
                    "rewritten": bool(rollout.rewritten[i, t]),
                    "q": round(float(q[token].exp()), 4),
                    "p": round(float(p[token].exp()), 4),
                    "student": likeliest(env.task, q, top),
                    "teacher": likeliest(env.task, p, top),
                }
            )
        grade = env.task.grade(prompt, ids) if env.task.graded else None
        answers.append({"correct": None if grade is None else grade.right, "tokens": tokens})
    return answers


def likeliest(task: Task, log_probs: Tensor, count: int) -> list[tuple[str, float]]:
    """The likeliest tokens of log p [V] and their probabilities."""
    values, ids = log_probs.topk(min(count, len(log_probs)))
    return [(token_text(task, i), round(float(v.exp()), 4)) for v, i in zip(values, ids.tolist(), strict=True)]


def token_text(task: Task, token: int) -> str:
    return END if token == task.eos_token_id else task.decode([token])


def hard_by_position(env: DistillVectorEnv, student: TrainableModel, rollout: Rollout, tau: float) -> list[float]:
    """The share of hard steps among the answers that reach each position."""
    from distill_env.divergence import reverse_kl

    longest = rollout.tokens.shape[1]
    hard, there = np.zeros(longest), np.zeros(longest)
    for begin in range(0, len(rollout.prompts), env.num_envs):
        part = slice_rows(rollout, begin, begin + env.num_envs)
        divergence = reverse_kl(*(x.double() for x in read_along(env, student, part)))
        hard += ((divergence >= tau) & part.mask).sum(0).numpy()
        there += part.mask.sum(0).numpy()
    shares: NDArray[np.float64] = hard / np.maximum(there, 1)
    return [round(float(s), 4) for s in shares[there > 0]]


def slice_rows(rollout: Rollout, begin: int, end: int) -> Rollout:
    """Some of the answers, without what the teacher thought of them."""
    parts = ("prompts", "tokens", "rewritten", "rewards", "token_log_prob", "score", "grades")
    return replace(rollout, **{p: getattr(rollout, p)[begin:end] for p in parts}, teacher=None, support=None)
