"""Repeat the evaluation of a finished run, or measure the perplexity of a corpus.

    python experiments/evaluate.py runs/gated-sums-s0
    python experiments/evaluate.py runs/gated-lm-s0 --corpus wikitext2/test.txt
    python experiments/evaluate.py runs/gated-sums-s0 --completions runs/gated-sums-s0/completions.jsonl

The student is that of the newest checkpoint.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from rich.console import Console

from distill_env.checks import Natural, Range
from experiments.running.build import agent_loader
from experiments.running.cli import command, print_warning
from experiments.running.config import EvaluationConfig
from experiments.running.config_file import load_config
from experiments.running.evaluating import evaluate_all
from experiments.running.run_folder import finite, write_json
from experiments.running.summary import evaluation_table


@dataclass(frozen=True)
class EvaluateConfig:
    """Repeat the evaluation of a run, or measure the perplexity of a corpus."""

    folder: tyro.conf.Positional[Path]
    """Folder of the run."""
    eval_prompts: Annotated[int | None, Range(least=1)] = None
    """Number of prompts per split; by default as in the run."""
    eval_samples: Annotated[int | None, Range(least=1)] = None
    """Number of completions per prompt; by default as in the run."""
    corpus: str = ""
    """Measure the perplexity of this text instead: a file, or the test split of a folder or hub id. With a run of --env
    lm it is measured for the student before and after the run, and for the teacher."""
    corpus_tokens: Natural = 0
    """Number of tokens of the corpus to read; 0 reads all."""
    window: int = 512
    """Number of tokens that a model reads at a time."""
    stride: int = 256
    """Tokens between two windows. A token has at least window - stride tokens of context, except at the beginning."""
    out: Path | None = None
    """JSON file to write the metrics to."""
    completions: Path | None = None
    """JSONL file to write the completions to, for judge.py."""


def evaluate_again(config: EvaluateConfig) -> None:
    """Load the student of the newest checkpoint, evaluate it, and print a table."""
    console = Console()
    run = load_config(config.folder)
    usual = run.evaluation
    settings = EvaluationConfig(config.eval_prompts or usual.prompts, config.eval_samples or usual.samples)
    run = replace(run, evaluation=settings)
    from agents.checkpoint import load_checkpoint

    agent, _, damaged = load_checkpoint(config.folder / "checkpoints", agent_loader(run))
    for reason in damaged.values():
        print_warning(console, f"{reason}; the one before it is used")
    if config.corpus:
        from experiments.running.corpus import corpus_perplexities, corpus_table

        read = (config.corpus, config.corpus_tokens, config.window, config.stride)
        metrics = corpus_perplexities(run, agent, *read, console)
        console.print(corpus_table(config.folder, config.corpus, metrics))
    else:
        metrics = evaluate_all(run, agent, console, "again", config.completions)
        console.print(evaluation_table(config.folder, settings.samples, {"now": metrics}))
    if config.out:
        write_json(config.out, finite(metrics))


main = command(evaluate_again, EvaluateConfig, __doc__)

if __name__ == "__main__":
    sys.exit(main())
