"""Train the teacher of Sums from scratch and write the folder that ships with the project.

    python experiments/train_sums_teacher.py

Supervised learning on uniformly random right ways of the training multisets, all lengths, twelve minutes on one
core. Ends with the share of correct chains at temperature 1 on held-out problems of every length.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.progress import track

from distill_env.models.causal_lm import CausalLM
from distill_env.models.sums import TEACHER_PATH, sums_llama, sums_tokenizer
from distill_env.randomness import Purpose, episode_keys, inverse_cdf, uniform
from distill_env.tasks.sums import (
    EOS,
    OOD_LENGTHS,
    TRAIN_LENGTHS,
    SumsTask,
    encode_answer,
    encode_problem,
    multisets,
    number_of_ways,
)

LENGTHS = TRAIN_LENGTHS + OOD_LENGTHS

MODEL_CARD = """---
license: apache-2.0
library_name: transformers
---
# The teacher of Sums

A Llama-type model of {parameters:,} weights ({layers} layers, width {width}), trained from scratch by
`python experiments/train_sums_teacher.py` for {steps:,} steps of {batch} problems of {shortest} to {longest} digits
whose multisets the hash puts into the training split. `7+2+9=` is answered `77;29;98`, or in any other order of the
digits: each step writes a digit and the running total modulo 10.

Correct chains at temperature 1 on held-out multisets, {samples} samples a problem:

| digits | correct chains | problems | distinct right ways used, of those there are (at most {samples}) |
| ---: | ---: | ---: | ---: |
{rows}
"""


@dataclass(frozen=True)
class Config:
    """Train the teacher of Sums."""

    out: Path = TEACHER_PATH
    """Folder to write."""
    width: int = 96
    """Hidden width."""
    layers: int = 3
    """Number of layers."""
    steps: int = 3500
    """Optimiser steps."""
    batch: int = 128
    """Problems a step."""
    learning_rate: float = 2e-3
    """Peak of the one-cycle schedule."""
    seed: int = 0
    """Seed of the weights and of the problems."""


def supervised_batch(rng: np.random.Generator, lengths: tuple[int, ...], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n problems with random right answers: inputs int64 [n, L] and labels [n, L] (-100 where there is no answer)."""
    rows = []
    for _ in range(n):
        pool = multisets(lengths[rng.integers(len(lengths))], "train")
        digits = rng.permutation(pool[rng.integers(len(pool))])
        rows.append((encode_problem(digits.tolist()), encode_answer(rng.permutation(digits).tolist())))
    longest = max(len(p) + len(a) for p, a in rows)
    inputs = torch.full((n, longest), EOS)
    labels = torch.full((n, longest), -100)
    for i, (prompt, answer) in enumerate(rows):
        inputs[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return inputs, labels


def correct_chains(model: CausalLM, length: int, samples: int, limit: int = 200) -> dict[str, float]:
    """Share of correct chains, and share of the distinct right ways that `samples` draws found."""
    task = SumsTask(lengths=(length,), prompts_per_length=limit)
    prompts = task.prompts("test")
    rows = [p for p in prompts for _ in range(samples)]
    keys = episode_keys(2024, np.arange(len(rows)))
    log_probs = model.start([p.ids for p in rows])
    answers = np.full((len(rows), 3 * length), -1)
    for t in range(3 * length):
        token = inverse_cdf(log_probs, uniform(keys, t, Purpose.TEACHER))
        answers[:, t] = token.numpy()
        log_probs = model.extend(token[:, None])[:, 0]
    right = 0
    found = 0.0
    for i, prompt in enumerate(prompts):
        grades = [
            task.grade(prompt, a[: list(a).index(EOS) + 1] if EOS in a else a)
            for a in answers[i * samples : (i + 1) * samples]
        ]
        right += sum(bool(g.chain_correct) for g in grades)
        digits = [t for t in prompt.ids if t < 10]
        found += len({g.way for g in grades if g.way}) / min(samples, number_of_ways(digits))
    return {"correct": right / len(rows), "problems": len(prompts), "ways": found / len(prompts)}


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    model = sums_llama(config.width, config.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    started = time.time()
    for step in track(range(config.steps), description="teacher"):
        inputs, labels = supervised_batch(rng, LENGTHS, config.batch)
        logits = model(inputs).logits  # [n, L, V]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f} nats a token, {time.time() - started:.0f} s", flush=True)

    wrapped = CausalLM(model, eos_token_id=EOS)
    results = {n: correct_chains(wrapped, n, samples=8) for n in LENGTHS}
    rows = "\n".join(f"| {n} | {r['correct']:.2%} | {r['problems']} | {r['ways']:.1%} |" for n, r in results.items())
    wrapped.save_pretrained(config.out)
    sums_tokenizer().save_pretrained(config.out)
    card = MODEL_CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.layers,
        width=config.width,
        steps=config.steps,
        batch=config.batch,
        shortest=min(LENGTHS),
        longest=max(LENGTHS),
        samples=8,
        rows=rows,
    )
    (config.out / "README.md").write_text(card)
    print(json.dumps(results, indent=1))
    print(f"wrote {config.out} in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config))
