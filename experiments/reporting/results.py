"""The runs of a comparison as rows, and estimates over seeds.

A *setting* is a task with a warm start. *Contenders* are compared within a setting, and their runs differ by seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from agents.methods import METHODS
from experiments.comparing.results_file import ENDPOINT, Row, primary_endpoint, read_results
from experiments.comparing.statistics import (
    Estimate,
    PairedDifference,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
)
from experiments.comparing.studies import CELL_LABELS, CELLS
from experiments.running.metric_display import metric

PRIMARY_WARM = "weak"
OURS = "gated"
PURE = ("rkl", "fkl")
BASELINES = (*PURE, "rewrite_only")
BEFORE = "before training"
NEEDED = ("env", "warm", "label", "seed")
# methods that are also cells of the study of prefix and loss
METHOD_CELLS = {cell: agent for cell, agent in CELLS.items() if agent in METHODS}


class Setting(NamedTuple):
    env: str
    warm: str

    def __str__(self) -> str:
        return f"{self.env}, {'no warm' if self.warm in ('', 'none') else self.warm} start"


def load_results(folder: Path, studies: Sequence[str] = ()) -> list[Row]:
    """The finished runs of these studies (of all, if none are named) in the folder of a comparison.

    Rows get derived columns and lose non-finite values.

    Methods that ran in the studies `two_by_two` or `rivals` are copied to the main study, if it has no runs of them in
    that setting.

    Raises:
        ValueError: if there is no results.csv, it lacks columns, or no run has finished.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"runs: {str(folder)!r} has no results.csv; expected a folder of experiments/compare.py")
    try:
        rows = [_complete(row) for row in read_results(path)]
    except KeyError as error:
        raise ValueError(f"runs: {str(path)!r} has no column {error}; expected {', '.join(NEEDED)}") from None
    rows = [row for row in rows if not studies or row["study"] in studies]
    if not rows:
        of = f" of {', '.join(studies)}" if studies else ""
        raise ValueError(f"runs: no run{of} in {str(path)!r} has finished")
    in_main = {(r["env"], r["warm"], r["label"]) for r in rows if r["study"] == "main"}
    names = {CELL_LABELS[cell]: label for cell, label in METHOD_CELLS.items()}
    for row in list(rows):
        label = names.get(row["label"]) if row["study"] == "two_by_two" else row["label"]
        if row["study"] in ("two_by_two", "rivals") and label and (row["env"], row["warm"], label) not in in_main:
            rows.append(row | {"study": "main", "label": label})
    return rows


def _complete(row: Row) -> Row:
    complete = {key: row[key] for key in NEEDED} | {"run": row.get("run", ""), "study": row.get("study", "main")}
    complete |= {k: v for k, v in row.items() if isinstance(v, float) and math.isfinite(v)}
    for prefix in ("", "before/"):
        inside, outside = complete.get(f"{prefix}{ENDPOINT}"), complete.get(f"{prefix}ood/{ENDPOINT}")
        if inside and outside is not None:
            complete[f"{prefix}retention"] = outside / inside
    if complete.get("tokens") and "teacher_tokens" in complete:
        complete["teacher_share"] = complete["teacher_tokens"] / complete["tokens"]
    return complete


@dataclass
class Results:
    """The runs of a comparison. `rows` are those of `load_results`."""

    rows: Sequence[Row]

    def of(self, setting: Setting | None, study: str = "main", label: str | None = None) -> Iterator[Row]:
        """The rows of a setting (of all if None), a study, and a contender (all if None)."""
        for row in self.rows:
            here = setting is None or (row["env"], row["warm"]) == setting
            if here and row["study"] == study and label in (None, row["label"]):
                yield row

    def endpoint(self, setting: Setting, study: str = "main") -> str:
        """The primary endpoint of a setting."""
        return primary_endpoint(list(self.of(setting, study)))

    def endpoints(self) -> list[str]:
        """The primary endpoints of all settings of the main study, each once."""
        return list(dict.fromkeys(self.endpoint(s) for s in self.settings()))

    def settings(self, study: str = "main") -> list[Setting]:
        """Tasks in the order of the file, the weak warm start of each first."""
        settings = dict.fromkeys(Setting(r["env"], r["warm"]) for r in self.of(None, study))
        envs = list(dict.fromkeys(s.env for s in settings))
        return sorted(settings, key=lambda s: (envs.index(s.env), s.warm != PRIMARY_WARM, s.warm))

    def primary(self) -> list[Setting]:
        """One setting a task: its weak warm start, or else the first."""
        first: dict[str, Setting] = {}
        for setting in self.settings():
            first.setdefault(setting.env, setting)
        return list(first.values())

    def labels(self, setting: Setting | None = None, study: str = "main") -> list[str]:
        """Contenders in the order of the file, but ours and the baselines first."""
        labels = dict.fromkeys(r["label"] for r in self.of(setting, study))
        front = (OURS, "soft", *BASELINES)
        return sorted(labels, key=lambda label: front.index(label) if label in front else len(front))

    def by_seed(self, setting: Setting, label: str, key: str, study: str = "main") -> dict[int, float]:
        """A metric of a contender by seed. `BEFORE` is the student from which all runs of a seed started."""
        chosen, column = (None, f"before/{key}") if label == BEFORE else (label, key)
        return {r["seed"]: r[column] for r in self.of(setting, study, chosen) if column in r}

    def seeds(self, setting: Setting, label: str) -> int:
        """How many runs of a contender have finished."""
        return len({r["seed"] for r in self.of(setting, label=label)})

    def estimate(self, setting: Setting, label: str, key: str, study: str = "main") -> Estimate | None:
        """Interquartile mean over the runs; None without values."""
        values = list(self.by_seed(setting, label, key, study).values())
        return interquartile_mean(values).clipped(*metric(key).range) if values else None

    def estimates(self, setting: Setting, key: str, study: str = "main") -> dict[str, Estimate]:
        """The estimates of all contenders that have values."""
        found = {label: self.estimate(setting, label, key, study) for label in self.labels(setting, study)}
        return {label: estimate for label, estimate in found.items() if estimate}

    def difference(self, setting: Setting, label: str, baseline: str, key: str) -> PairedDifference | None:
        """label - baseline over the seeds that both have; None if they share none."""
        return paired(self.by_seed(setting, label, key), self.by_seed(setting, baseline, key))

    def improvement(self, setting: Setting, label: str, baseline: str, key: str) -> Estimate:
        """The chance that a run of `label` has a better `key` than one of `baseline`, if both have runs."""
        names = (baseline, label) if metric(key).better == "less" else (label, baseline)
        x, y = (list(self.by_seed(setting, name, key).values()) for name in names)
        return probability_of_improvement(x, y)

    def buckets(self, setting: Setting, prefix: str = "") -> list[int]:
        """The measured difficulties; `prefix` is "" or "ood/"."""
        keys = {key for row in self.rows if (row["env"], row["warm"]) == setting for key in row}
        return sorted(int(match[1]) for key in keys if (match := re.fullmatch(rf"{prefix}{ENDPOINT}/(\d+)", key)))


def paired(x: dict[int, float], y: dict[int, float]) -> PairedDifference | None:
    """The mean of x - y over the seeds of both; None if they share none."""
    shared = sorted(x.keys() & y.keys())
    return paired_difference([x[s] for s in shared], [y[s] for s in shared]) if shared else None
