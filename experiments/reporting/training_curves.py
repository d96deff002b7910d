"""What the runs of a comparison logged while they trained, as curves over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.comparing.statistics import Estimate
from experiments.reporting.results import Results, Setting
from experiments.running.metric_display import metric
from experiments.running.run_folder import read_metrics


class Line(NamedTuple):
    """A curve [points] with its band."""

    x: NDArray[np.float64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, estimates: Mapping[float, Estimate], scale: float) -> Line:
        """The estimates by x, times `scale`, with their intervals as the band."""
        scaled = [estimate.scaled(scale) for estimate in estimates.values()]
        columns = ([getattr(estimate, part) for estimate in scaled] for part in ("value", "low", "high"))
        return cls(np.array(list(estimates), float), *map(np.array, columns))


class Curves:
    """The columns of every run's metrics.csv, each file read once."""

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder, self.results = folder, results

    @cached_property
    def _logs(self) -> dict[str, list[dict[str, float]]]:
        return {row["run"]: read_metrics(self.folder / row["run"]) for row in self.results.rows if row["run"]}

    def lines(self, setting: Setting, key: str, bins: int = 0) -> dict[str, Line]:
        """A line a contender: the interquartile mean over its runs, and their middle half, or all if fewer than four.

        Args:
            setting: whose runs.
            key: a column of metrics.csv; shares become percent.
            bins: average within so many equal parts of the training first; 0 takes every logged point.
        """
        from scipy import stats

        lines = {}
        for label in self.results.labels(setting):
            runs = [self._points(row["run"], key, bins) for row in self.results.of(setting, label=label)]
            runs = [points for points in runs if points]
            shared = sorted(set.intersection(*map(set, runs))) if runs else []
            if len(shared) > 1:
                values = np.array([[run[x] for x in shared] for run in runs])  # [runs, points]
                values *= metric(key.partition("/")[2]).scale
                low, high = np.percentile(values, (25, 75) if len(runs) > 3 else (0, 100), axis=0)
                lines[label] = Line(np.array(shared, float), stats.trim_mean(values, 0.25), low, high)
        return lines

    def _points(self, run: str, key: str, bins: int) -> dict[float, float]:
        """The logged values by iteration, or their means by the middle of each bin."""
        log = self._logs.get(run, [])
        width = max(1, math.ceil(len(log) / bins)) if bins else 1
        parts: dict[float, list[float]] = {}
        for row in log:
            if key in row and math.isfinite(row[key]):
                parts.setdefault((row["iteration"] - 1) // width * width + (width + 1) / 2, []).append(row[key])
        return {x: float(np.mean(values)) for x, values in parts.items()}
