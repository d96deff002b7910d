"""What a comparison says, by rule: tests, what was expected and what was measured, the answer in three sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.comparing.statistics import Estimate, PairedDifference, holm
from experiments.reporting.results import (
    BASELINES,
    ENDPOINT,
    MEASURES,
    METHOD_CELLS,
    OURS,
    PURE,
    Measure,
    Results,
    Setting,
    measure,
)

Verdict = Literal["holds", "does not hold", "cannot be told"]


def primary_comparisons(results: Results) -> list[tuple[Setting, str, PairedDifference, float]]:
    """Ours against each baseline on each task, on the primary endpoint: setting, baseline, difference, and its p-value
    adjusted over all of them by Holm's method."""
    found = {
        (setting, baseline): d
        for setting in results.primary()
        for baseline in BASELINES
        if (d := results.difference(setting, OURS, baseline, ENDPOINT))
    }
    adjusted = holm({f"{s.env} {b}": d.p_value for (s, b), d in found.items()})
    return [(s, b, d, adjusted[f"{s.env} {b}"]) for (s, b), d in found.items()]


def secondary_comparisons(results: Results, baseline: str) -> list[tuple[Setting, str, PairedDifference, float]]:
    """Every contender against `baseline` on the primary endpoint: setting, contender, difference, and its p-value
    adjusted over the tasks by Holm's method."""
    tests = []
    for label in results.labels():
        if label == baseline:
            continue
        found = {s: d for s in results.primary() if (d := results.difference(s, label, baseline, ENDPOINT))}
        adjusted = holm({s.env: d.p_value for s, d in found.items()})
        tests += [(s, label, d, adjusted[s.env]) for s, d in found.items()]
    order = [s.env for s in results.primary()]
    return sorted(tests, key=lambda t: order.index(t[0].env))


# ---------------------------------------------------------------------- expected and measured


@dataclass(frozen=True)
class Claim:
    """What was expected of the gate. `relation` is to each of `against`; `between` is to the pair."""

    text: str
    key: str
    relation: Literal["at least", "above", "below", "between"]
    against: tuple[str, ...] = PURE


CLAIMS = (
    Claim("accuracy at least that of both pure methods", ENDPOINT, "at least"),
    Claim("entropy between theirs", "entropy", "between"),
    Claim("diversity between theirs", "distinct_ways", "between"),
    Claim("less loss on hard problems: higher accuracy on the hardest in distribution", "hardest", "above"),
    Claim("less loss on unseen problems: higher accuracy out of distribution", f"ood/{ENDPOINT}", "above"),
    Claim("less loss on unseen problems: a larger share of the accuracy kept", "retention", "above"),
    Claim("steadier training: the loss oscillates less", "loss_oscillation", "below"),
    Claim("steadier training: smaller gradient norm", "grad_norm", "below"),
    Claim("cost: the teacher writes less than for forward KL", "teacher_share", "below", ("fkl",)),
)


@dataclass(frozen=True)
class Finding:
    """A claim in one setting: ours minus each of the others, and what follows."""

    claim: Claim
    setting: Setting
    measure: Measure
    differences: dict[str, PairedDifference]
    verdict: Verdict


def judge(estimates: Iterable[Estimate], at_least: bool = False) -> Verdict:
    """From differences that are positive where the expectation is met.

    It holds if every interval lies above 0 (or from 0 on, with `at_least`), does not if one lies below, and cannot be
    told otherwise, or where there is no interval.
    """
    bounds = [(e.low, e.high) for e in estimates]
    if bounds and all(low > 0 or (at_least and low == 0) for low, _ in bounds):
        return "holds"
    return "does not hold" if any(high < 0 for _, high in bounds) else "cannot be told"


def negative(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low)


def findings(results: Results, setting: Setting) -> list[Finding]:
    """Every claim whose numbers there are."""
    found = []
    for claim in CLAIMS:
        key = claim.key
        if key == "hardest":
            buckets = results.buckets(setting)
            if not buckets:
                continue
            key = f"{ENDPOINT}/{buckets[-1]}"
        differences = {b: d for b in claim.against if (d := results.difference(setting, OURS, b, key))}
        if not differences:
            continue
        missing = len(differences) < len(claim.against)
        estimates = [d.estimate for d in differences.values()]
        if claim.relation == "between":
            # ours - lower > 0 and upper - ours > 0, the upper one being that with the smaller difference
            low, high = max(estimates, key=lambda e: e.value), min(estimates, key=lambda e: e.value)
            estimates = [low, negative(high)]
        elif claim.relation == "below":
            estimates = [negative(e) for e in estimates]
        verdict = judge(estimates, claim.relation == "at least")
        if missing and (verdict == "holds" or claim.relation == "between"):
            verdict = "cannot be told"
        found.append(Finding(claim, setting, measure(key), differences, verdict))
    return found


