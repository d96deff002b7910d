"""Repeat the evaluation of a finished run, or measure the perplexity of a corpus.

python experiments/evaluate.py runs/gated-sums-s0
python experiments/evaluate.py runs/gated-lm-s0 --corpus wikitext2/test.txt
python experiments/evaluate.py runs/gated-sums-s0 --answers runs/gated-sums-s0/answers.jsonl
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agents.base import Metrics
from distill_env.checks import check_range
from experiments.running.build import agent_loader
from experiments.running.cli import exit_code, read_flags
from experiments.running.config import EvaluationConfig, RunConfig
from experiments.running.config_file import load_config
from experiments.running.lifecycle import evaluate_all
from experiments.running.lm_arguments import shared_ids, student_arguments, teacher_arguments, teacher_tokenizer
from experiments.running.tracking import add_metrics, finite, progress_bar, write_json


@dataclass(frozen=True)
class Config:
    """Repeat the evaluation of a run, or measure the perplexity of a corpus."""

    folder: tyro.conf.Positional[Path]
    """The run's folder."""
    eval_prompts: int | None = None
    """Prompts per split; as in the run if not given."""
    eval_samples: int | None = None
    """Answers to each; as in the run if not given."""
    corpus: str = ""
    """Instead, the perplexity of this text (a file, or the test split of a folder or hub id) under the student
    before and after a run of --env lm, and under its teacher."""
    corpus_tokens: int = 0
    """Only the first so many tokens of it; 0 for all."""
    window: int = 512
    """Tokens that a model reads at a time."""
    stride: int = 256
    """Tokens by which the window moves on; each has at least window - stride before it, but at the beginning."""
    out: Path | None = None
    """Write the metrics into this JSON file as well."""
    answers: Path | None = None
    """Write the answers into this JSONL file, as experiments/answers.py says; experiments/judge.py compares such."""

    def __post_init__(self) -> None:
        check_range(self, "eval_prompts", "eval_samples", least=1)
        check_range(self, "corpus_tokens", least=0)


def main(args: Sequence[str] | None = None) -> int:
    """Evaluate, or say in one line why not. Returns the exit code."""
    return exit_code(lambda: evaluate_again(read_flags(Config, args, __doc__), Console()))


def evaluate_again(config: Config, console: Console) -> None:
    run = load_config(config.folder)
    evaluation = EvaluationConfig(
        config.eval_prompts or run.evaluation.prompts, config.eval_samples or run.evaluation.samples
    )
    run = replace(run, evaluation=evaluation)
    from agents.checkpoint import load_checkpoint

    agent, _, damaged = load_checkpoint(config.folder / "checkpoints", agent_loader(run))
    for reason in damaged.values():
        console.print(f"[bold yellow]warning[/] {escape(reason)}: taking the one before", soft_wrap=True)
    if config.corpus:
        metrics = corpus_perplexities(config, run, agent, console)
    else:
        metrics = evaluate_all(run, agent, console, "again", config.answers)
    table = Table(title=str(config.folder), title_justify="left")
    if config.corpus:
        table.add_column(f"perplexity of {config.corpus}, {metrics['tokens']:,.0f} tokens")
        table.add_column("", justify="right")
        for label in ("before", "after", "teacher"):
            table.add_row(label, f"{metrics[label]:.2f}")
    else:
        table.add_column("student alone, test split")
        table.add_column("now", justify="right")
        add_metrics(table, run.evaluation.samples, [dict(metrics)])
    console.print(table)
    if config.out:
        write_json(config.out, finite(metrics))


def corpus_perplexities(config: Config, run: RunConfig, agent: Any, console: Console) -> Metrics:
    """`before`, `after` and `teacher`, in the tokens of their common tokenizer, and the number of `tokens`.

    Raises:
        ValueError: for a run without language models, or an agent without a student.
    """
    from agents.likelihood import corpus_perplexity
    from distill_env.models.hub import load_tokenizer
    from distill_env.models.load import build_model, is_served, load_model
    from distill_env.tasks.text import read_corpus

    if run.env != "lm" or not hasattr(agent, "student"):
        raise ValueError(f"corpus: {str(config.folder)!r} is a run of --env {run.env}; accepted: --env lm, a student")
    splits = read_corpus(config.corpus)
    text = splits.get("test") or next(iter(splits.values()))
    ids = load_tokenizer(teacher_tokenizer(run))(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids[: config.corpus_tokens or None]
    models = {
        "before": lambda: build_model(
            run.student.model, **shared_ids(run), **student_arguments(run), dtype=run.student.dtype
        ),
        "after": lambda: agent.student,
        "teacher": lambda: load_model(run.teacher.model, **teacher_arguments(run)),
    }
    metrics: Metrics = {"tokens": float(len(ids))}
    if is_served(run.teacher.model):
        del models["teacher"]
        metrics["teacher"] = math.nan
    with progress_bar(console) as progress:
        for name, load in models.items():
            bar = progress.add_task(f"perplexity, {name}", total=max(1, len(ids) - 1))
            advance = partial(progress.advance, bar)
            metrics[name] = corpus_perplexity(load(), ids, config.window, config.stride, advance)
    return metrics


if __name__ == "__main__":
    sys.exit(main())
