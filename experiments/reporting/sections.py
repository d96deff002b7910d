"""The report from title to last section, as the data of a page."""

from __future__ import annotations

from collections.abc import Callable

from experiments.reporting import pictures, tables
from experiments.reporting.answer import answer
from experiments.reporting.material import Material
from experiments.reporting.page import Block, Page, Section, has_content
from experiments.reporting.results import BASELINES, OURS, PRIMARY_WARM, Results


def method(material: Material) -> list[Block]:
    warm = f" from the {PRIMARY_WARM} warm start" if PRIMARY_WARM in {r["warm"] for r in material.results.rows} else ""
    return [
        "All numbers are of the student alone, on problems that it was not trained on. Within a setting, runs with the "
        "same seed start from the same student, so contenders are compared run by run.",
        "Estimates are interquartile means over runs (Agarwal et al. 2021, arXiv 2108.13264; the mean of up to three "
        "runs) with the t interval of Tukey and McLaughlin (1963) for trimmed means. Differences are means over pairs "
        "of runs that share a seed, with Student's t interval and sign-flip tests. The chance that a run is better has "
        "the interval of Newcombe (2006). All intervals are 95 %. "
        f"The primary endpoint is correct chains in distribution{warm}; everything else is description.",
        "The share kept out of distribution is the accuracy there divided by the accuracy in distribution, run by run. "
        "A student that is bad at both can have a high share.",
    ]


SECTIONS: tuple[tuple[str, str, Callable[[Material], list[Block]]], ...] = (
    ("expected", "What was expected, what was measured", tables.expectations),
    ("diversity", "Accuracy against diversity", pictures.diversity),
    ("cost", "Accuracy against teacher cost", pictures.cost),
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
    if OURS in labels and any(b in labels for b in BASELINES):
        return "Does the gate help?", (
            "With `gated`, the student writes and the teacher rewrites the hard steps. The student learns by reverse "
            "KL where it wrote, and by forward KL where the teacher wrote. Is that better than one KL alone, and what "
            "does it cost?"
        )
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
