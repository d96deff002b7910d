"""The answer of the report in words: a paragraph a task, by rule from the numbers."""

from __future__ import annotations

from experiments.reporting.claims import CLAIMS, findings
from experiments.reporting.results import ENDPOINT, OURS, PURE, Results, Setting
from experiments.running.metric_display import metric

GRADES = {"yes": "is at least as good as both", "no": "is not at least as good as both"}  # else it is undecided

PLACES = {1: "is above both", -1: "is below both", 0: "lies between theirs"}


def answer(results: Results) -> list[str]:
    """Per task: who has the most correct chains, whether ours is as good as the pure methods, what ours does."""
    settings = [s for s in results.primary() if results.estimates(s, ENDPOINT)]
    if not settings:
        return ["No finished run of the main study was graded, so there is no answer yet."]
    return [" ".join(filter(None, (_best(results, s), _as_good(results, s), _behaviour(results, s)))) for s in settings]


def _best(results: Results, setting: Setting) -> str:
    estimates = results.estimates(setting, ENDPOINT)
    best = max(estimates, key=lambda k: estimates[k].value)
    runs = results.seeds(setting, best)
    shown = {k: estimates[k].scaled(100).text("{:.1f} %") for k in (best, OURS) if k in estimates}
    ours = f"; `{OURS}` has {shown[OURS]}" if OURS in shown and best != OURS else ""
    seeds = f"{runs} seed{'s' if runs > 1 else ''}"
    return f"On {setting}, `{best}` has the most correct chains, {shown[best]} ({seeds}){ours}."


def _as_good(results: Results, setting: Setting) -> str:
    """Ours against both pure methods; nothing if they share no seed."""
    finding = next((f for f in findings(results, setting) if f.claim is CLAIMS[0]), None)
    if finding is None:
        return ""
    differences = [
        f"`{OURS}` minus `{b}` is {d.estimate.scaled(100).text('{:+.1f}')} points{'' if d.n > 1 else ' on one seed'}"
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
