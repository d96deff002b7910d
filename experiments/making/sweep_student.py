"""Which student of Sums? The largest that, converged under forward KL, stays 5 to 15 points below the teacher.

    python experiments/making/sweep_student.py

The teacher writes a data set once; students of several sizes and seeds learn from it by the `fkl` loss with a falling
step size, for a short and a long budget (equal results mean converged). Writes docs/results/student_sweep.md.
"""

from __future__ import annotations

import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from rich.progress import track

from agents.config import DistillConfig
from agents.distill import DistillAgent
from agents.evaluation import completion_metrics
from agents.generation import generate
from agents.methods import METHODS
from agents.rollout import Rollout
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.toy import toy_student
from distill_env.tasks.base import Split
from distill_env.tasks.sums import EOS
from experiments.running.cli import command
from experiments.running.warm_start import epochs, teacher_answers


@dataclass(frozen=True)
class Config:
    """Sweep the student's size."""

    mlps: tuple[int, ...] = (16, 24, 32, 48)
    """Widths of the feed-forward layers."""
    width: int = 16
    """Hidden width."""
    layers: int = 2
    """Layers."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the weights and of the order of the data."""
    batches: int = 300
    """Batches of 64 answers of the teacher to learn from."""
    updates: tuple[int, int] = (3000, 6000)
    """Short and long budget, in updates."""
    learning_rate: float = 1e-2
    """Step size at its highest."""
    samples: int = 4
    """Answers to each test prompt."""
    jobs: int = max(1, os.cpu_count() or 1)
    """Students at a time, each with one thread."""
    out: Path = Path("docs/results/student_sweep.md")
    """Table to write."""


def options(config: Config, seed: int = 0, updates: int = 0) -> DistillConfig:
    return DistillConfig(
        method=METHODS["fkl"],
        learning_rate=config.learning_rate,
        warmup_iterations=100,
        decay_iterations=updates,
        batch_size=64,
        seed=seed,
    )


def student(config: Config, mlp: int, seed: int) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(toy_student("sums", config.width, config.layers, mlp), eos_token_id=EOS)


def result(job: tuple[Config, int, int, int, list[Rollout]]) -> tuple[float, float]:
    """Correct chains on the test split and out of distribution of a student of this size, seed and budget."""
    config, mlp, seed, updates, data = job
    torch.set_num_threads(1)
    agent = DistillAgent(student(config, mlp, seed), options(config, seed, updates))
    for done in epochs(agent, data):
        if done == updates:
            break
    return correct_chains(agent, config, "test"), correct_chains(agent, config, "ood")


def correct_chains(agent: DistillAgent | None, config: Config, split: Split) -> float:
    """Of the agent's answers; of the teacher's without one."""
    env = DistillVectorEnv(400, "sums", "sums", split, autoreset_mode="Disabled")
    prompts = [p for p in env.prompts for _ in range(config.samples)]
    return completion_metrics(generate(agent, env, prompts, 1, teacher_writes=agent is None), 1.0)["correct_chains"]


def main(config: Config) -> None:
    env = DistillVectorEnv(64, "sums", "sums", autoreset_mode="Disabled", reveal_teacher=False)
    teacher = correct_chains(None, config, "test")
    writer = DistillAgent(student(config, config.mlps[0], 0), options(config))
    data = teacher_answers(writer, env, config.batches)
    short, long = config.updates
    seeds = len(config.seeds)
    lines = [
        "# The default student of Sums",
        "",
        "Correct chains at temperature 1 of students trained by forward KL on "
        f"{64 * config.batches:,} answers of the teacher to",
        f"training problems; mean of {seeds} seeds, and each. In distribution the teacher itself has {teacher:.1%}.",
        "`python experiments/making/sweep_student.py`",
        "",
        f"| width, layers, feed-forward | weights | {short:,} updates | {long:,} updates | below the teacher, points "
        "| out of distribution |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    jobs = [(config, *job, data) for job in itertools.product(config.mlps, config.seeds, config.updates)]
    with ProcessPoolExecutor(config.jobs) as pool:
        results = list(track(pool.map(result, jobs), description="students", total=len(jobs)))
    table = np.array(results).reshape(len(config.mlps), seeds, 2, 2)  # size, seed, budget, split
    for mlp, by_seed in zip(config.mlps, table, strict=True):
        weights = sum(p.numel() for p in student(config, mlp, 0).parameters())
        cells = [cell(by_seed[:, 0, 0]), cell(by_seed[:, 1, 0])]
        gap = 100 * (teacher - by_seed[:, 1, 0].mean())
        cells += [f"{gap:.1f}", cell(by_seed[:, 1, 1])]
        lines.append(f"| {config.width}, {config.layers}, {mlp} | {weights:,} | {' | '.join(cells)} |")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text("\n".join(lines) + "\n")
    print(config.out.read_text())


def cell(values: np.ndarray) -> str:
    return f"{values.mean():.1%} ({', '.join(f'{100 * v:.1f}' for v in values)})"


if __name__ == "__main__":
    sys.exit(command(main, Config))
