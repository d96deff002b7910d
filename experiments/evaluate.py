"""Repeat the evaluation of a finished run.

python experiments/evaluate.py runs/gated-sums-s0
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.config import agent_class, load_config
from experiments.run import evaluate_all
from experiments.tracking import finite, table_rows, write_json


@dataclass(frozen=True)
class Config:
    """Repeat the evaluation of a run."""

    folder: tyro.conf.Positional[Path]
    """The run's folder."""
    eval_prompts: int | None = None
    """Prompts per split; as in the run if not given."""
    eval_samples: int | None = None
    """Answers to each; as in the run if not given."""
    out: Path | None = None
    """Write the metrics into this JSON file as well."""


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    console = Console()
    try:
        run = load_config(config.folder)
        run = replace(
            run,
            eval_prompts=config.eval_prompts or run.eval_prompts,
            eval_samples=config.eval_samples or run.eval_samples,
        )
        from agents.checkpoint import load_checkpoint

        agent, _, damaged = load_checkpoint(config.folder / "checkpoints", agent_class(run).load)
        for reason in damaged.values():
            console.print(f"[bold yellow]warning[/] {escape(reason)}: taking the one before", soft_wrap=True)
        metrics = evaluate_all(run, agent, console, "again")
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 1
    table = Table(title=str(config.folder), title_justify="left")
    table.add_column("student alone, test split")
    table.add_column("now", justify="right")
    for label, cells in table_rows(run.eval_samples, [dict(metrics)]):
        table.add_row(label, *cells)
    console.print(table)
    if config.out:
        write_json(config.out, finite(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
