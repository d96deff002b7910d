"""Where a student puts probability that the teacher does not: the measures of `diagnose.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.prompts import evenly_spaced
from experiments.running.build import make_env
from experiments.running.config_file import load_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from distill_env.models.base import TrainableModel

SEED = 1_000_033
WRONG = 0.01  # a token with less teacher probability is wrong
FORCED = 0.1  # nats; a state in which the teacher's entropy is lower leaves no choice


class Tempered:
    """A token model at another temperature."""

    def __init__(self, model: TrainableModel, temperature: float) -> None:
        self.model, self.temperature = model, temperature
        self.vocab_size, self.eos_token_id = model.vocab_size, model.eos_token_id

    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        return self._temper(self.model.start(prompts, rows))

    def extend(self, tokens: Tensor) -> Tensor:
        return self._temper(self.model.extend(tokens))

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        self.model.rewind(lengths)

    def _temper(self, log_probs: Tensor) -> Tensor:
        return (log_probs / self.temperature).log_softmax(-1)


def masses(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """The student's probability of wrong tokens and the teacher's probability that the student misses.

    Args:
        student, teacher: log-probabilities [m, V] in the same m states.

    Returns:
        Means over states without and with a choice. Wrong mass: the student's probability of tokens with less than
        `WRONG` under the teacher. Missing mass: the teacher's probability of tokens to which the student gives less
        than a tenth of it.
    """
    from distill_env.divergence import entropy

    q, p = student.exp(), teacher.exp()
    forced = entropy(teacher) < FORCED
    wrong = (q * (p < WRONG)).sum(-1)
    missing = (p * (q < p / 10)).sum(-1)
    return {
        "wrong_forced": float(wrong[forced].mean()),
        "wrong_choice": float(wrong[~forced].mean()),
        "missing_choice": float(missing[~forced].mean()),
    }


def diagnose_run(folder: Path, count: int, samples: int) -> dict[str, float]:
    """All measures of the student of one run.

    Args:
        folder: of the run.
        count: test prompts, at most.
        samples: completions of the student to each prompt, at each temperature.
    """
    import torch

    from agents.collector import collect
    from distill_env.gate_settings import ALWAYS, NEVER
    from distill_env.models.base import ids_of
    from distill_env.models.load import build_model
    from distill_env.randomness import episode_keys

    config = load_config(folder)
    prompts = list(make_env(config, "test", 1, purpose="train").prompts)
    prompts = evenly_spaced(prompts, min(count, len(prompts)))
    env = make_env(config, "test", len(prompts), purpose="train")
    student: Any = build_model(folder / "student", **ids_of(env.teacher))
    by_teacher = collect(env, student, prompts, episode_keys(SEED, np.arange(len(prompts))), ALWAYS, 16)
    with torch.no_grad():
        features = student.features([p.ids for p in prompts], by_teacher.tokens, by_teacher.mask)
        log_probs = student.head(features)
    assert by_teacher.teacher is not None
    measured = masses(log_probs.double(), by_teacher.teacher.double())

    repeated = [p for p in prompts for _ in range(samples)]
    keys = episode_keys(SEED + 1, np.arange(len(repeated)))
    for temperature in (1, 0.5, 0.05):
        model = student if temperature == 1 else Tempered(student, temperature)
        own = collect(env, model, repeated, keys, NEVER, 16)
        right = [
            bool(env.task.grade(p, t[m].tolist()).chain_correct)
            for p, t, m in zip(repeated, own.tokens, own.mask, strict=True)
        ]
        measured[f"chains@{temperature}"] = float(np.mean(right))
        if temperature == 1:
            assert own.teacher is not None
            chosen = own.teacher.gather(-1, own.tokens[own.mask][:, None])[:, 0]
            wrong = torch.zeros(own.mask.shape, dtype=torch.bool)
            wrong[own.mask] = chosen.exp() < WRONG
            first = torch.where(wrong.any(1), wrong.int().argmax(1) % 3, -1)  # a step is three tokens long
            measured |= {f"first_wrong/{i}": float((first == i).double().mean()) for i in range(3)}
    return measured
