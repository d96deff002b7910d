"""What the report's pictures show: each function fills a matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from experiments.comparing.statistics import Estimate
from experiments.reporting.drawing import FAINT, HEAT, INK, MUTED, Style, short
from experiments.reporting.results import OURS
from experiments.reporting.training_curves import Line

LONGEST_LABEL = 36  # characters of a line along the height of a panel
MAX_TOKENS = 40  # of a long completion only the first ones are drawn


def scatter(
    axes: Any,
    values: Mapping[str, tuple[Estimate, Estimate]],
    style: Style,
    shown: Sequence[str],
    titles: tuple[str, str],
    diagonals: Sequence[float] = (),
) -> None:
    """Contenders in two metrics, whiskers along both; those that are not `shown` are grey dots. `diagonals` are lines
    y = share * x.
    """
    for label, (x, y) in values.items():
        if label not in shown:
            axes.plot(x.value, y.value, **FAINT, marker="o", markersize=4, markeredgewidth=0, zorder=1)
            continue
        bars, size = {"xerr": whisker(x), "yerr": whisker(y)}, 8 if label == OURS else 6.5
        axes.errorbar(x.value, y.value, **bars, **style.mark(label), markersize=size, elinewidth=1.1, zorder=3)
    axes.set(xlabel=titles[0], ylabel=fill(titles[1], LONGEST_LABEL))
    axes.grid(True)
    if diagonals:
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for share in diagonals:
            axes.axline((0, 0), slope=share, color=MUTED, linewidth=0.7, linestyle=(0, (3, 3)), zorder=1)
            end = min(right, top / share)
            axes.annotate(f"{share:.0%}", (end, share * end), (3, 0), textcoords="offset points", color=MUTED)
        axes.set(xlim=(max(0.0, left), right), ylim=(max(0.0, bottom), top))


def whisker(estimate: Estimate) -> list[list[float]] | None:
    """[2, 1] distances to both ends; None without an interval."""
    if math.isnan(estimate.low):
        return None
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def curves(
    axes: Any,
    values: Mapping[str, Line],
    style: Style,
    shown: Sequence[str],
    titles: tuple[str, str],
    log: bool = False,
) -> None:
    """A line a contender with its band; those that are not `shown` are thin and grey. With `log` the x axis is
    logarithmic, and y begins at 0.
    """
    for label, line in values.items():
        if label not in shown:
            axes.plot(line.x, line.middle, **FAINT, zorder=1)
            continue
        colour = style[label][0]
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.14, linewidth=0)
        few, wide = "o" if len(line.x) <= 24 else None, 2.0 if label == OURS else 1.5
        axes.plot(line.x, line.middle, color=colour, linewidth=wide, marker=few, markersize=3.5, markeredgewidth=0)
    axes.set(xlabel=titles[0], ylabel=fill(titles[1], LONGEST_LABEL))
    axes.margins(x=0.01)
    axes.grid(True, axis="y")
    ticks = sorted({float(x) for line in values.values() for x in line.x})
    if log:
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    else:
        axes.xaxis.get_major_locator().set_params(integer=all(tick.is_integer() for tick in ticks))


def calibration(axes: Any, values: Mapping[str, Line], style: Style) -> None:
    """The true mean of D_t against the predicted one, and where both are equal."""
    for label, line in values.items():
        colour = style[label][0]
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(line.x, line.middle, color=colour, marker="o", markersize=3.5, markeredgewidth=0)
    axes.axline((0.01, 0.01), (1, 1), color=MUTED, linewidth=0.7, linestyle=(0, (3, 3)), zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="predicted D\u209c, nats", ylabel="mean D\u209c, nats")
    ticks = [10.0**power for power in range(-3, 2)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(True)


def dots(axes: Any, values: Mapping[str, Estimate], style: Style, x_label: str) -> None:
    """A row a contender: the estimate and its whisker."""
    for row, (label, estimate) in enumerate(values.items()):
        axes.errorbar(estimate.value, row, xerr=whisker(estimate), **style.mark(label), markersize=6.5, elinewidth=1.3)
    axes.set_yticks(range(len(values)), [short(label) for label in values])
    axes.set(ylim=(len(values) - 0.4, -0.6), xlabel=x_label)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(True, axis="x")
    axes.tick_params(axis="y", length=0)


def gate(
    axes: Any, texts: Sequence[str], scores: Sequence[float], rewritten: Sequence[bool], tau: float | None
) -> None:
    """The gate at work in one completion: the score of each position against tau, above the token and its writer."""
    from matplotlib.patches import Patch

    texts = [short(text.replace("\n", "\u21b5")) for text in texts[:MAX_TOKENS]]
    colours = [HEAT if by_teacher else MUTED for by_teacher in rewritten[:MAX_TOKENS]]
    axes.bar(range(len(texts)), scores[:MAX_TOKENS], 0.62, color=colours)
    axes.set_xticks(range(len(texts)), texts, family="monospace", fontsize=min(15, 300 / max(20, *map(len, texts))))
    for label, colour in zip(axes.get_xticklabels(), colours, strict=True):
        if colour == HEAT:
            label.set(color=HEAT, fontweight="bold")
            label.set_bbox({"boxstyle": "round,pad=0.22", "facecolor": "white", "edgecolor": HEAT})
    if tau is not None:
        axes.axhline(tau, color=INK, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(
            f"\u03c4 = {tau:g} nats", (1, tau), (0, 4), ("axes fraction", "data"), "offset points", ha="right"
        )
    writers = [Patch(color=MUTED, label="written by the student"), Patch(color=HEAT, label="written by the teacher")]
    axes.legend(handles=writers, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=2)
    axes.set_ylabel("D\u209c = KL(student || teacher), nats")
    axes.margins(x=0.02, y=0.08)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", pad=9)
    axes.grid(axis="y")
