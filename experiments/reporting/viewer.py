"""Completions for the gate viewer: for every token D_t, the likeliest tokens of student and teacher, and who wrote it.

The data are plain lists and numbers, ready for JSON. Texts in them are model output and must be escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from agents.config import DistillConfig
from agents.methods import GATED, Method
from agents.prompts import evenly_spaced
from agents.rollout import Parts, completions_of
from distill_env.gate_settings import NEVER, Gate
from distill_env.rendering import END
from experiments.reporting.drawing import HIGHLIGHTED

if TYPE_CHECKING:
    from torch import Tensor

    from agents.rollout import Rollout
    from distill_env.env import DistillVectorEnv
    from distill_env.models.base import TrainableModel
    from distill_env.tasks.base import Prompt, Task
    from experiments.reporting.results import Results
    from experiments.running.config import RunConfig


def see_contenders(
    folder: Path, results: Results, contenders: int, prompts: int, console: Console
) -> dict[str, dict[str, Any]]:
    """`see_run` of the first run of each contender on the first task, by contender, the main methods first.

    Runs that cannot be loaded or have other prompts are left out, with a line on the console.
    """
    seen: dict[str, dict[str, Any]] = {}
    for setting in results.primary()[:1]:
        labels = sorted(results.labels(setting), key=lambda k: k not in HIGHLIGHTED)
        for label in labels:
            runs = sorted((r for r in results.of(setting, label=label) if r["run"]), key=lambda r: r["seed"])
            if not runs or len(seen) == contenders:
                continue
            try:
                run = see_run(folder / runs[0]["run"], prompts)
                if seen and run["prompts"] != next(iter(seen.values()))["prompts"]:
                    raise ValueError("its prompts differ")
            except (ValueError, OSError) as error:
                console.print(f"viewer: {label} is left out: {escape(str(error))}", highlight=False)
                continue
            seen[label] = run | {"setting": str(setting), "seed": runs[0]["seed"]}
    return seen


def see_run(folder: Path, prompts: int = 4, positions_from: int = 100, top: int = 5) -> dict[str, Any]:
    """What a run's student writes, assisted by the teacher and alone, and where its positions are hard.

    Args:
        folder: of the run.
        prompts: how many, evenly spaced over the test split.
        positions_from: completions for `hard_by_position`.
        top: the likeliest tokens listed for each token.

    Returns:
        `tau` in nats (None if the gate does not compare D_t itself with a finite tau); `prompts`, their texts;
        `assisted` and `alone`, a completion of each (see `describe`); `hard_by_position`, the share of hard positions
        at each position of completions that the student writes alone.

    Raises:
        ValueError: if the folder holds no run, or no student.
    """
    from experiments.running.build import make_env
    from experiments.running.config_file import load_config

    config = load_config(folder)
    student, method = load_student(folder, config)
    gate = method.hard_gate
    rows = min(positions_from, 16 if config.env == "lm" else 128)
    env = make_env(config, "test", prompts, purpose="evaluate")
    chosen = evenly_spaced(env.prompts, prompts)
    assisted = write_completions(env, student, chosen, gate, method.top_k, method.top_p)
    alone = write_completions(env, student, chosen, NEVER)
    wide = make_env(config, "test", rows, purpose="evaluate")
    many = write_completions(wide, student, evenly_spaced(wide.prompts, max(positions_from, rows)), NEVER)
    reads_divergence = gate.score == "divergence" and not gate.has_memory and math.isfinite(gate.threshold)
    return {
        "tau": gate.threshold if reads_divergence else None,
        "prompts": [p.text for p in chosen],
        "assisted": describe(env, student, assisted, gate, top),
        "alone": describe(env, student, alone, gate, top),
        "hard_by_position": hard_by_position(wide, student, many, gate),
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


def write_completions(
    env: DistillVectorEnv,
    student: TrainableModel,
    prompts: Sequence[Prompt],
    gate: Gate,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """One completion of each prompt, token by token, with the same random numbers whatever the gate."""
    from agents.collector import collect
    from distill_env.randomness import episode_keys
    from experiments.running.evaluating import EVALUATION_SEED

    keys = episode_keys(EVALUATION_SEED, np.arange(len(prompts)))
    return collect(env, student, prompts, keys, gate, 1, top_k, top_p, keep_teacher=False)


def read_along(
    env: DistillVectorEnv, student: TrainableModel, completion: Parts, gate: Gate
) -> tuple[Tensor, Tensor, list[bool]]:
    """log p of student and teacher [T, V] along a completion, and where the gate is hard."""
    import torch

    from agents.hand_over import predict
    from distill_env.gate import DraftBlock, GateState, apply_gate, student_score
    from distill_env.models.base import start_teacher

    tokens = torch.tensor(completion.tokens)

    def read(reader: Any, first: Tensor) -> Tensor:
        rest = [reader.extend(tokens[None, :-1])] if len(tokens) > 1 else []
        return torch.cat([first[:, None], *rest], 1).double()

    own, teacher = student.fork(), env.teacher.fork()  # type: ignore[attr-defined]
    log_q = read(own, own.start([completion.prompt.ids]))  # [1, T, V]
    log_p = read(teacher, start_teacher(teacher, [completion.prompt]))
    ends = torch.isin(tokens, torch.tensor(sorted(env.task.step_end_ids)))
    starts = torch.cat([torch.tensor([True]), ends[:-1]])[None]
    unused = torch.zeros(starts.shape, dtype=torch.float64)
    predicted = predict(student, [completion.prompt.ids], tokens[None], torch.ones_like(starts))
    own_score = student_score(gate, log_q, None if predicted is None else predicted[None])
    block = DraftBlock(tokens[None], starts, unused, unused[0], own_score)
    decision, _ = apply_gate(gate, log_q, log_p, block, GateState.start(1))
    return log_q[0], log_p[0], decision.hard[0].tolist()


def describe(
    env: DistillVectorEnv, student: TrainableModel, rollout: Rollout, gate: Gate, top: int
) -> list[dict[str, Any]]:
    """Every completion as `{"correct": bool or None, "tokens": [...]}`.

    A token: its `text`, `d` (D_t in the state before it, nats), `hard` (by the gate), `rewritten`, `q` and `p` (its
    probability under student and teacher), `student` and `teacher`: the `top` likeliest tokens as [text, probability].
    """
    from distill_env.divergence import reverse_kl

    completions = []
    for completion in completions_of(rollout):
        log_q, log_p, hard = read_along(env, student, completion, gate)
        divergence = reverse_kl(log_q, log_p).clamp(min=0)
        described = [
            {
                "text": token_text(env.task, token),
                "d": round(float(divergence[t]), 4),
                "hard": hard[t],
                "rewritten": completion.rewritten[t],
                "q": round(float(log_q[t, token].exp()), 4),
                "p": round(float(log_p[t, token].exp()), 4),
                "student": likeliest(env.task, log_q[t], top),
                "teacher": likeliest(env.task, log_p[t], top),
            }
            for t, token in enumerate(completion.tokens)
        ]
        correct = env.task.grade(completion.prompt, completion.tokens).right if env.task.graded else None
        completions.append({"correct": correct, "tokens": described})
    return completions


def likeliest(task: Task, log_probs: Tensor, count: int) -> list[tuple[str, float]]:
    """The likeliest tokens of log p [V] and their probabilities."""
    values, ids = log_probs.topk(min(count, len(log_probs)))
    return [(token_text(task, i), round(float(v.exp()), 4)) for v, i in zip(values, ids.tolist(), strict=True)]


def token_text(task: Task, token: int) -> str:
    return END if token == task.eos_token_id else task.decode([token])


def hard_by_position(env: DistillVectorEnv, student: TrainableModel, rollout: Rollout, gate: Gate) -> list[float]:
    """The share of hard positions among the completions that reach each position."""
    hard = [read_along(env, student, completion, gate)[2] for completion in completions_of(rollout)]
    reached = [[h[t] for h in hard if len(h) > t] for t in range(max(map(len, hard)))]
    return [round(float(np.mean(flags)), 4) for flags in reached]
