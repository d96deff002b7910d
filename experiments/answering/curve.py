"""The curve of assisted decoding: quality of the completions against what the teacher did for them, gate by gate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from agents.atomic_io import write_text
from agents.metrics import HIGH_DIVERGENCE
from experiments.answering.areas import area_table
from experiments.answering.assisted import (
    GRADES,
    AssistedCompletions,
    AssistedRun,
    DecodeConfig,
    open_task,
    open_validation,
    read_run,
)
from experiments.answering.gates import Reading
from experiments.answering.prices import Prices
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
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the student's positions that are hard, for scores with other units
MOST_DRAWN = 0.4  # share of the tokens, up to which curves of several gates are drawn
MOST_BANDS = 4  # curves; the bands of more would hide one another
BINS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, math.inf)  # of the predicted D_t, nats
SHARE = Metric("share", "tokens written by the teacher", "{:.1%}")
QUALITY = (  # the first that all completions have
    metric("correct_chains"),
    metric("accuracy"),
    Metric("divergence", "D_t of the student's tokens, nats per token", "{:.3f}", "less"),
)


class Point(NamedTuple):
    """A threshold: the teacher's share of the tokens, the price of a completion, and the quality of the completions."""

    share: Estimate
    price: Estimate
    quality: Estimate


def decode_curve(config: DecodeConfig, folder: Path, console: Console) -> str:
    """Decode with every run, score and threshold, and write the curves into a folder. Returns their table.

    The completions of the teacher alone are the same for all runs, and decoded once, those of the student alone once a
    run.

    Raises:
        ValueError: if the runs differ in task or teacher.
    """
    opened = [read_run(folder, config) for folder in config.runs]
    check_same(opened, "rewrite" if config.rewrite else "")
    seeds = [run.agent_options.seed for run in opened]
    methods = short_labels([run.name for run in opened], seeds)
    grid = grid_of(config)
    env, prompts = open_task(config, opened[0], opened[0].evaluation.prompts)
    screened = any("@" in name for name in config.score)
    validation = open_validation(config, opened[0], opened[0].evaluation.prompts) if screened else (env, [])
    rows: list[Row] = []
    readings: list[Row] = []
    teacher: AssistedCompletions | None = None
    with progress_bar(console) as progress:
        bar = progress.add_task("decoding", total=len(opened) * (len(config.score) * len(grid) + 2))
        for path, method, seed in zip(config.runs, methods, seeds, strict=True):
            run = AssistedRun(path, config)
            gates = {name: run.gate(name, *validation) for name in config.score}
            reading = run.read(env, prompts, gates) if env.task.graded or config.budget or not by_tau(config) else None
            first = next(iter(gates.items()))
            alone = run.decode(env, prompts, math.inf, first[1], first[0])
            teacher = teacher or run.decode(env, prompts, 0.0, first[1], first[0])
            progress.advance(bar, 2)
            for name, gate in gates.items():
                label = label_of(method, name, len(set(methods)), len(gates))
                taus = grid if by_tau(config) else thresholds(reading, name, grid)
                for tau in (math.inf, *taus, 0.0):
                    ends = {math.inf: alone, 0.0: teacher}
                    completions = ends[tau] if tau in ends else run.decode(env, prompts, tau, gate, name)
                    rows.append(curve_row(run.run.name, label, seed, name, tau, completions, config.prices))
                    progress.advance(bar, tau not in ends)
                if reading is not None:
                    readings += reading_rows(run.run.name, label, seed, name, reading)
    return write_curve(folder, rows, readings, table=by_tau(config))


def by_tau(config: DecodeConfig) -> bool:
    """Whether the grid is one of thresholds, which all curves share; else it is one of shares."""
    return bool(config.tau) or (not config.budget and set(config.score) <= {"divergence", "run"})


def grid_of(config: DecodeConfig) -> list[float]:
    """Thresholds, falling, or shares, rising; without both ends."""
    if by_tau(config):
        return sorted({*(config.tau or TAUS)} - {0.0, math.inf}, reverse=True)
    return sorted({*(config.budget or SHARES)})


