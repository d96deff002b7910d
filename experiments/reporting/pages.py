"""A report as data, written as one HTML file or as Markdown. Everything that is text is escaped here, and only here.

Text may hold `code` in backticks and nothing else.
"""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.reporting.figures import MUTED, Panel, Style, png, svg

TEMPLATE = Path(__file__).with_name("report.html")
COLUMNS_OF_A_PICTURE = 2
NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, a smaller note behind it, and the number by which it sorts."""

    text: str
    note: str = ""
    value: float | None = None
    tone: Literal["", "good", "bad", "open", "best"] = ""
    heat: float | None = None  # in [0, 1], the ground
    chip: str = ""  # the contender whose colour stands before the text


@dataclass(frozen=True)
class Table:
    """`columns` are titles; the first `names` of them hold words and are aligned to the left. `title` stands above."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    names: int = 1
    title: str = ""
    sortable: bool = True


@dataclass(frozen=True)
class Picture:
    """Panels side by side, a legend of contenders above, a caption below."""

    name: str
    panels: Sequence[Panel]
    caption: str
    legend: Sequence[str] = ()


@dataclass(frozen=True)
class Viewer:
    """The gate viewer: `data` for the page, a picture of the first answers for Markdown."""

    data: dict[str, Any]
    caption: str
    picture: Picture


Block = str | Table | Picture | Viewer


@dataclass(frozen=True)
class Section:
    """`name` is its address and, with spaces, its name in the list of sections."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """The report: a question, an answer of a few sentences, facts about the runs, and sections."""

    title: str
    question: str
    answer: Sequence[str]
    facts: Sequence[str]
    sections: Sequence[Section]
    style: Style


# ---------------------------------------------------------------------- HTML


def to_html(page: Page) -> str:
    """The whole page; nothing in it is fetched from elsewhere."""
    viewers = [b for s in page.sections for b in s.blocks if isinstance(b, Viewer)]
    parts = {
        "title": html.escape(page.title),
        "question": inline(page.question),
        "answer": "".join(f"<p>{inline(sentence)}</p>" for sentence in page.answer),
        "facts": "".join(f"<li>{inline(fact)}</li>" for fact in page.facts),
        "links": "".join(f'<a href="#{s.name}">{s.name.replace("-", " ")}</a>' for s in page.sections),
        "sections": "\n".join(_section(s, page.style) for s in page.sections),
        "data": script_json(viewers[0].data if viewers else None),
    }
    # one pass: what is put in is not looked at again
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def inline(text: str) -> str:
    """Escaped, `code` in backticks marked, numbers kept together with what belongs to them."""
    text = re.sub(r" ?\[[^\[\]`]*\]| %", lambda match: match[0].replace(" ", NO_BREAK), text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def script_json(data: Any) -> str:
    """JSON that may stand inside a script element: no `<` in it, so no end tag and no comment."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def _section(section: Section, style: Style) -> str:
    blocks = ""
    for single, group in itertools.groupby(section.blocks, lambda b: isinstance(b, Picture) and len(b.panels) == 1):
        inner = "\n".join(_block(block, style) for block in group)
        blocks += f'<div class="pair">{inner}</div>\n' if single else inner  # small pictures stand side by side
    return f'<section id="{section.name}"><h2>{inline(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block, style: Style) -> str:
    if isinstance(block, str):
        return f"<p>{inline(block)}</p>"
    if isinstance(block, Table):
        return _table(block, style)
    if isinstance(block, Picture):
        return _picture(block, style)
    return f'<div id="viewer" class="viewer"></div><p class="caption">{inline(block.caption)}</p>'


def _picture(picture: Picture, style: Style) -> str:
    panels = "".join(
        f"<figure><h3>{inline(panel.title)}</h3>"
        f'<div class="svg" role="img" aria-label="{html.escape(f"{panel.title}. {picture.caption}")}">'
        f"{svg(panel, f'{picture.name}-{i}')}</div></figure>"
        for i, panel in enumerate(picture.panels)
    )
    return (
        f'<div class="picture">{_legend(picture.legend, style)}<div class="panels">{panels}</div>'
        f'<p class="caption">{inline(picture.caption)}</p></div>'
    )


