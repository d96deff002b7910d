"""Finished runs as Markdown: the table of metrics with a column a run, and their completions to the same prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.running import completions_file
from experiments.running.config_file import load_config
from experiments.running.metric_display import evaluation_lines, markdown_table, metric
from experiments.running.run_folder import read_json

TRAINING = (
    "tokens", "teacher_tokens", "teacher_positions", "hard_share_first", "hard_share_last", "grad_norm", "seconds"
)  # fmt: skip


def side_by_side(runs: Sequence[Path], prompts: int) -> str:
    """The Markdown text, with completions to the first `prompts` prompts if the runs have files of them.

    Raises:
        ValueError: for a folder without a finished run.
    """
    samples = load_config(runs[0]).evaluation.samples  # raises for a folder that is not a run
    evaluations = [read_json(folder / "evaluation.json") for folder in runs]
    for folder, evaluation in zip(runs, evaluations, strict=True):
        if "after" not in evaluation:
            raise ValueError(f"runs: {str(folder)!r} has not finished; expected folders of finished runs")
    names = [folder.name for folder in runs]
    parts = [markdown_table(metrics_lines(names, evaluations, samples))]
    files = [folder / completions_file.FILE for folder in runs]
    if prompts and all(path.exists() for path in files):
        parts += completion_blocks(names, files, prompts)
    return "\n\n".join(parts)


def metrics_lines(names: Sequence[str], evaluations: Sequence[dict[str, Any]], samples: int) -> list[list[str]]:
    """A line a metric, a column a run. The column "before" is the first run's; `samples` completions a prompt."""
    columns = [evaluations[0]["before"], *(evaluation["after"] for evaluation in evaluations)]
    lines = [["", "before", *names]]
    lines += itertools.chain(*evaluation_lines(samples, columns).values())
    for m in map(metric, TRAINING):
        lines.append([m.label, "", *(m.text(evaluation["training"].get(m.key)) for evaluation in evaluations)])
    return lines


def completion_blocks(names: Sequence[str], files: Sequence[Path], count: int) -> list[str]:
    """A block for each of the first prompts: a completion of every run, then the teacher's and the reference."""
    written: dict[str, dict[str, str]] = {}
    for name, path in zip(names, files, strict=True):
        for line in completions_file.read_lines(path, "runs", ("prompt", "completion", "writer")):
            writer = name if line["writer"] == "student" else line["writer"]
            written.setdefault(line["prompt"], {}).setdefault(writer, line["completion"])
    blocks = []
    for prompt, by_writer in list(written.items())[:count]:
        order = [*names, *(w for w in ("teacher", "reference") if w in by_writer)]
        lines = [["", ""], *([f"`{w}`", _escape(by_writer.get(w, ""))] for w in order)]
        blocks.append(f"**{_escape(prompt)}**\n\n" + markdown_table(lines).replace("---:", "---"))
    return blocks


def _escape(text: str) -> str:
    """Model output as the text of one Markdown cell."""
    escaped = "".join(f"\\{c}" if c in r"\`*_{}[]<>()#+-.!|~$&" else c for c in text)
    return " ".join(escaped.split())
