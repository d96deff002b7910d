"""Who writes the prefixes and which loss is minimised there, separated: means of the cells, and effects of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.comparing.statistics import PairedDifference
from experiments.comparing.studies import CELL_LABELS, CELLS
from experiments.reporting.results import METHOD_CELLS, Results, Setting, paired

ALL = "on average"
Cell = tuple[str, str]  # who writes the prefix, which loss is minimised


@dataclass(frozen=True)
class Crossed:
    """`runs[prefix, loss][seed]` is the primary endpoint `key`. `effects[change, level]` is the difference that a
    change makes at a level of the other factor, or on average over the levels with runs of both.
    """

    setting: Setting
    key: str
    prefixes: tuple[str, ...]
    losses: tuple[str, ...]
    runs: dict[Cell, dict[int, float]]
    effects: dict[tuple[str, str], PairedDifference]


def crossed(results: Results, setting: Setting) -> Crossed | None:
    """The study `two_by_two`, or the four methods of the main study that are its cells; None without either."""
    study, ran = "two_by_two", results.labels(setting, "two_by_two")
    cells = {cell: label for cell, label in CELL_LABELS.items() if label in ran}
    if not cells and set(METHOD_CELLS.values()) <= set(results.labels(setting)):
        study, cells = "main", METHOD_CELLS
    key = results.endpoint(setting, study)
    runs = {c: values for c, label in cells.items() if (values := results.by_seed(setting, label, key, study))}
    if not runs:
        return None
    prefixes = tuple(dict.fromkeys(prefix for prefix, _ in CELLS if any(prefix == p for p, _ in runs)))
    losses = tuple(dict.fromkeys(loss for _, loss in CELLS if any(loss == o for _, o in runs)))
    effects: dict[tuple[str, str], PairedDifference] = {}
    for prefix in prefixes[1:]:
        pairs = {f"with {o} loss": ((prefix, o), (prefixes[0], o)) for o in losses}
        effects |= _effects(runs, f"{prefix} prefix instead of {prefixes[0]} prefix", pairs)
    for loss in losses[1:]:
        pairs = {f"with {p} prefix": ((p, loss), (p, losses[0])) for p in prefixes}
        effects |= _effects(runs, f"{loss} loss instead of {losses[0]} loss", pairs)
    return Crossed(setting, key, prefixes, losses, runs, effects)


def _effects(
    runs: dict[Cell, dict[int, float]], change: str, pairs: dict[str, tuple[Cell, Cell]]
) -> dict[tuple[str, str], PairedDifference]:
    """Paired differences of cells, level by level and on average, a difference a seed."""
    both = {level: (runs[a], runs[b]) for level, (a, b) in pairs.items() if a in runs and b in runs}
    if not both:
        return {}
    seeds = set.intersection(*(a.keys() & b.keys() for a, b in both.values()))
    x, y = ({s: float(np.mean([cells[i][s] for cells in both.values()])) for s in seeds} for i in (0, 1))
    tests = {ALL: paired(x, y)} | {level: paired(*cells) for level, cells in both.items()}
    return {(change, level): test for level, test in tests.items() if test}
