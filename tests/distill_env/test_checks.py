"""Types and ranges of a configuration's fields."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from distill_env.checks import Count, Finite, Positive, Range, Share, check_fields


@dataclass(frozen=True)
class Settings:
    """One field of each kind."""

    count: Count = 1
    share: Share = 0.5
    rate: Positive = 1.0
    level: Annotated[float | None, Range(above=0, below=1)] = None
    weight: Finite = 0.0
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        check_fields(self)


GOOD: dict[str, list[Any]] = {
    "count": [1, 10**9],
    "share": [0, 0.0, 1],
    "rate": [1e-300, math.inf],
    "level": [None, 0.001, 0.999],
    "weight": [-1e300, 0],
    "kind": ["a", "b"],
}
BAD: dict[str, list[Any]] = {
    "count": [0, 1.0, True, "1", None],
    "share": [-1e-9, 1 + 1e-9, math.nan],
    "rate": [0, -1.0, math.nan],
    "level": [0, 1, -math.inf, "x"],
    "weight": [math.inf, -math.inf, math.nan],
    "kind": ["c", None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_what_is_in_range_is_accepted(name: str, value: Any) -> None:
    assert getattr(Settings(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_what_is_not_is_refused_in_one_line_that_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: ") as error:
        Settings(**{name: value})
    assert "\n" not in str(error.value)
