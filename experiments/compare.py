"""Run several methods over seeds, environments and warm starts, and compare the results.

    python experiments/compare.py --agents gated rkl fkl rewrite_only --seeds 0 1 2 --envs sums coins

Every run has its own folder, as if started by `experiments/run.py`. Finished runs are skipped and interrupted ones are
resumed. Runs with the same seed share their warm start, prompts and evaluation. A contender may have flags and a label:
`"loose=gated --tau 1"`. Flags of `run.py` for all runs follow `--`: `... -- --iterations 400 --tau 0.3`. With
`-- --limit 50000 --limit-of teacher_positions` all runs end at equal cost instead of equal updates.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from experiments.comparing.grid import Contender, GridConfig, run_grid, split_flags
from experiments.comparing.tables import write_summary
from experiments.running.cli import exit_code, read_flags


@dataclass(frozen=True)
class CompareConfig(GridConfig):
    """Compare methods over seeds, environments and warm starts."""

    agents: tuple[str, ...] = ("gated", "rkl", "fkl", "rewrite_only")
    """Methods or other agents, as in run.py; or LABEL=AGENT --flag value ..., in quotation marks."""
    reference: str = "rkl"
    """Label that the others are compared with, seed by seed."""
    study: str = "main"
    """Name of these runs in results.csv."""
    out: Path = Path("runs/compare")
    """Folder for the runs, results.csv and summary-<study>.md."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[\w.-]+", self.study):
            raise ValueError(f"study: {self.study!r}; expected letters, digits, '.', '-' and '_', for a file name")


def main(args: Sequence[str] | None = None) -> int:
    """Compare, or say in one line why not. Returns the exit code."""
    arguments, flags = split_flags(list(sys.argv[1:] if args is None else args))
    return exit_code(lambda: compare(read_flags(CompareConfig, arguments, __doc__), flags, Console()))


def compare(config: CompareConfig, flags: Sequence[str], console: Console) -> None:
    jobs = config.grid(config.study, [Contender.read(a) for a in config.agents])
    rows = run_grid(jobs, config.out, flags, config.jobs, console, config.fan_out, config.stack)
    labels = list(dict.fromkeys(job.contender.label for job in jobs))
    write_summary(rows, labels, config.reference, config.out, console)


if __name__ == "__main__":
    sys.exit(main())
