"""Show where the students of finished runs put probability that the teacher does not.

    python experiments/diagnose.py --runs runs/compare

For each run in results.csv, the student's distribution is read along completions that the teacher writes to test
prompts; the states are the same for all students. The student also writes completions of its own at several
temperatures. A token counts as wrong if the teacher gives it less than one per cent. The table of means over seeds,
with their t intervals (95 %), is written to diagnose-<env>-<warm>.md in that folder. The environment is sums or coins:
there a reasoning step has three tokens, and the teacher is nearly always right.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import track

from experiments.comparing.diagnosis import diagnose_run
from experiments.comparing.results_file import read_results
from experiments.comparing.statistics import mean
from experiments.comparing.tables import print_table
from experiments.running.cli import command
from experiments.running.config import SMALL_TASKS
from experiments.running.metric_display import DIAGNOSIS, markdown_table


@dataclass(frozen=True)
class DiagnoseConfig:
    """Diagnose the students of a comparison."""

    runs: Path = Path("runs/compare")
    """Folder of compare.py or ablate.py."""
    study: str = "main"
    """Study of results.csv. The same label may mean another setting in another study."""
    env: str = "sums"
    """Environment."""
    warm: str = "weak"
    """Warm start."""
    labels: tuple[str, ...] = ()
    """Labels of contenders; all by default."""
    seeds: tuple[int, ...] = ()
    """Seeds; all by default."""
    prompts: int = 60
    """Number of test prompts."""
    samples: int = 4
    """Number of completions per prompt."""


def diagnose(config: DiagnoseConfig) -> None:
    """Diagnose, print the table and write it."""
    if config.env not in SMALL_TASKS:
        raise ValueError(f"env: {config.env!r}; expected {' or '.join(SMALL_TASKS)}")
    chosen = (config.study, config.env, config.warm)
    rows = [r for r in read_results(config.runs / "results.csv") if (r["study"], r["env"], r["warm"]) == chosen]
    rows = [r for r in rows if not config.labels or r["label"] in config.labels]
    rows = [r for r in rows if not config.seeds or r["seed"] in config.seeds]
    if not rows:
        raise ValueError(f"runs: no finished run of {', '.join(chosen)} in {str(config.runs)!r}")
    console = Console()
    measured: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in track(rows, description="students", console=console):
        measured[row["label"]].append(diagnose_run(config.runs / row["run"], config.prompts, config.samples))
    lines = [["", *measured]]
    for m in DIAGNOSIS:
        estimates = [mean([run[m.key] for run in runs]).clipped(*m.range) for runs in measured.values()]
        lines.append([m.label, *(e.text(m.form) for e in estimates)])
    print_table(lines, f"{config.env}, {config.warm} warm start", console)
    path = config.runs / f"diagnose-{config.env}-{config.warm}.md"
    path.write_text(markdown_table(lines) + "\n")
    console.print(f"Wrote {path}")


main = command(diagnose, DiagnoseConfig, __doc__)

if __name__ == "__main__":
    sys.exit(main())
