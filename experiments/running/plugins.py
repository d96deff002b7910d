"""Agents of the user's own: `package.module:Class`, and the flags that they bring. Light to import."""

from __future__ import annotations

import inspect
from dataclasses import field, is_dataclass, make_dataclass
from functools import cache
from typing import Any, Literal, get_origin, get_type_hints

from agents.config import PluginConfig
from distill_env.tasks.registry import import_name

GIVEN = ("env", "seed", "student")  # parameters of an agent that the run fills
FLAG_TYPES = (bool, int, float, str)


def plugin(name: str) -> Any:
    """`package.module:Class` -> the class.

    Raises:
        ValueError: if it cannot be imported, or is no agent.
    """
    loaded = import_name("agent", name)
    missing = [verb for verb in ("learn", "act", "save", "load") if not callable(getattr(loaded, verb, None))]
    if missing or not isinstance(loaded, type):
        lacks = f"has no {', '.join(missing)}" if missing else "is no class"
        raise ValueError(f"agent: {name!r} {lacks}; expected a class as agents.base.Agent describes it")
    return loaded


def parameters(agent: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a class by name, without `env`."""
    found = inspect.signature(agent).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in list(found.items())[1:] if p.kind in kinds}


@cache
def config_class(name: str) -> type[PluginConfig]:
    """The class of an agent's options. Its own parameters are fields, and so flags: numbers, texts, truth values,
    choices, and dataclasses of these.

    Raises:
        ValueError: for an agent that cannot be imported, or a parameter without a default that the run does not fill.
    """
    agent = plugin(name)
    hints = get_type_hints(agent.__init__)
    own = []
    for key, parameter in parameters(agent).items():
        if key in (*GIVEN, "batch_size"):
            continue
        if parameter.default is inspect.Parameter.empty:
            raise ValueError(f"agent: {name!r} needs {key!r}, which the run does not know; expected a default")
        hint = hints.get(key, type(parameter.default))
        if hint in FLAG_TYPES or get_origin(hint) is Literal or is_dataclass(parameter.default):
            default: Any = parameter.default
            own.append((key, hint, field(default=default)))
    if not own:
        return PluginConfig
    return make_dataclass("PluginConfig", own, bases=(PluginConfig,), frozen=True, namespace={"__doc__": agent.__doc__})


def make_plugin(agent: Any, env: Any, config: PluginConfig, student: Any) -> Any:
    """The agent, with whichever parameters it has: its own, `seed`, and `student`, the warm student."""
    values = {**vars(config), "student": student}
    return agent(env, **{name: values[name] for name in parameters(agent) if name in values})


def wants_student(name: str) -> bool:
    """Whether an agent takes the warm student."""
    return "student" in parameters(plugin(name))


def is_name(value: str) -> bool:
    """Whether this names something of the user's own."""
    module, _, attribute = value.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))
