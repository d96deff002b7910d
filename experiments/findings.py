"""What the runs of a comparison say: estimates, paired differences, and sentences made of them by rule.

A *setting* is a task with a warm start, a *contender* is what is compared within one, and its runs differ by seed.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.statistics import Estimate, PairedDifference, bootstrap, holm, paired_difference
from experiments.statistics import probability_of_improvement as improvement

ENDPOINT = "correct_chains"
PRIMARY_WARM = "weak"
OURS = "gated"
PURE = ("rkl", "fkl")
BASELINES = (*PURE, "rewrite_only")
BEFORE = "before training"
TEXT_COLUMNS = ("env", "warm", "label", "run", "study")
MINUS = "\u2212"

Verdict = Literal["holds", "does not hold", "cannot be told"]


class Setting(NamedTuple):
    env: str
    warm: str

    def __str__(self) -> str:
        return f"{self.env}, {self.warm} start"


@dataclass(frozen=True)
class Measure:
    """How a column is called and written."""

    key: str
    label: str
    unit: str = ""
    digits: int = 2
    less_is_better: bool | None = None  # None: neither

    @property
    def scale(self) -> float:
        return 100.0 if self.unit == "%" else 1.0

    @property
    def title(self) -> str:
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def number(self, value: float) -> str:
        return f"{value * self.scale:,.{self.digits}f}".replace("-", MINUS)

    def interval(self, estimate: Estimate) -> str:
        """`[71.8, 75.4]`, or nothing where one run says nothing of the spread."""
        if math.isnan(estimate.low):
            return ""
        return f"[{self.number(estimate.low)}, {self.number(estimate.high)}]"

    def signed(self, value: float) -> str:
        return ("" if value * self.scale < 0 else "+") + self.number(value)

    def change(self, estimate: Estimate) -> str:
        """A difference with its sign and interval; of shares in points."""
        text = self.signed(estimate.value)
        if not math.isnan(estimate.low):
            text += f" [{self.signed(estimate.low)}, {self.signed(estimate.high)}]"
        return text

    @property
    def change_unit(self) -> str:
        return "points" if self.unit == "%" else self.unit


MEASURES = {
    m.key: m
    for m in (
        Measure("correct_chains", "correct chains", "%", 1, less_is_better=False),
        Measure("accuracy", "accuracy of the final value", "%", 1, less_is_better=False),
        Measure("ood/correct_chains", "correct chains out of distribution", "%", 1, less_is_better=False),
        Measure("ood/accuracy", "accuracy out of distribution", "%", 1, less_is_better=False),
        Measure("retention", "kept out of distribution", "%", 1, less_is_better=False),
        Measure("distinct_ways", "distinct right ways a prompt", "", 2, less_is_better=False),
        Measure("entropy", "entropy", "nats a token", 3),
        Measure("collapse", "collapse", "%", 1, less_is_better=True),
        Measure("divergence", "D_t on own answers", "nats", 3, less_is_better=True),
        Measure("hard_share", "hard steps", "%", 1, less_is_better=True),
        Measure("perplexity", "perplexity of the teacher's answers", "", 3, less_is_better=True),
        Measure("teacher_share", "tokens of the training that the teacher wrote", "%", 1, less_is_better=True),
        Measure("teacher_positions", "positions that the teacher scored", "", 0, less_is_better=True),
        Measure("loss_oscillation", "loss oscillation", "nats", 3, less_is_better=True),
        Measure("grad_norm", "gradient norm", "", 2, less_is_better=True),
        Measure("improvement", "chance that a run is better", "%", 0, less_is_better=False),
    )
}


def measure(key: str) -> Measure:
    """The measure of a column, `correct_chains/5` and the like included."""
    if key in MEASURES:
        return MEASURES[key]
    name, _, bucket = key.rpartition("/")
    base = MEASURES.get(name)
    if base is None:
        return Measure(key, key)
    return Measure(key, f"{base.label}, difficulty {bucket}", base.unit, base.digits, base.less_is_better)


# ---------------------------------------------------------------------- what was measured


def load_results(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of a comparison's folder, derived columns added. Cells that hold no number are left out.

    Raises:
        ValueError: if there is no results.csv, it lacks columns, or no run has finished.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"runs: {str(folder)!r} has no results.csv; accepted: a folder of experiments/compare.py")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [c for c in ("env", "warm", "label", "seed") if c not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"runs: {str(path)!r} lacks the columns {', '.join(missing)}")
        rows = [_row(row) for row in reader]
    if not rows:
        raise ValueError(f"runs: no run in {str(path)!r} has finished")
    return rows


def _row(cells: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {c: cells.get(c) or "" for c in TEXT_COLUMNS}
    row["study"] = row["study"] or "main"
    row["seed"] = int(float(cells["seed"]))
    for key, text in cells.items():
        if key not in row and text:
            try:
                value = float(text)
            except ValueError:
                continue
            if math.isfinite(value):
                row[key] = value
    for prefix in ("", "before/"):
        inside, outside = row.get(f"{prefix}{ENDPOINT}"), row.get(f"{prefix}ood/{ENDPOINT}")
        if inside and outside is not None:
            row[f"{prefix}retention"] = outside / inside
    if row.get("tokens") and "teacher_tokens" in row:
        row["teacher_share"] = row["teacher_tokens"] / row["tokens"]
    return row


@dataclass
class Results:
    """The runs, and estimates from them.

    Args:
        rows: as `load_results` gives them.
        draws: resamples of every bootstrap.
    """

    rows: Sequence[dict[str, Any]]
    draws: int = 2000
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    def settings(self, study: str = "main") -> list[Setting]:
        """Tasks in the order of the file, the weak start of each first."""
        found = dict.fromkeys(Setting(r["env"], r["warm"]) for r in self.rows if r["study"] == study)
        envs = list(dict.fromkeys(s.env for s in found))
        return sorted(found, key=lambda s: (envs.index(s.env), s.warm != PRIMARY_WARM, s.warm))

    def primary(self) -> list[Setting]:
        """One setting a task: its weak warm start, or the first there is."""
        first: dict[str, Setting] = {}
        for setting in self.settings():
            first.setdefault(setting.env, setting)
        return list(first.values())

    def labels(self, setting: Setting | None = None, study: str = "main") -> list[str]:
        """Contenders in the order of the file, ours and what it is compared with first."""
        found = dict.fromkeys(
            r["label"]
            for r in self.rows
            if r["study"] == study and (setting is None or Setting(r["env"], r["warm"]) == setting)
        )
        front = (OURS, "soft", *BASELINES)
        return [label for label in front if label in found] + [label for label in found if label not in front]

    def studies(self) -> list[str]:
        return list(dict.fromkeys(r["study"] for r in self.rows))

    def by_seed(self, setting: Setting, label: str, key: str, study: str = "main") -> dict[int, float]:
        """The measured values of a contender, by seed. `BEFORE` is the student that all runs of a seed began with."""
        before = label == BEFORE
        column = f"before/{key}" if before else key
        return {
            r["seed"]: r[column]
            for r in self.rows
            if Setting(r["env"], r["warm"]) == setting
            and r["study"] == study
            and (before or r["label"] == label)
            and column in r
        }

    def seeds(self, setting: Setting, label: str, study: str = "main") -> int:
        """How many runs of a contender have finished."""
        mine = (r for r in self.rows if Setting(r["env"], r["warm"]) == setting and r["study"] == study)
        return len({r["seed"] for r in mine if r["label"] == label})

    def estimate(self, setting: Setting, label: str, key: str, study: str = "main") -> Estimate | None:
        """Interquartile mean over the runs with its bootstrap interval; None where nothing was measured."""
        values = list(self.by_seed(setting, label, key, study).values())
        return self._once(("estimate", *values), lambda: bootstrap([values], draws=self.draws)) if values else None

    def pooled(self, label: str, key: str) -> Estimate | None:
        """Interquartile mean over the runs of all settings, stratified by setting; None unless each has some."""
        strata = [list(self.by_seed(s, label, key).values()) for s in self.settings()]
        return bootstrap(strata, draws=self.draws) if strata and all(strata) else None

    def difference(
        self, setting: Setting, label: str, baseline: str, key: str, study: str = "main"
    ) -> PairedDifference | None:
        """label - baseline over the seeds that both have; None where they share none."""
        x, y = (self.by_seed(setting, name, key, study) for name in (label, baseline))
        return self.paired(x, y)

    def paired(self, x: dict[int, float], y: dict[int, float]) -> PairedDifference | None:
        shared = sorted(x.keys() & y.keys())
        if not shared:
            return None
        a, b = [x[s] for s in shared], [y[s] for s in shared]
        return self._once(("paired", *a, None, *b), lambda: paired_difference(a, b, draws=self.draws))

    def improvement(self, label: str, baseline: str, key: str, settings: Sequence[Setting]) -> Estimate | None:
        """The chance that a run of `label` has more of `key` than one of `baseline`, the mean over settings."""
        strata = [[list(self.by_seed(s, name, key).values()) for s in settings] for name in (label, baseline)]
        return improvement(*strata, draws=self.draws) if strata[0] and all(map(all, strata)) else None

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def buckets(self, setting: Setting, prefix: str = "") -> list[int]:
        """The difficulties that were measured, `prefix` "" or "ood/"."""
        pattern = re.compile(rf"{prefix}{ENDPOINT}/(\d+)")
        keys = {k for r in self.rows if Setting(r["env"], r["warm"]) == setting for k in r}
        return sorted(int(m[1]) for m in map(pattern.fullmatch, keys) if m)


def primary_tests(results: Results, baseline: str) -> list[tuple[Setting, str, PairedDifference, float]]:
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
    settings = [s for s in results.primary() if results.estimate(s, results.labels(s)[0], ENDPOINT)]
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
        "cannot be told": "cannot be told to be at least as good as both pure methods, or not to be,",
    }
    parts = []
    for setting in settings:
        finding = next((f for f in findings(results, setting) if f.claim is CLAIMS[0]), None)
        if finding is None:
            parts.append(f"cannot be compared with the pure methods on {setting.env}, where runs of a kind are missing")
            continue
        m = finding.measure
        against = [
            f"{m.change(d.estimate)} points against `{b}`" + ("" if d.n > 1 else " on one seed")
            for b, d in finding.differences.items()
        ]
        lacking = [b for b in PURE if b not in finding.differences]
        against += [f"no runs of `{b}`" for b in lacking]
        parts.append(f"{words[finding.verdict]} on {setting.env} ({', '.join(against)})")
    return f"`{OURS}` {_join(parts)}."


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
    where = (
        "lies between theirs" if min(others) <= ours <= max(others) else "is above both" if ours > max(others) else ""
    )
    return f"{where or 'is below both'} ({numbers})"


def _join(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a; b; and c`: parts hold commas."""
    if len(parts) < 3:
        return " and ".join(parts)
    return "; ".join(parts[:-1]) + f"; and {parts[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------- who writes the prefix, which objective

