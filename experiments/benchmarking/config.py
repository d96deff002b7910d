"""The flags of `experiments/benchmark.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["rollout", "iteration", "environment", "precision", "memory", "peers", "seeds"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure the speed of rollouts, iterations and the environment, the effect of rounding, and memory."""

    teacher: str = ""
    """Folder or hub id of the teacher; by default the teacher of Sums with an untrained student."""
    student: str = ""
    """Folder or hub id of the student."""
    task_path: str = ""
    """Instructions for a pair of language models, as --task instruct of run.py reads them."""
    parts: tuple[Part, ...] = ("rollout", "iteration", "environment", "precision")
    """What to measure. `memory` and `peers` (TRL's trainers, extra `trl`) need a pair of language models; `seeds` is
    about Sums."""
    rows: tuple[int, ...] = (8, 64)
    """Batch sizes of the rollouts."""
    batch: int = 8
    """Batch size of iterations, memory and peers."""
    new_tokens: int = 64
    """Maximum number of tokens per completion; Sums has a maximum of its own."""
    hard_rates: tuple[float, ...] = (0.01, 0.05, 0.2, 0.5)
    """Shares of hard positions; tau is set to reach them."""
    lengths: tuple[int, ...] = (2, 4, 8, 16)
    """Fixed draft lengths besides 1 to compare with the adaptive one; above 1 / hard rate they are left out."""
    seeds: int = 10
    """Seeds that `seeds` trains as one computation."""
    repetitions: int = 3
    """Timed repetitions; the contenders alternate."""
    threads: int = 0
    """Threads of torch; 0 keeps its default."""
    out: Path = Path("runs/benchmark")
    """Path of the .json, .md and .png files, without the ending."""
