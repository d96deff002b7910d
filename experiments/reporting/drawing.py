"""How the report's pictures look and are written: colours of the contenders, SVG for the page, PNG for Markdown.

Ink and rules of an SVG are CSS variables, so that it follows the page into dark mode; the colours of the contenders are
the same in all pictures and legible on both backgrounds. matplotlib is imported where it is used.
"""

from __future__ import annotations

import io
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.reporting.results import OURS

INK, MUTED, RULE, HEAT = "#22262d", "#6a717c", "#dde1e7", "#e4572e"
CSS_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"}
COLOURS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("colours.toml").read_text())
BEFORE_STYLE = (MUTED, "o")
HIGHLIGHTED = (OURS, "soft", "rkl", "fkl", "rewrite_only")
CROWD = 7  # among more contenders than this, those that are not highlighted are grey
WIDTH, HEIGHT = 4.3, 3.1  # inches of a panel; 310 points, about the width of a phone
PAGE = 2 * WIDTH  # inches of panels side by side in a file

STYLE = Path(__file__).with_name("report.mplstyle")
FAINT: dict[str, Any] = {"color": MUTED, "linewidth": 0.8, "alpha": 0.55}  # a line in the background


@dataclass(frozen=True)
class Panel:
    """`draw` fills an axes."""

    title: str
    draw: Callable[[Any], None]
    height: float = HEIGHT
    width: float = WIDTH


@dataclass(frozen=True)
class Style:
    """Colour and marker of every contender, in the report's order; more than `crowd` are a crowd."""

    labels: tuple[str, ...]
    crowd: int = CROWD

    def __getitem__(self, label: str) -> tuple[str, str]:
        known, spare = COLOURS["known"], COLOURS["others"]
        others = [name for name in self.labels if name not in known]
        if label in known or label not in others:
            return tuple(known.get(label, BEFORE_STYLE))
        turn, at = divmod(others.index(label), len(spare))
        return spare[at][0], spare[(at + turn) % len(spare)][1]  # when colours repeat, markers differ

    def mark(self, label: str) -> dict[str, Any]:
        """How matplotlib draws the contender's points."""
        colour, marker = self[label]
        return {"color": colour, "marker": marker, "markeredgewidth": 0}

    def legend(self, labels: Sequence[str]) -> tuple[list[str], list[str]]:
        """Those with a colour of their own, and in a crowd the others."""
        named = [k for k in labels if len(labels) <= self.crowd or k in HIGHLIGHTED]
        return named, [k for k in labels if k not in named]


def short(label: str, longest: int = 26) -> str:
    """A name that leaves room for the picture."""
    return label if len(label) <= longest else label[: longest - 1] + "\u2026"


def _figure(panels: Sequence[Panel], titles: bool) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width = max(panel.width for panel in panels)
    columns = min(len(panels), int(PAGE / width))
    rows = -(-len(panels) // columns)
    heights = [max(p.height for p in panels[i * columns : (i + 1) * columns]) for i in range(rows)]
    figure = Figure(figsize=(width * columns, sum(heights)), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw(axes)
        axes.set_title(panel.title if titles else "")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def svg(panel: Panel, name: str) -> str:
    """One panel as an `<svg>` element without a title; `name` makes its ids unique in a page."""
    import matplotlib

    with matplotlib.rc_context(fname=STYLE):
        file = io.StringIO()
        _figure([panel], titles=False).savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # the page decides
    for colour, variable in CSS_VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def png(panels: Sequence[Panel], path: Path, style: Style, legend: Sequence[str] = ()) -> None:
    """The panels side by side, a legend below."""
    import matplotlib
    from matplotlib.lines import Line2D

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(fname=STYLE):
        figure = _figure(panels, titles=True)
        named, others = style.legend(legend)
        marks = [Line2D([], [], **style.mark(k), label=short(k, 34)) for k in named]
        if others:
            marks.append(Line2D([], [], **FAINT, label=f"{len(others)} others"))
        if marks:
            columns = 7 if max(map(len, named), default=0) < 20 else 4
            figure.legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(len(marks), columns))
        figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.08)
