"""Run several methods over seeds, environments and warm starts, and put the results side by side.

    python experiments/compare.py --agents gated rkl fkl rewrite_only --seeds 0 1 2 --envs sums coins

Every run is a folder of its own made by `experiments/run.py`; finished ones are not run again, interrupted ones go on.
Runs of one seed share their warm start, prompts and evaluation. A contender may have flags and a name of its own:
`"loose=gated --tau 1"`. Further flags of `run.py` for all stand after `--`: `... -- --iterations 400 --tau 0.3`; with
`-- --limit 50000 --limit-of teacher_positions` all runs end at equal cost instead of equal updates.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from rich.console import Console
from rich.table import Table

from distill_env.checks import check_range
from experiments.comparing.grid import Contender, Job, Row, run_grid, split_flags
from experiments.comparing.pool import FanOut
from experiments.comparing.statistics import Estimate, bootstrap, holm, paired_difference, probability_of_improvement
from experiments.running.cli import exit_code, read_flags
from experiments.running.tracking import TABLE_ROWS, markdown_table

COST_ROWS = (
    ("rewritten_share_last", "rewritten steps, last tenth of training", "{:.1%}"),
    ("teacher_tokens_per_student_token", "teacher tokens per student token", "{:.3f}"),
    ("student_tokens", "tokens the student wrote", "{:,.0f}"),
    ("teacher_positions", "teacher positions scored", "{:,.0f}"),
    ("loss_oscillation", "loss oscillation, nats", "{:.3f}"),
    ("grad_norm", "gradient norm", "{:.2f}"),
    ("seconds", "seconds a run", "{:.0f}"),
)
ENDPOINT = "correct_chains"


@dataclass(frozen=True)
class Config:
    """Compare methods over seeds, environments and warm starts."""

    agents: tuple[str, ...] = ("gated", "rkl", "fkl", "rewrite_only")
    """Methods or other agents, as in run.py; or LABEL=AGENT --flag value ..., in quotation marks."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; methods of one seed begin with the same student and see the same prompts."""
    envs: tuple[str, ...] = ("sums",)
    """Environments."""
    warm: tuple[str, ...] = ("weak",)
    """Where the warm start ends: weak (a third of the teacher's correct chains), strong (two thirds) or none."""
    reference: str = "rkl"
    """Label to which the others are compared, seed by seed."""
    study: str = "main"
    """What the rows are called in results.csv."""
    out: Path = Path("runs/compare")
    """Folder of the runs, of results.csv and of summary-<study>.md."""
    jobs: int = max(1, os.cpu_count() or 1)
    """Runs at a time, each with one torch thread."""
    fan_out: FanOut = "local"
    """Where they run: local processes, or ray: the cluster of $RAY_ADDRESS (--out has to be a folder that all its nodes
    see), else a local one of --jobs workers."""

    def __post_init__(self) -> None:
        check_range(self, "jobs", least=1)
        if not re.fullmatch(r"[\w.-]+", self.study):
            raise ValueError(f"study: {self.study!r}; accepted: letters, digits, '.', '-' and '_', for a file's name")


def jobs_of(config: Config) -> list[Job]:
    """Seed by seed, so that what is finished can be compared at any time."""
    contenders = [Contender.read(a) for a in config.agents]
    return [
        Job(config.study, env, warm, contender, seed)
        for seed, env, warm, contender in itertools.product(config.seeds, config.envs, config.warm, contenders)
    ]


def values_of(rows: Sequence[Row], key: str) -> dict[int, float]:
    """A number a seed."""
    return {row["seed"]: float(row[key]) for row in rows if row.get(key) is not None}


def with_interval(estimate: Estimate | None, form: str) -> str:
    """`value [low, high]`, or only the value where there is no interval."""
    if estimate is None:
        return ""
    value, low, high = (form.format(x) for x in (estimate.value, estimate.low, estimate.high))
    return value if np.isnan(estimate.low) or low == high else f"{value} [{low}, {high}]"


def estimate(rows: Sequence[Row], key: str) -> Estimate | None:
    """The interquartile mean over seeds with its bootstrap interval; None where nothing was measured."""
    values = list(values_of(rows, key).values())
    return bootstrap([np.array(values)]) if values and np.isfinite(values).all() else None


