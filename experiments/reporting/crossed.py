"""Who writes the prefixes and which loss is minimised there, separated: means of the cells, and effects of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.comparing.statistics import PairedDifference
from experiments.reporting.results import ENDPOINT, METHOD_CELLS, Results, Setting, paired

PREFIXES = ("student", "gated", "random")
LOSSES = ("reverse", "gated", "forward")
ALL = "on average"

Prefix = str
Loss = str


@dataclass(frozen=True)
class Crossed:
    """`runs[prefix, loss][seed]` is the endpoint. `effects[change, level]` is the difference that a change makes at a
    level of the other factor, or on average over the levels with runs of both.
    """

    setting: Setting
    prefixes: tuple[Prefix, ...]
    losses: tuple[Loss, ...]
    runs: dict[tuple[Prefix, Loss], dict[int, float]]
    effects: dict[tuple[str, str], PairedDifference]


def crossed(results: Results, setting: Setting) -> Crossed | None:
    """The study `two_by_two`, or the four methods of the main study that are its cells; None without either."""
    study, cells = "two_by_two", {}
    for label in results.labels(setting, study):
        if match := re.fullmatch(r"(.+) prefix, (.+)", label):
            cells[match[1], match[2]] = label
    if not cells:
        study, cells = "main", {c: k for c, k in METHOD_CELLS.items() if k in results.labels(setting)}
        if len(cells) < len(METHOD_CELLS):
            return None
    runs = {c: values for c, label in cells.items() if (values := results.by_seed(setting, label, ENDPOINT, study))}
    if not runs:
        return None
    prefixes, losses = _ordered((p for p, _ in runs), PREFIXES), _ordered((o for _, o in runs), LOSSES)
    effects: dict[tuple[str, str], PairedDifference] = {}
    for prefix in prefixes[1:]:
        pairs = {f"with {o} loss": ((prefix, o), (prefixes[0], o)) for o in losses}
        effects |= _effects(runs, f"{prefix} prefix instead of {prefixes[0]} prefix", pairs)
    for loss in losses[1:]:
        pairs = {f"with {p} prefix": ((p, loss), (p, losses[0])) for p in prefixes}
        effects |= _effects(runs, f"{loss} loss instead of {losses[0]} loss", pairs)
    return Crossed(setting, prefixes, losses, runs, effects)


def _ordered(names: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    names = dict.fromkeys(names)
    return tuple(n for n in known if n in names) + tuple(n for n in names if n not in known)


def _effects(
    runs: dict[tuple[str, str], dict[int, float]],
    change: str,
    pairs: dict[str, tuple[tuple[str, str], tuple[str, str]]],
) -> dict[tuple[str, str], PairedDifference]:
    """Paired differences of cells, level by level and on average, a difference a seed."""
    both = {level: (runs[a], runs[b]) for level, (a, b) in pairs.items() if a in runs and b in runs}
    if not both:
        return {}
    seeds = set.intersection(*(a.keys() & b.keys() for a, b in both.values()))
    x, y = ({s: float(np.mean([cells[i][s] for cells in both.values()])) for s in seeds} for i in (0, 1))
    tests = {ALL: paired(x, y)} | {level: paired(*cells) for level, cells in both.items()}
    return {(change, level): test for level, test in tests.items() if test}
