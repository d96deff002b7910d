"""Curves of quality against the teacher's share of the tokens, in numbers: areas, values at equal shares, and work.

A curve is the rows of one run with one gate, from the student alone (share 0) to the teacher alone (share 1); between
its points it is a straight line.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.comparing.results_file import Row
from experiments.comparing.statistics import mean, paired_difference
from experiments.running.metric_display import Metric

LARGEST_SHARE = 0.2  # of the tokens, up to which the area is taken
AT = (0.05, 0.1, 0.15, 0.2, 0.3)  # shares at which curves are compared
WORK_AT = 0.1  # share at which the teacher's work is compared


def value_at(curve: Sequence[Row], key: str, share: float) -> float:
    """The value of a curve at a share of the tokens."""
    ordered = sorted(curve, key=lambda row: row["share"])
    return float(np.interp(share, [row["share"] for row in ordered], [row[key] for row in ordered]))


def area(curve: Sequence[Row], key: str, most: float = LARGEST_SHARE) -> float:
    """The mean value of a curve between a share of 0 and one of `most`."""
    ordered = sorted(curve, key=lambda row: row["share"])
    inside = [row for row in ordered if row["share"] < most]
    x = np.array([*(row["share"] for row in inside), most])
    y = np.array([*(row[key] for row in inside), value_at(ordered, key, most)])
    return float(np.trapezoid(y, x)) / most


def work_at(curve: Sequence[Row], key: str, share: float = WORK_AT) -> float:
    """A count per token at a share of the tokens."""
    return value_at([row | {key: row[key] / row["tokens"]} for row in curve], key, share)


def area_table(rows: Sequence[Row], readings: Sequence[Row], m: Metric) -> list[list[str]]:
    """A line a gate: the area under its curve, less that under the first one, values at equal shares, what the teacher
    does at a tenth of the tokens, and how well the gate finds hard positions (AUROC). Means over seeds, t intervals;
    differences are paired by seed."""
    curves: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        curves.setdefault(row["label"], {}).setdefault(row["seed"], []).append(row)
    areas = {label: {seed: area(c, m.key) for seed, c in by_seed.items()} for label, by_seed in curves.items()}
    first = next(iter(areas.values()))
    number = m.number_form()
    lines = [["gate", f"{m.title}: mean up to {LARGEST_SHARE:.0%} of the tokens", "less the first"]]
    lines[0] += [f"at {share:.0%}" for share in AT]
    lines[0] += [f"{what} at {WORK_AT:.0%}" for what in ("scored", "processed", "calls per 100 tokens")] + ["AUROC"]
    for label, by_seed in curves.items():
        own = areas[label]
        paired = sorted(own.keys() & first.keys())
        line = [label, mean(list(own.values())).clipped(*m.range).shown_as(m), ""]
        if own is not first and paired:
            difference = paired_difference([own[s] for s in paired], [first[s] for s in paired])
            line[2] = difference.estimate.shown_as(m, sign=True)
        line += [number.format(m.scale * np.mean([value_at(c, m.key, x) for c in by_seed.values()])) for x in AT]
        work = {k: np.mean([work_at(c, k) for c in by_seed.values()]) for k in ("scored", "processed", "calls")}
        line += [f"{work['scored']:.0%}", f"{work['processed']:.0%}", f"{100 * work['calls']:.1f}"]
        found = [row["auroc"] for row in readings if row["label"] == label and "auroc" in row]
        lines.append([*line, f"{np.mean(found):.3f}" if found else "n/a"])
    return lines