def _legend(labels: Sequence[str], style: Style) -> str:
    if not labels:
        return ""
    chips, rest = "", [k for k in labels if not style.stands_out(k, labels)]
    for label in labels:
        if label not in rest:
            chips += f'<li><i style="background:{style[label][0]}"></i>{html.escape(label)}</li>'
    if rest:
        chips += f'<li><i style="background:{MUTED}" class="thin"></i>{html.escape(", ".join(rest))}</li>'
    return f'<ul class="legend">{chips}</ul>'


def _table(table: Table, style: Style) -> str:
    head = "".join(_heading(title, i < table.names, table.sortable) for i, title in enumerate(table.columns))
    body = "".join(
        "<tr>" + "".join(_cell(c, i, table.names, style) for i, c in enumerate(row)) + "</tr>" for row in table.rows
    )
    caption = f'<p class="caption">{inline(table.caption)}</p>' if table.caption else ""
    title = f"<h3>{inline(table.title)}</h3>" if table.title else ""
    label = html.escape(table.title or table.caption or table.name)
    return (
        f'{title}<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table id="{table.name}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{caption}"
    )


def _heading(title: str, words: bool, sortable: bool) -> str:
    text = f'<button type="button">{inline(title)}</button>' if sortable and title else inline(title)
    return f'<th scope="col"{" class=words" if words else ""}>{text}</th>'


def _cell(cell: Cell, column: int, names: int, style: Style) -> str:
    classes = " ".join(c for c in ("words" if column < names else "", cell.tone) if c)
    attributes = f' class="{classes}"' if classes else ""
    if cell.value is not None:
        attributes += f' data-value="{cell.value!r}"'
    if cell.heat is not None:
        attributes += f' style="--share:{55 * cell.heat:.0f}%"'
    note = f' <span class="note">{inline(cell.note)}</span>' if cell.note else ""
    tag = 'th scope="row"' if column == 0 else "td"
    chip = f'<i class="chip" style="background:{style[cell.chip][0]}"></i>' if cell.chip else ""
    return f"<{tag}{attributes}>{chip}{inline(cell.text)}{note}</{tag.split()[0]}>"


# ---------------------------------------------------------------------- Markdown


def to_markdown(page: Page, images: Path) -> str:
    """The same with pictures as PNG, which are written into the folder `images` beside the file."""
    lines = [f"# {plain(page.title)}", "", f"*{plain(page.question)}*", ""]
    for sentence in page.answer:
        lines += [plain(sentence), ""]
    lines += [f"- {plain(fact)}" for fact in page.facts]
    for section in page.sections:
        lines += ["", f"## {plain(section.title)}"]
        for block in section.blocks:
            lines += ["", *_markdown(block, images, page.style)]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text in which Markdown and HTML find nothing of theirs outside backticks."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_|\[\]])", r"\\\1", _tame(p)) for p in parts)


def _tame(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _markdown(block: Block, images: Path, style: Style) -> list[str]:
    if isinstance(block, str):
        return [plain(block)]
    if isinstance(block, Viewer):
        return _markdown(block.picture, images, style)
    if isinstance(block, Picture):
        path = images / f"{block.name}.png"
        png(block.panels, path, style, block.legend, COLUMNS_OF_A_PICTURE)
        return [f"![{plain(block.caption)}]({images.name}/{path.name})", "", plain(block.caption)]
    align = ["---" if i < block.names else "---:" for i in range(len(block.columns))]
    rows = [[plain(c) for c in block.columns], align, *([_markdown_cell(c) for c in row] for row in block.rows)]
    table = ["| " + " | ".join(row) + " |" for row in rows]
    title = [f"**{plain(block.title)}**", ""] if block.title else []
    return [*title, *table, *(["", plain(block.caption)] if block.caption else [])]


def _markdown_cell(cell: Cell) -> str:
    text = plain(f"{cell.text} {cell.note}".strip()).replace("\n", " ")
    text = re.sub(r"(?<!\\)\|", r"\\|", text.replace("\\[", "[").replace("\\]", "]"))
    return f"**{text}**" if cell.tone == "best" else text
