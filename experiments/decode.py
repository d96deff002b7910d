"""Assisted decoding: a run's student writes, and its teacher writes the tokens at hard positions.

    python experiments/decode.py runs/gated-sums-s0 --tau 0.5
    python experiments/decode.py runs/gated-sums-s0 --score predicted_divergence --budget 0.1
    python experiments/decode.py runs/gated-lm-s0 --tau 0.5 2 --prompt "What is a mean?"
    python experiments/decode.py runs/gated-sums-s0 --picture gate.png
    python experiments/decode.py runs/gated-sums-s0 runs/rkl-sums-s0 --curve runs/curve

Prints the completions with the teacher's tokens marked, and a table of their quality, or draws the curve of several
runs.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from experiments.answering.assisted import (
    BUDGET,
    GRADES,
    AssistedCompletions,
    AssistedRun,
    DecodeConfig,
    completion_lines,
    open_task,
    open_validation,
    summary_table,
)
from experiments.answering.curve import decode_curve
from experiments.answering.gate_picture import draw_gate
from experiments.running.cli import command
from experiments.running.metric_display import metric

PROMPTS = 8
NATS = ("divergence", "forward_kl", "student_entropy", "teacher_entropy", "predicted_divergence")


def decode(config: DecodeConfig) -> None:
    config.check()
    console = Console(highlight=False, soft_wrap=True)
    if config.curve is None:
        show_completions(config, console)
    else:
        console.print(decode_curve(config, config.curve, console), markup=False)
        files = sorted(path.name for path in config.curve.iterdir())
        console.print(f"\nwrote {config.curve}: {', '.join(files)}")


def show_completions(config: DecodeConfig, console: Console) -> None:
    """Print the completions at each tau, and their table; draw one of those of the first tau."""
    run = AssistedRun(config.runs[0], config)
    env, prompts = open_task(config, run.run, PROMPTS)
    (name,), default = config.score, run.default_tau(config.score[0])
    budgets = config.budget or (() if config.tau or default is not None else (BUDGET,))
    validation = open_validation(config, run.run, run.run.evaluation.prompts) if budgets or "@" in name else (env, [])
    gate = run.gate(name, *validation)
    trials = [run.meet_budget(*validation, budget, gate, name) for budget in budgets]
    for budget, trial in zip(budgets, trials, strict=True):
        console.print(f"budget {budget:g}: {expectation(trial, len(validation[1]))}")
    decoded = []
    for tau in (*config.tau, *(trial.tau for trial in trials)) or (default,):
        assert tau is not None
        completions = run.decode(env, prompts, tau, gate, name)
        decoded.append(completions)
        console.print(f"\ntau {completions.tau:.4g}, tokens by the teacher are marked ⟦so⟧")
        for line in completion_lines(env.task, completions):
            console.print(line)
    console.print()
    unit = "nats" if gate.score in NATS else ""
    title = f"{config.runs[0]}, {name}, 95 % intervals over {len(prompts)} prompts"
    console.print(summary_table(title, decoded, config.prices, unit))
    if config.picture is not None:
        draw_gate(env.task, decoded[0], config.picture)
        console.print(f"wrote {config.picture}")


def expectation(trial: AssistedCompletions, prompts: int) -> str:
    """What a threshold did on the validation prompts, in words."""
    quality = ", ".join(f"{metric(key).title} {e.shown_as(metric(key))}" for key in GRADES if (e := trial.grade(key)))
    share = f"the teacher writes {trial.teacher_share:.1%} of the tokens of {prompts} validation prompts"
    return f"tau {trial.tau:.4g}, at which {share}" + (f"; expect {quality}" if quality else "")


main = command(decode, DecodeConfig, __doc__)

if __name__ == "__main__":
    sys.exit(main())
