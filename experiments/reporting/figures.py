"""What the report's pictures show: each function fills a matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from experiments.comparing.statistics import Estimate
from experiments.reporting.drawing import HEAT, HIGHLIGHTED, INK, MUTED, Style, short
from experiments.reporting.results import OURS
from experiments.reporting.training_curves import Line

FEW = 24  # a line with at most so many points shows them
NAMED = 14  # among more points than this only the foremost are named

PLACES = ((0.8, 0.6), (0.8, -0.6), (-0.8, 0.6), (-0.8, -0.6), (1, 0), (-1, 0), (0, 1), (0, -1))  # of a name, by rank


class Point(NamedTuple):
    label: str
    x: Estimate
    y: Estimate


def scatter(
    axes: Any, points: Sequence[Point], style: Style, titles: tuple[str, str], diagonals: Sequence[float] = ()
) -> Callable[[], None]:
    """Contenders in two metrics, whiskers along both, names beside them; `diagonals` are lines y = share * x.

    Returns:
        what places the names, to be called when the layout is fixed.
    """
    for point in points:
        colour, marker = style[point.label]
        bars = {"xerr": whisker(point.x), "yerr": whisker(point.y)}
        size = 8 if point.label == OURS else 6.5
        axes.errorbar(
            point.x.value, point.y.value, **bars, color=colour, marker=marker, markersize=size, elinewidth=1.1,
            markeredgewidth=0, zorder=3,
        )  # fmt: skip
    axes.set(xlabel=titles[0], ylabel=titles[1])
    axes.margins(0.16, 0.12)
    axes.grid(True)
    if diagonals:
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for share in diagonals:
            axes.axline((0, 0), slope=share, color=MUTED, linewidth=0.7, linestyle=(0, (3, 3)), zorder=1)
            end = min(right, top / share)
            axes.annotate(f"{share:.0%}", (end, share * end), (3, 0), textcoords="offset points", color=MUTED)
        axes.set_xlim(max(0.0, left), right)
        axes.set_ylim(max(0.0, bottom), top)

    def name_them() -> None:
        _place_names(axes, points, style, foremost(points))

    return name_them


def foremost(points: Sequence[Point]) -> set[str]:
    """Who is named: all, or in a crowd those that are highlighted and the three highest others."""
    names = {p.label for p in points}
    if len(points) <= NAMED:
        return names
    others = sorted((p for p in points if p.label not in HIGHLIGHTED), key=lambda p: -p.y.value)
    return names & set(HIGHLIGHTED) | {p.label for p in others[:3]}


def whisker(estimate: Estimate) -> ArrayLike | None:
    """[2, 1] distances to both ends; None without an interval."""
    if math.isnan(estimate.low):
        return None
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def _place_names(axes: Any, points: Sequence[Point], style: Style, named: set[str]) -> None:
    """Put each of these names where it covers least: points, whiskers and names that stand already."""
    renderer = axes.figure.canvas.get_renderer()
    scale = axes.figure.dpi / 72
    frame = axes.get_window_extent(renderer).extents
    taken: list[tuple[float, float, float, float, int]] = []  # left, bottom, right, top, how much it counts
    for point in points:
        x, y = axes.transData.transform((point.x.value, point.y.value))
        taken.append((x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale, 3))
        for ends in (
            [(point.x.low, point.y.value), (point.x.high, point.y.value)],
            [(point.x.value, point.y.low), (point.x.value, point.y.high)],
        ):
            if not np.isnan(ends).any():
                (left, bottom), (right, top) = axes.transData.transform(ends)
                taken.append((left - 2 * scale, bottom - 2 * scale, right + 2 * scale, top + 2 * scale, 1))
    for point in [p for p in points if p.label in named]:
        x, y = axes.transData.transform((point.x.value, point.y.value))
        # a place in the axes stays true whatever the picture is saved at
        text = axes.text(0, 0, short(point.label), transform=axes.transAxes, va="bottom", zorder=4)
        text.set(in_layout=False, color=style[point.label][0])
        text.set_fontweight("bold" if point.label == OURS else "normal")
        box = text.get_window_extent(renderer)
        best, where = math.inf, (x, y)
        for distance in range(4, 44, 4):
            for i, (dx, dy) in enumerate(PLACES):
                left = x + dx * distance * scale - box.width * (1 - np.sign(dx)) / 2
                bottom = y + dy * distance * scale - box.height * (1 - np.sign(dy)) / 2
                mine = (left, bottom, left + box.width, bottom + box.height)
                covered = sum(counts * _overlap(mine, other) for *other, counts in taken)
                outside = box.width * box.height - _overlap(mine, frame)
                cost = (covered + 3 * outside) / (box.width * box.height) + 0.01 * distance + 0.004 * i
                if cost < best:
                    best, where = cost, (left, bottom)
        text.set_position(axes.transAxes.inverted().transform(where))
        taken.append((*where, where[0] + box.width, where[1] + box.height, 50))


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def curves(axes: Any, lines: Mapping[str, Line], style: Style, titles: tuple[str, str]) -> None:
    """A line a contender with its band; in a crowd those that are not highlighted are thin and grey."""
    for label in sorted(lines, key=lambda k: style.stands_out(k, list(lines))):
        line = lines[label]
        if style.stands_out(label, list(lines)):
            colour = style[label][0]
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.14, linewidth=0)
            few = "o" if len(line.x) <= FEW else None
            wide = 2.0 if label == OURS else 1.5
            axes.plot(line.x, line.middle, color=colour, linewidth=wide, marker=few, markersize=3.5, markeredgewidth=0)
        else:
            axes.plot(line.x, line.middle, color=MUTED, linewidth=0.8, alpha=0.55)
    axes.set(xlabel=titles[0], ylabel=titles[1])
    axes.margins(x=0.01)
    axes.grid(True, axis="y")


def by_difficulty(
    axes: Any, values: Mapping[str, Mapping[int, Estimate]], outside: Sequence[int], style: Style, y_label: str
) -> None:
    """Estimates over difficulty, whiskers beside each other; `outside` are those that were never trained on."""
    among = list(values)
    shown = [k for k in among if style.stands_out(k, among)]
    buckets = sorted({b for found in values.values() for b in found})
    if outside and len(outside) < len(buckets):
        axes.axvspan(min(outside) - 0.5, max(outside) + 0.5, color=MUTED, alpha=0.08, linewidth=0)
        axes.annotate(
            "out of distribution", (min(outside) - 0.42, 1), (0, -4), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", color=MUTED,
        )  # fmt: skip
    for label in sorted(among, key=lambda k: k in shown):
        found = dict(sorted(values[label].items()))
        middle = [e.value for e in found.values()]
        if label not in shown:
            axes.plot(list(found), middle, color=MUTED, linewidth=0.8, alpha=0.55)
            continue
        at = np.array(list(found)) + (shown.index(label) - (len(shown) - 1) / 2) * 0.5 / max(len(shown), 4)
        bars = np.array([np.ravel(b) if (b := whisker(e)) is not None else [np.nan, np.nan] for e in found.values()])
        colour, marker = style[label]
        axes.errorbar(
            at, middle, yerr=bars.T, color=colour, marker=marker, markersize=5, linewidth=1.2, elinewidth=1,
            markeredgewidth=0,
        )  # fmt: skip
    axes.set_xticks(buckets)
    axes.set_xlim(buckets[0] - 0.5, buckets[-1] + 0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("difficulty")
    axes.set_ylabel(y_label)
    axes.grid(True, axis="y")


def dots(axes: Any, values: Mapping[str, Estimate], style: Style, x_label: str) -> None:
    """A row a contender: the estimate and its whisker."""
    for row, (label, estimate) in enumerate(values.items()):
        colour, marker = style[label]
        axes.errorbar(
            estimate.value, row, xerr=whisker(estimate), color=colour, marker=marker, markersize=6.5, elinewidth=1.3,
            markeredgewidth=0,
        )  # fmt: skip
    axes.set_yticks(range(len(values)), [short(label) for label in values])
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_xlabel(x_label)
    axes.grid(True, axis="x")
    axes.tick_params(axis="y", length=0)


def tokens(axes: Any, completions: Sequence[Mapping[str, Any]], scale: float, columns: int = 46) -> None:
    """Completions as coloured tokens, as in the viewer: D_t behind each, the teacher's boxed, hard ones underlined.

    Args:
        completions: each with `label` (beside it) and `tokens` of the viewer.
        scale: the D_t with the full colour, nats.
        columns: characters per line.
    """
    from matplotlib.patches import Rectangle

    row, widest = 0, 24.0
    for completion in completions:
        axes.text(-0.6, row, short(completion["label"]), ha="right", va="center", color=MUTED)
        at = 0.0
        for token in completion["tokens"]:
            text = short(token["text"].replace("\n", "\u21b5"), columns)
            wide = len(text) * 0.62 + 0.5
            if at and at + wide > columns:
                row, at = row + 1, 0
            box = Rectangle((at, row - 0.38), wide, 0.76, color=HEAT, alpha=heat(token["d"], scale), linewidth=0)
            axes.add_patch(box)
            if token["rewritten"]:
                axes.add_patch(Rectangle((at + 0.05, row - 0.38), wide - 0.1, 0.76, fill=False, ec=INK, linewidth=1))
            if token["hard"]:
                axes.plot([at + 0.12, at + wide - 0.12], [row + 0.27] * 2, color=INK, linewidth=1)
            axes.text(at + wide / 2, row, text, ha="center", va="center", color=INK, family="monospace")
            at += wide + 0.08
            widest = max(widest, at)
        row += 1
    axes.set_xlim(-7, widest)
    axes.set_ylim(row - 0.4, -0.6)
    axes.set_axis_off()


def heat(d: float, scale: float) -> float:
    """Opacity of the colour behind a token: D_t as a share of `scale`, at most 0.75 so that the text stays legible."""
    return 0.75 * min(max(d / scale, 0.0), 1.0)
