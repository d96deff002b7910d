"""A report as data, and how it is written: one HTML file from `page.html.j2`, or Markdown with PNG pictures.

Text may contain `code` in backticks; all other markup in it is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.reporting.drawing import MUTED, Panel, Style, png, svg

NO_BREAK = "\u00a0"


Tone = Literal["", "good", "bad", "open", "best"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, a smaller note after it, and the number by which it sorts."""

    text: str
    note: str = ""
    value: float | None = None
    tone: Tone = ""
    heat: float | None = None  # in [0, 1], for the background
    chip: str = ""  # the contender whose colour precedes the text


@dataclass(frozen=True)
class Table:
    """Rows of cells by the title of their column; a column without a number to sort by is of words."""

    name: str
    rows: Sequence[Mapping[str, Cell]]
    caption: str = ""
    title: str = ""
    sortable: bool = True

    def columns(self) -> dict[str, bool]:
        """The titles, and whether the column is of words."""
        return {title: all(row[title].value is None for row in self.rows) for title in self.rows[0]}


@dataclass(frozen=True)
class Picture:
    """Panels side by side, with a legend of contenders above and a caption below."""

    name: str
    panels: Sequence[Panel]
    caption: str
    legend: Sequence[str] = ()


@dataclass(frozen=True)
class Viewer:
    """The gate viewer: `data` for HTML, a picture of some completions for Markdown."""

    data: dict[str, Any]
    caption: str
    picture: Picture


Block = str | Table | Picture | Viewer


@dataclass(frozen=True)
class Section:
    """`name` is its address in the page and, with spaces, its entry in the list of sections."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report: a question, an answer in a few paragraphs, facts about the runs, and sections."""

    title: str
    question: str
    answer: Sequence[str]
    facts: Sequence[str]
    sections: Sequence[Section]
    style: Style


def has_content(block: Block) -> bool:
    """Whether there is something to see: a text, a row, or a panel."""
    return bool(block.rows if isinstance(block, Table) else block.panels if isinstance(block, Picture) else block)


def to_html(page: Page) -> str:
    """The page as one file that loads nothing from elsewhere."""
    return _render(page, "page.html.j2", inline=inline, legend=page.style.legend, svg=svg, muted=MUTED)


def to_markdown(page: Page, images: Path) -> str:
    """The page as Markdown; pictures are written as PNG into the folder `images` beside the file."""

    def image(picture: Picture) -> str:
        path = images / f"{picture.name}.png"
        png(picture.panels, path, page.style, picture.legend)
        return f"{images.name}/{path.name}"

    return _render(page, "page.md.j2", plain=plain, png=image, cell=_markdown_cell)


def _render(page: Page, template: str, **helpers: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    loader, escaped = FileSystemLoader(Path(__file__).parent), select_autoescape(["html.j2"])
    environment = Environment(loader=loader, autoescape=escaped, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= helpers
    return environment.get_template(template).render(page=page, **helpers)


def inline(text: str) -> str:
    """Escaped text as markup: `code` in backticks, and no line break within `[low, high]` or before %."""
    from markupsafe import Markup, escape

    text = re.sub(r" ?\[[^\[\]`]*\]| %", lambda match: match[0].replace(" ", NO_BREAK), text)
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def plain(text: str) -> str:
    """Text without Markdown or HTML markup outside backticks."""
    parts = re.split(r"(`[^`]+`)", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_|\[\]])", r"\\\1", p) for p in parts)


def _markdown_cell(cell: Cell) -> str:
    text = plain(f"{cell.text} {cell.note}".strip()).replace("\n", " ").replace("\\[", "[").replace("\\]", "]")
    text = re.sub(r"(?<!\\)\|", r"\\|", text)  # also in code
    return f"**{text}**" if cell.tone == "best" else text
