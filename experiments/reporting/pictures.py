"""The pictures of the report: each function turns what was measured into blocks of a page, or none without the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from experiments.comparing.statistics import Estimate
from experiments.reporting import figures
from experiments.reporting.drawing import PAGE, Panel
from experiments.reporting.material import INTERVALS, Material
from experiments.reporting.page import Block, Picture, Viewer
from experiments.reporting.results import ENDPOINT, Setting
from experiments.reporting.training_curves import Line
from experiments.running.metric_display import metric

BINS = 40  # points of a curve over training
BAND = "Interquartile means over seeds; the band is the middle half of the runs, or all if there are fewer than four."


def by_setting(
    material: Material, name: str, caption: str, found: Mapping[Setting, Mapping[str, Any]], draw: Callable[..., None]
) -> Picture:
    """One panel a setting, for the data of each contender; the legend is common."""
    legend = list(dict.fromkeys(chain(*found.values())))
    options: dict[str, Any] = {"style": material.style, "shown": material.style.legend(legend)[0]}
    panels = [
        Panel(str(setting), partial(draw, **options, values=values)) for setting, values in found.items() if values
    ]
    return Picture(name, panels, caption, legend)


def scatter_picture(material: Material, name: str, x: str, y: str, caption: str, **options: Any) -> Picture:
    """One panel a setting, a point a contender."""
    found = {}
    for setting in material.results.settings():
        across, up = (material.results.estimates(setting, key) for key in (x, y))
        found[setting] = {
            k: (across[k].scaled(metric(x).scale), up[k].scaled(metric(y).scale)) for k in across if k in up
        }
    draw = partial(figures.scatter, titles=(metric(x).title, metric(y).title), **options)
    return by_setting(material, name, f"{caption} {INTERVALS}", found, draw)


def diversity(material: Material) -> list[Block]:
    ways = "Accuracy against the number of different correct ways among the completions of a prompt."
    entropy = "Accuracy against the entropy of the student's next token."
    return [
        scatter_picture(material, "accuracy_distinct_ways", "distinct_ways", ENDPOINT, ways),
        scatter_picture(material, "accuracy_entropy", "entropy", ENDPOINT, entropy),
    ]


def cost(material: Material) -> list[Block]:
    caption = (
        "Accuracy against the share of training tokens that the teacher wrote: none for reverse KL on the student's "
        "own completions, all for forward KL on the teacher's."
    )
    return [scatter_picture(material, "accuracy_cost", "teacher_share", ENDPOINT, caption)]


def curve_picture(material: Material, name: str, key: str, caption: str, bins: int = 0) -> Picture:
    """One panel a setting, a line a contender."""
    found = {setting: material.curves.lines(setting, key, bins) for setting in material.results.settings()}
    draw = partial(figures.curves, titles=("iteration", metric(key.partition("/")[2]).title))
    return by_setting(material, name, f"{caption} {BAND}", found, draw)


def learning(material: Material) -> list[Block]:
    where = "of the student alone on the validation split."
    return [
        curve_picture(material, "learning", f"validation/{ENDPOINT}", f"Correct chains {where}"),
        curve_picture(material, "learning_entropy", "validation/entropy", f"Entropy {where}"),
    ]


def difficulty(material: Material) -> list[Block]:
    results = material.results
    found: dict[Setting, dict[str, dict[tuple[int, bool], Estimate]]] = {}
    for setting in results.settings():
        inside = results.buckets(setting)
        found[setting] = {}
        for bucket in sorted({*inside, *results.buckets(setting, "ood/")}):
            key = f"{ENDPOINT}/{bucket}" if bucket in inside else f"ood/{ENDPOINT}/{bucket}"
            for label, estimate in results.estimates(setting, key).items():
                found[setting].setdefault(label, {})[bucket, bucket not in inside] = estimate.scaled(100)
    caption = f"Correct chains by the difficulty of the test problem. {INTERVALS}"
    draw = partial(figures.by_difficulty, y_label=metric(ENDPOINT).title)
    return [by_setting(material, "difficulty_buckets", caption, found, draw)]


def out_of_distribution(material: Material) -> list[Block]:
    caption = "Accuracy out of distribution against accuracy in distribution; dashed: the share kept."
    shares = (0.25, 0.5, 0.75, 1.0)
    return [scatter_picture(material, "in_and_out", ENDPOINT, f"ood/{ENDPOINT}", caption, diagonals=shares)]


def hard_positions(material: Material) -> list[Block]:
    training = curve_picture(
        material, "hard_training", "rollout/hard_share",
        "Share of the training positions that the method's own gate finds hard. The positions are in the student's "
        "completions, the teacher's, or both, as the method has it.", BINS,
    )  # fmt: skip
    if not material.seen:
        return [training]
    lines = {}
    for label, run in material.seen.items():
        shares = 100 * np.array(run["hard_by_position"])
        lines[label] = Line(np.arange(1, len(shares) + 1.0), shares, shares, shares)
    titles = "position in the completion, tokens", "hard positions, %"
    draw = partial(figures.curves, values=lines, style=material.style, shown=list(lines), titles=titles)
    caption = (
        "Share of hard positions, by the run's own gate, in about 100 completions that the trained student writes "
        "alone; one run a contender. Only long completions reach late positions."
    )
    where = next(iter(material.seen.values()))["setting"]
    return [training, Picture("hard_position", [Panel(where, draw)], caption, list(lines))]


def stability(material: Material) -> list[Block]:
    panels = []
    for setting in material.results.primary():
        for m in map(metric, ("loss_oscillation", "grad_norm", "collapse")):
            values = {k: e.scaled(m.scale) for k, e in material.results.estimates(setting, m.key).items()}
            if values:
                draw = partial(figures.dots, values=values, style=material.style, x_label=m.title)
                panels.append(Panel(f"{m.label}: {setting}", draw, 0.75 + 0.27 * max(len(values), 4)))
    caption = (
        "Loss oscillation is the mean absolute change of the loss from one iteration to the next. The gradient norm is "
        "the mean before clipping. Both depend on the loss, and the losses of the methods differ. " + INTERVALS
    )
    return [Picture("stability_dots", panels, caption)]


def gate_viewer(material: Material) -> list[Block]:
    if not material.seen:
        return []
    first = next(iter(material.seen.values()))
    data = {
        "prompts": first["prompts"],
        "scale": 2 * first["tau"] if first["tau"] else 1.0,
        "contenders": [
            {"label": k, "colour": material.style[k][0], **{key: run[key] for key in ("tau", "assisted", "alone")}}
            for k, run in material.seen.items()
        ],
    }
    seeds = sorted({run["seed"] for run in material.seen.values()})
    common = (
        f"{first['setting']}, seed {', '.join(map(str, seeds))}. All completions use the same random numbers, so they "
        "differ only where the distributions do."
    )
    caption = (
        "The background of a token shows D\u209c = KL(student || teacher) before it. Tokens at hard positions are "
        "underlined, the teacher's tokens are boxed. Point at a token, or move to it with Tab and the arrow keys, to "
        f"see both distributions. {common}"
    )
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
    picture = Picture("gate", panels, f"Completions of {first['prompts'][at][:60]} with the teacher's help. {common}")
    return [Viewer(data, caption, picture)]
