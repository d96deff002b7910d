"""`--help` of a run: a line a flag, in groups, without the flags that have no effect in the environment."""

import ast
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from agents.config import DistillConfig
from agents.methods import METHODS, Method
from distill_env.gate_settings import SCORE_NAMES
from distill_env.tasks.registry import LANGUAGE_TASKS
from experiments.running.config import (
    SB3_AGENTS,
    SMALL_TASKS,
    DataConfig,
    EnvName,
    LoadingConfig,
    RunConfig,
    TeacherConfig,
)
from experiments.running.section import Flag, flag_names, flags_of

FIRST = ("agent", "env", "tau", "iterations", "seed", "name", "out", "resume", "teacher", "student", "task_path")
LM_ONLY = {name for section in (TeacherConfig, LoadingConfig, DataConfig) for name in flag_names(section).values()}
LM_ONLY -= {"teacher_cache"}
LM_ONLY |= {"lora_rank", "lora_alpha", "lora_targets", "gradient_checkpointing", "teacher_buffer_gib"}
LM_ONLY |= {"refresh_teacher"}
# the environments in which a flag has an effect, if not in all
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LM_ONLY, ("lm",)),
    **dict.fromkeys(("student_width", "student_layers", "student_mlp"), SMALL_TASKS),
    "warm_start": (*SMALL_TASKS, "lm"),
    **dict.fromkeys(("dtype", "student_dtype"), (*SMALL_TASKS, "lm")),
}
METHODS_ONLY = ("teacher_cache", "student_dtype", "draft_limit")
# fields of a method that --help leaves out where they have no effect; all can be set
EFFECTIVE: dict[str, Callable[[Method], bool]] = {
    "screen_tau": lambda m: bool(m.gate.screen),
    "alpha": lambda m: "soft" in (m.teacher_writes, m.weighting),
    "reverse_weight": lambda m: m.weighting == "constant",
    "beta": lambda m: m.loss == "jensen_shannon",
    "skew": lambda m: m.loss.startswith("skew"),
    "temperature": lambda m: m.temperature != 1,
    "loss_temperature": lambda m: m.loss_temperature != 1,
    "teacher_rate": lambda m: m.teacher_writes in ("random", "mixture"),
    "teacher_rate_anneal": lambda m: m.teacher_writes in ("random", "mixture"),
    "importance_weights": lambda m: m.teacher_writes == "random",
}


def concerns(flag: Flag, config: RunConfig) -> bool:
    """Whether a flag has an effect with the environment and the agent of a configuration."""
    is_method = isinstance(config.agent_options, DistillConfig)
    return config.env in ENVIRONMENTS.get(flag.name, config.env) and (is_method or flag.name not in METHODS_ONLY)


def is_shown(flag: Flag, config: RunConfig) -> bool:
    effective = EFFECTIVE.get(flag.name)
    return concerns(flag, config) and (effective is None or config.method is None or effective(config.method))


def line(flag: Flag, width: int) -> str:
    """The flag with its value, and what it is in short."""
    text = short(docstrings(type(flag.section)).get(flag.path[-1], ""))  # type: ignore[arg-type]
    if accepted := choices(flag):
        text += f": {', '.join(accepted)}"
    value = f" {flag.value:.3g}" if isinstance(flag.value, float) else f" {flag.value}"
    if flag.value in ("", (), None) or isinstance(flag.value, bool):
        value = ""
    name = f"--{flag.name.replace('_', '-')}{value}"
    return textwrap.fill(f"{text}.", width, initial_indent=f"  {name:<27} ", subsequent_indent=" " * 30)


def choices(flag: Flag) -> tuple[str, ...]:
    """The values that are accepted, if they are few."""
    if flag.name == "agent":
        return (*METHODS, *SB3_AGENTS, "package.module:Class")
    if flag.name == "env":
        return (*get_args(EnvName), "package.module:id")
    if flag.name == "score":
        return (*SCORE_NAMES, "package.module:function")
    if flag.name == "task":
        return (*LANGUAGE_TASKS, "package.module:Class")
    hint = get_type_hints(type(flag.section))[flag.path[-1]]
    return get_args(hint) if get_origin(hint) is Literal else ()


def short(text: str) -> str:
    """A docstring up to the first full stop, colon or semicolon."""
    return re.split(r"[.:;](?:\s|$)", text)[0]


@lru_cache
def docstrings(config_class: Any) -> dict[str, str]:
    """The sentences under the fields of a dataclass."""
    try:
        source = inspect.getsource(config_class)
    except (OSError, TypeError):  # made from the parameters of somebody else's agent
        return docstrings(config_class.__mro__[1])
    body = ast.parse(textwrap.dedent(source)).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[union-attr]
    return texts


def refuse_without_effect(config: RunConfig, default: RunConfig) -> None:
    """Raise ValueError for a flag that has no effect with the environment or the agent."""
    for flag, plain in zip(flags_of(config), flags_of(default), strict=True):
        if flag.value != plain.value and not concerns(flag, config):
            raise ValueError(
                f"{flag.name}: {flag.value!r} has no effect with --env {config.env} and --agent {config.agent}; "
                f"expected {plain.value!r}"
            )


def help_text(config: RunConfig, description: str) -> str:
    """The text of `--help`, with the values of a configuration as the defaults."""
    width = shutil.get_terminal_size((110, 24)).columns
    agents = [flag.name for flag in flags_of(config.agent_options)]
    shown = [flag for flag in flags_of(config) if is_shown(flag, config)]
    shown.sort(key=lambda flag: flag.name not in agents)
    first = sorted((flag for flag in shown if flag.name in FIRST), key=lambda flag: FIRST.index(flag.name))
    groups: dict[str, list[Flag]] = {"The flags that matter most": first}
    for flag in shown:
        if flag not in first:
            groups.setdefault(short(type(flag.section).__doc__ or ""), []).append(flag)
    lines = [
        description.strip(),
        "",
        f"Flags that have an effect with --agent {config.agent} --env {config.env}, with their defaults.",
        "--help-all explains all flags. --config FILE reads flags from YAML or JSON, such as a run's config.json.",
    ]
    for title, flags in groups.items():
        lines += ["", f"{title}:", *(line(flag, width) for flag in flags)]
    return "\n".join(lines)
