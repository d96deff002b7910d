"""Run several methods over several seeds from the same warm starts and budgets, and put the results side by side.

    python experiments/compare.py --agents gated rkl fkl rewrite_only --seeds 0 1 2

Every run is a folder of its own made by `experiments/run.py`; finished ones are not run again, interrupted ones go on.
Further flags of `run.py` stand after `--`: `... -- --iterations 400 --tau 0.3`.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.tracking import TABLE_ROWS

COST_ROWS = (
    ("rewritten_share_last", "rewritten steps, last tenth of training", "{:.1%}"),
    ("teacher_tokens_per_student_token", "teacher tokens per student token", "{:.3f}"),
    ("teacher_positions", "teacher positions scored", "{:,.0f}"),
    ("loss_oscillation", "loss oscillation, nats", "{:.3f}"),
    ("grad_norm", "gradient norm", "{:.2f}"),
    ("tokens_per_second", "tokens a second in training", "{:,.0f}"),
)


@dataclass(frozen=True)
class Config:
    """Compare methods over seeds."""

    agents: tuple[str, ...] = ("gated", "rkl", "fkl", "rewrite_only")
    """Methods or other agents, as in run.py."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; methods of one seed begin with the same student."""
    out: Path = Path("runs/compare")
    """Folder of the runs and of results.csv and results.md."""
    jobs: int = max(1, os.cpu_count() or 1)
    """Runs at a time, each with one torch thread."""


def run_all(config: Config, flags: list[str], console: Console) -> None:
    """Start what is not finished, `jobs` at a time; a run that fails is reported and leaves its log."""
    waiting = [(agent, seed) for agent in config.agents for seed in config.seeds]
    total, started = len(waiting), time.time()
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    finished = 0
    while waiting or running:
        while waiting and len(running) < config.jobs:
            agent, seed = waiting.pop(0)
            folder = config.out / name_of(agent, seed)
            if is_finished(folder):
                finished += 1
                continue
            command = [sys.executable, "-m", "experiments.run", "--out", str(config.out), "--name", folder.name]
            if (folder / "config.json").exists():
                command += ["--resume"]
            else:
                command += ["--agent", agent, "--seed", str(seed), "--threads", "1", *flags]
            config.out.mkdir(parents=True, exist_ok=True)
            with (config.out / f"{folder.name}.log").open("w") as log:
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                running[agent, seed] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        time.sleep(0.2)
        for key, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[key]
            finished += 1
            if process.returncode:
                console.print(f"[red]failed[/] {key[0]}, seed {key[1]}: see {config.out / name_of(*key)}.log")
            minutes = (time.time() - started) / 60
            console.print(
                f"{finished} of {total} done after {minutes:.1f} min: {key[0]}, seed {key[1]}", highlight=False
            )


def name_of(agent: str, seed: int) -> str:
    return f"{agent}-s{seed}"


def is_finished(folder: Path) -> bool:
    path = folder / "evaluation.json"
    return path.exists() and "after" in json.loads(path.read_text())


def load_results(config: Config) -> list[dict[str, float | str]]:
    """One row a finished run: agent, seed, and all that was measured."""
    rows: list[dict[str, float | str]] = []
    for agent in config.agents:
        for seed in config.seeds:
            folder = config.out / name_of(agent, seed)
            if is_finished(folder):
                evaluation = json.loads((folder / "evaluation.json").read_text())
                before = {f"before/{k}": v for k, v in evaluation["before"].items()}
                rows.append({"agent": agent, "seed": seed, **evaluation["after"], **evaluation["training"], **before})
    return rows


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """A 95 % percentile-bootstrap interval of the mean over seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(config: Config, rows: list[dict[str, float | str]]) -> list[list[str]]:
    """The table as cells: a line a metric, a column an agent, mean and bootstrap interval over the seeds."""
    agents = [a for a in config.agents if any(r["agent"] == a for r in rows)]
    samples = next((int(k.split("@")[1]) for k in rows[0] if k.startswith("pass@")), 0)
    lines = [["", "before", *agents]]
    for key, label, form in (*TABLE_ROWS, *COST_ROWS):
        name = key.format(k=samples)
        cells = [label.format(k=samples)]
        for agent in (None, *agents):
            column = f"before/{name}" if agent is None else name
            chosen = rows if agent is None else [r for r in rows if r["agent"] == agent]
            values = np.array([r[column] for r in chosen if column in r], float)
            cells.append(cell(values, form))
        if any(cells[1:]):
            lines.append(cells)
    return lines


def cell(values: np.ndarray, form: str) -> str:
    if len(values) == 0 or np.isnan(values).all():
        return ""
    if np.ptp(values) == 0 or not np.isfinite(values).all():
        return form.format(values[0])
    low, high = interval(values)
    return f"{form.format(values.mean())} [{form.format(low)}, {form.format(high)}]"


def main() -> None:
    arguments = sys.argv[1:]
    flags: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, flags = arguments[:at], arguments[at + 1 :]
    config = tyro.cli(Config, args=arguments, description=__doc__)
    console = Console()
    run_all(config, flags, console)
    rows = load_results(config)
    if not rows:
        sys.exit("compare: no run has finished")
    columns = list(dict.fromkeys(k for row in rows for k in row))
    with (config.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    lines = summarise(config, rows)
    table = Table(*lines[0], title=f"{len(config.seeds)} seeds, mean [95 % bootstrap interval over seeds]")
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)
    markdown = ["| " + " | ".join(line) + " |" for line in lines]
    markdown.insert(1, "| --- |" + " ---: |" * (len(lines[0]) - 1))
    (config.out / "results.md").write_text("\n".join(markdown) + "\n")
    console.print(f"wrote {config.out}/results.csv and results.md")


if __name__ == "__main__":
    main()
