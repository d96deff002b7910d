"""The curve of assisted decoding: quality of the completions against the share of tokens that the teacher wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from agents.atomic_io import write_text
from experiments.answering.assisted import GRADES, AssistedCompletions, AssistedRun, DecodeConfig, open_task, read_run
from experiments.comparing.results_file import Row, write_csv
from experiments.comparing.statistics import Estimate
from experiments.reporting import figures
from experiments.reporting.drawing import Panel, Style, png
from experiments.reporting.training_curves import Line
from experiments.running.cli import progress_bar
from experiments.running.config import RunConfig
from experiments.running.config_file import flag_values
from experiments.running.metric_display import Metric, markdown_table, metric

TAUS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
SAME = (  # flags in which the runs of one curve agree
    *("env", "teacher", "task", "task_path", "few_shot", "chat", "max_prompt_tokens", "max_new_tokens"),
    *("rewrite", "rewrite_span", "rewrite_top_p"),
)
SHARE = Metric("share", "tokens written by the teacher", "{:.1%}")
QUALITY = (  # the first that all completions have
    metric("correct_chains"),
    metric("accuracy"),
    Metric("divergence", "D_t of the student's tokens, nats per token", "{:.3f}", "less"),
)


class Point(NamedTuple):
    """A tau: the teacher's share of the tokens, and the quality of the completions."""

    share: Estimate
    quality: Estimate


def decode_curve(config: DecodeConfig, folder: Path, console: Console) -> str:
    """Decode with every run at every tau, and write the curve into a folder. Returns its table.

    The completions of the teacher alone are the same for all runs, and decoded once.

    Raises:
        ValueError: if the runs differ in task or teacher.
    """
    opened = [read_run(folder, config) for folder in config.runs]
    check_same(opened, "rewrite" if config.rewrite else "")
    seeds = [run.agent_options.seed for run in opened]
    labels = short_labels([run.name for run in opened], seeds)
    taus = sorted({*(config.tau or TAUS), math.inf} - {0.0}, reverse=True)
    env, prompts = open_task(config, opened[0], opened[0].evaluation.prompts)
    rows: list[Row] = []
    teacher: AssistedCompletions | None = None
    with progress_bar(console) as progress:
        bar = progress.add_task("decoding", total=len(opened) * (len(taus) + 1))
        for path, label, seed in zip(config.runs, labels, seeds, strict=True):
            run = AssistedRun(path, config)
            for tau in (*taus, 0.0):
                completions = (not tau and teacher) or run.decode(env, prompts, tau)
                teacher = teacher if tau else completions
                rows.append(curve_row(run.run.name, label, seed, completions))
                progress.advance(bar)
    return write_curve(folder, rows)


def check_same(runs: Sequence[RunConfig], except_for: str) -> None:
    """Raises ValueError if a run has another value than the first in one of the flags of `SAME`."""
    first = flag_values(runs[0])
    for run in runs[1:]:
        differing = [f for f in SAME if flag_values(run)[f] != first[f] and f != except_for]
        if differing:
            names = f"{run.name!r} and {runs[0].name!r}"
            raise ValueError(f"runs: {names} differ in {differing[0]}; expected runs on one task with one teacher")


def curve_row(run: str, label: str, seed: int, completions: AssistedCompletions) -> Row:
    """Quality and cost of a run's completions at one tau, a row of `curve.csv`."""
    mask = completions.rollout.mask
    row: Row = {"run": run, "label": label, "seed": seed, "tau": completions.tau, "share": completions.teacher_share}
    row |= {"prompts": len(mask) // completions.samples, "samples": completions.samples, "tokens": int(mask.sum())}
    row |= {"teacher_tokens": int(completions.rollout.rewritten[mask].sum())}
    for key in GRADES:
        estimate = completions.grade(key)
        if estimate is not None:
            row |= {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
    if not math.isnan(completions.divergence):
        row["divergence"] = completions.divergence
    return row


def over_runs(rows: Sequence[Row], key: str) -> Estimate:
    """The mean over runs with their range; for a single run its interval over prompts."""
    values = [float(row[key]) for row in rows]
    if len(values) > 1:
        return Estimate(float(np.mean(values)), min(values), max(values))
    return Estimate(values[0], *(float(rows[0].get(f"{key}_{end}", math.nan)) for end in ("low", "high")))


def curve_points(rows: Sequence[Row], key: str) -> dict[str, dict[float, Point]]:
    """The points of each label by tau, falling; the labels in the order of the rows."""
    groups: dict[str, dict[float, list[Row]]] = {row["label"]: {} for row in rows}
    for row in sorted(rows, key=lambda r: -r["tau"]):
        groups[row["label"]].setdefault(row["tau"], []).append(row)
    return {
        label: {tau: Point(over_runs(some, "share"), over_runs(some, key)) for tau, some in by_tau.items()}
        for label, by_tau in groups.items()
    }


def write_curve(folder: Path, rows: Sequence[Row]) -> str:
    """Write `curve.csv`, a row per run and tau, `curve.png`, and the table `curve.md`, which is returned."""
    m = next(m for m in QUALITY if all(m.key in row for row in rows))
    labels = curve_points(rows, m.key)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(rows, folder / "curve.csv")
    by_share = {
        label: Line.of({SHARE.scale * p.share.value: p.quality for p in points.values()}, m.scale)
        for label, points in labels.items()
    }
    by_tau = {
        label: Line.of({tau: p.share for tau, p in points.items() if 0 < tau < math.inf}, SHARE.scale)
        for label, points in labels.items()
    }
    style = Style(tuple(labels))
    curves = partial(figures.curves, style=style, shown=list(labels))
    draw = partial(curves, values=by_share, titles=(SHARE.title, m.title))
    panels = [Panel("quality against the teacher's share", draw)]
    if any(len(line.x) for line in by_tau.values()):
        draw = partial(curves, values=by_tau, titles=("tau, nats", SHARE.title), log=True)
        panels.append(Panel("the teacher's share by tau", draw))
    png(panels, folder / "curve.png", style, tuple(labels))
    names = {math.inf: "inf: the student alone", 0.0: "0: the teacher alone"}
    table = [["tau, nats", *labels]]
    for tau in sorted({row["tau"] for row in rows}, reverse=True):
        points = [by_label[tau] for by_label in labels.values()]
        cells = [f"{SHARE.form.format(p.share.value)}: {p.quality.shown_as(m)}" for p in points]
        table.append([names.get(tau, f"{tau:g}"), *cells])
    text = markdown_table(table)
    write_text(folder / "curve.md", text + "\n")
    return text


def short_labels(names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The folders' names without the seed, and without the parts with which all of them begin or end.

    Runs that differ only by seed get one label.
    """
    parts = [name.removesuffix(f"-s{seed}").split("-") for name, seed in zip(names, seeds, strict=True)]
    if len({tuple(p) for p in parts}) > 1:
        for end in (0, -1):
            while all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1:
                parts = [p[1:] if end == 0 else p[:-1] for p in parts]
    return ["-".join(p) for p in parts]
