"""Measure what the gate costs: rollouts, iterations, memory, and the environment, in alternating repetitions.

    python experiments/benchmark.py
    python experiments/benchmark.py --teacher PATH_OR_ID --student PATH_OR_ID --task-path FILE --parts rollout peers

Without a pair of models it uses the teacher of Sums and an untrained student. It writes tables (.md), all numbers
(.json), and a figure of the rollouts' speed-up over token-by-token gating beside that of the cost model (.png).
"""

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
from experiments.benchmarking.config import BenchmarkConfig, Part
from experiments.benchmarking.cost_model import CostModelConfig, draw_cost_model
from experiments.benchmarking.environment import measure_environment
from experiments.benchmarking.iterations import measure_iterations
from experiments.benchmarking.peers import measure_memory, measure_peers
from experiments.benchmarking.rollouts import measure_precision, measure_rollouts
from experiments.benchmarking.seeds import measure_seeds
from experiments.benchmarking.tables import benchmark_report
from experiments.running.cli import command

MEASURES: dict[Part, Callable[[BenchmarkConfig], Any]] = {
    "iteration": measure_iterations,
    "environment": measure_environment,
    "precision": measure_precision,
    "memory": measure_memory,
    "peers": measure_peers,
    "seeds": measure_seeds,
}


def benchmark(config: BenchmarkConfig) -> None:
    if {"memory", "peers"} & set(config.parts) and not config.teacher:
        raise ValueError("parts: memory and peers without models; expected --teacher, --student and --task-path")
    if config.threads:
        torch.set_num_threads(config.threads)
    console = Console(highlight=False)
    results: dict[str, Any] = {
        "config": {k: str(v) for k, v in asdict(config).items()},
        "pair": f"{Path(config.teacher).parent.name}" if config.teacher else "Sums",
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        for rows in config.rows if part == "rollout" else (0,):
            console.print(f"measuring: {part}{f', {rows} rows' if rows else ''}")
            started = time.perf_counter()
            if rows:
                results.setdefault(part, []).append(measure_rollouts(config, rows))
            else:
                results[part] = MEASURES[part](config)
            console.print(f"  {time.perf_counter() - started:.0f} s")
            write_text(config.out.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
            write_text(config.out.with_suffix(".md"), benchmark_report(results))
    if "rollout" in results:
        draw_cost_model(CostModelConfig(config.out.with_suffix(".json"), config.out.with_suffix(".png")))
    print(benchmark_report(results))


main = command(benchmark, BenchmarkConfig, __doc__)

if __name__ == "__main__":
    sys.exit(main())
