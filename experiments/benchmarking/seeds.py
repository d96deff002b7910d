"""Training several seeds of Sums as one computation, against one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

from rich.console import Console

from agents.config import DistillConfig
from agents.distill import DistillAgent
from distill_env.models.load import build_model
from experiments.benchmarking.config import BenchmarkConfig
from experiments.benchmarking.timing import alternate
from experiments.running.build import make_env
from experiments.running.flags import parse
from experiments.running.warm_start import warm_start

BATCH = 128  # completions of an iteration, as in the published comparison
AGENTS = ("gated", "rkl", "fkl")


def measure_seeds(config: BenchmarkConfig) -> dict[str, Any]:
    """CPU seconds of a seed's iteration, by itself and in a stack, from a student after the weak warm start.

    The teacher's memory fills while the stack is measured, so later repetitions are faster.
    """
    from agents.stacked import AgentStack  # here, since --help needs no Transformers
    from experiments.running.together import remembered_teacher

    contenders: dict[str, Callable[[], object]] = {}
    for name in AGENTS:
        flags = ["--env", "sums", "--agent", name, "--batch-size", str(BATCH), "--learning-rate", "7e-3"]
        run = parse([*flags, "--draft-length", "0", "--hand-over-width", "0", "--out", str(config.out.parent)])
        _, folder = warm_start(run, Console(stderr=True))
        options = cast("DistillConfig", run.agent_options)
        one, *agents = (
            DistillAgent(build_model(folder / "student"), replace(options, seed=seed))
            for seed in range(config.seeds + 1)
        )
        contenders[f"{name}, alone"] = partial(one.learn, make_env(run, "train", BATCH, purpose="train"), 1)
        rows, teacher = BATCH * config.seeds, remembered_teacher("sums", "float32")
        together = make_env(run, "train", rows, purpose="train", teacher=teacher)
        contenders[f"{name}, stacked"] = partial(AgentStack(agents).learn, together, 1)
    seconds = alternate(contenders, config.repetitions, time.process_time)
    shared = {k: [x / config.seeds for x in v] if k.endswith("stacked") else v for k, v in seconds.items()}
    return {"seeds": config.seeds, "rows": BATCH, "seconds": shared}
