"""The runs of a comparison as numbers: a row a run, how its columns are called and written, estimates over seeds.

A *setting* is a task with a warm start, a *contender* is what is compared within one, and its runs differ by seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.methods import METHODS
from experiments.comparing.grid import Row, read_results
from experiments.comparing.statistics import (
    Estimate,
    PairedDifference,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
)
from experiments.comparing.studies import CELLS
from experiments.running.tracking import read_metrics

ENDPOINT = "correct_chains"
PRIMARY_WARM = "weak"
OURS = "gated"
PURE = ("rkl", "fkl")
BASELINES = (*PURE, "rewrite_only")
BEFORE = "before training"
NEEDED = ("env", "warm", "label", "seed")
# methods of the table that are cells of the study of prefix and objective
METHOD_CELLS = {cell: agent for cell, agent in CELLS.items() if agent in METHODS}
MINUS = "\u2212"


class Setting(NamedTuple):
    env: str
    warm: str

    def __str__(self) -> str:
        return f"{self.env}, {self.warm} start"


@dataclass(frozen=True)
class Measure:
    """How a column is called and written."""

    key: str
    label: str
    unit: str = ""
    digits: int = 2
    less_is_better: bool | None = None  # None: neither

    @property
    def scale(self) -> float:
        return 100.0 if self.unit == "%" else 1.0

    @property
    def title(self) -> str:
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def number(self, value: float) -> str:
        return f"{value * self.scale:,.{self.digits}f}".replace("-", MINUS)

    def interval(self, estimate: Estimate) -> str:
        """`[71.8, 75.4]`, or nothing where one run says nothing of the spread."""
        if math.isnan(estimate.low):
            return ""
        return f"[{self.number(estimate.low)}, {self.number(estimate.high)}]"

    def signed(self, value: float) -> str:
        return ("" if value * self.scale < 0 else "+") + self.number(value)

    def change(self, estimate: Estimate) -> str:
        """A difference with its sign and interval; of shares in points."""
        text = self.signed(estimate.value)
        if not math.isnan(estimate.low):
            text += f" [{self.signed(estimate.low)}, {self.signed(estimate.high)}]"
        return text

    @property
    def change_unit(self) -> str:
        return "points" if self.unit == "%" else self.unit


MEASURES = {
    m.key: m
    for m in (
        Measure("correct_chains", "correct chains", "%", 1, less_is_better=False),
        Measure("accuracy", "accuracy of the final value", "%", 1, less_is_better=False),
        Measure("ood/correct_chains", "correct chains out of distribution", "%", 1, less_is_better=False),
        Measure("ood/accuracy", "accuracy out of distribution", "%", 1, less_is_better=False),
        Measure("retention", "kept out of distribution", "%", 1, less_is_better=False),
        Measure("distinct_ways", "distinct right ways a prompt", "", 2, less_is_better=False),
        Measure("entropy", "entropy", "nats a token", 3),
        Measure("collapse", "collapse", "%", 1, less_is_better=True),
        Measure("divergence", "D_t on own answers", "nats", 3, less_is_better=True),
        Measure("hard_share", "hard steps", "%", 1, less_is_better=True),
        Measure("perplexity", "perplexity of the teacher's answers", "", 3, less_is_better=True),
        Measure("teacher_share", "tokens of the training that the teacher wrote", "%", 1, less_is_better=True),
        Measure("teacher_positions", "positions that the teacher scored", "", 0, less_is_better=True),
        Measure("loss_oscillation", "loss oscillation", "nats", 3, less_is_better=True),
        Measure("grad_norm", "gradient norm", "", 2, less_is_better=True),
        Measure("improvement", "chance that a run is better", "%", 0, less_is_better=False),
    )
}


def measure(key: str) -> Measure:
    """The measure of a column, `correct_chains/5` and the like included."""
    if key in MEASURES:
        return MEASURES[key]
    name, _, bucket = key.rpartition("/")
    base = MEASURES.get(name)
    if base is None:
        return Measure(key, key)
    return Measure(key, f"{base.label}, difficulty {bucket}", base.unit, base.digits, base.less_is_better)


# ---------------------------------------------------------------------- what was measured


def load_results(folder: Path) -> list[Row]:
    """The finished runs of a comparison's folder, with derived columns and without what is not finite.

    Methods of the table that ran as cells of the study `two_by_two`, or in `rivals`, are in the main study as well
    where it has no runs of them in that setting.

    Raises:
        ValueError: if there is no results.csv, it lacks columns, or no run has finished.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"runs: {str(folder)!r} has no results.csv; accepted: a folder of experiments/compare.py")
    found = read_results(path)
    try:
        rows = [_complete(row) for row in found]
    except KeyError as error:
        raise ValueError(f"runs: {str(path)!r} cannot be read ({error}); needed: {', '.join(NEEDED)}") from None
    if not rows:
        raise ValueError(f"runs: no run in {str(path)!r} has finished")
    there = {(r["env"], r["warm"], r["label"]) for r in rows if r["study"] == "main"}
    names = {f"{prefix} prefix, {objective}": label for (prefix, objective), label in METHOD_CELLS.items()}
    for row in list(rows):
        label = names.get(row["label"]) if row["study"] == "two_by_two" else row["label"]
        if row["study"] in ("two_by_two", "rivals") and label and (row["env"], row["warm"], label) not in there:
            rows.append(row | {"study": "main", "label": label})
    return rows


