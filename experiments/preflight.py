"""Check that the teacher, the student and the task of --env lm fit together. Takes the flags of run.py.

    python experiments/preflight.py --teacher T --student S --task-path instructions.jsonl

The error of a check can be accepted by its name, for example --accept chat_template.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from experiments.running.cli import exit_code
from experiments.running.flags import parse


def main(args: Sequence[str] | None = None) -> int:
    """Check. Returns the exit code."""
    return exit_code(lambda: check(list(sys.argv[1:] if args is None else args)))


def check(args: list[str]) -> None:
    config = parse([*([] if "--env" in args else ["--env", "lm"]), *args], __doc__)
    from experiments.running.preflight import checked_pair  # imports torch, which --help does not need

    checked_pair(config, Console(), config.rollout.rows or config.agent_options.batch_size)


if __name__ == "__main__":
    sys.exit(main())