PREFIXES = ("student", "gated", "random")
OBJECTIVES = ("reverse", "gated", "forward")
# methods of the table that are cells of the 2 x 2, for a comparison without the study
CELLS = {
    ("student", "reverse"): "rkl",
    ("student", "gated"): "gate_only",
    ("gated", "reverse"): "rewrite_only",
    ("gated", "gated"): "gated",
}


@dataclass(frozen=True)
class Crossed:
    """Runs by who wrote the prefix and which objective was descended: `runs[prefix, objective][seed]` is the endpoint."""

    setting: Setting
    prefixes: tuple[str, ...]
    objectives: tuple[str, ...]
    runs: dict[tuple[str, str], dict[int, float]]
    effects: dict[str, PairedDifference]  # by what is compared


def crossed(results: Results, setting: Setting) -> Crossed | None:
    """The study `two_by_two`, or the four methods of the main study that are its cells; None without either."""
    study, cells = "two_by_two", {}
    for label in results.labels(setting, study):
        match = re.fullmatch(r"(.+) prefix, (.+)", label)
        if match:
            cells[match[1], match[2]] = label
    if not cells:
        study, cells = "main", {c: k for c, k in CELLS.items() if k in results.labels(setting)}
        if len(cells) < len(CELLS):
            return None
    runs = {c: results.by_seed(setting, label, ENDPOINT, study) for c, label in cells.items()}
    runs = {c: values for c, values in runs.items() if values}
    prefixes = _ordered((p for p, _ in runs), PREFIXES)
    objectives = _ordered((o for _, o in runs), OBJECTIVES)
    effects = {}
    for prefix in prefixes[1:]:
        pairs = [((prefix, o), (prefixes[0], o)) for o in objectives]
        if effect := _main_effect(results, runs, pairs):
            effects[f"prefix: {prefix} instead of {prefixes[0]}"] = effect
    for objective in objectives[1:]:
        pairs = [((p, objective), (p, objectives[0])) for p in prefixes]
        if effect := _main_effect(results, runs, pairs):
            effects[f"objective: {objective} instead of {objectives[0]}"] = effect
    return Crossed(setting, prefixes, objectives, runs, effects) if runs else None


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
        kind, _, what = name.partition(": ")
        told = judge([effect.estimate]), judge([negative(effect.estimate)])
        verb = "adds" if told[0] == "holds" else "costs" if told[1] == "holds" else "does not resolvably change it:"
        parts.append(f"the {kind} {what} {verb} {m.change(effect.estimate)} points")
    n = {e.n for e in found.effects.values()}
    seeds = f"{min(n)} to {max(n)} seeds" if len(n) > 1 else f"{max(n, default=0)} seed{'s' if n != {1} else ''}"
    if not parts:
        return f"On {found.setting} no two cells share a seed."
    return f"On {found.setting}, on average over the other factor and paired over {seeds}: {'; '.join(parts)}."
