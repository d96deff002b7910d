"""Win rate: a judge compares the completions of two runs pair by pair, in both orders.

    python experiments/judge.py pairs runs/a runs/b --out pairs.jsonl
    python experiments/judge.py pairs runs/a runs/a --writer-b teacher --out pairs.jsonl
    python experiments/judge.py api pairs.jsonl --model gpt-4.1            # the key is in $OPENAI_API_KEY
    python experiments/judge.py api pairs.jsonl --model NAME --base-url http://localhost:8000/v1 --key-variable ''
    python experiments/judge.py local pairs.jsonl --model PATH_OR_ID

Pairs are JSON objects, one per line, with the texts `prompt`, `completion_a` and `completion_b`; other fields are
ignored. Each verdict is appended at once to a file of verdicts: `judge`, `pair` (the pair's line), `order` (`ab` or
`ba`), `verdict` (`first`, `second`, `tie`, or null if the reply holds none), `reply`, and `key`, a hash of what the
judge read. The same command continues where it was interrupted, and asks again where there is no verdict.

A pair is won by the completion that is preferred in both orders, and a tie otherwise (arXiv 2306.05685, section 3.4).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from rich.console import Console

from experiments.answering.judges import LocalJudge, LocalJudgeConfig, ServedJudge, ServedJudgeConfig
from experiments.answering.judging import JudgingConfig, PairsConfig, judge_pairs, make_pairs
from experiments.running.cli import command
from experiments.running.signals import signals, stop


@dataclass(frozen=True, kw_only=True)
class ServedConfig(JudgingConfig):
    """Judge pairs with a model behind an endpoint that speaks OpenAI's protocol."""

    judge: Annotated[ServedJudgeConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class LocalConfig(JudgingConfig):
    """Judge pairs with a causal language model on this machine, which names its likeliest verdict."""

    judge: Annotated[LocalJudgeConfig, tyro.conf.arg(name="")]


JudgeConfig = (
    Annotated[PairsConfig, tyro.conf.subcommand("pairs")]
    | Annotated[ServedConfig, tyro.conf.subcommand("api")]
    | Annotated[LocalConfig, tyro.conf.subcommand("local")]
)


def judge(config: PairsConfig | ServedConfig | LocalConfig) -> None:
    """Make pairs, or judge them."""
    console = Console()
    try:
        with signals(stop):
            if isinstance(config, PairsConfig):
                console.print(make_pairs(config), highlight=False, soft_wrap=True)
            elif isinstance(config, ServedConfig):
                judge_pairs(config, ServedJudge(config.judge), console)
            else:
                judge_pairs(config, LocalJudge(config.judge), console)
    except KeyboardInterrupt:
        console.print("stopped; the same command continues")
        raise


main = command(judge, JudgeConfig, __doc__)  # type: ignore[arg-type]

if __name__ == "__main__":
    sys.exit(main())
