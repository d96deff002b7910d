"""Comparison folders made of random numbers, for the tests of the report: no run stands behind them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLUMNS = ("env", "warm", "label", "seed", "run", "study")
MEASURED = {
    # mean and spread between contenders
    "correct_chains": (0.75, 0.08),
    "accuracy": (0.8, 0.06),
    "ood/correct_chains": (0.3, 0.08),
    "ood/accuracy": (0.4, 0.08),
    "distinct_ways": (3.2, 0.5),
    "entropy": (0.25, 0.07),
    "collapse": (0.04, 0.02),
    "divergence": (0.35, 0.08),
    "high_divergence_share": (0.12, 0.03),
    "hard_share": (0.12, 0.03),
    "perplexity": (1.35, 0.08),
    "loss_oscillation": (0.04, 0.015),
    "grad_norm": (2.0, 0.8),
    "teacher_tokens": (40_000.0, 15_000.0),
    "teacher_positions": (350_000.0, 20_000.0),
    **{f"correct_chains/{d}": (1.1 - 0.1 * d, 0.06) for d in (2, 3, 4, 5)},
    **{f"ood/correct_chains/{d}": (1.1 - 0.13 * d, 0.06) for d in (6, 7)},
}
LABELS = (
    *("gated", "soft", "rkl", "fkl", "rewrite_only", "gate_only", "random_rewrite"),
    *("sft", "gkd", "rival_one", "rival_two", "rival_three"),
)


def random_rows(
    settings: Sequence[tuple[str, str]] = (("sums", "weak"),),
    labels: Sequence[str] = ("gated", "rkl", "fkl", "rewrite_only"),
    seeds: int = 4,
    study: str = "main",
) -> list[dict[str, str | float]]:
    """Rows of a results.csv: contenders differ, seeds scatter around them."""
    rng = np.random.default_rng(len(labels))
    rows: list[dict[str, str | float]] = []
    for env, warm in settings:
        for label in labels:
            level = {key: rng.normal(mean, spread) for key, (mean, spread) in MEASURED.items()}
            start = rng.normal(0.35, 0.02, seeds)
            for seed in range(seeds):
                row: dict[str, str | float] = dict(zip(COLUMNS, (env, warm, label, seed, "", study), strict=True))
                row["run"] = f"{env}-{warm}-{label.replace(' ', '-').replace(',', '')}-s{seed}"
                row |= {k: abs(rng.normal(level[k], 0.4 * spread)) for k, (_, spread) in MEASURED.items()}
                row |= {"tokens": 300_000, "before/correct_chains": start[seed], "iterations": 400}
                rows.append(row)
    return rows


def write_comparison(folder: Path, rows: Sequence[dict[str, str | float]], curves: bool = False) -> Path:
    """`results.csv`, and with `curves` a metrics.csv for every run."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "results.csv", rows)
    rng = np.random.default_rng(0)
    for row in rows if curves else ():
        (folder / str(row["run"])).mkdir()
        noise = rng.normal(0, 0.02, (400, 3))
        rise = 1 - np.exp(-np.arange(400) / 80)
        logged: list[dict[str, str | float]] = []
        for i in range(400):
            logged.append({"iteration": i + 1, "rollout/hard_share": abs(0.25 - 0.15 * rise[i] + noise[i, 0])})
            if i % 10 == 9:
                for column, key, start in ((1, "correct_chains", 0.35), (2, "entropy", 0.45)):
                    logged[-1][f"validation/{key}"] = start + (float(row[key]) - start) * rise[i] + noise[i, column] / 2
        _write(folder / str(row["run"]) / "metrics.csv", logged)
    return folder


def _write(path: Path, rows: Sequence[dict[str, str | float]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        writer.writerows(rows)
