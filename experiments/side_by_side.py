"""Runs beside one another, as Markdown: the whole table of metrics, and what they answered to the same prompts.

    python experiments/side_by_side.py runs/fkl runs/rkl runs/gated --answers 10 > compared.md

The runs begin with the same student: the column "before" is the first one's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from experiments.running import completions_file as answers
from experiments.running.cli import exit_code, read_flags
from experiments.running.config import load_config
from experiments.running.tracking import cell, markdown_table, read_json, table_rows

TRAINING = (
    ("tokens", "tokens in training", "{:,.0f}"),
    ("teacher_tokens", "of them by the teacher", "{:,.0f}"),
    ("teacher_positions", "positions that the teacher scored", "{:,.0f}"),
    ("hard_share_first", "hard steps in the first tenth", "{:.1%}"),
    ("hard_share_last", "hard steps in the last tenth", "{:.1%}"),
    ("grad_norm", "gradient norm", "{:.2f}"),
    ("seconds", "seconds in training", "{:,.0f}"),
)


@dataclass(frozen=True)
class Config:
    """Runs beside one another."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""
    answers: int = 10
    """Prompts whose answers are shown, the first of each writer (--env lm)."""


def metrics_lines(names: Sequence[str], evaluations: Sequence[dict[str, Any]], samples: int) -> list[list[str]]:
    """The table: a line a metric, a column a run; `samples` answers were written to each prompt."""
    columns = [evaluations[0]["before"], *(evaluation["after"] for evaluation in evaluations)]
    lines = [["", "before", *names]]
    lines += [[label.strip(), *cells] for label, cells in table_rows(samples, columns)]
    for key, label, form in TRAINING:
        lines.append([label, "", *(cell(form, evaluation["training"].get(key)) for evaluation in evaluations)])
    return lines


def answer_blocks(names: Sequence[str], files: Sequence[Path], count: int) -> list[str]:
    """The first answers to the first prompts, one block a prompt; the reference and the teacher's come last."""
    found: dict[str, dict[str, str]] = {}
    for name, path in zip(names, files, strict=True):
        for line in answers.read_lines(path, "runs", ("prompt", "answer", "writer")):
            writer = name if line["writer"] == "student" else line["writer"]
            found.setdefault(line["prompt"], {}).setdefault(writer, line["answer"])
    blocks = []
    for prompt, written in list(found.items())[:count]:
        order = [*names, *(w for w in ("teacher", "reference") if w in written)]
        lines = [["", ""], *([f"`{w}`", _in_a_cell(written.get(w, ""))] for w in order)]
        blocks.append(f"**{_in_a_cell(prompt)}**\n\n" + markdown_table(lines).replace("---:", "---"))
    return blocks


def _in_a_cell(text: str) -> str:
    """Model output as the text of a Markdown cell: nothing in it is markup."""
    escaped = "".join(f"\\{c}" if c in r"\`*_{}[]<>()#+-.!|~$&" else c for c in text)
    return " ".join(escaped.split())


def side_by_side(config: Config) -> str:
    """The Markdown text.

    Raises:
        ValueError: for a folder without a finished run.
    """
    samples = load_config(config.runs[0]).eval_samples  # refuses what is no run
    evaluations = [read_json(folder / "evaluation.json") for folder in config.runs]
    for folder, evaluation in zip(config.runs, evaluations, strict=True):
        if "after" not in evaluation:
            raise ValueError(f"runs: {str(folder)!r} has not finished; accepted: folders of finished runs")
    names = [folder.name for folder in config.runs]
    parts = [markdown_table(metrics_lines(names, evaluations, samples))]
    files = [folder / answers.FILE for folder in config.runs]
    if config.answers and all(path.exists() for path in files):
        parts += answer_blocks(names, files, config.answers)
    return "\n\n".join(parts)


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(lambda: print(side_by_side(read_flags(Config, args, __doc__))))


if __name__ == "__main__":
    sys.exit(main())
