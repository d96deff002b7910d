"""Times of several contenders, taken in turn so that a change of the machine's speed affects all of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from experiments.running.cli import progress_bar


def alternate(
    contenders: Mapping[str, Callable[[], Any]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contender in each repetition, after one round that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with progress_bar(Console(stderr=True, quiet=not sys.stderr.isatty())) as progress:
        bar = progress.add_task("", total=len(contenders) * (repetitions + 1))
        for repetition in range(repetitions + 1):
            for name, contender in contenders.items():
                progress.update(bar, description=name)
                started = clock()
                contender()
                if repetition > 0:
                    seconds[name].append(clock() - started)
                progress.advance(bar)
    return seconds
