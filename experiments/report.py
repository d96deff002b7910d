"""Write the report of a comparison: one self-contained HTML file, and the same as Markdown with pictures.

python experiments/report.py --runs runs/compare --out docs/results/report
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.markup import escape

from distill_env.checks import check_range
from experiments.reporting import figures, sections
from experiments.reporting.figures import Style
from experiments.reporting.findings import answer
from experiments.reporting.pages import Page, to_html, to_markdown
from experiments.reporting.results import Curves, Results, Setting, load_results
from experiments.running.cli import exit_code, read_flags


@dataclass(frozen=True)
class Config:
    """Report a comparison."""

    runs: Path = Path("runs/compare")
    """Folder of the comparison, with its results.csv."""
    out: Path = Path("docs/results/report")
    """Folder to write report.html, report.md and images/ into."""
    viewer: bool = True
    """Let the students write for the gate viewer; without, no model is loaded."""
    contenders: int = 6
    """How many of them the viewer shows at most, a run each."""
    answers: int = 4
    """Answers of each."""

    def __post_init__(self) -> None:
        check_range(self, "contenders", "answers", least=1)


def main(args: Sequence[str] | None = None) -> int:
    """Write the report, or say in one line why not. Returns the exit code."""
    return exit_code(lambda: write_report(read_flags(Config, args, __doc__), Console()))


def write_report(config: Config, console: Console) -> None:
    results = Results(load_results(config.runs))
    page = make_page(config, results, console)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "report.html").write_text(to_html(page), encoding="utf-8")
    (config.out / "report.md").write_text(to_markdown(page, config.out / "images"), encoding="utf-8")
    for sentence in page.answer:
        console.print(escape(sentence), highlight=False)
    console.print(f"\nwrote {config.out}/report.html, report.md and images/")


def make_page(config: Config, results: Results, console: Console) -> Page:
    """The whole report as data."""
    style = Style(tuple(dict.fromkeys(r["label"] for r in results.rows)))
    seen = look_at_students(config, results, console) if config.viewer else {}
    curves = Curves(config.runs, results)
    made = [
        sections.expectations(results),
        sections.diversity(results, style),
        sections.cost(results, style),
        sections.contenders(results),
        sections.differences(results),
        sections.learning(results, curves, style),
        sections.difficulty(results, style),
        sections.out_of_distribution(results, style),
        sections.hard_steps(results, curves, seen, style),
        sections.stability(results, style),
        sections.two_by_two(results),
        sections.ablations(results),
        sections.gate_viewer(seen, style),
        sections.how(results),
    ]
    return Page(
        title="Does the gate help?",
        question=(
            "A student writes, a teacher rewrites its hard steps; where the student wrote it descends reverse KL, "
            "where the teacher did, forward KL. Is that better than either KL alone, and at what cost?"
        ),
        answer=answer(results),
        facts=facts(results),
        sections=[s for s in made if s is not None],
        style=style,
    )


def facts(results: Results) -> list[str]:
    rows = results.rows
    runs = {r["run"] or (r["study"], r["env"], r["warm"], r["label"], r["seed"]) for r in rows}
    found = [f"{len(runs)} finished run{'s' if len(runs) > 1 else ''}"]
    for column, noun in (("env", "task"), ("warm", "warm start"), ("seed", "seed")):
        names = sorted({str(r[column]) for r in rows if r[column] != ""})
        if names:
            shown = "" if column == "seed" else f": {', '.join(names)}"
            found.append(f"{len(names)} {noun}{'s' if len(names) > 1 else ''}{shown}")
    found.append(f"{len(results.labels())} contenders")
    iterations = sorted({int(r["iterations"]) for r in rows if "iterations" in r})
    if iterations:
        found.append(f"{' or '.join(f'{i:,}' for i in iterations)} iterations a run")
    return found


def look_at_students(config: Config, results: Results, console: Console) -> dict[str, dict[str, Any]]:
    """What `viewer.see_run` saw of the first run of each contender, in the first task, by contender."""
    from experiments.reporting.viewer import see_run

    seen: dict[str, dict[str, Any]] = {}
    for setting in results.primary()[:1]:
        labels = results.labels(setting)
        order = [k for k in figures.HIGHLIGHTED if k in labels] + [k for k in labels if k not in figures.HIGHLIGHTED]
        for label in order:
            if len(seen) == config.contenders:
                break
            row = first_run(results, setting, label)
            if row is None:
                continue
            try:
                found = see_run(config.runs / row["run"], config.answers)
            except (ValueError, OSError) as error:
                console.print(f"viewer: {label} left out, {escape(str(error))}", highlight=False)
                continue
            if seen and found["prompts"] != next(iter(seen.values()))["prompts"]:
                console.print(f"viewer: {label} left out, its prompts are others", highlight=False)
                continue
            seen[label] = found | {"setting": str(setting), "seed": row["seed"]}
    return seen


def first_run(results: Results, setting: Setting, label: str) -> dict[str, Any] | None:
    """The row of the lowest seed that names its folder."""
    mine: Iterable[dict[str, Any]] = (
        r
        for r in results.rows
        if r["study"] == "main" and Setting(r["env"], r["warm"]) == setting and r["label"] == label and r["run"]
    )
    return min(mine, key=lambda r: r["seed"], default=None)


if __name__ == "__main__":
    sys.exit(main())
