"""Choose the default student of Sums: the largest that stays 5 to 15 points below its teacher after convergence.

    python experiments/making/sweep_student.py

Students of several sizes and seeds are trained by forward KL on one data set that the teacher writes, with a decaying
learning rate, for a short and a long budget (equal results mean convergence). Writes a table.
"""

from __future__ import annotations

import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from rich.progress import track

from agents.atomic_io import write_text
from agents.config import DistillConfig, OptimizerConfig
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
from experiments.running.metric_display import markdown_table
from experiments.running.warm_start import epochs, teacher_completions


@dataclass(frozen=True)
class SweepConfig:
    """Train students of several sizes and compare them with the teacher."""

    mlps: tuple[int, ...] = (16, 24, 32, 48)
    """Widths of the feed-forward layers."""
    width: int = 16
    """Hidden width."""
    layers: int = 2
    """Layers."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the initial weights and of the order of the data."""
    batches: int = 300
    """Batches of 64 completions of the teacher in the data set."""
    updates: tuple[int, int] = (3000, 6000)
    """Updates of the short and of the long budget."""
    learning_rate: float = 1e-2
    """Peak learning rate."""
    samples: int = 4
    """Completions per test prompt."""
    jobs: int = max(1, os.cpu_count() or 1)
    """Students trained at a time, each in a process with one thread."""
    out: Path = Path("runs/student_sweep.md")
    """Table to write."""


def agent(config: SweepConfig, mlp: int, seed: int = 0, updates: int = 0) -> DistillAgent:
    torch.manual_seed(seed)
    student = CausalLM(toy_student("sums", config.width, config.layers, mlp), eos_token_id=EOS)
    optimizer = OptimizerConfig(config.learning_rate, warmup_iterations=100, decay_iterations=updates)
    return DistillAgent(student, DistillConfig(METHODS["fkl"], optimizer, batch_size=64, seed=seed))


def train(job: tuple[SweepConfig, int, int, int, list[Rollout]]) -> tuple[float, float]:
    """Share of correct chains of a trained student on the test split and out of distribution."""
    config, mlp, seed, updates, data = job
    torch.set_num_threads(1)
    trained = agent(config, mlp, seed, updates)
    for _ in islice(epochs(trained, data), updates):
        pass
    return correct_chains(trained, config, "test"), correct_chains(trained, config, "ood")


def correct_chains(writer: DistillAgent | None, config: SweepConfig, split: Split) -> float:
    """Share of correct chains of the agent, or of the teacher if there is no agent."""
    env = DistillVectorEnv(400, "sums", "sums", split, autoreset_mode="Disabled")
    prompts = [p for p in env.prompts for _ in range(config.samples)]
    return completion_metrics(generate(writer, env, prompts, 1, teacher_writes=writer is None))["correct_chains"]


def main(config: SweepConfig) -> None:
    env = DistillVectorEnv(64, "sums", "sums", autoreset_mode="Disabled", reveal_teacher=False)
    teacher = correct_chains(None, config, "test")
    data = teacher_completions(agent(config, config.mlps[0]), env, config.batches)
    seeds = len(config.seeds)
    jobs = [(config, *job, data) for job in itertools.product(config.mlps, config.seeds, config.updates)]
    with ProcessPoolExecutor(config.jobs) as pool:
        results = list(track(pool.map(train, jobs), description="students", total=len(jobs)))
    table = np.array(results).reshape(len(config.mlps), seeds, 2, 2)  # size, seed, budget, split
    budgets = [f"{updates:,} updates" for updates in config.updates]
    head = ["width, layers, feed-forward", "parameters", *budgets, "below the teacher, points", "out of distribution"]
    lines = [head]
    for mlp, by_seed in zip(config.mlps, table, strict=True):
        parameters = sum(p.numel() for p in agent(config, mlp).student.parameters())
        gap = 100 * (teacher - by_seed[:, 1, 0].mean())
        short, long, outside = map(cell, (by_seed[:, 0, 0], by_seed[:, 1, 0], by_seed[:, 1, 1]))
        size = f"{config.width}, {config.layers}, {mlp}"
        lines.append([size, f"{parameters:,}", short, long, f"{gap:.1f}", outside])
    values = {"completions": 64 * config.batches, "seeds": seeds, "teacher": teacher, "table": markdown_table(lines)}
    page = Path(__file__).with_name("student_sweep_page.txt").read_text().format(**values)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, page)
    print(page)


def cell(values: np.ndarray) -> str:
    return f"{values.mean():.1%} ({', '.join(f'{100 * v:.1f}' for v in values)})"


if __name__ == "__main__":
    sys.exit(command(main, SweepConfig, __doc__)())
