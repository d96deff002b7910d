"""What a report is made of, and the words that its tables and pictures share."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.reporting.drawing import Style
from experiments.reporting.results import Results, Setting
from experiments.reporting.training_curves import Curves

TEXTS: dict[str, str] = tomllib.loads(Path(__file__).with_name("texts.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Material:
    """What a report is made of; `seen` is what `viewer.see_run` saw, by contender."""

    results: Results
    curves: Curves
    style: Style
    seen: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def text(name: str, **gaps: object) -> str:
    """What `texts.toml` says, its gaps filled."""
    return TEXTS[name].format(intervals=TEXTS["intervals"], band=TEXTS["band"], **gaps)


def start_of(settings: Sequence[Setting]) -> str:
    warm = sorted({s.warm for s in settings if s.warm} - {"none"})
    return f"With a warm start: the {' or '.join(warm)} one." if warm else ""
