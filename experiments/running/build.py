"""Environments, students and agents from a configuration. Light to import."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agents.config import DistillConfig, PluginConfig, SB3Config
from agents.pair import SERVED_OPTIONS
from distill_env.tasks.base import Split
from experiments.running.config import SMALL_TASKS, EnvironmentConfig, RunConfig
from experiments.running.lm_arguments import new_student_arguments, student_arguments, task_arguments, teachers
from experiments.running.placement import placement
from experiments.running.plugins import make_plugin, plugin
from experiments.running.section import errors_name_flags

if TYPE_CHECKING:
    from agents.base import Agent
    from distill_env.env import DistillVectorEnv
    from distill_env.env_arguments import AutoresetName
    from distill_env.models.base import TokenModel, TrainableModel
    from distill_env.tasks.base import Task

CATEGORICAL_VOCABULARY = 6
ENTRY_POINT = "distill_env.env:DistillEnv"
DEFAULTS = vars(EnvironmentConfig())
OWN_AGENTS: dict[type, str] = {DistillConfig: "agents.distill:DistillAgent", SB3Config: "agents.sb3:SB3Agent"}
AUTORESET: dict[type, AutoresetName] = {SB3Config: "SameStep", PluginConfig: "NextStep"}  # which its training needs
# arguments of a served teacher, and of a task and a teacher that are loaded, and their flags
SERVED_FLAGS = {"path": "task_path", "url": "teacher", "tokenizer": "teacher_tokenizer", **SERVED_OPTIONS}
LOADED_FLAGS = {"path": "task_path", "name_or_path": "teacher", "model": "teacher"}


def task_and_teacher(config: RunConfig) -> dict[str, Any]:
    """The task and the teacher of a run, as arguments of `DistillVectorEnv`."""
    if config.env == "categorical":
        return {"task": "categorical", "teacher": "markov", "teacher_kwargs": {"vocab_size": CATEGORICAL_VOCABULARY}}
    if ":" in config.env:
        return registered(config.env)
    if config.env != "lm":  # a task with a teacher that ships with it
        return {"task": config.env, "teacher": config.env, "teacher_kwargs": {"dtype": placement(config).dtype}}
    return {
        "task": config.data.task,
        "task_kwargs": task_arguments(config),
        **teachers(config),
    }


def registered(name: str) -> dict[str, Any]:
    """The arguments with which `package.module:id` is registered with Gymnasium.

    Raises:
        ValueError: if it is not, or is none of this project's environments.
    """
    import gymnasium as gym

    module, _, env_id = name.partition(":")
    try:
        importlib.import_module(module)  # which registers it
        spec = gym.spec(env_id)
    except Exception as error:  # a module may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"env: {name!r} is not registered ({reason}); expected package.module:id") from None
    if spec.entry_point != ENTRY_POINT:
        raise ValueError(f"env: {name!r} is made by {spec.entry_point}; expected {ENTRY_POINT}")
    return dict(spec.kwargs)


def make_env(
    config: RunConfig,
    split: Split,
    rows: int,
    *,
    purpose: Literal["train", "evaluate", "decode"],
    task: Task | None = None,
    with_teacher: bool = True,
    teacher: TokenModel | None = None,
) -> DistillVectorEnv:
    """The run's environment.

    Args:
        config: of the run.
        split: of the task's prompts.
        rows: completions at a time.
        purpose: for training it is as the agent requires it, for evaluation it goes token by token, for decoding by
            whole drafts.
        task: instead of the run's own.
        with_teacher: False for an agent on its own; REWRITE is then refused.
        teacher: instead of the run's own.
    """
    from distill_env.env import DistillVectorEnv

    kind = type(config.agent_options) if purpose == "train" else object
    drafts = purpose == "decode" or kind is DistillConfig
    own = config.environment
    usual = task_and_teacher(config)
    flags = vars(own) | {"rewrite_cost": min(own.rewrite_cost, -own.log_prob_floor)}
    arguments = usual | {name: value for name, value in flags.items() if name not in usual or value != DEFAULTS[name]}
    arguments["observation"] = "ids"
    if task is not None:
        arguments |= {"task": task, "task_kwargs": None}
    if not with_teacher:
        arguments |= {"teacher": None, "teacher_kwargs": None}
    if teacher is not None:
        arguments |= {"teacher": teacher, "teacher_kwargs": None}
    with errors_name_flags(SERVED_FLAGS if config.teacher.is_served else LOADED_FLAGS):
        return DistillVectorEnv(
            rows,
            split=split,
            chunk=config.rollout.draft_limit if drafts else 1,
            reveal_teacher=not drafts,
            autoreset_mode="SameStep"
            if kind is SB3Config
            else "NextStep"
            if issubclass(kind, PluginConfig)
            else "Disabled",
            **arguments,
        )


def make_student(config: RunConfig, env: DistillVectorEnv) -> TrainableModel:
    """The student that a run begins with, before any warm start.

    Raises:
        ValueError: if its vocabulary is not the environment's.
    """
    import torch

    from distill_env.models.load import build_model

    own = config.student
    if own.model:
        with errors_name_flags({"name_or_path": "student", "model": "student"}):
            student: TrainableModel = build_model(own.model, **new_student_arguments(config))
        if student.vocab_size != env.vocab_size:
            raise ValueError(f"student: {own.model!r} has {student.vocab_size} ids, the teacher {env.vocab_size}")
        return student
    if config.env not in SMALL_TASKS:
        from distill_env.models.tabular import uniform

        return uniform(env.vocab_size)
    from distill_env.models.causal_lm import CausalLM
    from distill_env.models.toy import toy_student

    with torch.random.fork_rng():
        torch.manual_seed(config.agent_options.seed)
        model = toy_student(config.env, own.width, own.layers, own.mlp)
    model.to(getattr(torch, placement(config).student_dtype))
    return CausalLM(model, eos_token_id=env.task.eos_token_id)


def make_agent(config: RunConfig, student: TrainableModel, env: DistillVectorEnv) -> Agent:
    """The agent of a run, around that student."""
    options = config.agent_options
    if isinstance(options, PluginConfig):
        return make_plugin(agent_class(config), env, options, student)
    return agent_class(config)(student, options)


def agent_class(config: RunConfig) -> Any:
    """The agent's class, whose `load` reads the run's checkpoints."""
    return plugin(OWN_AGENTS.get(type(config.agent_options), config.agent))


def agent_loader(config: RunConfig, **options: Any) -> Callable[[Path], Any]:
    """Reads an agent of the run from a checkpoint, its student loaded as the flags say.

    Args:
        config: of the run.
        options: for `DistillAgent.load`.
    """
    own = config.agent_options
    load = agent_class(config).load
    if isinstance(own, PluginConfig):
        return load
    if not isinstance(own, DistillConfig):
        return partial(load, **student_arguments(config))

    def load_and_reconfigure(path: Path) -> Any:
        agent = load(path, **student_arguments(config), **options)
        agent.reconfigure(own)
        return agent

    return load_and_reconfigure
