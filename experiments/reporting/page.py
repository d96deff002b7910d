"""A report as data, and how it is written: one HTML file from `page.html.j2`, or Markdown with PNG pictures.

Text may contain `code` in backticks; all other markup in it is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.reporting.drawing import MUTED, Panel, Style, png, svg

NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, a smaller note after it, and the number by which it sorts."""

    text: str
    note: str = ""
    value: float | None = None
    tone: Literal["", "good", "bad", "open", "best"] = ""
    heat: float | None = None  # in [0, 1], for the background
    chip: str = ""  # the contender whose colour precedes the text


@dataclass(frozen=True)
class Table:
    """`columns` are titles; the first `names` of them hold words and are left-aligned."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    names: int = 1
    title: str = ""
    sortable: bool = True


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


def to_html(page: Page) -> str:
    """The page as one file that loads nothing from elsewhere."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters |= {"inline": inline, "legend": page.style.legend}
    environment.globals |= {"svg": _svg, "muted": MUTED}
    viewers = [b for s in page.sections for b in s.blocks if isinstance(b, Viewer)]
    return environment.get_template("page.html.j2").render(page=page, data=viewers[0].data if viewers else None)


def inline(text: str) -> str:
    """Escaped text as markup: `code` in backticks, and no line break within `[low, high]` or before %."""
    from markupsafe import Markup, escape

    text = re.sub(r" ?\[[^\[\]`]*\]| %", lambda match: match[0].replace(" ", NO_BREAK), text)
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _svg(panel: Panel, name: str) -> str:
    from markupsafe import Markup

    return Markup(svg(panel, name))


def to_markdown(page: Page, images: Path) -> str:
    """The page as Markdown; pictures are written as PNG into the folder `images` beside the file."""
    parts = [f"# {plain(page.title)}", f"*{plain(page.question)}*", *map(plain, page.answer)]
    parts.append("\n".join(f"- {plain(fact)}" for fact in page.facts))
    for section in page.sections:
        parts.append(f"## {plain(section.title)}")
        for block in section.blocks:
            parts += _markdown(block, images, page.style)
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text without Markdown or HTML markup outside backticks."""
    parts = re.split(r"(`[^`]+`)", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_|\[\]])", r"\\\1", p) for p in parts)


def _markdown(block: Block, images: Path, style: Style) -> list[str]:
    if isinstance(block, str):
        return [plain(block)]
    if isinstance(block, Viewer):
        block = block.picture
    if isinstance(block, Picture):
        path = images / f"{block.name}.png"
        png(block.panels, path, style, block.legend)
        return [f"![{plain(block.caption)}]({images.name}/{path.name})", plain(block.caption)]
    align = ["---" if i < block.names else "---:" for i in range(len(block.columns))]
    rows = [[plain(c) for c in block.columns], align, *([_markdown_cell(c) for c in row] for row in block.rows)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return [*([f"**{plain(block.title)}**"] if block.title else []), table, *filter(None, [plain(block.caption)])]


def _markdown_cell(cell: Cell) -> str:
    text = plain(f"{cell.text} {cell.note}".strip()).replace("\n", " ").replace("\\[", "[").replace("\\]", "]")
    text = re.sub(r"(?<!\\)\|", r"\\|", text)  # also in code
    return f"**{text}**" if cell.tone == "best" else text
