"""The tables of the report: each function turns what was measured into blocks of a page, or none without the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from experiments.comparing.results_file import ENDPOINT
from experiments.comparing.statistics import Estimate, interquartile_mean
from experiments.reporting.claims import (
    CLAIMS,
    Comparison,
    Verdict,
    findings,
    primary_comparisons,
    secondary_comparisons,
)
from experiments.reporting.crossed import Crossed, crossed
from experiments.reporting.material import Material, start_of, text
from experiments.reporting.page import Block, Cell, Table, Tone
from experiments.reporting.results import BASELINES, BEFORE, OURS, PURE, Results, Setting
from experiments.running.metric_display import metric

EMPTY = "\u2013"
LEVEL = 0.05  # of a test
TONES: dict[Verdict, Tone] = {"yes": "good", "no": "bad", "undecided": "open"}
# columns of the table of contenders: what the student can do, and what its training cost
QUALITY = (
    ENDPOINT, "accuracy", "forward_kl", f"ood/{ENDPOINT}", "ood/accuracy", "retention", "distinct_ways", "entropy",
    "collapse", "divergence", "high_divergence_share", "perplexity",
)  # fmt: skip
COST = ("teacher_share", "teacher_positions", "loss_oscillation", "grad_norm")


def name_cell(label: str) -> Cell:
    return Cell(label, chip="" if label == BEFORE else label)


def number_cell(key: str, estimate: Estimate | None, best: bool = False, sign: bool = False) -> Cell:
    """An estimate and its interval, with `sign` as a difference; a dash where nothing was measured."""
    if estimate is None:
        return Cell(EMPTY)
    number, _, interval = estimate.shown_as(metric(key), sign).partition(" ")
    return Cell(number, interval, estimate.value, "best" if best else "")


def setting_cells(setting: Setting, settings: Sequence[Setting]) -> dict[str, Cell]:
    """Task and warm start, each only if there are several."""
    columns = zip(("task", "warm start"), setting, zip(*settings, strict=True), strict=True)
    return {title: Cell(value) for title, value, others in columns if len(set(others)) > 1}


def best_of(key: str, estimates: Mapping[str, Estimate]) -> str:
    """The contender whose estimate is better than all others, and whose interval meets none of theirs; empty if there
    is no such one."""
    better = metric(key).better
    if not better or len(estimates) < 2:
        return ""
    best = (min if better == "less" else max)(estimates, key=lambda label: estimates[label].value)
    low, high = estimates[best].low, estimates[best].high  # NaN with one seed, which is never apart
    apart = (e.high < low or high < e.low for label, e in estimates.items() if label != best)
    return best if all(apart) else ""


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def address(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)


def expectations(material: Material) -> list[Block]:
    settings = material.results.primary()
    found = [f for setting in settings for f in findings(material.results, setting)]
    rows = []
    for finding in sorted(found, key=lambda f: CLAIMS.index(f.claim)):
        m, row = metric(finding.key), setting_cells(finding.setting, settings)
        unit = "points" if m.scale == 100 else m.label.partition(", ")[2]
        row = {"expected of the gate": Cell(finding.claim.text, f"({unit})" if unit else "")} | row
        row["true?"] = Cell(finding.verdict, tone=TONES[finding.verdict])
        for baseline in PURE:
            difference = finding.differences.get(baseline)
            estimate = difference.estimate if difference else None
            row[f"`{OURS}` minus `{baseline}`"] = number_cell(m.key, estimate, sign=True)
        rows.append(row)
    return [Table("expectations", rows, text("expectations", start=start_of(settings)))]


def contenders(material: Material) -> list[Block]:
    caption = text("contenders")
    return [
        estimates("contenders-table", "The student alone on the test split", material.results, QUALITY, caption),
        estimates("cost-table", "Training cost and stability", material.results, COST, caption),
    ]


def ablations(material: Material) -> list[Block]:
    results = material.results
    others = {r["study"]: None for r in results.rows if r["study"] not in ("main", "two_by_two", "rivals")}
    keys, caption = {study: _keys(results, study) for study in others}, text("intervals")
    return [
        estimates(address(f"study-{study}"), f"Study: {study}", results, keys[study], caption, study)
        for study in others
    ]


def _keys(results: Results, study: str) -> list[str]:
    """The columns of a study's table."""
    primary = dict.fromkeys(results.endpoint(setting, study) for setting in results.settings(study))
    return [*primary, f"ood/{ENDPOINT}", "distinct_ways", "entropy", "teacher_share"]


def endpoint_name(keys: Sequence[str]) -> str:
    """The primary endpoints in words."""
    names = " or ".join(metric(key).label.partition(", ")[0] for key in keys)
    return names[0].upper() + names[1:] if names else ""