def thresholds(reading: Reading | None, name: str, shares: Sequence[float]) -> list[float]:
    """The thresholds, falling, that these shares of a student's own positions reach; 0 and ties are left out."""
    assert reading is not None
    return sorted({tau for share in shares if (tau := reading.threshold(name, share)) > 0}, reverse=True)


def label_of(method: str, score: str, methods: int, scores: int) -> str:
    """What tells a curve from the others."""
    if scores == 1:
        return method
    return score if methods == 1 else f"{method}, {score}"


def check_same(runs: Sequence[RunConfig], except_for: str) -> None:
    """Raises ValueError if a run has another value than the first in one of the flags of `SAME`."""
    first = flag_values(runs[0])
    for run in runs[1:]:
        differing = [f for f in SAME if flag_values(run)[f] != first[f] and f != except_for]
        if differing:
            names = f"{run.name!r} and {runs[0].name!r}"
            raise ValueError(f"runs: {names} differ in {differing[0]}; expected runs on one task with one teacher")


def curve_row(
    run: str, label: str, seed: int, score: str, tau: float, completions: AssistedCompletions, prices: Prices
) -> Row:
    """Quality and cost of a run's completions at one threshold, a row of `curve.csv`."""
    mask, usage = completions.rollout.mask, completions.usage
    row: Row = {"run": run, "label": label, "seed": seed, "score": score, "tau": tau}
    row |= {"share": completions.teacher_share, "prompts": len(mask) // completions.samples}
    row |= {"samples": completions.samples, "tokens": int(mask.sum()), "teacher_tokens": usage.written}
    row |= {name: count for name, count in asdict(usage).items() if name != "written"}
    row |= {"price": usage.price(prices) / len(mask), "price_without_cache": usage.price(prices, False) / len(mask)}
    row |= {"seconds": completions.rollout.cost.seconds, "teacher_seconds": completions.rollout.cost.teacher_seconds}
    for key in GRADES:
        estimate = completions.grade(key)
        if estimate is not None:
            row |= {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
    if not math.isnan(completions.divergence):
        row["divergence"] = completions.divergence
    return row


def reading_rows(run: str, label: str, seed: int, score: str, reading: Reading) -> list[Row]:
    """How well a gate finds the positions with D_t >= 0.5 nats of the student alone; for the hand-over head also the
    mean of D_t where it predicts about as much. Rows of `reading.csv`."""
    row: Row = {"run": run, "label": label, "seed": seed, "score": score}
    rows = [row | {"auroc": reading.auroc(score, HIGH_DIVERGENCE)}]
    if score == "predicted_divergence":
        predicted, true = reading.scores[score], reading.divergence
        for low, high in itertools.pairwise(BINS):
            inside = (predicted >= low) & (predicted < high)
            if inside.any():
                means = {"predicted": float(predicted[inside].mean()), "true": float(true[inside].mean())}
                rows.append(row | {"from": low, "positions": int(inside.sum())} | means)
    return rows


def over_runs(rows: Sequence[Row], key: str) -> Estimate:
    """The mean over runs with their range; for a single run its interval over prompts."""
    values = [float(row[key]) for row in rows]
    if len(values) > 1:
        return Estimate(float(np.mean(values)), min(values), max(values))
    return Estimate(values[0], *(float(rows[0].get(f"{key}_{end}", math.nan)) for end in ("low", "high")))


def curve_points(rows: Sequence[Row], key: str) -> dict[str, dict[float, Point]]:
    """The points of each label, the student alone first; the labels in the order of the rows.

    Runs that differ by seed have thresholds of their own where these were set by a share: their points are joined in
    order, and named by the mean threshold.
    """
    groups: dict[str, dict[str, list[Row]]] = {row["label"]: {} for row in rows}
    for row in sorted(rows, key=lambda r: -r["tau"]):
        groups[row["label"]].setdefault(row["run"], []).append(row)
    points: dict[str, dict[float, Point]] = {}
    for label, by_run in groups.items():
        shortest = min(map(len, by_run.values()))  # ties may have left out a threshold
        columns = zip(*([*some[: shortest - 1], some[-1]] for some in by_run.values()), strict=True)
        points[label] = {
            one_tau(some): Point(*(over_runs(some, k) for k in ("share", "price", key))) for some in columns
        }
    return points


def one_tau(rows: Sequence[Row]) -> float:
    """The threshold of these rows, or the mean of their thresholds."""
    taus = [row["tau"] for row in rows]
    return float(taus[0] if len(set(taus)) == 1 else np.mean(taus))


def write_curve(folder: Path, rows: Sequence[Row], readings: Sequence[Row], table: bool) -> str:
    """Write `curve.csv`, a row per run, score and threshold, `reading.csv`, `curve.png` and the table `curve.md`, which
    is returned. `table` says whether all curves have the same thresholds, which the table then lists."""
    m = next(m for m in QUALITY if all(m.key in row for row in rows))
    labels = curve_points(rows, m.key)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(rows, folder / "curve.csv")
    if readings:
        write_csv(readings, folder / "reading.csv")
    style = Style(tuple(labels), crowd=len(labels))
    png(panels_of(labels, readings, m, style, table), folder / "curve.png", style, tuple(labels))
    text = markdown_table(tau_table(rows, labels, m) if table else area_table(rows, readings, m))
    write_text(folder / "curve.md", text + "\n")
    return text


def panels_of(
    labels: Mapping[str, Mapping[float, Point]], readings: Sequence[Row], m: Metric, style: Style, by_tau: bool
) -> list[Panel]:
    """Quality against the teacher's share and against the price; then the share by tau, or the head's calibration."""
    draw = partial(figures.curves, style=style, shown=list(labels))

    def drawn(p: Point) -> Estimate:
        return p.quality if len(labels) <= MOST_BANDS else Estimate(*(3 * [p.quality.value]))

    near = {  # what is beyond says little about several gates
        label: [p for p in points.values() if by_tau or p.share.value <= MOST_DRAWN] for label, points in labels.items()
    }
    by_share = {
        label: Line.of({SHARE.scale * p.share.value: drawn(p) for p in points}, m.scale)
        for label, points in near.items()
    }
    by_price = {
        label: Line.of({p.price.value: drawn(p) for p in points if p.share.value < 1}, m.scale)
        for label, points in near.items()
    }
    panels = [
        Panel("quality against the teacher's share", partial(draw, values=by_share, titles=(SHARE.title, m.title))),
        Panel("quality against price", partial(draw, values=by_price, titles=("price per completion", m.title))),
    ]
    shares = {
        label: Line.of({tau: p.share for tau, p in points.items() if 0 < tau < math.inf}, SHARE.scale)
        for label, points in labels.items()
    }
    if by_tau and any(len(line.x) for line in shares.values()):
        panels.append(
            Panel("the teacher's share by tau", partial(draw, values=shares, titles=("tau", SHARE.title), log=True))
        )
    bins: dict[str, dict[float, list[Row]]] = {}
    for row in readings:
        if "from" in row:
            bins.setdefault(row["label"], {}).setdefault(row["from"], []).append(row)
    if bins:
        lines = {
            label: Line.of({over_runs(some, "predicted").value: over_runs(some, "true") for some in by_bin.values()}, 1)
            for label, by_bin in bins.items()
        }
        panels.append(Panel("calibration of the head", partial(figures.calibration, values=lines, style=style)))
    return panels


def tau_table(rows: Sequence[Row], labels: Mapping[str, Mapping[float, Point]], m: Metric) -> list[list[str]]:
    """A line a threshold, a column a curve: the teacher's share, and the quality."""
    names = {math.inf: "inf: the student alone", 0.0: "0: the teacher alone"}
    lines = [["tau, nats" if {row["score"] for row in rows} == {"divergence"} else "tau", *labels]]
    for tau in sorted({row["tau"] for row in rows}, reverse=True):
        points = [by_label[tau] for by_label in labels.values()]
        cells = [f"{SHARE.form.format(p.share.value)}: {p.quality.shown_as(m)}" for p in points]
        lines.append([names.get(tau, f"{tau:g}"), *cells])
    return lines


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
