"""Checks of a configuration's fields: their types, and the ranges of numbers. Light to import."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import EnumType
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


@dataclass(frozen=True)
class Range:
    """The range of a field, in its annotation: `Annotated[float, Range(above=0)]`.

    `least` and `most` belong to the range; `above` and `below` do not. With `finite` infinities are refused. None is
    in every range.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    finite: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError for a value outside, which is called by its name."""
        bounds = {kind: bound for kind in BOUNDS if (bound := getattr(self, kind)) is not None}
        infinite = self.finite and value is not None and not math.isfinite(value)
        if infinite or not all(value is None or BOUNDS[kind][1](value, bound) for kind, bound in bounds.items()):
            accepted = [f"{BOUNDS[kind][0]} {bound}" for kind, bound in bounds.items()] + ["finite"] * infinite
            raise ValueError(f"{name}: {value}; expected {' and '.join(accepted)}")


Count = Annotated[int, Range(least=1)]
Natural = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]
Finite = Annotated[float, Range(finite=True)]
Seed = Annotated[int, Range(least=0, most=2**63 - 1)]  # the largest of torch's generators


def check_fields(config: Any) -> None:
    """Check that every field of a dataclass has the type and the range of its annotation, and that no number is NaN.

    Choices (Literal), str, bool, int, float, enumerations and None are checked, and unions of them; other types are
    not.

    Raises:
        ValueError: in one line that names the field, its value and what is accepted.
    """
    check_values(vars(config), type(config))


def check_values(values: Mapping[str, Any], annotated: Any) -> None:
    """`check_fields` of values by name, with the annotations of a class; names that the class lacks are ignored."""
    for name, hint in _hints(annotated).items():
        if name not in values:
            continue
        kind, *metadata = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if not any(_fits(values[name], k) for k in kinds):
            raise ValueError(f"{name}: {values[name]!r}; expected {', '.join(map(_words, kinds))}")
        for accepted in metadata:
            if isinstance(accepted, Range):
                accepted.check(name, values[name])


def check_range(config: Any, *names: str, finite: bool = False, **bounds: float) -> None:
    """Check that the numbers of these names, if not None, are in a range.

    Args:
        config: any object with these attributes.
        names: attributes.
        finite: whether infinities and NaN are refused.
        bounds: as for `Range`.

    Raises:
        ValueError: in one line that names the field, its value and what is accepted.
    """
    for name in names:
        Range(finite=finite, **bounds).check(name, getattr(config, name))


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return not (kind in (str, bool, NoneType) or isinstance(kind, EnumType)) or isinstance(value, kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    words = {str: "a text", bool: "true, false", int: "a whole number", float: "a number", NoneType: "none"}
    return words.get(kind) or kind.__name__


@contextmanager
def errors_name_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Errors that begin with one of these arguments begin with the name under which the caller gave it."""
    try:
        yield
    except (ValueError, OSError) as error:
        name, colon, rest = str(error).partition(":")
        if not colon or name not in flags:
            raise
        raise type(error)(flags[name] + colon + rest) from None
