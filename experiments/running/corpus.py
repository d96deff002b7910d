"""The perplexity of a corpus under the models of a run."""

import math
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from agents.base import Metrics
from agents.likelihood import corpus_perplexity
from distill_env.models.hub import load_tokenizer
from distill_env.models.load import build_model, is_served, load_model
from distill_env.tasks.encoding import opening, token_ids
from distill_env.tasks.text import read_corpus
from experiments.running.cli import progress_bar
from experiments.running.config import RunConfig
from experiments.running.lm_arguments import new_student_arguments, shared_ids, teacher_arguments, teacher_tokenizer
from experiments.running.metric_display import metric


def corpus_perplexities(
    run: RunConfig, agent: Any, path: str, tokens: int, window: int, stride: int, console: Console
) -> Metrics:
    """`before`, `after` and `teacher` (with its name, if there are several), in the tokens of their common tokenizer,
    and the number of `tokens`.

    Args:
        run, agent: the run, and its trained agent.
        path: of the corpus.
        tokens: that are read; 0 for all.
        window, stride: as for `corpus_perplexity`.
        console: for the progress.

    Raises:
        ValueError: for a run without language models, or an agent without a student.
    """
    if run.env != "lm" or not hasattr(agent, "student"):
        raise ValueError(f"corpus: a run of --env {run.env}; expected --env lm, and an agent with a student")
    splits = read_corpus(path)
    text = splits.get("test") or next(iter(splits.values()))
    tokenizer, vocab_size = load_tokenizer(teacher_tokenizer(run)), shared_ids(run)["vocab_size"]
    begin, ids = opening(tokenizer), token_ids(tokenizer, [text])[0][: tokens or None]
    if max(ids, default=0) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(f"corpus: {path!r} has the token {token!r}, which the models do not have")
    models = {
        "before": lambda: build_model(run.student.model, **new_student_arguments(run)),
        "after": lambda: agent.student,
    }
    metrics: Metrics = {"tokens": float(len(ids))}
    for name, model in run.teacher.by_name.items():
        label = f"teacher {name}".rstrip()
        if is_served(model):
            metrics[label] = math.nan
        else:
            models[label] = partial(load_model, model, **teacher_arguments(run, model))
    with progress_bar(console) as progress:
        for name, load in models.items():
            bar = progress.add_task(f"perplexity, {name}", total=max(1, len(ids) - (not begin)))
            advance = partial(progress.advance, bar)
            metrics[name] = corpus_perplexity(load(), ids, window, stride, advance, begin)
    return metrics


def corpus_table(title: object, path: str, metrics: Metrics) -> Table:
    """What `corpus_perplexities` returns, as a table."""
    table = Table(title=str(title), title_justify="left")
    table.add_column(f"perplexity of {path}, {metrics['tokens']:,.0f} tokens")
    table.add_column("", justify="right")
    for label, value in metrics.items():
        if label != "tokens":
            table.add_row(label, metric("perplexity").text(value))
    return table
