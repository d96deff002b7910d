"""Write the report of a comparison: one self-contained HTML file, and the same as Markdown with pictures.

    python experiments/report.py --runs runs/compare

Reads results.csv and the runs of a folder of compare.py or ablate.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.markup import escape

from distill_env.checks import Count
from experiments.reporting.drawing import Style
from experiments.reporting.material import Material
from experiments.reporting.page import to_html, to_markdown
from experiments.reporting.results import Results, load_results
from experiments.reporting.sections import make_page
from experiments.reporting.training_curves import Curves
from experiments.reporting.viewer import see_contenders
from experiments.running.cli import command


@dataclass(frozen=True)
class ReportConfig:
    """Report a comparison."""

    runs: Path = Path("runs/compare")
    """Folder of the comparison, with its results.csv."""
    out: Path | None = None
    """Folder for report.html, report.md and images/; by default report/ in the folder of the comparison."""
    studies: tuple[str, ...] = ()
    """Studies in results.csv; all by default."""
    viewer: bool = True
    """Include the gate viewer, for which the students write completions. Without it no model is loaded."""
    contenders: Count = 6
    """Maximum number of contenders in the viewer, one run of each."""
    prompts: Count = 4
    """Number of prompts in the viewer."""


def write_report(config: ReportConfig) -> None:
    console = Console()
    results, out = Results(load_results(config.runs, config.studies)), config.out or config.runs / "report"
    style = Style(tuple(dict.fromkeys(r["label"] for r in results.rows)))
    seen = see_contenders(config.runs, results, config.contenders, config.prompts, console) if config.viewer else {}
    page = make_page(Material(results, Curves(config.runs, results), style, seen))
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(to_html(page), encoding="utf-8")
    (out / "report.md").write_text(to_markdown(page, out / "images"), encoding="utf-8")
    for paragraph in page.answer:
        console.print(escape(paragraph), highlight=False)
    console.print(f"\nWrote {out}/report.html, report.md and images/")


main = command(write_report, ReportConfig, __doc__)

if __name__ == "__main__":
    sys.exit(main())
