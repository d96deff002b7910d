"""Train a student with its teacher in the environment, and report the result.

    python experiments/run.py --agent gated

Everything of a run lands in runs/<name>/. An interrupted run continues with --resume.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.running.lifecycle import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
