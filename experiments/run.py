"""Train a student with its teacher in the environment, and report the result.

    python experiments/run.py --agent gated

All output of a run goes to runs/<name>/. An interrupted run continues with --resume.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.running.cli import exit_code
from experiments.running.flags import parse


def main(args: Sequence[str] | None = None) -> int:
    """Run what the command line says. Returns the exit code."""
    return exit_code(lambda: train(args))


def train(args: Sequence[str] | None) -> None:
    config = parse(args, __doc__)
    from experiments.running.lifecycle import launch  # imports torch, which --help does not need

    launch(config)


if __name__ == "__main__":
    sys.exit(main())
