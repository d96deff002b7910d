"""Assisted decoding: a run's student writes, and its teacher writes the tokens at hard positions, D_t >= tau.

    python experiments/decode.py runs/gated-sums-s0 --tau 0.5
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

from experiments.answering.assisted import AssistedRun, DecodeConfig, completion_lines, open_task, summary_table
from experiments.answering.curve import decode_curve
from experiments.answering.gate_picture import draw_gate
from experiments.running.cli import command

PROMPTS = 8


def decode(config: DecodeConfig) -> None:
    config.check()
    console = Console(highlight=False, soft_wrap=True)
    if config.curve is None:
        show_completions(config, console)
    else:
        console.print(decode_curve(config, config.curve, console), markup=False)
        console.print(f"\nwrote {config.curve}: curve.csv, curve.png, curve.md")


def show_completions(config: DecodeConfig, console: Console) -> None:
    """Print the completions at each tau, and their table; draw one of those of the first tau."""
    run = AssistedRun(config.runs[0], config)
    env, prompts = open_task(config, run.run, PROMPTS)
    decoded = []
    for tau in config.tau or (run.tau,):
        completions = run.decode(env, prompts, tau)
        decoded.append(completions)
        console.print(f"\ntau {completions.tau:g}, tokens by the teacher are marked ⟦so⟧")
        for line in completion_lines(env.task, completions):
            console.print(line)
    console.print()
    console.print(summary_table(f"{config.runs[0]}, 95 % intervals over {len(prompts)} prompts", decoded))
    if config.picture is not None:
        draw_gate(env.task, decoded[0], config.picture)
        console.print(f"wrote {config.picture}")


main = command(decode, DecodeConfig, __doc__)

if __name__ == "__main__":
    sys.exit(main())
