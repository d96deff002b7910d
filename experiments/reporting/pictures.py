"""The pictures of the report: each function turns what was measured into blocks of a page, or none without the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from experiments.comparing.results_file import ENDPOINT
from experiments.comparing.statistics import Estimate
from experiments.reporting import figures
from experiments.reporting.drawing import PAGE, Panel
from experiments.reporting.material import Material, text
from experiments.reporting.page import Block, Picture, Viewer
from experiments.reporting.training_curves import Line
from experiments.running.metric_display import metric

BINS = 40  # points of a curve over training


def by_setting(
    material: Material, name: str, found: Mapping[Any, Mapping[str, Any]], draw: Callable[..., None], **gaps: str
) -> Picture:
    """One panel a setting, for the data of each contender; the legend is common. `gaps` are those of the caption."""
    legend = list(dict.fromkeys(chain(*found.values())))
    options: dict[str, Any] = {"style": material.style, "shown": material.style.legend(legend)[0]}
    panels = [
        Panel(str(setting), partial(draw, **options, values=values)) for setting, values in found.items() if values
    ]
    return Picture(name, panels, text(name, **gaps), legend)


def scatter_picture(material: Material, name: str, x: str, y: str, **options: Any) -> Picture:
    """One panel for each setting whose primary endpoint is (that without its split) y, a point a contender."""
    found = {}
    for setting in material.results.settings():
        if material.results.endpoint(setting) != y.removeprefix("ood/"):
            continue
        across, up = (material.results.estimates(setting, key) for key in (x, y))
        found[setting] = {
            k: (across[k].scaled(metric(x).scale), up[k].scaled(metric(y).scale)) for k in across if k in up
        }
    draw = partial(figures.scatter, titles=(metric(x).title, metric(y).title), **options)
    return by_setting(material, name, found, draw, quality=sentence_case(metric(y).label.partition(", ")[0]))


def sentence_case(words: str) -> str:
    return words[0].upper() + words[1:]


def scatter_pictures(material: Material, **x_by_name: str) -> list[Block]:
    """The primary endpoints against other metrics; `x_by_name` are the metrics by the names of the pictures."""
    keys = material.results.endpoints()
    names = {(name, y): name if y == ENDPOINT else f"{name}_{y}" for name in x_by_name for y in keys}
    return [
        replace(scatter_picture(material, name, x_by_name[name], y), name=full) for (name, y), full in names.items()
    ]


def diversity(material: Material) -> list[Block]:
    return scatter_pictures(material, accuracy_distinct_ways="distinct_ways", accuracy_entropy="entropy")


def cost(material: Material) -> list[Block]:
    return scatter_pictures(material, accuracy_cost="teacher_share")


def curve_picture(material: Material, name: str, key: str, bins: int = 0) -> Picture:
    """One panel a setting, a line a contender."""
    found = {setting: material.curves.lines(setting, key, bins) for setting in material.results.settings()}
    draw = partial(figures.curves, titles=("iteration", metric(key.partition("/")[2]).title))
    return by_setting(material, name, found, draw)


def learning(material: Material) -> list[Block]:
    return [
        curve_picture(material, "learning", f"validation/{ENDPOINT}"),
        curve_picture(material, "learning_forward_kl", "validation/forward_kl"),
        curve_picture(material, "learning_entropy", "validation/entropy"),
    ]


def difficulty(material: Material) -> list[Block]:
    results, m = material.results, metric(ENDPOINT)
    found: dict[str, dict[str, Line]] = {}
    for setting in results.settings():
        inside, outside = results.buckets(setting), results.buckets(setting, "ood/")
        keys = {b: f"ood/{m.key}/{b}" for b in outside} | {b: f"{m.key}/{b}" for b in inside}
        values: dict[str, dict[float, Estimate]] = {}
        for bucket, key in sorted(keys.items()):
            for label, estimate in results.estimates(setting, key).items():
                values.setdefault(label, {})[bucket] = estimate
        beyond = ", ".join(str(b) for b in outside if b not in inside)
        title = f"{setting}{f'; out of distribution: {beyond}' if beyond else ''}"
        found[title] = {label: Line.of(estimates, m.scale) for label, estimates in values.items()}
    draw = partial(figures.curves, titles=("difficulty", m.title))
    return [by_setting(material, "difficulty_buckets", found, draw)]


def out_of_distribution(material: Material) -> list[Block]:
    shares = (0.25, 0.5, 0.75, 1.0)
    return [scatter_picture(material, "in_and_out", ENDPOINT, f"ood/{ENDPOINT}", diagonals=shares)]


def hard_positions(material: Material) -> list[Block]:
    training = curve_picture(material, "hard_training", "rollout/hard_share", BINS)
    if not material.seen:
        return [training]
    lines = {}
    for label, run in material.seen.items():
        shares = 100 * np.array(run["hard_by_position"])
        lines[label] = Line(np.arange(1, len(shares) + 1.0), shares, shares, shares)
    titles = "position in the completion, tokens", "hard positions, %"
    draw = partial(figures.curves, values=lines, style=material.style, shown=list(lines), titles=titles)
    where = next(iter(material.seen.values()))["setting"]
    return [training, Picture("hard_position", [Panel(where, draw)], text("hard_position"), list(lines))]


def stability(material: Material) -> list[Block]:
    panels = []
    for setting in material.results.primary():
        for m in map(metric, ("loss_oscillation", "grad_norm", "collapse")):
            values = {k: e.scaled(m.scale) for k, e in material.results.estimates(setting, m.key).items()}
            if values:
                draw = partial(figures.dots, values=values, style=material.style, x_label=m.title)
                panels.append(Panel(f"{m.label}: {setting}", draw, 0.75 + 0.27 * max(len(values), 4)))
    return [Picture("stability_dots", panels, text("stability_dots"))]


def colour_scale(seen: Mapping[str, Mapping[str, Any]]) -> float:
    """The D_t that the viewer shows in full colour, nats: what one position in twenty exceeds, but at least the largest
    tau, to one digit.

    So the colours tell the positions apart both of students that are far from their teacher and of those that are near.
    """
    shown = [t["d"] for run in seen.values() for mode in ("assisted", "alone") for c in run[mode] for t in c["tokens"]]
    largest = max([float(np.quantile(shown, 0.95)), *(run["tau"] or 0.0 for run in seen.values())])
    return float(f"{largest:.1g}") if largest > 0 else 1.0


def gate_viewer(material: Material) -> list[Block]:
    if not material.seen:
        return []
    first = next(iter(material.seen.values()))
    data = {
        "prompts": first["prompts"],
        "scale": colour_scale(material.seen),
        "contenders": [
            {"label": k, "colour": material.style[k][0], **{key: run[key] for key in ("tau", "assisted", "alone")}}
            for k, run in material.seen.items()
        ],
    }
    seeds = sorted({run["seed"] for run in material.seen.values()})
    rewrites = [
        sum(t["rewritten"] for run in material.seen.values() for t in run["assisted"][i]["tokens"])
        for i in range(len(first["prompts"]))
    ]
    at = int(np.argmax(rewrites))  # the prompt that shows most
    panels = []
    for label, run in material.seen.items():
        tokens = run["assisted"][at]["tokens"]
        texts, scores, rewritten = ([token[key] for token in tokens] for key in ("text", "d", "rewritten"))
        draw = partial(figures.gate, texts=texts, scores=scores, rewritten=rewritten, tau=run["tau"])
        panels.append(Panel(label, draw, width=PAGE))
    facts = {"where": first["setting"], "seeds": ", ".join(map(str, seeds))}
    picture = Picture("gate", panels, text("gate", prompt=first["prompts"][at][:60], **facts))
    return [Viewer(data, text("viewer", **facts), picture)]