def estimates(name: str, title: str, results: Results, keys: Sequence[str], caption: str, study: str = "main") -> Table:
    """A row a contender and setting, a column a metric; in the main study also the number of runs, and the student from
    which they started."""
    settings, main = results.settings(study), study == "main"
    keys = [k for k in keys if any(k in r for r in results.of(None, study))]
    rows = []
    for setting in settings:
        found = {k: results.estimates(setting, k, study) for k in keys}
        best = {k: best_of(k, by_label) for k, by_label in found.items()}
        for label in [*results.labels(setting, study), *[BEFORE] * main]:
            shown = {k: results.estimate(setting, label, k, study) for k in keys}
            if any(shown.values()):
                row = {"contender": name_cell(label) if main else Cell(label), **setting_cells(setting, settings)}
                if main:
                    row["runs"] = count_cell(results.seeds(setting, label)) if label != BEFORE else Cell("")
                rows.append(row | {metric(k).title: number_cell(k, e, best[k] == label) for k, e in shown.items()})
    return Table(name, rows, caption, title)


def count_cell(n: int) -> Cell:
    return Cell(str(n), value=n)


def differences(material: Material) -> list[Block]:
    results, settings = material.results, material.results.primary()
    primary = primary_comparisons(results)
    families = {baseline: secondary_comparisons(results, baseline) for baseline in BASELINES}
    comparisons = [c for family in (primary, *families.values()) for c in family]
    if not comparisons:
        return []
    most = max(c.difference.n for c in comparisons)
    pairs, least = f"{most} pair{'s' if most > 1 else ''}", p_text(2.0 ** (1 - most))
    name = endpoint_name(results.endpoints())
    note = text("differences", endpoint=name, start=start_of(settings), pairs=pairs, least=least)
    over = f"over these {len(primary)}"
    rows = [{"minus": name_cell(c.baseline)} | comparison_cells(results, c, over) for c in primary]
    tables = {f"`{OURS}` minus each baseline (primary)": rows}
    for baseline, family in families.items():
        rows = [{"contender": name_cell(c.label)} | comparison_cells(results, c, "over tasks") for c in family]
        tables[f"Every contender minus `{baseline}`"] = rows
    return [note, *(Table(address(title), rows, title=title) for title, rows in tables.items() if rows)]


def comparison_cells(results: Results, c: Comparison, over: str) -> dict[str, Cell]:
    """The cells of a comparison; `over` says what Holm's correction is taken over."""
    settings, key, keys = results.primary(), results.endpoint(c.setting), results.endpoints()
    m, value = metric(key), c.difference.estimate.value
    tone: Tone = "" if c.adjusted >= LEVEL else "good" if (value > 0) != (m.better == "less") else "bad"
    unit = "points" if m.scale == 100 else m.label.partition(", ")[2]
    difference = number_cell(key, c.difference.estimate, sign=True)
    title = f"{m.label.partition(', ')[0]}, {unit}"
    if len(keys) > 1:
        title, difference = "primary endpoint", replace(difference, note=f"{difference.note} {unit}".strip())
    chance, _, interval = c.better.scaled(100).text("{:.0f}").partition(" ")
    return {
        **setting_cells(c.setting, settings),
        title: difference,
        "p": Cell(p_text(c.difference.p_value), value=c.difference.p_value),
        f"p, Holm {over}": Cell(p_text(c.adjusted), value=c.adjusted, tone=tone),
        "chance that a run is better, %": Cell(chance, interval, c.better.value),
        "pairs": count_cell(c.difference.n),
    }


def prefix_and_loss(material: Material) -> list[Block]:
    results = material.results
    settings = dict.fromkeys([*results.settings("two_by_two"), *results.settings()])
    found = [c for setting in settings if (c := crossed(results, setting))]
    if not found:
        return []
    effects = dict.fromkeys(effect for c in found for effect in c.effects)
    changes = list(dict.fromkeys(change for change, _ in effects))
    rows = []
    for change, level in sorted(effects, key=lambda effect: changes.index(effect[0])):
        row = {"change": Cell(change), "where": Cell(level)}
        for c in found:
            test = c.effects.get((change, level))
            row[str(c.setting)] = number_cell(c.key, test.estimate if test else None, sign=True)
        rows.append(row)
    name = endpoint_name(list(dict.fromkeys(c.key for c in found)))
    effect_table = Table("effects", rows, text("effects", endpoint=name), "Effects", sortable=False)
    return [text("crossed", endpoint=name), *map(crossed_table, found), effect_table]


def crossed_table(found: Crossed) -> Table:
    """Means of the cells, shaded from the lowest to the highest."""
    means = {
        cell: interquartile_mean(list(runs.values())).clipped(*metric(found.key).range)
        for cell, runs in found.runs.items()
    }
    values = sorted(e.value for e in means.values())
    rows = []
    for prefix in found.prefixes:
        row = {str(found.setting): Cell(f"{prefix} prefix")}
        for loss in found.losses:
            mean = means.get((prefix, loss))
            heat = (mean.value - values[0]) / (values[-1] - values[0] or 1) if mean else None
            row[f"{loss} loss"] = replace(number_cell(found.key, mean), heat=heat)
        rows.append(row)
    return Table(address(f"crossed-{found.setting.env}-{found.setting.warm}"), rows, sortable=False)
