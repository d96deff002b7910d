"""The answer of the report in words: a paragraph a task, by rule from the numbers."""

from __future__ import annotations

from experiments.comparing.statistics import Estimate
from experiments.reporting.claims import findings
from experiments.reporting.results import OURS, PURE, Results, Setting
from experiments.running.metric_display import metric

GRADES = {"yes": "is at least as good as both", "no": "is not at least as good as both"}  # else it is undecided

PLACES = {1: "is above both", -1: "is below both", 0: "lies between theirs"}


def answer(results: Results) -> list[str]:
    """Per task: who is best in the primary endpoint, whether ours is as good as the pure methods, what ours does."""
    settings = [s for s in results.primary() if results.estimates(s, results.endpoint(s))]
    if not settings:
        return ["No finished run of the main study measured a primary endpoint, so there is no answer yet."]
    return [" ".join(filter(None, (_best(results, s), _as_good(results, s), _behaviour(results, s)))) for s in settings]


def _best(results: Results, setting: Setting) -> str:
    key = results.endpoint(setting)
    estimates, m = results.estimates(setting, key), metric(key)
    name, _, unit = m.label.partition(", ")
    best = (min if m.better == "less" else max)(estimates, key=lambda k: estimates[k].value)
    runs = results.seeds(setting, best)
    shown = {k: _with_unit(estimates[k], key, unit) for k in (best, OURS) if k in estimates}
    seeds = f"{runs} seed{'s' if runs > 1 else ''}"
    if len(estimates) == 1:
        return f"On {setting}, `{best}` was measured alone; {name}: {shown[best]} ({seeds})."
    ours = f"; `{OURS}` has {shown[OURS]}" if OURS in shown and best != OURS else ""
    most = "the lowest" if m.better == "less" else "the most"
    return f"On {setting}, `{best}` has {most} {name}, {shown[best]} ({seeds}){ours}."


def _with_unit(estimate: Estimate, key: str, unit: str, sign: bool = False) -> str:
    """An estimate in points or in the unit of its metric; a share in per cent unless it is a difference."""
    m = metric(key)
    form = m.number_form(sign) + (" %" if m.scale == 100 and not sign else "")
    unit = "points" if m.scale == 100 and sign else unit
    return f"{estimate.scaled(m.scale).text(form)} {unit}".strip()


def _as_good(results: Results, setting: Setting) -> str:
    """Ours against both pure methods; nothing if they share no seed."""
    key = results.endpoint(setting)
    finding = next((f for f in findings(results, setting) if f.claim.key == key), None)
    if finding is None:
        return ""
    differences = [
        f"`{OURS}` minus `{b}` is {_with_unit(d.estimate, key, metric(key).label.partition(', ')[2], sign=True)}"
        f"{'' if d.n > 1 else ' on one seed'}"
        for b, d in finding.differences.items()
    ]
    grade = GRADES.get(finding.verdict, "may or may not be at least as good as both")
    missing = [f"`{b}`" for b in PURE if b not in finding.differences]
    note = f". There are no runs of {' and '.join(missing)}." if missing else f", so `{OURS}` {grade}."
    return " and ".join(differences) + note


def _behaviour(results: Results, setting: Setting) -> str:
    """Where ours lies between the pure methods in diversity, and who wrote the training tokens."""
    sentences = []
    for key, noun in (("entropy", "entropy"), ("distinct_ways", "number of distinct correct ways")):
        values = _values(results, setting, key)
        if OURS in values and len(values) == 1 + len(PURE):
            ours, others = values[OURS], [values[k] for k in PURE]
            place = PLACES[(ours > max(others)) - (ours < min(others))]
            sentences.append(f"Its {noun} {place} ({_listed(key, values)}).")
    shares = _values(results, setting, "teacher_share")
    if OURS in shares:
        sentences.append(f"Training tokens that the teacher wrote: {_listed('teacher_share', shares)}.")
    return " ".join(sentences)


def _values(results: Results, setting: Setting, key: str) -> dict[str, float]:
    found = results.estimates(setting, key)
    return {k: found[k].value for k in (PURE[0], OURS, PURE[1]) if k in found}


def _listed(key: str, values: dict[str, float]) -> str:
    return ", ".join(f"`{k}` {metric(key).form.format(v)}" for k, v in values.items())
