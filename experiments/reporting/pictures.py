"""The pictures of the report: each function turns what was measured into blocks of a page, or none without the data."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from experiments.reporting import figures
from experiments.reporting.drawing import Panel
from experiments.reporting.figures import Point
from experiments.reporting.material import INTERVALS, Material
from experiments.reporting.page import Block, Picture, Viewer
from experiments.reporting.results import ENDPOINT
from experiments.reporting.training_curves import Line
from experiments.running.metric_display import metric

BINS = 40  # points of a curve over training
BAND = "Interquartile means over seeds; the band is the middle half of the runs, or all if there are fewer than four."


def scatter_picture(material: Material, name: str, x: str, y: str, caption: str, **options: Any) -> list[Block]:
    """One panel a setting, a point a contender."""
    panels, results = [], material.results
    for setting in results.settings():
        points = []
        for label in results.labels(setting):
            across, up = results.estimate(setting, label, x), results.estimate(setting, label, y)
            if across and up:
                points.append(Point(label, across.scaled(metric(x).scale), up.scaled(metric(y).scale)))
        if points:
            titles = metric(x).title, metric(y).title
            draw = partial(figures.scatter, points=points, style=material.style, titles=titles, **options)
            panels.append(Panel(str(setting), draw))
    if any(len(results.labels(s)) > figures.NAMED for s in results.settings()):
        caption += " Only the main methods and the most accurate others are named; the table below has all."
    return [Picture(name, panels, caption)] if panels else []


def diversity(material: Material) -> list[Block]:
    return [
        *scatter_picture(
            material, "accuracy_distinct_ways", "distinct_ways", ENDPOINT,
            f"Accuracy against the number of different correct ways among the completions of a prompt. {INTERVALS}",
        ),
        *scatter_picture(
            material, "accuracy_entropy", "entropy", ENDPOINT,
            f"Accuracy against the entropy of the student's next token. {INTERVALS}",
        ),
    ]  # fmt: skip


def cost(material: Material) -> list[Block]:
    caption = (
        "Accuracy against the share of training tokens that the teacher wrote: none for reverse KL on the student's "
        f"own completions, all for forward KL on the teacher's. {INTERVALS}"
    )
    return scatter_picture(material, "accuracy_cost", "teacher_share", ENDPOINT, caption)


def curve_picture(material: Material, name: str, key: str, caption: str, bins: int = 0) -> list[Block]:
    """One panel a setting, a line a contender."""
    titles = "iteration", metric(key.partition("/")[2]).title
    panels: list[Panel] = []
    legend: dict[str, None] = {}
    for setting in material.results.settings():
        lines = material.curves.lines(setting, key, bins)
        if lines:
            draw = partial(figures.curves, lines=lines, style=material.style, titles=titles)
            panels.append(Panel(str(setting), draw))
            legend |= dict.fromkeys(lines)
    return [Picture(name, panels, caption, list(legend))] if panels else []


def learning(material: Material) -> list[Block]:
    where = f"of the student alone on the validation split. {BAND}"
    return [
        *curve_picture(material, "learning", f"validation/{ENDPOINT}", f"Correct chains {where}"),
        *curve_picture(material, "learning_entropy", "validation/entropy", f"Entropy {where}"),
    ]


def difficulty(material: Material) -> list[Block]:
    results = material.results
    panels: list[Panel] = []
    legend: dict[str, None] = {}
    for setting in results.settings():
        inside, outside = results.buckets(setting), results.buckets(setting, "ood/")
        beyond = [b for b in outside if b not in inside]
        keys = {b: f"{ENDPOINT}/{b}" for b in inside} | {b: f"ood/{ENDPOINT}/{b}" for b in beyond}
        values = {
            label: {b: e.scaled(100) for b, k in keys.items() if (e := results.estimate(setting, label, k))}
            for label in results.labels(setting)
        }
        values = {k: v for k, v in values.items() if v}
        if values:
            y_label = metric(ENDPOINT).title
            draw = partial(figures.by_difficulty, values=values, outside=beyond, style=material.style, y_label=y_label)
            panels.append(Panel(str(setting), draw))
            legend |= dict.fromkeys(values)
    caption = f"Correct chains by the difficulty of the test problem. {INTERVALS}"
    return [Picture("difficulty_buckets", panels, caption, list(legend))] if panels else []


def out_of_distribution(material: Material) -> list[Block]:
    caption = f"Accuracy out of distribution against accuracy in distribution; dashed: the share kept. {INTERVALS}"
    shares = (0.25, 0.5, 0.75, 1.0)
    return scatter_picture(material, "in_and_out", ENDPOINT, f"ood/{ENDPOINT}", caption, diagonals=shares)


def hard_positions(material: Material) -> list[Block]:
    blocks = curve_picture(
        material, "hard_training", "rollout/hard_share",
        "Share of the training positions that the method's own gate finds hard. The positions are in the student's "
        f"completions, the teacher's, or both, as the method has it. {BAND}", BINS,
    )  # fmt: skip
    lines = {}
    for label, run in material.seen.items():
        shares = 100 * np.array(run["hard_by_position"])
        lines[label] = Line(np.arange(1, len(shares) + 1.0), shares, shares, shares)
    if lines:
        titles = "position in the completion, tokens", "hard positions, %"
        draw = partial(figures.curves, lines=lines, style=material.style, titles=titles)
        caption = (
            "Share of hard positions, by the run's own gate, in about 100 completions that the trained student writes "
            "alone; one run a contender. Only long completions reach late positions."
        )
        where = next(iter(material.seen.values()))["setting"]
        blocks.append(Picture("hard_position", [Panel(where, draw)], caption, list(lines)))
    return blocks


def stability(material: Material) -> list[Block]:
    panels, results = [], material.results
    for setting in results.primary():
        for key in ("loss_oscillation", "grad_norm", "collapse"):
            m = metric(key)
            estimates = {k: results.estimate(setting, k, key) for k in results.labels(setting)}
            values = {k: e.scaled(m.scale) for k, e in estimates.items() if e}
            if values:
                draw = partial(figures.dots, values=values, style=material.style, x_label=m.title)
                panels.append(Panel(f"{m.label}: {setting}", draw, 0.75 + 0.27 * max(len(values), 4)))
    caption = (
        "Loss oscillation is the mean absolute change of the loss from one iteration to the next. The gradient norm is "
        "the mean before clipping. Both depend on the loss, and the losses of the methods differ. " + INTERVALS
    )
    return [Picture("stability_dots", panels, caption)] if panels else []


def gate_viewer(material: Material) -> list[Block]:
    if not material.seen:
        return []
    first = next(iter(material.seen.values()))
    scale = 2 * first["tau"] if first["tau"] else 1.0
    data = {
        "prompts": first["prompts"],
        "scale": scale,
        "contenders": [
            {"label": k, "colour": material.style[k][0], **{key: run[key] for key in ("tau", "assisted", "alone")}}
            for k, run in material.seen.items()
        ],
    }
    seeds = sorted({run["seed"] for run in material.seen.values()})
    common = (
        f"{first['setting']}, seed {', '.join(map(str, seeds))}. The background of a token shows D\u209c = KL(student "
        "|| teacher) before it. Tokens at hard positions are underlined, the teacher's tokens are boxed. All "
        "completions use the same random numbers, so they differ only where the distributions do."
    )
    caption = f"{common} Point at a token, or move to it with Tab and the arrow keys, to see both distributions."
    rewrites = [
        sum(t["rewritten"] for run in material.seen.values() for t in run["assisted"][i]["tokens"])
        for i in range(len(first["prompts"]))
    ]
    at = int(np.argmax(rewrites))  # the prompt that shows most
    chosen = [{"label": k, **run["assisted"][at]} for k, run in material.seen.items()]
    draw = partial(figures.tokens, completions=chosen, scale=scale)
    panel = Panel(f"{first['prompts'][at][:60]}, with the teacher's help", draw, 0.5 + 0.36 * len(chosen))
    picture = Picture("gate", [panel], f"Completions of one prompt with the teacher's help. {common}")
    return [Viewer(data, caption, picture)]
