"""A student with its teacher on call: hard steps are handed over when it is deployed, too.

`decode` writes answers by draft and verify without any update; tau = inf is the student alone, tau = 0 the teacher
alone. All draws are keyed by the answer's number, so that answers part only where another hand writes. `curve` sets
what such answers are worth against the share of their tokens that the teacher wrote.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.atomic_io import write_text
from distill_env.gate_settings import ALWAYS, Gate
from experiments.comparing.statistics import Estimate, proportion
from experiments.reporting import figures
from experiments.reporting.figures import Panel, Style
from experiments.reporting.results import Line, Measure, measure
from experiments.running.lifecycle import EVALUATION_SEED
from experiments.running.tracking import markdown_table

if TYPE_CHECKING:
    from agents.draft_length import DraftLength
    from agents.rollout import Rollout
    from distill_env.env import DistillVectorEnv
    from distill_env.models.base import TokenModel
    from distill_env.tasks.base import Grade, Prompt

LARGEST = sys.float_info.max  # no D_t reaches it, and unlike inf it has the gate read D_t
ON_CALL = Measure("share", "tokens that the teacher wrote", "%", 1)
WORTH = {
    m.key: m
    for m in (
        measure("correct_chains"),
        measure("accuracy"),
        Measure("divergence", "D_t of own tokens, per token of the answers", "nats", 3, less_is_better=True),
    )
}

Row = dict[str, Any]


def writer(tau: float, gate: Gate | None = None) -> Gate:
    """The hard gate on D_t, or this gate, at tau; at 0 every step is hard, so that nobody need ask."""
    return ALWAYS if tau == 0 else replace(gate or Gate(), tau=min(tau, LARGEST))


@dataclass(frozen=True)
class Decoded:
    """Answers that were written with the teacher on call: `samples` to each prompt, one after the other."""

    tau: float
    samples: int
    rollout: Rollout
    grades: list[Grade]  # empty if the task cannot grade

    @property
    def share(self) -> float:
        """Of the tokens of all answers, those that the teacher wrote."""
        return float(self.rollout.rewritten[self.rollout.mask].double().mean())

    @property
    def divergence(self) -> float:
        """Sum of D_t over own tokens, nats per token of the answers; nan where the gate reads something else.

        With rewrites by `sample` its mean is KL(these answers || the teacher's) per token (chain rule: a rewritten
        token adds 0).
        """
        own = self.rollout.mask & ~self.rollout.rewritten
        return float(self.rollout.score[own].sum()) / float(self.rollout.mask.sum())

    def grade(self, key: str) -> Estimate | None:
        """Mean of `accuracy` or `correct_chains` with the interval over prompts; None if not graded."""
        values = [g.correct if key == "accuracy" else g.chain_correct for g in self.grades]
        if not values or any(v is None for v in values):
            return None
        return proportion(np.array(values, np.float64).reshape(-1, self.samples).mean(1))


def decode(
    env: DistillVectorEnv,
    student: TokenModel,
    prompts: Sequence[Prompt],
    tau: float,
    samples: int = 1,
    gate: Gate | None = None,
    draft_length: DraftLength | int = 1,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Decoded:
    """Answers to the prompts, the teacher writing where the gate says so; arguments as of `collect` and `writer`."""
    from agents.collector import collect
    from distill_env.randomness import episode_keys

    repeated = [p for p in prompts for _ in range(samples)]
    keys = episode_keys(EVALUATION_SEED, np.arange(len(repeated)))
    chosen = writer(tau, gate)
    top_k = top_k or env.teacher_top_k
    rollout = collect(env, student, repeated, keys, chosen, draft_length, top_k, top_p, keep_teacher=False)
    grades = []
    if env.task.graded:
        answers = zip(repeated, rollout.tokens, rollout.mask, strict=True)
        grades = [env.task.grade(p, tokens[mask].tolist()) for p, tokens, mask in answers]
    return Decoded(tau, samples, rollout, grades)


# ---------------------------------------------------------------------- the curve


def curve_row(run: str, label: str, seed: int, decoded: Decoded) -> Row:
    """What a run's answers at one tau are worth and cost, a row of `curve.csv`."""
    mask = decoded.rollout.mask
    row: Row = {"run": run, "label": label, "seed": seed, "tau": decoded.tau, "share": decoded.share}
    row |= {"prompts": len(mask) // decoded.samples, "samples": decoded.samples, "tokens": int(mask.sum())}
    row |= {"teacher_tokens": int(decoded.rollout.rewritten[mask].sum())}
    for key in ("correct_chains", "accuracy"):
        estimate = decoded.grade(key)
        if estimate is not None:
            row |= {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
    if not math.isnan(decoded.divergence):
        row["divergence"] = decoded.divergence
    return row


def worth(rows: Sequence[Row]) -> Measure:
    """What the answers are judged by: correct chains, else accuracy, else how far they are from the teacher's."""
    return next(m for m in WORTH.values() if all(m.key in row for row in rows))


def over_runs(rows: Sequence[Row], key: str) -> Estimate:
    """The mean over the runs of a label with their range; of a single run its interval over prompts."""
    values = [float(row[key]) for row in rows]
    if len(values) > 1:
        return Estimate(float(np.mean(values)), min(values), max(values))
    return Estimate(values[0], *(float(rows[0].get(f"{key}_{end}", math.nan)) for end in ("low", "high")))


def by_label(rows: Sequence[Row]) -> dict[str, dict[float, list[Row]]]:
    """label -> tau, falling -> rows of its runs."""
    found: dict[str, dict[float, list[Row]]] = {}
    for row in sorted(rows, key=lambda r: -r["tau"]):
        found.setdefault(row["label"], {}).setdefault(row["tau"], []).append(row)
    return {label: found[label] for label in dict.fromkeys(row["label"] for row in rows)}


def curve_line(points: Mapping[float, Sequence[Row]], x: str, y: Measure) -> Line:
    """A label's points in the order of tau; x is `share` or `tau`, shares in percent."""
    if x == "tau":
        points = {tau: rows for tau, rows in points.items() if 0 < tau < math.inf}
    estimates = [over_runs(rows, y.key) for rows in points.values()]
    at = [tau if x == "tau" else 100 * over_runs(rows, "share").value for tau, rows in points.items()]
    middle, low, high = (np.array([getattr(e, k) for e in estimates]) * y.scale for k in ("value", "low", "high"))
    return Line(np.array(at), middle, low, high)


def write_curve(folder: Path, rows: Sequence[Row]) -> str:
    """`curve.csv`, a row a run and tau; `curve.png`; `curve.md`, the table, which is returned."""
    y, labels = worth(rows), by_label(rows)
    text = io.StringIO(newline="")
    sheet = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "curve.csv", text.getvalue())
    style = Style(tuple(labels))

    def by_share(axes: Any) -> None:
        lines = {label: curve_line(points, "share", y) for label, points in labels.items()}
        figures.curves(axes, lines, style, ON_CALL.title, y.title)

    def by_tau(axes: Any) -> None:
        lines = {label: curve_line(points, "tau", ON_CALL) for label, points in labels.items()}
        figures.curves(axes, lines, style, "tau, nats", ON_CALL.title)
        axes.set_xscale("log")
        ticks = sorted({float(x) for line in lines.values() for x in line.x})
        axes.set_xticks(ticks, [f"{tau:g}" for tau in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)

    panels = [Panel("what the teacher's tokens buy", by_share)]
    if any(0 < tau < math.inf for points in labels.values() for tau in points):
        panels.append(Panel("what tau costs", by_tau))
    figures.png(panels, folder / "curve.png", style, tuple(labels))
    table = curve_table(labels, y)
    write_text(folder / "curve.md", table + "\n")
    return table


def curve_table(labels: Mapping[str, Mapping[float, Sequence[Row]]], y: Measure) -> str:
    """A line a tau; a cell is the teacher's share of the tokens, a colon, and what the answers are worth."""
    taus = sorted({tau for points in labels.values() for tau in points}, reverse=True)
    names = {math.inf: "inf: the student alone", 0.0: "0: the teacher alone"}
    lines = [["tau, nats", *labels]]
    for tau in taus:
        cells = []
        for points in labels.values():
            share, value = over_runs(points[tau], "share"), over_runs(points[tau], y.key)
            cells.append(f"{ON_CALL.number(share.value)}%: {y.number(value.value)} {y.interval(value)}".rstrip())
        lines.append([names.get(tau, f"{tau:g}"), *cells])
    return markdown_table(lines)


def short_labels(names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Labels of runs: their folders' names without the seed and without the parts that all of them begin or end with.

    Runs with one label are one contender with several seeds.
    """
    parts = [name.removesuffix(f"-s{seed}").split("-") for name, seed in zip(names, seeds, strict=True)]
    if len({tuple(p) for p in parts}) > 1:
        for end in (0, -1):
            while all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1:
                parts = [p[1:] if end == 0 else p[:-1] for p in parts]
    return ["-".join(p) for p in parts]