# ---------------------------------------------------------------------- the answer


def answer(results: Results) -> list[str]:
    """Three sentences: who is best, whether the gate is as good as both its halves, and what it does at which cost."""
    settings = [s for s in results.primary() if any(results.by_seed(s, k, ENDPOINT) for k in results.labels(s))]
    if not settings:
        return ["No finished run of the main study was graded, so there is no answer yet."]
    return [_best(results, settings), _as_good(results, settings), _where(results, settings)]


def _best(results: Results, settings: Sequence[Setting]) -> str:
    parts = []
    m = MEASURES[ENDPOINT]
    for setting in settings:
        found = {k: e for k in results.labels(setting) if (e := results.estimate(setting, k, ENDPOINT))}
        best = max(found, key=lambda k: found[k].value)
        shown = {k: f"{m.number(found[k].value)} % {m.interval(found[k])}".strip() for k in (best, OURS) if k in found}
        ours = f"; `{OURS}` {shown[OURS]}" if OURS in found and best != OURS else ""
        parts.append(f"by `{best}` on {setting.env} ({shown[best]}{ours})")
    warm = sorted({s.warm for s in settings})
    runs = sorted({results.seeds(s, k) for s in settings for k in results.labels(s)})
    seeds = f"{runs[0]} to {runs[-1]} seeds" if len(runs) > 1 else f"{runs[0]} seed{'s' if runs[0] > 1 else ''}"
    start = f" from the {' or '.join(warm)} warm start" if all(warm) else ""
    others = f"{len({k for s in settings for k in results.labels(s)})} contenders, interquartile means over {seeds}"
    return f"Most correct chains in distribution{start} are written {_join(parts)}: {others}."


def _as_good(results: Results, settings: Sequence[Setting]) -> str:
    words = {
        "holds": "is at least as good as both pure methods",
        "does not hold": "is not at least as good as both pure methods",
        "cannot be told": "may or may not be at least as good as both pure methods",
        "": "cannot be compared with the pure methods",
    }
    told: dict[str, list[str]] = {}
    for setting in settings:
        finding = next((f for f in findings(results, setting) if f.claim is CLAIMS[0]), None)
        if finding is None:
            told.setdefault("", []).append(f"on {setting.env}, where they share no seed")
            continue
        m = finding.measure
        against = [
            f"{m.change(d.estimate)} points against `{b}`" + ("" if d.n > 1 else " on one seed")
            for b, d in finding.differences.items()
        ]
        against += [f"no runs of `{b}`" for b in PURE if b not in finding.differences]
        told.setdefault(finding.verdict, []).append(f"on {setting.env} ({', '.join(against)})")
    return f"`{OURS}` {'; it '.join(f'{words[verdict]} {_join(parts)}' for verdict, parts in told.items())}."


def _where(results: Results, settings: Sequence[Setting]) -> str:
    parts = []
    for setting in settings:
        places = [
            f"{noun} {_place(results, setting, key)}"
            for key, noun in (("entropy", "entropy"), ("distinct_ways", "number of distinct right ways"))
            if results.estimate(setting, OURS, key)
        ]
        if not places:
            continue
        parts.append(f"on {setting.env} its {' and its '.join(places)}{_cost(results, setting)}")
    return f"{_capital(_join(parts))}." if parts else f"Where `{OURS}` lies in entropy and diversity was not measured."


def _cost(results: Results, setting: Setting) -> str:
    m = MEASURES["teacher_share"]
    found = {k: e for k in (OURS, *PURE) if (e := results.estimate(setting, k, m.key))}
    if OURS not in found:
        return ""
    others = ", ".join(f"`{k}` {m.number(e.value)} %" for k, e in found.items() if k != OURS)
    behind = f" ({others})" if others else ""
    return f", with {m.number(found[OURS].value)} % of the tokens of its training written by the teacher{behind}"


def _place(results: Results, setting: Setting, key: str) -> str:
    """`lies between those of ...` and the three numbers, by the interquartile means alone."""
    found = {k: results.estimate(setting, k, key) for k in (PURE[0], OURS, PURE[1])}
    m = MEASURES[key]
    known = {k: e.value for k, e in found.items() if e is not None}
    numbers = ", ".join(f"`{k}` {m.number(v)}" for k, v in known.items()) + (f" {m.unit}" if m.unit else "")
    others = [v for k, v in known.items() if k != OURS]
    if len(others) < 2:
        return f"is what the numbers say ({numbers})"
    ours = known[OURS]
    side = "is above both" if ours > max(others) else "is below both"
    return f"{'lies between theirs' if min(others) <= ours <= max(others) else side} ({numbers})"


