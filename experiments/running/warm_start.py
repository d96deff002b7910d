"""Supervised learning on a data set that the teacher wrote, and the warm start of a student of sums or coins by it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import track

from agents.base import Metrics
from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.evaluation import completion_metrics
from agents.generation import generate
from agents.methods import METHODS, variant
from agents.prompts import PromptStream
from agents.rollout import Rollout
from agents.teacher_cache import TeacherCache
from distill_env.env import DistillVectorEnv
from distill_env.models.base import TrainableModel
from distill_env.models.load import build_model
from experiments.running.build import make_env, make_student
from experiments.running.cli import progress_bar
from experiments.running.config import LARGEST_RUN_SEED, LEARNING_RATE, EnvironmentConfig, RunConfig, TeacherConfig
from experiments.running.evaluating import EVALUATION_SEED
from experiments.running.placement import placement

LM_SEED = 2**33  # and above, of the fine-tuning of language models
DATA_SET = 100  # batches of the teacher's completions, over which a warm start iterates
DATA_SEED = LARGEST_RUN_SEED + 2  # of the data set, which all warm starts of an environment share
VALIDATE_EVERY = 50  # updates
GIVE_UP_AFTER = 20_000  # updates


def teacher_completions(agent: DistillAgent, env: Any, batches: int) -> list[Rollout]:
    """Batches of `agent.config.batch_size` completions that the teacher writes to the training prompts."""
    stream = PromptStream(env.unwrapped.prompts, agent.config.seed)
    data = []
    for i in track(range(batches), "the teacher writes a data set", transient=True):
        agent.iteration = i
        data.append(agent.rollout(env, stream))
    agent.iteration = 0
    return data


def epochs(agent: DistillAgent, data: Sequence[Rollout]) -> Iterator[int]:
    """Update on the data in epochs of different order, without end. Yields the number of updates so far."""
    while True:
        order = np.random.default_rng([DATA_SEED, agent.config.seed, agent.iteration]).permutation(len(data))
        for i in order:
            agent.update(data[i])
            agent.iteration += 1
            yield agent.iteration


@lru_cache(maxsize=4)
def data_set(config: RunConfig, batches: int) -> tuple[list[Rollout], float]:
    """The data set of a warm start, and the teacher's share of correct chains in validation."""
    assert isinstance(config.agent_options, DistillConfig)
    env = make_env(config, "train", config.agent_options.batch_size, purpose="train")
    validation = make_env(config, "validation", 300, purpose="evaluate")
    written = generate(None, validation, validation.prompts, EVALUATION_SEED, teacher_writes=True)
    cache = TeacherCache(config.out / "warm_start" / "completions")  # shared by all processes and students
    options = dataclasses.replace(config.agent_options, seed=DATA_SEED)
    data = teacher_completions(DistillAgent(make_student(config, env), options, cache), env, batches)
    return data, completion_metrics(written)["correct_chains"]


