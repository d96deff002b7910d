"""Show finished runs side by side, as Markdown: the table of metrics, and their completions to the same prompts.

    python experiments/side_by_side.py runs/fkl runs/rkl runs/gated --prompts 10 > compared.md

The runs must start from the same student: the column "before" is the first run's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from experiments.comparing.side_by_side import side_by_side
from experiments.running.cli import command


@dataclass(frozen=True)
class SideBySideConfig:
    """Runs side by side."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""
    prompts: int = 10
    """Number of prompts (--env lm); the first completion of each writer is shown."""


def show(config: SideBySideConfig) -> None:
    print(side_by_side(config.runs, config.prompts))


main = command(show, SideBySideConfig, __doc__)

if __name__ == "__main__":
    sys.exit(main())