def _join(parts: Sequence[str]) -> str:
    """`a`, `a, and b`, `a; b; and c`: parts hold commas."""
    return "; ".join(parts[:-1]) + f"; and {parts[-1]}" if len(parts) > 2 else ", and ".join(parts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------- who writes the prefix, which objective

PREFIXES = ("student", "gated", "random")
OBJECTIVES = ("reverse", "gated", "forward")


@dataclass(frozen=True)
class Crossed:
    """Runs by who wrote the prefix and what was descended there: `runs[prefix, objective][seed]` is the endpoint."""

    setting: Setting
    study: bool  # or methods of the main study
    prefixes: tuple[str, ...]
    objectives: tuple[str, ...]
    runs: dict[tuple[str, str], dict[int, float]]
    effects: dict[str, PairedDifference]  # by what is compared, on average over the other factor
    by_objective: dict[str, dict[str, PairedDifference]]  # of each prefix instead of the first, under each objective


def crossed(results: Results, setting: Setting) -> Crossed | None:
    """The study `two_by_two`, or the four methods of the main study that are its cells; None without either."""
    study, cells = "two_by_two", {}
    for label in results.labels(setting, study):
        match = re.fullmatch(r"(.+) prefix, (.+)", label)
        if match:
            cells[match[1], match[2]] = label
    if not cells:
        study, cells = "main", {c: k for c, k in METHOD_CELLS.items() if k in results.labels(setting)}
        if len(cells) < len(METHOD_CELLS):
            return None
    runs = {c: results.by_seed(setting, label, ENDPOINT, study) for c, label in cells.items()}
    runs = {c: values for c, values in runs.items() if values}
    prefixes = _ordered((p for p, _ in runs), PREFIXES)
    objectives = _ordered((o for _, o in runs), OBJECTIVES)
    effects = {}
    for prefix in prefixes[1:]:
        pairs = [((prefix, o), (prefixes[0], o)) for o in objectives]
        if effect := _main_effect(results, runs, pairs):
            effects[f"the {prefix} prefix instead of the {prefixes[0]} prefix"] = effect
    for objective in objectives[1:]:
        pairs = [((p, objective), (p, objectives[0])) for p in prefixes]
        if effect := _main_effect(results, runs, pairs):
            effects[f"the {objective} objective instead of the {objectives[0]} one"] = effect
    by_objective: dict[str, dict[str, PairedDifference]] = {}
    for prefix in prefixes[1:]:
        alone = {o: _main_effect(results, runs, [((prefix, o), (prefixes[0], o))]) for o in objectives}
        by_objective[prefix] = {o: effect for o, effect in alone.items() if effect}
    return Crossed(setting, study != "main", prefixes, objectives, runs, effects, by_objective) if runs else None


def _ordered(names: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    found = dict.fromkeys(names)
    return tuple(n for n in known if n in found) + tuple(n for n in found if n not in known)


def _main_effect(
    results: Results,
    runs: dict[tuple[str, str], dict[int, float]],
    pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]],
) -> PairedDifference | None:
    """The mean over the pairs of cells that both have runs, a difference a seed."""
    both = [(runs[a], runs[b]) for a, b in pairs if a in runs and b in runs]
    if not both:
        return None
    seeds = set.intersection(*(a.keys() & b.keys() for a, b in both))
    means = [{s: float(np.mean([side[i][s] for side in both])) for s in seeds} for i in (0, 1)]
    return results.paired(means[0], means[1])


def effects_sentence(found: Crossed) -> str:
    """The main effects on correct chains, paired over seeds."""
    m = MEASURES[ENDPOINT]
    parts = []
    for name, effect in found.effects.items():
        if judge([effect.estimate]) == "holds":
            said = f"adds {m.change(effect.estimate)}"
        elif judge([negative(effect.estimate)]) == "holds":
            said = f"costs {m.change(effect.estimate)}"
        else:
            said = f"makes no resolved difference, {m.change(effect.estimate)}"
        parts.append(f"{name} {said} points")
    if not parts:
        return f"On {found.setting} no two cells share a seed."
    n = sorted({e.n for e in found.effects.values()})
    seeds = f"{n[0]} to {n[-1]} seeds" if len(n) > 1 else f"{n[0]} seed{'s' if n[0] > 1 else ''}"
    cells = "" if found.study else f" (its cells are {', '.join(f'`{k}`' for k in METHOD_CELLS.values())})"
    alone = [
        f"the {prefix} prefix changes it by "
        + ", ".join(f"{m.change(e.estimate)} under the {objective} objective" for objective, e in effects.items())
        for prefix, effects in found.by_objective.items()
        if len(effects) > 1
    ]
    apart = f" Objective by objective, {'; '.join(alone)}." if alone else ""
    where = f"On {found.setting}{cells}, on average over the other factor and paired over {seeds}"
    return f"{where}: {'; '.join(parts)}.{apart}"
