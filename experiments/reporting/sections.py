"""The report from title to last section, as the data of a page."""

from __future__ import annotations

from collections.abc import Callable

from experiments.reporting import pictures, tables
from experiments.reporting.answer import answer
from experiments.reporting.material import Material, text
from experiments.reporting.page import Block, Page, Section, has_content
from experiments.reporting.results import OURS, PRIMARY_WARM, PURE, Results


def method(material: Material) -> list[Block]:
    warm = f" from the {PRIMARY_WARM} warm start" if PRIMARY_WARM in {r["warm"] for r in material.results.rows} else ""
    name = tables.endpoint_name(material.results.endpoints())
    return list(text("method", warm=warm, endpoint=name[:1].lower() + name[1:]).split("\n\n"))


SECTIONS: tuple[tuple[str, str, Callable[[Material], list[Block]]], ...] = (
    ("expected", "What was expected, what was measured", tables.expectations),
    ("diversity", "Quality and diversity", pictures.diversity),
    ("cost", "Quality and teacher cost", pictures.cost),
    ("contenders", "All contenders", tables.contenders),
    ("differences", "Paired differences", tables.differences),
    ("learning", "Learning curves", pictures.learning),
    ("difficulty", "Difficulty", pictures.difficulty),
    ("out-of-distribution", "In and out of distribution", pictures.out_of_distribution),
    ("hard-positions", "Hard positions", pictures.hard_positions),
    ("stability", "Stability", pictures.stability),
    ("prefix-and-loss", "Prefix and loss", tables.prefix_and_loss),
    ("ablations", "Ablations", tables.ablations),
    ("gate-viewer", "Gate viewer", pictures.gate_viewer),
    ("method", "How the numbers are made", method),
)


def make_page(material: Material) -> Page:
    """The whole report; what has no data is left out."""
    made = [Section(name, title, list(filter(has_content, make(material)))) for name, title, make in SECTIONS]
    title, question = heading(material.results.labels())
    sections = [section for section in made if section.blocks]
    return Page(title, question, answer(material.results), facts(material.results), sections, material.style)


def heading(labels: list[str]) -> tuple[str, str]:
    """Title and question, by what was compared."""
    if {OURS, *PURE} <= {*labels}:
        return "Does the gate help?", text("gated_question")
    names = [f"`{k}`" for k in labels[:4]] + ([f"{len(labels) - 4} others"] if len(labels) > 4 else [])
    return "Comparison of methods", f"How do {', '.join(names)} compare?" if labels else ""


def facts(results: Results) -> list[str]:
    """What was run, a phrase each."""
    rows = results.rows
    runs = {r["run"] or (r["study"], r["env"], r["warm"], r["label"], r["seed"]) for r in rows}
    phrases = [_count(len(runs), "finished run")]
    for column, noun in (("env", "task"), ("warm", "warm start"), ("seed", "seed")):
        names = sorted({str(r[column]) for r in rows if r[column] != ""})
        phrases.append(_count(len(names), noun) + ("" if column == "seed" or not names else f": {', '.join(names)}"))
    phrases.append(_count(len(results.labels()), "contender"))
    iterations = sorted({int(r["iterations"]) for r in rows if "iterations" in r})
    return [*phrases, f"{' or '.join(f'{i:,}' for i in iterations)} iterations per run"] if iterations else phrases


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
