"""Checks of a configuration's fields: their types, and the ranges of numbers. Light to import."""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints


def check_types(config: Any) -> None:
    """Whether every field of a dataclass is what its annotation says, and no number is nan.

    Choices (Literal), str, bool, int, float and None are checked, and unions of them; other types are not.

    Raises:
        ValueError: in one line that names the field, its value and what is accepted.
    """
    for name, kind in _hints(cast(Any, type(config))).items():
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        value = getattr(config, name)
        if not any(_fits(value, k) for k in kinds):
            raise ValueError(f"{name}: {value!r}; accepted: {', '.join(map(_words, kinds))}")


def check_range(
    config: Any, *names: str, least: float = -math.inf, most: float = math.inf, finite: bool = False
) -> None:
    """Whether numbers, as far as they are not None, are from `least` to `most`, and if asked so not infinite.

    Raises:
        ValueError: in one line that names the field, its value and what is accepted.
    """
    said = [f"at least {least}"] * (least > -math.inf) + [f"at most {most}"] * (most < math.inf)
    for name in names:
        value = getattr(config, name)
        if value is not None and not (least <= value <= most and (math.isfinite(value) or not finite)):
            words = [*said, "finite"] if math.isinf(value) else said
            raise ValueError(f"{name}: {value}; accepted: {' and '.join(words)}")


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return kind not in (str, bool, NoneType) or isinstance(value, kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    return {str: "a text", bool: "true, false", int: "a whole number", float: "a number", NoneType: "none"}[kind]
