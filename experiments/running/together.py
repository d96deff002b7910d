"""New runs that differ in their seeds alone, trained as one computation. Each has a folder as if run by itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console

from agents.base import Metrics
from agents.config import DistillConfig
from agents.stacked import AgentStack
from distill_env.models.base import TokenModel
from distill_env.models.load import load_model
from distill_env.models.remembered import RememberedLM
from distill_env.models.stacked import StackedLM
from experiments.running.build import make_env, make_student
from experiments.running.config import SMALL_TASKS, RunConfig
from experiments.running.config_file import to_dict
from experiments.running.evaluating import HeldOut
from experiments.running.lifecycle import check_name, finish, start
from experiments.running.loop import TrainingLoop
from experiments.running.placement import placement
from experiments.running.run_folder import write_json
from experiments.running.tracking import check_track


def can_run_together(configs: Sequence[RunConfig]) -> bool:
    """Whether `run_together` takes these runs: new ones of one method on Sums or Coins, equal but for name and seed,
    whose gate depends on no batch and that end after a number of iterations."""
    first = configs[0]
    options = first.agent_options
    return (
        len({repr(_without_seed(c)) for c in configs}) == 1
        and isinstance(options, DistillConfig)
        and first.env in SMALL_TASKS
        and options.micro_batch == 0
        and options.method.gate.tau != "auto"
        and options.method.budget == 0
        and options.method.teacher_writes != "matched"
        and options.method.gate.student_score != "predicted_divergence"
        and not (first.resume or first.teacher.cache or first.student.model or first.training.limit)
        and first.rollout.rows in (0, options.batch_size)
        and first.logging.track in ("none", "tensorboard")
    )


def _without_seed(config: RunConfig) -> RunConfig:
    options: Any = config.agent_options
    return dataclasses.replace(config, name="", agent_options=dataclasses.replace(options, seed=0))


@cache
def remembered_teacher(task: str, dtype: str) -> TokenModel:
    """The teacher of a small task, which remembers what it computes for all runs of this process."""
    teacher: Any = load_model(task, dtype=dtype)
    return RememberedLM(StackedLM([teacher]))


def run_together(configs: Sequence[RunConfig], consoles: Sequence[Console]) -> None:
    """Train and evaluate runs that can run together.

    Args:
        configs: of the runs.
        consoles: for the progress and the results of each.

    Raises:
        ValueError: for a run whose folder exists or is in use.
        FloatingPointError: if the training of one of them fails. All can be resumed by themselves.
    """
    first, s = configs[0], len(configs)
    if first.training.threads:
        torch.set_num_threads(first.training.threads)
    check_track(first.logging.track)
    with ExitStack() as locks:
        for config in configs:
            check_name(config)
            config.folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(FileLock(config.folder / ".lock", blocking=False))
            write_json(config.folder / "config.json", to_dict(config))
        rows = first.agent_options.batch_size
        env = make_env(first, "train", rows, purpose="train")
        agents, evaluations, loops = [], [], []
        held_out = [HeldOut() for _ in configs]
        for config, console, own in zip(configs, consoles, held_out, strict=True):
            began = time.perf_counter()
            agent, evaluation = start(config, make_student(config, env), env, console, own)
            evaluation["seconds"] += time.perf_counter() - began
            agents.append(agent)
            evaluations.append(evaluation)
            loops.append(TrainingLoop(config, agent, env, console, evaluation["before"]))

        def after_iteration(iteration: int, metrics: Sequence[Metrics]) -> None:
            for loop, own in zip(loops, metrics, strict=True):
                loop.after_iteration(iteration, own)

        began = time.perf_counter()
        teacher = remembered_teacher(first.env, placement(first).dtype)
        together = make_env(first, "train", s * rows, purpose="train", teacher=teacher)
        try:
            AgentStack(agents).learn(together, first.training.iterations, after_iteration)
        finally:
            for loop in loops:
                loop.tracker.close()
        seconds = (time.perf_counter() - began) / s
        members = zip(configs, agents, evaluations, held_out, loops, consoles, strict=True)
        for config, agent, evaluation, own, loop, console in members:
            evaluation["seconds"] += seconds
            finish(config, agent, env, evaluation, own, loop.log.lines, time.perf_counter(), console)