def _complete(row: Row) -> Row:
    found = {key: row[key] for key in NEEDED} | {"run": row.get("run", ""), "study": row.get("study", "main")}
    found |= {k: v for k, v in row.items() if isinstance(v, float) and math.isfinite(v)}
    for prefix in ("", "before/"):
        inside, outside = found.get(f"{prefix}{ENDPOINT}"), found.get(f"{prefix}ood/{ENDPOINT}")
        if inside and outside is not None:
            found[f"{prefix}retention"] = outside / inside
    if found.get("tokens") and "teacher_tokens" in found:
        found["teacher_share"] = found["teacher_tokens"] / found["tokens"]
    return found


@dataclass
class Results:
    """The runs, and estimates from them.

    Args:
        rows: as `load_results` gives them.
    """

    rows: Sequence[Row]
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    def settings(self, study: str = "main") -> list[Setting]:
        """Tasks in the order of the file, the weak start of each first."""
        found = dict.fromkeys(Setting(r["env"], r["warm"]) for r in self.rows if r["study"] == study)
        envs = list(dict.fromkeys(s.env for s in found))
        return sorted(found, key=lambda s: (envs.index(s.env), s.warm != PRIMARY_WARM, s.warm))

    def primary(self) -> list[Setting]:
        """One setting a task: its weak warm start, or the first there is."""
        first: dict[str, Setting] = {}
        for setting in self.settings():
            first.setdefault(setting.env, setting)
        return list(first.values())

    def labels(self, setting: Setting | None = None, study: str = "main") -> list[str]:
        """Contenders in the order of the file, ours and what it is compared with first."""
        found = dict.fromkeys(
            r["label"]
            for r in self.rows
            if r["study"] == study and (setting is None or Setting(r["env"], r["warm"]) == setting)
        )
        front = (OURS, "soft", *BASELINES)
        return [label for label in front if label in found] + [label for label in found if label not in front]

    def studies(self) -> list[str]:
        return list(dict.fromkeys(r["study"] for r in self.rows))

    def by_seed(self, setting: Setting, label: str, key: str, study: str = "main") -> dict[int, float]:
        """The measured values of a contender, by seed. `BEFORE` is the student that all runs of a seed began with."""
        before = label == BEFORE
        column = f"before/{key}" if before else key
        return {
            r["seed"]: r[column]
            for r in self.rows
            if Setting(r["env"], r["warm"]) == setting
            and r["study"] == study
            and (before or r["label"] == label)
            and column in r
        }

    def seeds(self, setting: Setting, label: str, study: str = "main") -> int:
        """How many runs of a contender have finished."""
        mine = (r for r in self.rows if Setting(r["env"], r["warm"]) == setting and r["study"] == study)
        return len({r["seed"] for r in mine if r["label"] == label})

    def estimate(self, setting: Setting, label: str, key: str, study: str = "main") -> Estimate | None:
        """Interquartile mean over the runs; None where nothing was measured."""
        values = list(self.by_seed(setting, label, key, study).values())
        return self._once(("estimate", *values), lambda: interquartile_mean(values)) if values else None

    def difference(
        self, setting: Setting, label: str, baseline: str, key: str, study: str = "main"
    ) -> PairedDifference | None:
        """label - baseline over the seeds that both have; None where they share none."""
        x, y = (self.by_seed(setting, name, key, study) for name in (label, baseline))
        return self.paired(x, y)

    def paired(self, x: dict[int, float], y: dict[int, float]) -> PairedDifference | None:
        shared = sorted(x.keys() & y.keys())
        if not shared:
            return None
        a, b = [x[s] for s in shared], [y[s] for s in shared]
        return self._once(("paired", *a, None, *b), lambda: paired_difference(a, b))

    def improvement(self, setting: Setting, label: str, baseline: str, key: str) -> Estimate | None:
        """The chance that a run of `label` has more of `key` than one of `baseline`."""
        x, y = (list(self.by_seed(setting, name, key).values()) for name in (label, baseline))
        return probability_of_improvement(x, y) if x and y else None

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def buckets(self, setting: Setting, prefix: str = "") -> list[int]:
        """The difficulties that were measured, `prefix` "" or "ood/"."""
        pattern = re.compile(rf"{prefix}{ENDPOINT}/(\d+)")
        keys = {k for r in self.rows if Setting(r["env"], r["warm"]) == setting for k in r}
        return sorted(int(m[1]) for m in map(pattern.fullmatch, keys) if m)


