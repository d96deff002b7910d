"""Train the teacher of a small task from scratch and write its folder.

    python experiments/making/train_teacher.py --task sums --out runs/sums_teacher
    python experiments/making/train_teacher.py --task coins --steps 6000 --out runs/coins_teacher
    python experiments/making/train_teacher.py --task coins --steps 4000 --learning-rate 1.5e-3 --seed 1 \\
        --init runs/coins_teacher --sharpen 1.5

Supervised learning on random right answers to training problems of all lengths. It takes twelve (sums) or thirty
(coins) minutes on one core, and ends with the share of correct chains at temperature 1 on test problems by length.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from jinja2 import Template
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from agents.generation import by_prompt, generate
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.toy import small_teacher, toy_tokenizer
from distill_env.tasks.registry import make_task
from experiments.running.cli import command

SAMPLES = 8  # completions per test problem
CARD = Path(__file__).with_name("teacher_card.md.j2")


@dataclass(frozen=True)
class TrainTeacherConfig:
    """Train the teacher of a small task from scratch."""

    task: Literal["sums", "coins"] = "sums"
    """Task of the teacher."""
    out: Path | None = None
    """Folder to write; by default TASK_teacher in runs."""
    init: Path | None = None
    """Folder of a teacher to start from; --width and --layers are then ignored."""
    width: int = 96
    """Hidden width."""
    layers: int = 3
    """Number of layers."""
    steps: int = 3500
    """Optimizer steps."""
    batch: int = 128
    """Problems per step."""
    learning_rate: float = 2e-3
    """Peak learning rate of the one-cycle schedule."""
    sharpen: float = 1.0
    """Factor of the logits at the end, put into the last norm's weights: above 1 it makes errors rarer."""
    seed: int = 0
    """Seed of the weights and of the problems."""


def supervised_batch(
    task: Any, rng: np.random.Generator, lengths: tuple[int, ...], n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """n problems with random right answers: inputs int64 [n, L] and labels int64 [n, L], -100 outside the answers."""
    rows = [task.draw(rng, lengths[rng.integers(len(lengths))]) for _ in range(n)]
    inputs = [torch.tensor(prompt + answer) for prompt, answer in rows]
    labels = [torch.tensor([-100] * len(prompt) + list(answer)) for prompt, answer in rows]
    return (
        pad_sequence(inputs, batch_first=True, padding_value=task.eos_token_id),
        pad_sequence(labels, batch_first=True, padding_value=-100),
    )


def correct_chains(task_name: str, model: CausalLM, length: int) -> dict[str, float]:
    """Share of correct chains, and share of the distinct right ways that `SAMPLES` completions per problem cover."""
    task: Any = make_task(task_name, lengths=(length,), prompts_per_length=200)
    prompts = task.prompts("test")
    env = DistillVectorEnv(400, task, model, "test", autoreset_mode="Disabled")
    completions = generate(None, env, [p for p in prompts for _ in range(SAMPLES)], 2024, teacher_writes=True)
    right = [c.grade is not None and bool(c.grade.chain_correct) for c in completions]
    ways = [len({c.grade.way for c in group if c.grade and c.grade.way}) for group in by_prompt(completions)]
    covered = [n / min(SAMPLES, task.number_of_ways(p)) for n, p in zip(ways, prompts, strict=True)]
    return {"correct": float(np.mean(right)), "problems": len(prompts), "ways": float(np.mean(covered))}


def main(config: TrainTeacherConfig) -> None:
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    out = config.out or Path("runs", f"{config.task}_teacher")
    task: Any = make_task(config.task)
    lengths = task.lengths + task.ood_lengths
    if config.init:
        model = LlamaForCausalLM.from_pretrained(str(config.init))
    else:
        model = small_teacher(config.task, config.width, config.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=max(config.steps, 1), pct_start=0.1
    )
    started = time.time()
    for step in track(range(config.steps), description="teacher"):
        inputs, labels = supervised_batch(task, rng, lengths, config.batch)
        logits = model(inputs).logits  # [n, L, V]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f} nats a token, {time.time() - started:.0f} s", flush=True)

    with torch.no_grad():
        model.model.norm.weight *= config.sharpen
    wrapped = CausalLM(model, eos_token_id=task.eos_token_id)
    results = {n: correct_chains(config.task, wrapped, n) for n in lengths}
    wrapped.save_pretrained(out)
    toy_tokenizer(config.task).save_pretrained(out)
    card = {"config": config, "parameters": sum(p.numel() for p in model.parameters()), "samples": SAMPLES}
    (out / "README.md").write_text(Template(CARD.read_text(), trim_blocks=True).render(**card, results=results))
    print(json.dumps(results, indent=1))
    print(f"wrote {out} in {time.time() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(command(main, TrainTeacherConfig, __doc__)())
