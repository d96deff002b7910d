"""The tables of the report: each function turns what was measured into blocks of a page, or none without the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments.comparing.statistics import Estimate, interquartile_mean
from experiments.reporting.claims import CLAIMS, Comparison, findings, primary_comparisons, secondary_comparisons
from experiments.reporting.crossed import Crossed, crossed
from experiments.reporting.material import INTERVALS, Material, start_of
from experiments.reporting.page import Block, Cell, Table
from experiments.reporting.results import BASELINES, BEFORE, ENDPOINT, OURS, PURE, Results, Setting
from experiments.running.metric_display import metric

EMPTY = "\u2013"
LEVEL = 0.05  # of a test
# columns of the table of contenders: what the student can do, and what its training cost
QUALITY = (
    ENDPOINT, "accuracy", f"ood/{ENDPOINT}", "ood/accuracy", "retention", "distinct_ways", "entropy", "collapse",
    "divergence", "high_divergence_share", "perplexity",
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


def setting_cells(setting: Setting, settings: Sequence[Setting]) -> list[Cell]:
    """Task and warm start, each only if there are several."""
    columns = zip(setting, zip(*settings, strict=True), strict=True)
    return [Cell(value) for value, others in columns if len(set(others)) > 1]


def setting_columns(settings: Sequence[Setting]) -> list[str]:
    columns = zip(("task", "warm start"), zip(*settings, strict=True), strict=True) if settings else ()
    return [title for title, values in columns if len(set(values)) > 1]


def best_of(key: str, estimates: Mapping[str, Estimate | None]) -> str:
    """The contender with the best estimate; none if there is no better direction, or only one contender."""
    values = {k: e.value for k, e in estimates.items() if e and k != BEFORE}
    better = metric(key).better
    return (min if better == "less" else max)(values, key=lambda k: values[k]) if better and len(values) > 1 else ""


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def address(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)


def expectations(material: Material) -> list[Block]:
    settings = material.results.primary()
    found = [f for setting in settings for f in findings(material.results, setting)]
    rows = []
    for finding in sorted(found, key=lambda f: CLAIMS.index(f.claim)):
        tone: Any = {"yes": "good", "no": "bad", "undecided": "open"}[finding.verdict]
        differences = [finding.differences.get(b) for b in PURE]
        shown = [number_cell(finding.key, d.estimate if d else None, sign=True) for d in differences]
        unit = "points" if metric(finding.key).scale == 100 else metric(finding.key).label.partition(", ")[2]
        what = Cell(finding.claim.text, f"({unit})" if unit else "")
        rows.append([what, *setting_cells(finding.setting, settings), Cell(finding.verdict, tone=tone), *shown])
    if not rows:
        return []
    titles = ["expected of the gate", *setting_columns(settings), "true?", *(f"`{OURS}` minus `{b}`" for b in PURE)]
    caption = (
        "Differences are paired over seeds, with 95 % intervals. An expectation is true (yes) if every interval it "
        "depends on lies on the expected side of 0, false (no) if one lies on the other side, and undecided otherwise. "
        "Loss oscillation and gradient norm depend on the loss, and the losses of the methods differ. "
        f"{start_of(settings)}"
    )
    return [Table("expectations", titles, rows, caption, 2 + len(setting_columns(settings)))]


def contenders(material: Material) -> list[Block]:
    results, settings = material.results, material.results.settings()
    blocks: list[Block] = []
    for name, title, chosen in (
        ("contenders-table", "The student alone on the test split", QUALITY),
        ("cost-table", "Its training", COST),
    ):
        keys = [k for k in chosen if any(k in r for r in results.rows)]
        rows = []
        for setting in settings:
            labels = [*results.labels(setting), *([BEFORE] if chosen is QUALITY else [])]
            table = {k: {c: results.estimate(setting, c, k) for c in labels} for k in keys}
            best = {k: best_of(k, estimates) for k, estimates in table.items()}
            for label in labels:
                if any(table[k][label] for k in keys):
                    cells = [number_cell(k, table[k][label], best[k] == label) for k in keys]
                    runs = Cell("") if label == BEFORE else Cell(str(n := results.seeds(setting, label)), value=n)
                    rows.append([name_cell(label), *setting_cells(setting, settings), runs, *cells])
        if rows:
            titles = ["contender", *setting_columns(settings), "runs", *(metric(k).title for k in keys)]
            names = 1 + len(setting_columns(settings))
            blocks.append(Table(name, titles, rows, f"{INTERVALS} The best number is bold.", names, title))
    return blocks


def differences(material: Material) -> list[Block]:
    results, settings = material.results, material.results.primary()
    families = {f"Every contender minus `{b}`": secondary_comparisons(results, b) for b in BASELINES}
    families = {f"`{OURS}` minus each baseline (primary)": primary_comparisons(results)} | families
    blocks: list[Block] = []
    for title, family in families.items():
        if family:
            primary = not blocks and family[0].label == OURS and title.startswith(f"`{OURS}`")
            over = f"over these {len(family)}" if primary else "over tasks"
            titles = [
                "minus" if primary else "contender", *setting_columns(settings), "correct chains, points", "p",
                f"p, Holm {over}", "chance that a run is better, %", "pairs",
            ]  # fmt: skip
            rows = [_comparison_row(results, c, settings, c.baseline if primary else c.label) for c in family]
            blocks.append(Table(address(title), titles, rows, names=1 + len(setting_columns(settings)), title=title))
    if not blocks:
        return []
    most = max(c.difference.n for family in families.values() for c in family)
    note = (
        f"Correct chains in distribution, the primary endpoint. {start_of(settings)} Mean differences of runs that "
        f"share a seed, and so a warm start, with 95 % intervals over pairs; two-sided sign-flip tests. With {most} "
        f"pair{'s' if most > 1 else ''} no p-value can be below {p_text(2.0 ** (1 - most))}."
    )
    return [note, *blocks]


def _comparison_row(results: Results, c: Comparison, settings: Sequence[Setting], name: str) -> list[Cell]:
    more = c.difference.estimate.value > 0
    tone: Literal["", "good", "bad"] = "" if c.adjusted >= LEVEL else "good" if more else "bad"
    better = results.improvement(c.setting, c.label, c.baseline, ENDPOINT)
    chance, _, interval = better.scaled(100).text("{:.0f}").partition(" ") if better else (EMPTY, "", "")
    return [
        name_cell(name),
        *setting_cells(c.setting, settings),
        number_cell(ENDPOINT, c.difference.estimate, sign=True),
        Cell(p_text(c.difference.p_value), value=c.difference.p_value),
        Cell(p_text(c.adjusted), value=c.adjusted, tone=tone),
        Cell(chance, interval, better.value if better else None),
        Cell(str(c.difference.n), value=c.difference.n),
    ]


def prefix_and_loss(material: Material) -> list[Block]:
    results = material.results
    settings = dict.fromkeys([*results.settings("two_by_two"), *results.settings()])
    found = [c for setting in settings if (c := crossed(results, setting))]
    changes = dict.fromkeys(change for c in found for change in c.effects)
    if not found:
        return []
    rows = []
    for change, level in sorted(changes, key=lambda change: [c for c, _ in changes].index(change[0])):
        tests = [c.effects.get((change, level)) for c in found]
        rows.append(
            [Cell(change), Cell(level), *(number_cell(ENDPOINT, t.estimate if t else None, sign=True) for t in tests)]
        )
    note = "Who writes the prefixes that a student is trained on, and which loss is minimised there: correct chains, %."
    caption = "Points of correct chains that a change makes, paired over seeds, with 95 % intervals."
    titles = ["change", "where", *(str(c.setting) for c in found)]
    effects = [Table("effects", titles, rows, caption, 2, "Effects", sortable=False)] if rows else []
    return [note, *map(crossed_table, found), *effects]


def crossed_table(found: Crossed) -> Table:
    """Means of the cells, shaded from the lowest to the highest."""
    estimates = {c: interquartile_mean(list(v.values())).clipped(0, 1) for c, v in found.runs.items()}
    values = [e.value for e in estimates.values()]
    rows = []
    for prefix in found.prefixes:
        cells = [Cell(f"{prefix} prefix")]
        for loss in found.losses:
            estimate = estimates.get((prefix, loss))
            cell = number_cell(ENDPOINT, estimate)
            shade = (estimate.value - min(values)) / (np.ptp(values) or 1) if estimate else None
            cells.append(Cell(cell.text, cell.note, cell.value, heat=shade))
        rows.append(cells)
    name = address(f"crossed-{found.setting.env}-{found.setting.warm}")
    return Table(name, [str(found.setting), *(f"{o} loss" for o in found.losses)], rows, sortable=False)


def ablations(material: Material) -> list[Block]:
    results = material.results
    blocks: list[Block] = []
    for study in dict.fromkeys(r["study"] for r in results.rows):
        if study in ("main", "two_by_two", "rivals"):
            continue  # shown above
        settings = results.settings(study)
        keys = [
            k
            for k in (ENDPOINT, f"ood/{ENDPOINT}", "distinct_ways", "entropy", "teacher_share")
            if any(k in r for r in results.of(None, study))
        ]
        rows = []
        for setting in settings:
            labels = results.labels(setting, study)
            table = {k: {c: results.estimate(setting, c, k, study) for c in labels} for k in keys}
            best = {k: best_of(k, estimates) for k, estimates in table.items()}
            for label in labels:
                cells = [number_cell(k, table[k][label], best[k] == label) for k in keys]
                rows.append([Cell(label), *setting_cells(setting, settings), *cells])
        titles = ["contender", *setting_columns(settings), *(metric(k).title for k in keys)]
        names, title = 1 + len(setting_columns(settings)), f"Study: {study}"
        blocks.append(Table(address(f"study-{study}"), titles, rows, INTERVALS, names, title))
    return blocks