# ---------------------------------------------------------------------- what was logged

SHARES = {"validation/correct_chains", "validation/hard_share", "rollout/hard_share", "rollout/rewritten_share"}


class Line(NamedTuple):
    """A curve [points] with its band."""

    x: NDArray[np.float64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


class Curves:
    """What the runs logged as they trained, read once."""

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder, self.results = folder, results
        self._rows: dict[str, list[dict[str, float]]] = {}

    def lines(self, setting: Setting, key: str, bins: int = 0) -> dict[str, Line]:
        """A line a contender: interquartile mean over its runs, and the middle half of them, or all if fewer than four.

        Args:
            setting: whose runs.
            key: a column of metrics.csv.
            bins: average within so many equal parts of the training first; 0 takes every logged point.
        """
        lines = {}
        for label in self.results.labels(setting):
            runs = [points for points in self._points(setting, label, key, bins) if points]
            shared = sorted(set.intersection(*(set(r) for r in runs))) if runs else []
            if len(shared) > 1:
                values = np.array([[run[x] for x in shared] for run in runs])  # [runs, points]
                scaled = values * (100 if key in SHARES else 1)
                ends = (25, 75) if len(runs) > 3 else (0, 100)
                low, high = np.percentile(scaled, ends, axis=0)
                ordered, cut = np.sort(scaled, axis=0), len(runs) // 4
                middle = ordered[cut : len(runs) - cut].mean(0)
                lines[label] = Line(np.array(shared, float), middle, low, high)
        return lines

    def _points(self, setting: Setting, label: str, key: str, bins: int) -> Iterator[dict[float, float]]:
        for row in self.results.rows:
            if row["study"] != "main" or Setting(row["env"], row["warm"]) != setting or row["label"] != label:
                continue
            if row["run"] not in self._rows:
                self._rows[row["run"]] = read_metrics(self.folder / row["run"]) if row["run"] else []
            logged = self._rows[row["run"]]
            found = {r["iteration"]: r[key] for r in logged if key in r and math.isfinite(r[key])}
            if not bins:
                yield dict(found)
                continue
            width = max(1, math.ceil(len(logged) / bins))
            parts: dict[float, list[float]] = {}
            for iteration, value in found.items():
                parts.setdefault((iteration - 1) // width * width + (width + 1) / 2, []).append(value)
            yield {x: float(np.mean(values)) for x, values in parts.items()}
