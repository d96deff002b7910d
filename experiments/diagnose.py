"""Why a method is better or worse: where the students of finished runs put probability that the teacher does not.

    python experiments/diagnose.py --runs runs/compare

For each run of results.csv the student is read on the answers that the teacher writes to test prompts, the same states
for all, and writes answers of its own at several temperatures. A token counts as wrong where the teacher gives it less
than one per cent. Means over seeds with 95 % bootstrap intervals, in diagnose-<env>-<warm>.md of that folder. For sums
and coins, whose steps are three tokens long and whose teachers are nearly always right.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.compare import show, with_interval
from experiments.comparing.grid import read_results
from experiments.comparing.statistics import bootstrap
from experiments.running.cli import command
from experiments.running.config import SMALL_TASKS, load_config, make_env
from experiments.running.tracking import markdown_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from distill_env.models.base import TrainableModel
    from distill_env.tasks.base import Prompt

SEED = 1_000_033
WRONG = 0.01  # a token to which the teacher gives less is wrong
FORCED = 0.1  # nats; a state at which the teacher's entropy is lower leaves no choice
MEASURES = {
    "chains@1": ("correct chains", "{:.1%}"),
    "chains@0.5": ("correct chains at temperature 0.5", "{:.1%}"),
    "chains@0.05": ("correct chains at temperature 0.05", "{:.1%}"),
    "wrong_forced": ("wrong mass, states without a choice", "{:.2%}"),
    "wrong_choice": ("wrong mass, states with a choice", "{:.2%}"),
    "missing_choice": ("teacher's mass missed, states with a choice", "{:.1%}"),
    "first_wrong/0": ("answers whose first wrong token begins a step", "{:.1%}"),
    "first_wrong/1": ("... is the result of a step", "{:.1%}"),
    "first_wrong/2": ("... separates or ends", "{:.1%}"),
}


@dataclass(frozen=True)
class Config:
    """Diagnose the students of a comparison."""

    runs: Path = Path("runs/compare")
    """Folder of compare.py or ablate.py."""
    study: str = "main"
    """Study of results.csv; a label may mean another setting in another one."""
    env: str = "sums"
    """Environment."""
    warm: str = "weak"
    """Warm start."""
    labels: tuple[str, ...] = ()
    """Contenders; all if not given."""
    seeds: tuple[int, ...] = ()
    """Seeds; all if not given."""
    prompts: int = 60
    """Test prompts."""
    samples: int = 4
    """Own answers to each."""


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
    """Where the student's probability lies at states [m, V], and what it misses of the teacher's.

    Wrong mass: of tokens to which the teacher gives less than `WRONG`. Missed mass: the teacher's, of tokens to which
    the student gives less than a tenth of what the teacher does.
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


def diagnose(folder: Path, count: int, samples: int) -> dict[str, float]:
    """All measures of the student of one run."""
    import torch

    from agents.collector import collect
    from distill_env.gate import ALWAYS, NEVER
    from distill_env.models.load import build_model
    from distill_env.randomness import episode_keys

    config = load_config(folder)
    prompts: list[Prompt] = list(make_env(config, "test", 1, purpose="train").prompts)
    prompts = prompts[:: max(1, -(-len(prompts) // count))]
    env = make_env(config, "test", len(prompts), purpose="train")
    student: Any = build_model(folder / "student", vocab_size=env.vocab_size, eos_token_id=env.task.eos_token_id)
    written = collect(env, student, prompts, episode_keys(SEED, np.arange(len(prompts))), ALWAYS, 16)
    with torch.no_grad():
        read = student.head(student.features([p.ids for p in prompts], written.tokens, written.mask))
    assert written.teacher is not None
    found = masses(read.double(), written.teacher.double())

    repeated = [p for p in prompts for _ in range(samples)]
    keys = episode_keys(SEED + 1, np.arange(len(repeated)))
    for temperature in (1, 0.5, 0.05):
        model = student if temperature == 1 else Tempered(student, temperature)
        own = collect(env, model, repeated, keys, NEVER, 16)
        right = [
            bool(env.task.grade(p, t[m].tolist()).chain_correct)
            for p, t, m in zip(repeated, own.tokens, own.mask, strict=True)
        ]
        found[f"chains@{temperature}"] = float(np.mean(right))
        if temperature == 1:
            assert own.teacher is not None
            chosen = own.teacher.gather(-1, own.tokens[own.mask][:, None])[:, 0]
            wrong = torch.zeros(own.mask.shape, dtype=torch.bool)
            wrong[own.mask] = chosen.exp() < WRONG
            first = torch.where(wrong.any(1), wrong.int().argmax(1) % 3, -1)
            found |= {f"first_wrong/{i}": float((first == i).double().mean()) for i in range(3)}
    return found


def main(config: Config) -> None:
    wanted = (config.study, config.env, config.warm)
    rows = [r for r in read_results(config.runs / "results.csv") if (r["study"], r["env"], r["warm"]) == wanted]
    rows = [r for r in rows if not config.labels or r["label"] in config.labels]
    rows = [r for r in rows if not config.seeds or r["seed"] in config.seeds]
    if config.env not in SMALL_TASKS:
        raise ValueError(f"env: {config.env!r}; accepted: {', '.join(SMALL_TASKS)}")
    if not rows:
        raise ValueError(f"runs: no finished run of {', '.join(wanted)} in {str(config.runs)!r}")
    console = Console()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in track(rows, description="students", console=console):
        found[row["label"]].append(diagnose(config.runs / row["run"], config.prompts, config.samples))
    lines = [["", *found]]
    for key, (title, form) in MEASURES.items():
        lines.append(
            [title, *(with_interval(bootstrap([[v[key] for v in values]], np.mean), form) for values in found.values())]
        )
    show(lines, f"{config.env}, {config.warm} warm start", console)
    path = config.runs / f"diagnose-{config.env}-{config.warm}.md"
    path.write_text(markdown_table(lines) + "\n")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(command(main, Config, __doc__))
