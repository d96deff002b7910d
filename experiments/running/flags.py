"""The command line of a run as a configuration. Light to import."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from agents.config import DistillConfig
from distill_env.models.load import is_served
from experiments.running.cli import errors_in_one_line
from experiments.running.config import RunConfig
from experiments.running.config_file import default_config, flag_values, load_config

# what a resumed run may change
RESUMABLE = {"iterations", "validate_every", "checkpoint_every", "keep_checkpoints", "threads", "eval_prompts"}
RESUMABLE |= {"eval_samples", "track", "push_to_hub", "teacher_cache", "teacher_timeout", "device", "device_map"}
RESUMABLE |= {"gradient_checkpointing"}


@dataclass(frozen=True)
class Choice:
    """The flags that decide which other flags there are."""

    agent: str = "gated"
    env: str = "sums"
    name: str = ""
    out: Path = Path("runs")
    resume: bool = False
    seed: int = 0


def parse(args: Sequence[str] | None = None, description: str | None = None) -> RunConfig:
    """The command line as a configuration.

    Raises:
        ValueError: in one line that names the flag, the value and what is expected.
    """
    args = list(sys.argv[1:] if args is None else args)
    with errors_in_one_line():
        choice, _ = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    name = choice.name or default_name(choice)
    default = load_config(choice.out / name) if choice.resume else default_config(choice.agent, choice.env)
    with errors_in_one_line():
        config = tyro.cli(
            RunConfig, args=args, default=default, description=description, config=(tyro.conf.OmitArgPrefixes,)
        )
    if is_served(config.teacher.model):
        config = truncated(config)
    if choice.resume:
        check_resumed(config, default)
        return replace(config, name=name, resume=True)
    if not choice.name and (config.out / name).exists():
        taken = (f"{name}-{i}" for i in itertools.count(2))
        name = next(n for n in taken if not (config.out / n).exists())
    return replace(config, name=name)


def check_resumed(config: RunConfig, saved: RunConfig) -> None:
    """Raise ValueError if a resumed run differs from the saved one in what may not change."""
    moved = {"teacher"} if is_served(saved.teacher.model) and is_served(config.teacher.model) else set()
    before = flag_values(saved)
    for name, value in flag_values(config).items():
        if value != before[name] and name not in RESUMABLE | moved | {"name", "out", "resume"}:
            raise ValueError(f"resume: {name} differs from the resumed run; accepted: {', '.join(sorted(RESUMABLE))}")


def truncated(config: RunConfig) -> RunConfig:
    """With a served teacher divergences are of its likeliest ids and a tail.

    Raises:
        ValueError: for a method that needs all of the teacher's distribution.
    """
    returned, options = config.teacher.top_k, config.agent_options
    if not returned or not isinstance(options, DistillConfig):
        return config
    top_k = options.method.top_k or returned
    if top_k > returned:
        raise ValueError(f"top_k: {top_k}; expected at most teacher_top_k, {returned}")
    try:
        method = replace(options.method, top_k=top_k)
    except ValueError as error:
        raise ValueError(
            f"teacher: {config.teacher.model!r} returns its {returned} likeliest ids, and so cannot be: {error}, with "
            "--teacher-top-k 0"
        ) from None
    return replace(config, agent_options=replace(options, method=method))


def default_name(choice: Choice) -> str:
    agent = re.sub(r"[^A-Za-z0-9_]+", "-", choice.agent)
    return f"{agent}-{choice.env}-s{choice.seed}"
