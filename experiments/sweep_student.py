"""Which student of Sums? The largest that, converged under forward KL, stays 5 to 15 points below the teacher.

    python experiments/sweep_student.py

Draws a pool of the teacher's answers once, trains students of several sizes on it by the `fkl` loss with a falling step
size, for a short and a long budget (equal results mean converged), and writes docs/results/student_sweep.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.progress import track

from agents.config import DistillConfig
from agents.distill import DistillAgent, PromptStream
from agents.evaluation import answer_metrics, write_answers
from agents.methods import METHODS
from agents.rollout import Rollout
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.sums import sums_llama
from distill_env.tasks.sums import EOS


@dataclass(frozen=True)
class Config:
    """Sweep the student's size."""

    mlps: tuple[int, ...] = (8, 16, 24, 32)
    """Widths of the feed-forward layers."""
    width: int = 16
    """Hidden width."""
    layers: int = 2
    """Layers."""
    pool: int = 300
    """Batches of 64 answers in the pool."""
    updates: tuple[int, ...] = (4500, 9000)
    """Budgets, in updates."""
    learning_rate: float = 4e-3
    """Step size at the start."""
    samples: int = 4
    """Answers to each test prompt."""
    out: Path = Path("docs/results/student_sweep.md")
    """Table to write."""


def train(mlp: int, updates: int, config: Config, pool: list[Rollout]) -> DistillAgent:
    """A fresh student after that many updates on the pool, in an order of its own every time round."""
    torch.manual_seed(0)
    student = CausalLM(sums_llama(config.width, config.layers, mlp), eos_token_id=EOS)
    options = DistillConfig(
        method=METHODS["fkl"], learning_rate=config.learning_rate, decay_iterations=updates, batch_size=64
    )
    agent = DistillAgent(student, options)
    for i in track(range(updates), description=f"mlp {mlp}", transient=True):
        order = np.random.default_rng(i // len(pool)).permutation(len(pool))
        agent.update(pool[order[i % len(pool)]])
        agent.iteration += 1
    return agent


def main(config: Config) -> None:
    env = DistillVectorEnv(64, "sums", "sums", autoreset_mode="Disabled", reveal_teacher=False)
    test = DistillVectorEnv(400, "sums", "sums", "test", autoreset_mode="Disabled")
    prompts = [p for p in test.prompts for _ in range(config.samples)]
    teacher = answer_metrics(write_answers(None, test, prompts, seed=1, teacher_writes=True), tau=1.0)["correct_chains"]
    print(f"teacher: {teacher:.1%} correct chains")
    writer = DistillAgent(CausalLM(sums_llama(16, 1), eos_token_id=EOS), DistillConfig(method=METHODS["fkl"]))
    stream = PromptStream(env.prompts, seed=0)
    pool = []
    for i in track(range(config.pool), description="pool", transient=True):
        writer.iteration = i
        pool.append(writer.rollout(env, stream))
    head = " | ".join(f"{u:,} updates" for u in config.updates)
    lines = [
        "# The default student of Sums",
        "",
        "Correct chains at temperature 1 on the test split (in-distribution lengths) of students trained by forward KL",
        f"on a pool of {64 * config.pool:,} answers of the teacher; the teacher itself: {teacher:.1%}.",
        "`python experiments/sweep_student.py`",
        "",
        f"| width, layers, feed-forward | weights | {head} | below the teacher, points | minutes |",
        "| --- | ---: |" + " ---: |" * (len(config.updates) + 2),
    ]
    print("\n".join(lines[-2:]))
    for mlp in config.mlps:
        started = time.time()
        results = []
        for updates in config.updates:
            agent = train(mlp, updates, config, pool)
            results.append(answer_metrics(write_answers(agent, test, prompts, seed=1), tau=1.0)["correct_chains"])
        parameters = sum(p.numel() for p in agent.student.parameters())
        cells = " | ".join(f"{r:.1%}" for r in results)
        gap = 100 * (teacher - results[-1])
        minutes = (time.time() - started) / 60
        lines.append(
            f"| {config.width}, {config.layers}, {mlp} | {parameters:,} | {cells} | {gap:.1f} | {minutes:.1f} |"
        )
        print(lines[-1], flush=True)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