def warm_start(config: RunConfig, console: Console) -> tuple[Any, Path]:
    """A student after supervised fine-tuning up to a share of the teacher's correct chains.

    The fine-tuning ends at the first validation at which the student reaches `warm_start` times the teacher's share.

    Returns:
        The student, and its folder, which all runs with the same seed, student and share use.

    Raises:
        ValueError: if that share is not reached.
    """
    options = DistillConfig(
        method=METHODS["sft"],
        optimizer=OptimizerConfig(1e-2, warmup_iterations=100),
        batch_size=64,
        hand_over_width=0,
        seed=config.agent_options.seed,
    )
    own = config.student
    shape: list[Any] = [config.env, own.width, own.layers, own.mlp, config.environment.max_new_tokens]
    if (dtype := placement(config).student_dtype) != "float32":
        shape.append(dtype)
    how = [options.batch_size, options.optimizer.learning_rate, options.optimizer.warmup_iterations, options.seed]
    key = json.dumps([*shape, config.training.warm_start, DATA_SET, DATA_SEED, *how])
    folder = config.out / "warm_start" / hashlib.sha256(key.encode()).hexdigest()[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # runs that need the same one wait for the first
        if not (folder / "student").exists():
            _fine_tune(config, options, console).save(folder)
    return build_model(folder / "student", dtype=dtype), folder


def _fine_tune(config: RunConfig, options: DistillConfig, console: Console) -> DistillAgent:
    sft = RunConfig(
        agent="sft",
        env=config.env,
        out=config.out,
        teacher=TeacherConfig(dtype=config.teacher.dtype),
        environment=EnvironmentConfig(max_new_tokens=config.environment.max_new_tokens),
        agent_options=dataclasses.replace(options, seed=0),  # so that all seeds find the data set in memory
    )
    with console.status("the teacher writes a data set"):
        data, teacher = data_set(sft, DATA_SET)
    validation = make_env(sft, "validation", 300, purpose="evaluate")
    prompts = validation.prompts
    fixed = config.training.warm_updates
    target = 1.0 if fixed else float(config.training.warm_start) * teacher
    agent = DistillAgent(make_student(config, validation), options)
    reached = 0.0
    with progress_bar(console) as progress:
        bar = progress.add_task("warm start", total=None)
        for updates in epochs(agent, data):
            if updates % VALIDATE_EVERY == 0:
                reached = completion_metrics(generate(agent, validation, prompts, EVALUATION_SEED))["correct_chains"]
                until = f"{fixed} updates" if fixed else f"{target:.0%} correct chains in validation"
                text = f"warm start: sft until {until}, now {reached:.0%} correct"
                progress.update(bar, description=text, completed=updates)
            if updates == fixed or (reached >= target and not fixed):
                break
            if updates >= GIVE_UP_AFTER:
                raise ValueError(
                    f"warm_start: {target:.0%} not reached in {GIVE_UP_AFTER:,} updates; lower it or widen the student"
                )
    console.print(
        f"warm start: {agent.iteration:,} updates on {DATA_SET * options.batch_size:,} completions of the teacher, "
        f"{reached:.1%} correct chains in validation"
    )
    return agent


def fine_tune(config: RunConfig, student: TrainableModel, env: DistillVectorEnv, console: Console) -> None:
    """Supervised fine-tuning of a language model, in place, for the updates of the run's warm start.

    On the reference completions of the training prompts if all have one, else on completions of the teacher. Prompts
    and draws are others than those of the training.
    """
    references = all(p.reference_completion for p in env.prompts)
    own, updates = config.agent_options, config.training.warm_updates
    rate = own.optimizer.learning_rate if isinstance(own, DistillConfig) else LEARNING_RATE["lm"]
    options = DistillConfig(
        variant(METHODS["sft"], teacher_writes="reference" if references else "always"),
        OptimizerConfig(rate, min(10, updates), "linear", updates),
        own.batch_size,
        micro_batch=getattr(own, "micro_batch", 0),
        seed=LM_SEED + own.seed,
    )
    if config.method is None:  # whose environment goes token by token
        sft = dataclasses.replace(config, agent="sft", agent_options=options)
        env = make_env(sft, "train", min(config.rollout.rows or own.batch_size, own.batch_size), purpose="train")
    losses: list[float] = []
    with progress_bar(console) as progress:
        bar = progress.add_task("warm start", total=updates)

        def show(iteration: int, metrics: Metrics) -> None:
            losses.append(metrics["train/loss"])
            progress.update(bar, description=f"warm start: sft, loss {losses[-1]:.3f}", completed=iteration)

        DistillAgent(student, options).learn(env, updates, show)
    written = "reference completions" if references else "the teacher's completions"
    console.print(
        f"warm start: {updates:,} updates of sft on {written}, loss {losses[0]:.3f} to {losses[-1]:.3f} nats per token"
    )
