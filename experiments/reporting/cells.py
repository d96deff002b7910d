"""Cells of the report's tables: estimates, changes, and which setting they belong to."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.comparing.statistics import Estimate
from experiments.reporting.pages import Cell
from experiments.reporting.results import BEFORE, Measure, Setting, measure

EMPTY = "\u2013"


def name_cell(label: str) -> Cell:
    return Cell(label, chip="" if label == BEFORE else label)


def number_cell(key: str, estimate: Estimate | None, best: bool = False) -> Cell:
    """An estimate and its interval; a dash where nothing was measured."""
    if estimate is None:
        return Cell(EMPTY)
    m = measure(key)
    return Cell(m.number(estimate.value), m.interval(estimate), estimate.value, "best" if best else "")


def change_cell(m: Measure, estimate: Estimate) -> Cell:
    """A difference with its sign, and its interval."""
    sign = m.signed(estimate.value)
    return Cell(sign, m.change(estimate).removeprefix(sign).strip(), estimate.value)


def setting_cells(setting: Setting, settings: Sequence[Setting]) -> list[Cell]:
    """Task and warm start, each only where there are several."""
    cells = []
    if len({s.env for s in settings}) > 1:
        cells.append(Cell(setting.env))
    if len({s.warm for s in settings}) > 1:
        cells.append(Cell(setting.warm))
    return cells


def setting_columns(settings: Sequence[Setting]) -> list[str]:
    return [
        title
        for title, part in (("task", {s.env for s in settings}), ("warm start", {s.warm for s in settings}))
        if len(part) > 1
    ]


def start_of(settings: Sequence[Setting]) -> str:
    warm = sorted({s.warm for s in settings if s.warm})
    return f"All from the {' or '.join(warm)} warm start." if warm else ""


def in_unit(key: str, estimate: Estimate) -> Estimate:
    scale = measure(key).scale
    return Estimate(estimate.value * scale, estimate.low * scale, estimate.high * scale)


def is_best(key: str, label: str, labels: Sequence[str], found: dict[tuple[str, str], Estimate | None]) -> bool:
    less = measure(key).less_is_better
    values = {c: e.value for c in labels if c != BEFORE and (e := found[key, c])}
    if less is None or label not in values or len(values) < 2:
        return False
    return values[label] == (min if less else max)(values.values())


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"
