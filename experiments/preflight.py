"""Check teacher, student and task before the first token. Takes the flags of run.py.

python experiments/preflight.py --env lm --teacher T --student S --task-path instructions.jsonl
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.running.preflight import main

if __name__ == "__main__":
    sys.exit(main())
