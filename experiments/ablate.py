"""Ablations: vary one setting of the method at a time, or cross who writes the prefix with which KL is minimised.

    python experiments/ablate.py --studies two_by_two tau --seeds 0 1 2

Runs are stored and resumed as by `compare.py`. Flags of `run.py` for all runs follow `--`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from experiments.comparing.grid import GridConfig, run_grid, split_flags
from experiments.comparing.studies import studies
from experiments.comparing.tables import print_table, tuning_table, write_summary
from experiments.running.cli import exit_code, read_flags
from experiments.running.metric_display import markdown_table


@dataclass(frozen=True)
class AblateConfig(GridConfig):
    """Vary one part of the method at a time."""

    studies: tuple[str, ...] = ("two_by_two",)
    """Studies: two_by_two, tuning, rivals, tau, alpha, gate, equal_cost, draw, truncation, score, span; or all."""
    out: Path = Path("runs/ablate")
    """Folder for the runs, results.csv and summary-<study>.md."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the studies, or say in one line why not. Returns the exit code."""
    arguments, flags = split_flags(list(sys.argv[1:] if args is None else args))
    return exit_code(lambda: ablate(read_flags(AblateConfig, arguments, __doc__), flags, Console()))


def ablate(config: AblateConfig, flags: Sequence[str], console: Console) -> None:
    known = studies()
    names = list(known) if config.studies == ("all",) else list(config.studies)
    for name in names:
        if name not in known:
            raise ValueError(f"studies: {name!r} is unknown; expected all, {', '.join(known)}")
    for name in names:
        jobs = config.grid(name, known[name])
        rows = run_grid(jobs, config.out, flags, config.jobs, console, config.fan_out, config.stack)
        labels = [contender.label for contender in known[name]]
        reference = "student prefix, reverse" if name == "two_by_two" else labels[0]
        write_summary(rows, labels, reference, config.out, console)
        if name == "tuning":
            lines = tuning_table(rows)
            print_table(lines, "tuning", console)
            (config.out / "tuning.md").write_text(markdown_table(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
