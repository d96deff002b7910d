"""Configurations as nested dictionaries: the `config.json` of a run, and YAML or JSON files for `--config`."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from experiments.running.config import ENV_DEFAULTS, RunConfig, default_options, kind_of
from experiments.running.section import flags_of

C = TypeVar("C")


def to_dict(config: Any) -> Any:
    """A nested dataclass as strict JSON represents it: tuples as lists, paths and infinities as text."""
    if is_dataclass(config):
        return {name: to_dict(value) for name, value in vars(config).items()}
    if isinstance(config, tuple):
        return [to_dict(value) for value in config]
    if isinstance(config, Path) or (isinstance(config, float) and not math.isfinite(config)):
        return str(config)
    return config


def flag_values(config: Any) -> dict[str, Any]:
    """The value of every flag of a nested dataclass, as JSON represents it."""
    return {flag.name: to_dict(flag.value) for flag in flags_of(config)}


def from_dict(default: C, values: Mapping[str, Any], where: str = "") -> C:
    """A nested dataclass with the given values in place of its own; the reverse of `to_dict`.

    Raises:
        ValueError: for an unknown key or a wrong value, named by its full path.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where.rstrip('.')}: {values!r}; expected a mapping")
    known = vars(default)
    changes = {}
    for key, value in values.items():
        if key not in known:
            same = [".".join(flag.path) for flag in flags_of(default) if key in (flag.name, flag.path[-1])]
            raise ValueError(f"{where}{key}: unknown key; expected {' or '.join(same) or [*known]}")
        changes[key] = _convert(known[key], value, f"{where}{key}")
    return replace(default, **changes)  # type: ignore[type-var]


def _convert(default: Any, value: Any, where: str) -> Any:
    """A value as JSON or YAML holds it, in the type of the default."""
    if is_dataclass(default):
        return from_dict(default, value, f"{where}.")
    if isinstance(default, Path):
        return Path(value)
    if isinstance(default, tuple) and isinstance(value, list | str):
        return (value,) if isinstance(value, str) else tuple(value)
    if isinstance(default, str) and isinstance(value, bool):  # YAML's yes and no
        return "yes" if value else "no"
    number = isinstance(default, float) or default == "auto"  # tau may be either
    if number and isinstance(value, str | int) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)  # "inf", and YAML's 1e-3, which is a text
    return value


def default_config(agent: str, env: str) -> RunConfig:
    """The configuration of an agent in an environment if no flag is given.

    Raises:
        ValueError: for an unknown agent or environment.
    """
    return from_dict(RunConfig(agent, env, agent_options=default_options(agent, env)), ENV_DEFAULTS[kind_of(env)])


def read_config(path: Path, agent: str = "", env: str = "", usual: tuple[str, str] = ("gated", "sums")) -> RunConfig:
    """The configuration in a YAML or JSON file; what it leaves out has the defaults of its agent and environment.

    Args:
        path: of the file.
        agent, env: in place of those in the file.
        usual: agent and environment of a file that names none.

    Raises:
        ValueError: in one line that names the file and the key.
    """
    try:
        values = {"agent": usual[0], "env": usual[1]} | read_mapping(path)
        values |= {key: value for key, value in (("agent", agent), ("env", env)) if value}
        return from_dict(default_config(values["agent"], values["env"]), values)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"config: {str(path)!r}: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file. Raises OSError or ValueError."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(values, dict):
        raise ValueError(f"{type(values).__name__}; expected a mapping")
    return values


def load_config(folder: Path) -> RunConfig:
    """The configuration of a run's folder.

    Raises:
        ValueError: if there is no run, or its configuration cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"run: {str(folder)!r} holds no run (no config.json)")
    config = read_config(path, usual=("", ""))
    return replace(config, out=folder.parent, name=folder.name)  # it may have been moved
