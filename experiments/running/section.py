"""Sections of a configuration, and the flags that their fields are. Light to import."""

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any, get_type_hints

import tyro

from distill_env.checks import check_fields, errors_name_flags


def flag(name: str) -> Any:
    """Annotation of a field whose flag has another name than the field."""
    return tyro.conf.arg(name=name)


def flag_names(config_class: Any) -> dict[str, str]:
    """The flag of every field of a dataclass, with underscores."""
    return _flag_names(config_class)


@cache
def _flag_names(config_class: Any) -> dict[str, str]:
    names = {}
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        renamed = (getattr(data, "name", None) for data in getattr(hint, "__metadata__", ()))
        names[name] = next((n.replace("-", "_") for n in renamed if n), name)
    return names


@dataclass(frozen=True)
class Flag:
    """A flag, its value in a configuration, and its place there."""

    name: str
    value: Any
    section: Any  # the dataclass that has the field
    path: tuple[str, ...]  # names of the sections, and of the field


def flags_of(config: Any, path: tuple[str, ...] = ()) -> Iterator[Flag]:
    """The flags of a nested configuration."""
    for name, value in vars(config).items():
        if is_dataclass(value):
            yield from flags_of(value, (*path, name))
        else:
            yield Flag(flag_names(type(config))[name], value, config, (*path, name))


class Section:
    """A part of the configuration. Its errors name the flag."""

    def __post_init__(self) -> None:
        with errors_name_flags(flag_names(type(self))):
            check_fields(self)
            self.check()

    def check(self) -> None:
        """Raise ValueError for a value out of range."""
