"""What does the gate cost? Every row measured side by side in one run, with alternating repetitions.

    python experiments/benchmark.py
    python experiments/benchmark.py --teacher PATH_OR_ID --student PATH_OR_ID --task-path FILE --parts rollout peers

Without a pair it takes that of Sums, with an untrained student. Writes tables (Markdown), all numbers (JSON), and the
rollouts' speed-up over token-by-token gating beside that of the cost model (PNG).
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

from agents.atomic_io import write_text
from experiments.benchmarking.cost_model import Config as CostModel
from experiments.benchmarking.cost_model import draw
from experiments.benchmarking.environment import measure_environment
from experiments.benchmarking.iterations import measure_iterations, measure_memory, measure_peers
from experiments.benchmarking.rollouts import measure_precision, measure_rollouts
from experiments.benchmarking.tables import lines
from experiments.benchmarking.timing import Config, Part
from experiments.running.cli import command


def main(config: Config) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    console = Console()
    results: dict[str, Any] = {
        "config": {k: str(v) for k, v in asdict(config).items()},
        "pair": f"{Path(config.teacher).parent.name}" if config.teacher else "Sums",
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    needs_pair = {"memory", "peers"} & set(config.parts)
    if needs_pair and not config.teacher:
        raise ValueError(f"parts: {', '.join(sorted(needs_pair))}: need --teacher, --student and --task-path")
    measures: dict[Part, Callable[[], Any]] = {
        "iteration": lambda: measure_iterations(config),
        "environment": lambda: measure_environment(config),
        "precision": lambda: measure_precision(config),
        "memory": lambda: measure_memory(config),
        "peers": lambda: measure_peers(config),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        for rows in config.rows if part == "rollout" else ("",):
            console.print(f"measuring: {part} {rows}", highlight=False)
            started = time.perf_counter()
            if part == "rollout":
                results.setdefault(part, []).append(measure_rollouts(config, int(rows)))
            else:
                results[part] = measures[part]()
            console.print(f"  {time.perf_counter() - started:.0f} s", highlight=False)
            write_text(config.out.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
            write_text(config.out.with_suffix(".md"), "\n".join(lines(results)) + "\n")
    if "rollout" in results:
        draw(CostModel(measured=config.out.with_suffix(".json"), out=config.out.with_suffix(".png")))
    console.print(config.out.with_suffix(".md").read_text(), markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(command(main, Config, __doc__))
