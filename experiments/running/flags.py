"""The command line of a run as a configuration. Light to import."""

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from agents import methods
from agents.config import DistillConfig
from experiments.running.cli import CONVENTIONS, override
from experiments.running.config import RunConfig
from experiments.running.config_file import default_config, flag_values, load_config, read_config
from experiments.running.help import help_text, refuse_without_effect
from experiments.running.placement import with_lengths

# what a resumed run may change
RESUMABLE = {"iterations", "validate_every", "checkpoint_every", "keep_checkpoints", "threads", "eval_prompts"}
RESUMABLE |= {"eval_samples", "track", "push_to_hub", "teacher_cache", "teacher_timeout", "device", "device_map"}
RESUMABLE |= {"gradient_checkpointing", "dry_run"}
# what it may change of a method's update, which is then another one: the run says so and keeps a record
CHANGEABLE = {"learning_rate", "schedule", "decay_iterations", "warmup_iterations", "batch_size"}


@dataclass(frozen=True)
class Choice:
    """The flags that decide what the defaults of the others are."""

    agent: str = ""
    env: str = ""
    name: str = ""
    out: Path = Path("runs")
    resume: bool = False
    seed: int = 0
    teacher: tuple[str, ...] = ()
    student: str = ""

    @property
    def usual_env(self) -> str:
        """The environment if none is given: language models if both are named."""
        return self.env or ("lm" if self.teacher and self.student else "sums")


def parse(args: Sequence[str] | None = None, description: str = "") -> RunConfig:
    """The command line as a configuration. `--help` prints and exits, and so does a flag that tyro refuses.

    Args:
        args: instead of `sys.argv`.
        description: for `--help`.

    Raises:
        ValueError: in one line that names the flag, the value and what is expected.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path)
    before.add_argument("-h", "--help", action="store_true")
    before.add_argument("--help-all", action="store_true")
    own, rest = before.parse_known_args(args)
    choice, _ = tyro.cli(Choice, args=rest, return_unknown_args=True, add_help=False, config=CONVENTIONS)
    name = choice.name or default_name(choice.agent or "gated", choice.usual_env, choice.seed)
    if choice.resume and own.config:
        raise ValueError("config: a resumed run reads the config.json in its folder; drop --config or --resume")
    if choice.resume:
        default = load_config(choice.out / name)
    elif own.config:
        default = read_config(own.config, choice.agent, choice.env, usual=("gated", choice.usual_env))
    else:
        default = default_config(choice.agent or "gated", choice.usual_env)
    if own.help:
        print(help_text(default, description))
        sys.exit(0)
    config = override(default, ["--help"] if own.help_all else rest, description)
    config = with_own_teacher(config)
    if choice.resume:
        check_resumed(config, default)
        return with_decay(replace(config, name=name, resume=True))
    refuse_without_effect(config, default_config(config.agent, config.env))
    if config.teacher.is_served:
        config = truncated(config)
    if config.env == "lm":
        if config.training.warm_start and not config.training.warm_updates:
            raise ValueError(f"warm_start: {config.training.warm_start} with --env lm; expected 0 or sft:N")
        config = with_lengths(config)
    config = with_decay(config)
    return config if config.name else replace(config, name=free_name(config))


def with_own_teacher(config: RunConfig) -> RunConfig:
    """With the student's name in place of `self` among the teachers."""
    if "self" not in config.teacher.by_name.values():
        return config
    if not config.student.model:
        raise ValueError("teacher: 'self' without --student; expected the name of a student")
    named = {name: config.student.model if model == "self" else model for name, model in config.teacher.by_name.items()}
    models = tuple(f"{name}={model}" if name else model for name, model in named.items())
    return replace(config, teacher=replace(config.teacher, models=models))


def free_name(config: RunConfig) -> str:
    """The name by agent, environment and seed, with a number if it is taken."""
    name = default_name(config.agent, config.env, config.agent_options.seed)
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(n for n in names if not (config.out / n).exists())


def check_resumed(config: RunConfig, saved: RunConfig) -> None:
    """Raise ValueError if a resumed run differs from the saved one in what may not change."""
    served = {name for name in saved.teacher.by_name if name not in saved.teacher.local}
    same = {name for name in config.teacher.by_name if name not in config.teacher.local} == served
    moved = {"teacher"} if served and same and saved.teacher.local == config.teacher.local else set()
    free = RESUMABLE | moved | {"name", "out", "resume"} | (CHANGEABLE if config.method else set())
    for name, (before, now) in changes(saved, config).items():
        if name not in free:
            raise ValueError(
                f"{name}: {now!r} with --resume, {before!r} before; only these may differ: {', '.join(sorted(free))}"
            )


def changes(saved: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The flags whose values differ, and both values."""
    before, now = flag_values(saved), flag_values(config)
    return {name: (before[name], value) for name, value in now.items() if value != before[name]}


def with_decay(config: RunConfig) -> RunConfig:
    """A schedule without a length covers all iterations."""
    options = config.agent_options
    if not isinstance(options, DistillConfig) or options.optimizer.decay_iterations:
        return config
    if options.optimizer.schedule not in ("linear", "cosine"):
        return config
    optimizer = replace(options.optimizer, decay_iterations=config.training.iterations)
    return replace(config, agent_options=replace(options, optimizer=optimizer))


def truncated(config: RunConfig) -> RunConfig:
    """With a served teacher divergences are of its likeliest ids and a tail.

    Raises:
        ValueError: for a method that needs all of the teacher's distribution.
    """
    options = config.agent_options
    if not isinstance(options, DistillConfig):
        return config
    method = methods.truncated(options.method, config.teacher.top_k, config.teacher.model)
    return replace(config, agent_options=replace(options, method=method))


def default_name(agent: str, env: str, seed: int) -> str:
    return "-".join([*(re.sub(r"[^A-Za-z0-9_]+", "-", part) for part in (agent, env)), f"s{seed}"])
