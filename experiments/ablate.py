"""What each part of the method does: one setting varied at a time; and who writes the prefix, against which KL.

    python experiments/ablate.py --studies two_by_two tau --seeds 0 1 2

Runs land in the same kind of folder as those of `compare.py` and are resumed the same way. Flags of `run.py` for all
stand after `--`.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from rich.console import Console

from agents.methods import METHODS
from distill_env.checks import check_range
from experiments.compare import show, summarise, values_of
from experiments.comparing.grid import Contender, Job, Row, run_grid, split_flags
from experiments.comparing.pool import FanOut
from experiments.running.cli import exit_code, read_flags
from experiments.running.tracking import markdown_table

# who writes the prefix, and which objective is descended at its states
CELLS = {
    ("student", "reverse"): "rkl",
    ("student", "gated"): "gate_only",
    ("student", "forward"): "rkl --loss forward",
    ("gated", "reverse"): "rewrite_only",
    ("gated", "gated"): "gated",
    ("gated", "forward"): "gated --loss forward",
    ("random", "reverse"): "random_rewrite --loss reverse",
    ("random", "gated"): "random_rewrite --weighting hard",
}

# the number that a method has to be given, and three values of it, tried on development seeds for all alike
TUNED: dict[str, tuple[str, float, float, float]] = {
    "gated": ("--tau", 0.25, 0.5, 1.0),
    "soft": ("--tau", 0.25, 0.5, 1.0),
    "rewrite_only": ("--tau", 0.25, 0.5, 1.0),
    "gate_only": ("--tau", 0.25, 0.5, 1.0),
    "budget": ("--budget", 0.05, 0.1, 0.2),
    "cumulative": ("--tau", 0.5, 1.0, 2.0),
    "step_sum": ("--tau", 0.25, 0.5, 1.0),
    "skd": ("--tau", 2.0, 4.0, 6.0),
    "adaswitch": ("--tau", 2.0, 3.0, 6.0),
    "eopd": ("--tau", 0.4, 0.8, 1.2),
    "minillm": ("--rate", 0.1, 0.2, 0.4),
    "gkd": ("--rate", 0.25, 0.5, 0.75),
    "dagger": ("--anneal-iterations", 25, 50, 75),
}
UNTUNED = ("skew_fkl", "skew_rkl", "akl", "todi", "negative")
# by docs/results/tuning.md
CHOSEN: dict[str, float] = {
    "gated": 1.0,
    "soft": 1.0,
    "rewrite_only": 0.25,
    "gate_only": 1.0,
    "budget": 0.05,
    "cumulative": 0.5,
    "step_sum": 0.5,
    "skd": 2.0,
    "adaswitch": 2.0,
    "eopd": 1.2,
    "minillm": 0.2,
    "gkd": 0.5,
    "dagger": 75,
}


def two_by_two() -> list[Contender]:
    """{student, gated} prefix x {reverse, gated, forward} objective, and as control a prefix of which as many steps are
    rewritten, but random ones. The gated objective weighs by the hard gate on `D_t`, whoever wrote.
    """
    return [Contender.read(f"{prefix} prefix, {objective}={agent}") for (prefix, objective), agent in CELLS.items()]


def values(label: str, flag: str, *settings: object, agent: str = "gated") -> list[Contender]:
    """One flag at several settings."""
    return [Contender(f"{label} {setting}", agent, (flag, str(setting))) for setting in settings]


def rivals() -> list[Contender]:
    """The published rivals, the new gates and the controls, each at the value that the tuning chose for it."""
    contenders = []
    for name in (*TUNED, *UNTUNED):
        flag, value = TUNED[name][0] if name in TUNED else "", CHOSEN.get(name)
        plain = value is None or value == getattr(METHODS[name], flag[2:].replace("-", "_"))
        contenders.append(Contender(name, name, () if plain else (flag, str(value))))
    return contenders


def tuning_table(rows: Sequence[Row]) -> list[list[str]]:
    """Correct chains in validation, mean of the last third of the training and over seeds, at each value; the best in
    bold is the one to take into CHOSEN."""
    lines = [["method", "flag", *(["value: correct chains in validation"] * 3)]]
    for name, (flag, *settings) in TUNED.items():
        found = {}
        for setting in settings:
            values = values_of([r for r in rows if r["label"] == f"{name} {setting}"], "validation_correct_chains")
            if values:
                found[setting] = float(np.mean(list(values.values())))
        best = max(found, key=lambda k: found[k], default=None)
        cells = [f"{k}: {v:.1%}" for k, v in found.items()]
        cells = [f"**{c}**" if k == best else c for k, c in zip(found, cells, strict=True)]
        lines.append([name, f"`{flag}`", *cells, *[""] * (3 - len(cells))])
    return lines


def studies() -> dict[str, list[Contender]]:
    """Every study by name; the default setting of `gated` is among the contenders of each."""
    default = Contender("gated", "gated")
    return {
        "two_by_two": two_by_two(),
        "tuning": [c for name, (flag, *settings) in TUNED.items() for c in values(name, flag, *settings, agent=name)],
        "rivals": rivals(),
        "tau": values("tau", "--tau", 0.05, 0.1, 0.25, 0.5, 1.0, 2.0),
        "alpha": [default, *values("alpha", "--alpha", 1, 4, 16, 64, agent="soft")],
        "gate": [
            default,
            Contender("soft", "soft"),
            Contender("step mean", "gated", ("--over-step", "mean")),
            Contender("step max", "gated", ("--over-step", "max")),
            Contender("step sum", "gated", ("--over-step", "sum")),
            Contender("teacher entropy", "gated", ("--score", "teacher_entropy")),
            Contender("forward KL", "gated", ("--score", "forward_kl")),
            Contender("budget", "budget"),
            Contender("cumulative", "cumulative"),
        ],
        "equal_cost": [
            Contender("token by token", "budget"),
            *(Contender(f"step {how}", f"step_{how}", ("--budget", "0.1")) for how in ("mean", "max", "sum")),
            Contender("cumulative", "cumulative", ("--budget", "0.1")),
        ],
        "draw": values("rewrite", "--rewrite", "sample", "nucleus", "argmax"),
        "truncation": [default, *values("top-k", "--top-k", 2, 4, 8), *values("top-p", "--top-p", 0.9, 0.99)],
        "score": [
            default,
            *values("score clip", "--score-clip", 1.0, 2.0),
            *values("loss clip", "--loss-clip", 1.0, 3.0),
            *values("smoothing", "--smoothing", 0.5, 0.9),
        ],
        "span": values("span", "--rewrite-span", "token", "step"),
    }


@dataclass(frozen=True)
class Config:
    """Vary one part of the method at a time."""

    studies: tuple[str, ...] = ("two_by_two",)
    """Which: two_by_two, tuning, rivals, tau, alpha, gate, equal_cost, draw, truncation, score, span; or all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds."""
    envs: tuple[str, ...] = ("sums",)
    """Environments."""
    warm: tuple[str, ...] = ("weak",)
    """Where the warm start ends: weak, strong or none, as in compare.py."""
    out: Path = Path("runs/ablate")
    """Folder of the runs, of results.csv and of summary-<study>.md."""
    jobs: int = max(1, os.cpu_count() or 1)
    """Runs at a time, each with one torch thread."""
    fan_out: FanOut = "local"
    """Where they run: local processes, or ray: the cluster of $RAY_ADDRESS (--out has to be a folder that all its nodes
    see), else a local one of --jobs workers."""

    def __post_init__(self) -> None:
        check_range(self, "jobs", least=1)


def main(args: Sequence[str] | None = None) -> int:
    """Run the studies, or say in one line why not. Returns the exit code."""
    arguments, flags = split_flags(list(sys.argv[1:] if args is None else args))
    return exit_code(lambda: ablate(read_flags(Config, arguments, __doc__), flags, Console()))


def ablate(config: Config, flags: Sequence[str], console: Console) -> None:
    known = studies()
    names = list(known) if config.studies == ("all",) else list(config.studies)
    for name in names:
        if name not in known:
            raise ValueError(f"studies: {name!r} is unknown; accepted: all, {', '.join(known)}")
    for name in names:
        jobs = [
            Job(name, env, warm, contender, seed)
            for seed, env, warm, contender in itertools.product(config.seeds, config.envs, config.warm, known[name])
        ]
        rows = run_grid(jobs, config.out, flags, config.jobs, console, config.fan_out)
        labels = [contender.label for contender in known[name]]
        reference = "student prefix, reverse" if name == "two_by_two" else labels[0]
        summarise(rows, labels, reference, config.out, console)
        if name == "tuning":
            lines = tuning_table(rows)
            show(lines, "tuning", console)
            (config.out / "tuning.md").write_text(markdown_table(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