def metrics_table(rows: Sequence[Row], labels: Sequence[str]) -> list[list[str]]:
    """The cells of one environment and warm start: a line a metric, a column a contender."""
    samples = max((int(k.split("@")[1]) for k in rows[0] if k.startswith("pass@")), default=0)
    lines = [["", "before", *labels]]
    for key, label, form in (*TABLE_ROWS, *COST_ROWS):
        name = key.format(k=samples)
        cells = [label.format(k=samples or "k"), with_interval(estimate(rows, f"before/{name}"), form)]
        cells += [
            with_interval(estimate([r for r in rows if r["label"] == contender], name), form) for contender in labels
        ]
        if any(cells[1:]):
            lines.append(cells)
    return lines


def paired_table(rows: Sequence[Row], labels: Sequence[str], reference: str, key: str = ENDPOINT) -> list[list[str]]:
    """Every contender less the reference in the endpoint, seed by seed; Holm over the lines."""
    base = values_of([r for r in rows if r["label"] == reference], key)
    found = {}
    for label in labels:
        own = values_of([r for r in rows if r["label"] == label], key)
        seeds = sorted(set(base) & set(own))
        if label != reference and seeds:
            x, y = np.array([own[s] for s in seeds]), np.array([base[s] for s in seeds])
            found[label] = paired_difference(x, y), probability_of_improvement([x], [y])
    adjusted = holm({label: paired.p_value for label, (paired, _) in found.items()})
    lines = [[f"less {reference}", "difference, points", "p", "p (Holm)", "P(better)", "pairs"]]
    for label, (paired, better) in found.items():
        points = Estimate(*(100 * x for x in (paired.estimate.value, paired.estimate.low, paired.estimate.high)))
        lines.append(
            [
                label,
                with_interval(points, "{:+.1f}"),
                f"{paired.p_value:.3f}",
                f"{adjusted[label]:.3f}",
                with_interval(better, "{:.2f}"),
                str(paired.n),
            ]
        )
    return lines


def show(lines: Sequence[Sequence[str]], title: str, console: Console) -> None:
    table = Table(*lines[0], title=title, title_justify="left")
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)


def summarise(rows: Sequence[Row], labels: Sequence[str], reference: str, out: Path, console: Console) -> None:
    """Tables on the screen and in `summary-<study>.md`, one pair for every environment and warm start."""
    text = ["Interquartile means over seeds with stratified bootstrap 95 % intervals; paired differences of "]
    text[0] += f"`{ENDPOINT}` by seed, exact sign-flip test, Holm over the lines of a table.\n"
    for env, warm in dict.fromkeys((r["env"], r["warm"]) for r in rows):
        here = [r for r in rows if (r["env"], r["warm"]) == (env, warm)]
        shown = [label for label in labels if any(r["label"] == label for r in here)]
        title = f"{env}, {warm} warm start, {len({r['seed'] for r in here})} seeds"
        tables = [metrics_table(here, shown)]
        if reference in shown and len(shown) > 1:
            tables.append(paired_table(here, shown, reference))
        text.append(f"## {title}\n")
        for i, lines in enumerate(tables):
            show(lines, title if i == 0 else "", console)
            text.append(markdown_table(lines) + "\n")
    path = out / f"summary-{rows[0]['study']}.md"
    path.write_text("\n".join(text))
    console.print(f"wrote {out}/results.csv and {path.name}; python experiments/report.py --runs {out} draws it")


def main(args: Sequence[str] | None = None) -> int:
    """Compare, or say in one line why not. Returns the exit code."""
    arguments, flags = split_flags(list(sys.argv[1:] if args is None else args))
    return exit_code(lambda: compare(read_flags(Config, arguments, __doc__), flags, Console()))


def compare(config: Config, flags: Sequence[str], console: Console) -> None:
    jobs = jobs_of(config)
    rows = run_grid(jobs, config.out, flags, config.jobs, console, config.fan_out)
    labels = list(dict.fromkeys(job.contender.label for job in jobs))
    summarise(rows, labels, config.reference, config.out, console)


if __name__ == "__main__":
    sys.exit(main())
