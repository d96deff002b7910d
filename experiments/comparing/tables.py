"""The tables of a comparison: a column a contender, paired differences by seed, and the tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.comparing.results_file import Row, primary_endpoint
from experiments.comparing.statistics import (
    Estimate,
    holm,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
)
from experiments.comparing.studies import TUNED
from experiments.running.metric_display import EVALUATION, markdown_table, metric

COST = (
    "rewritten_share_last", "teacher_tokens_per_student_token", "student_tokens", "teacher_positions",
    "loss_oscillation", "grad_norm", "seconds",
)  # fmt: skip


def by_seed(rows: Sequence[Row], label: str | None, key: str) -> dict[int, float]:
    """A metric of a contender's runs (of all runs if the label is None) by seed; runs without it are left out."""
    return {row["seed"]: float(row[key]) for row in rows if label in (None, row["label"]) and row.get(key) is not None}


def estimate(rows: Sequence[Row], label: str | None, key: str) -> Estimate | None:
    """The interquartile mean over seeds; None where nothing finite was measured."""
    values = list(by_seed(rows, label, key).values())
    if not values or not np.isfinite(values).all():
        return None
    return interquartile_mean(values).clipped(*metric(key.removeprefix("before/")).range)


def metrics_table(rows: Sequence[Row], labels: Sequence[str]) -> list[list[str]]:
    """The cells for one environment and warm start: a line a metric, a column a contender."""
    samples = max((int(k.split("@")[1]) for k in rows[0] if k.startswith("pass@")), default=1)
    evaluation = [m.key.format(k=samples) for group in EVALUATION.values() for m in group]
    lines = [["", "before", *labels]]
    for m in map(metric, (*evaluation, *COST)):
        estimates = [estimate(rows, None, f"before/{m.key}"), *(estimate(rows, c, m.key) for c in labels)]
        if any(estimates):
            lines.append([m.label, *(e.text(m.form) if e else "" for e in estimates)])
    return lines


def paired_table(rows: Sequence[Row], labels: Sequence[str], reference: str, key: str = "") -> list[list[str]]:
    """Every contender minus the reference in a metric, by default the primary endpoint, seed by seed; Holm's correction
    over the lines."""
    m = metric(key := key or primary_endpoint(rows))
    base = by_seed(rows, reference, key)
    pairs = {}
    for label in labels:
        own = by_seed(rows, label, key)
        seeds = sorted(base.keys() & own.keys())
        if label != reference and seeds:
            pairs[label] = [own[s] for s in seeds], [base[s] for s in seeds]
    differences = {label: paired_difference(x, y) for label, (x, y) in pairs.items()}
    adjusted = holm({label: d.p_value for label, d in differences.items()})
    unit = "points" if m.scale == 100 else m.label.partition(", ")[2]
    lines = [[f"minus {reference}", f"difference, {unit}", "p", "p (Holm)", "P(better)", "pairs"]]
    for label, d in differences.items():
        difference = d.estimate.scaled(m.scale).text(m.number_form(sign=True))
        good, bad = pairs[label] if m.better != "less" else pairs[label][::-1]
        better = probability_of_improvement(good, bad).text("{:.2f}")
        lines.append([label, difference, f"{d.p_value:.3f}", f"{adjusted[label]:.3f}", better, str(d.n)])
    return lines


def tuning_table(rows: Sequence[Row]) -> list[list[str]]:
    """Validation accuracy at each value: correct chains, mean over seeds and over the last third of the training. The
    best value is bold; copy it to TUNED."""
    lines = [["method", "flag", *(["value: correct chains in validation"] * 3)]]
    for name, (flag, settings, _) in TUNED.items():
        seeds = {s: by_seed(rows, f"{name} {s}", "validation_correct_chains") for s in settings}
        means = {s: float(np.mean(list(values.values()))) for s, values in seeds.items() if values}
        best = max(means, key=lambda s: means[s], default=None)
        cells = [f"**{s}: {v:.1%}**" if s == best else f"{s}: {v:.1%}" for s, v in means.items()]
        lines.append([name, f"`{flag}`", *cells, *[""] * (3 - len(cells))])
    return lines


def print_table(lines: Sequence[Sequence[str]], title: str, console: Console) -> None:
    """Lines of cells, the head first."""
    table = Table(*lines[0], title=title, title_justify="left")
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)


def write_summary(rows: Sequence[Row], labels: Sequence[str], reference: str, out: Path, console: Console) -> None:
    """Print the tables of every environment and warm start, and write them to `summary-<study>.md`."""
    text = [
        "Interquartile means over seeds with 95 % t intervals of trimmed means; paired differences of "
        f"`{primary_endpoint(rows)}` by seed with 95 % t intervals, sign-flip tests, and Holm's correction over the "
        "lines of a table.\n"
    ]
    for env, warm in dict.fromkeys((r["env"], r["warm"]) for r in rows):
        here = [r for r in rows if (r["env"], r["warm"]) == (env, warm)]
        shown = [label for label in labels if any(r["label"] == label for r in here)]
        title = f"{env}, {warm} warm start, {len({r['seed'] for r in here})} seeds"
        tables = [metrics_table(here, shown)]
        if reference in shown and len(shown) > 1:
            tables.append(paired_table(here, shown, reference))
        text.append(f"## {title}\n")
        for i, lines in enumerate(tables):
            print_table(lines, title if i == 0 else "", console)
            text.append(markdown_table(lines) + "\n")
    path = out / f"summary-{rows[0]['study']}.md"
    path.write_text("\n".join(text))
    console.print(f"Wrote {out}/results.csv and {path.name}. For figures: python experiments/report.py --runs {out}")
