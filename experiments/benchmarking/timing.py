"""What a benchmark measures, and how it takes turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Part = Literal["rollout", "iteration", "environment", "precision", "memory", "peers"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Config:
    """Measure rollouts, iterations, the environment and memory."""

    teacher: str = ""
    """Folder or hub id; the pair of Sums if empty."""
    student: str = ""
    """Folder or hub id."""
    task_path: str = ""
    """Instructions for a pair of language models, as for --task instruct of run.py."""
    parts: tuple[Part, ...] = ("rollout", "iteration", "environment", "precision")
    """What is measured; `memory` and `peers` (TRL's trainers, extra `trl`) need a pair of language models."""
    rows: tuple[int, ...] = (8, 64)
    """Batch sizes of the rollouts."""
    batch: int = 8
    """Batch size of iterations, memory and peers."""
    new_tokens: int = 64
    """Tokens an answer; Sums has its own horizon."""
    hard_rates: tuple[float, ...] = (0.01, 0.05, 0.2, 0.5)
    """Shares of hard steps that tau is set for."""
    lengths: tuple[int, ...] = (2, 4, 8, 16)
    """Fixed draft lengths, besides 1, that the adaptive one is compared with, where so long a draft meets one hard step
    at the most."""
    repetitions: int = 3
    """Alternating repetitions."""
    threads: int = 0
    """Torch threads; 0 leaves the default."""
    out: Path = Path("runs/benchmark")
    """Where .json, .md and .png go."""


def alternate(contenders: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each contender, `repetitions` times, taking turns; one round before that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, refresh_per_second=1, disable=quiet) as progress:
        bar = progress.add_task("", total=len(contenders) * (repetitions + 1))
        for round_number in range(repetitions + 1):
            for name, contender in contenders.items():
                progress.update(bar, description=name)
                started = time.perf_counter()
                contender()
                if round_number > 0:
                    seconds[name].append(time.perf_counter() - started)
                progress.advance(bar)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> str:
    """`1.23 s (1.20-1.31)`: median, smallest and largest."""
    return f"{median(values):.3g} s ({min(values):.3g}-{max(values):.3g})"
