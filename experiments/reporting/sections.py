"""The sections of the report: each takes what was measured and gives tables and pictures, or None without the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from experiments.comparing.statistics import PairedDifference, interquartile_mean
from experiments.reporting import figures
from experiments.reporting.cells import (
    EMPTY,
    change_cell,
    in_unit,
    is_best,
    name_cell,
    number_cell,
    p_text,
    setting_cells,
    setting_columns,
    start_of,
)
from experiments.reporting.figures import Panel, Point, Style
from experiments.reporting.findings import (
    CLAIMS,
    Crossed,
    crossed,
    effects_sentence,
    findings,
    primary_comparisons,
    secondary_comparisons,
)
from experiments.reporting.pages import Block, Cell, Picture, Section, Table, Viewer
from experiments.reporting.results import (
    BASELINES,
    BEFORE,
    ENDPOINT,
    MEASURES,
    MINUS,
    OURS,
    PRIMARY_WARM,
    PURE,
    Curves,
    Line,
    Results,
    Setting,
    measure,
)

BINS = 40  # points of a curve over training
PROBABLE = 0.05


def expectations(results: Results) -> Section | None:
    settings = results.primary()
    found = [f for setting in settings for f in findings(results, setting)]
    rows = []
    for finding in sorted(found, key=lambda f: CLAIMS.index(f.claim)):
        m = finding.measure
        tone = {"holds": "good", "does not hold": "bad", "cannot be told": "open"}[finding.verdict]
        verdict = Cell(finding.verdict, tone=tone)  # type: ignore[arg-type]
        shown = []
        for baseline in PURE:
            d = finding.differences.get(baseline)
            shown.append(Cell(EMPTY) if d is None else change_cell(m, d.estimate))
        bucket = f", difficulty {m.key.rpartition('/')[2]}" if m.key[-1].isdigit() else ""
        what = Cell(finding.claim.text + bucket, m.change_unit)
        rows.append([what, *setting_cells(finding.setting, settings), verdict, *shown])
    if not rows:
        return None
    columns = [
        "expected of the gate",
        *setting_columns(settings),
        "measured",
        *(f"`{OURS}` {MINUS} `{b}`" for b in PURE),
    ]
    caption = (
        "Differences are paired over seeds, with 95 % t intervals. An expectation holds if every interval it "
        "rests on lies on the expected side of 0, does not hold if one lies on the other side, and cannot be told "
        "otherwise, or with one seed. The losses of the methods are different divergences, so how much they oscillate "
        f"compares sizes that differ to begin with. {start_of(settings)}"
    )
    names = 2 + len(setting_columns(settings))
    return Section("expected", "Expected and measured", [Table("expectations", columns, rows, caption, names)])


def scatter_panels(results: Results, style: Style, x: str, y: str, diagonals: Sequence[float] = ()) -> list[Panel]:
    """One panel a setting, a point a contender."""
    panels = []
    for setting in results.settings():
        points = []
        for label in results.labels(setting):
            across, up = results.estimate(setting, label, x), results.estimate(setting, label, y)
            if across and up:
                points.append(Point(label, in_unit(x, across), in_unit(y, up)))
        if points:
            titles = measure(x).title, measure(y).title

            def draw(axes: Any, points: Sequence[Point] = points, titles: tuple[str, str] = titles) -> Any:
                return figures.scatter(axes, points, style, *titles, diagonals=diagonals)

            panels.append(Panel(str(setting), draw))
    return panels


def diversity(results: Results, style: Style) -> Section | None:
    blocks: list[Block] = []
    for key, why in (
        ("distinct_ways", "how many different right ways a prompt's answers take"),
        ("entropy", "how spread the student's next token is"),
    ):
        panels = scatter_panels(results, style, key, ENDPOINT)
        if panels:
            caption = f"Accuracy against {why}. {INTERVALS}{crowded(results)}"
            blocks.append(Picture(f"accuracy_{key}", panels, caption))
    return Section("diversity", "Accuracy against diversity", blocks) if blocks else None


def crowded(results: Results) -> str:
    """What a picture with many contenders leaves out."""
    if all(len(results.labels(s)) <= figures.NAMED for s in results.settings()):
        return ""
    return " Of many contenders only the main methods and the most accurate others are named; the table has all."


INTERVALS = "Interquartile means over seeds with 95 % t intervals."


def cost(results: Results, style: Style) -> Section | None:
    panels = scatter_panels(results, style, "teacher_share", ENDPOINT)
    if not panels:
        return None
    caption = (
        "Accuracy against the share of the training's tokens that the teacher wrote: none for reverse KL on the "
        f"student's own answers, all for forward KL on the teacher's. {INTERVALS}{crowded(results)} What the teacher "
        "scored is in the table below."
    )
    return Section("cost", "Accuracy against teacher cost", [Picture("accuracy_cost", panels, caption)])


def contenders(results: Results) -> Section | None:
    settings = results.settings()
    keys = [k for k in MEASURES if any(k in r for r in results.rows)]
    if not settings or not keys:
        return None
    rows = []
    for setting in settings:
        labels = [*results.labels(setting), BEFORE]
        found = {(k, c): results.estimate(setting, c, k) for k in keys for c in labels}
        for label in labels:
            if all(found[k, label] is None for k in keys):
                continue
            cells = [number_cell(k, found[k, label], is_best(k, label, labels, found)) for k in keys]
            runs = results.seeds(setting, label)
            count = Cell(str(runs), value=runs) if label != BEFORE else Cell("")
            rows.append([name_cell(label), *setting_cells(setting, settings), count, *cells])
    columns = ["contender", *setting_columns(settings), "runs", *(measure(k).title for k in keys)]
    caption = f"The student alone on the test split, and what its training cost. {INTERVALS} The best number is bold."
    names = 1 + len(setting_columns(settings))
    blocks: list[Block] = [Table("contenders-table", columns, rows, caption, names)]
    return Section("contenders", "All contenders", blocks)


def differences(results: Results) -> Section | None:
    settings = results.primary()
    where = setting_columns(settings)
    blocks: list[Block] = []
    first = primary_comparisons(results)
    if first:
        rows = [difference_row(results, OURS, b, s, settings, d, p, name_cell(b)) for s, b, d, p in first]
        columns = [f"`{OURS}` less", *where, *DIFFERENCE, f"p, Holm over these {len(first)}", *CHANCE]
        blocks.append(Table("primary", columns, rows, names=1 + len(where), title="Primary comparisons"))
    for baseline in BASELINES:
        found = secondary_comparisons(results, baseline)
        if found:
            rows = [difference_row(results, k, baseline, s, settings, d, p, name_cell(k)) for s, k, d, p in found]
            columns = ["contender", *where, *DIFFERENCE, "p, Holm over tasks", *CHANCE]
            name, title = f"against-{baseline}", f"Every contender less `{baseline}`"
            blocks.append(Table(name, columns, rows, names=1 + len(where), title=title))
    if not blocks:
        return None
    most = max(d.n for b in BASELINES for *_, d, _ in secondary_comparisons(results, b))
    note = (
        f"The primary endpoint: correct chains in distribution. {start_of(settings)} Mean differences of runs that "
        "share a seed, and so a warm start, with 95 % t intervals; two-sided exact sign-flip tests. With "
        f"{most} pair{'s' if most > 1 else ''} no p-value can be below {p_text(2.0 ** (1 - most))}."
    )
    return Section("differences", "Paired differences", [note, *blocks])


DIFFERENCE = ("difference, points of correct chains", "p")
CHANCE = ("chance that a run is better, %", "pairs")


def difference_row(
    results: Results,
    label: str,
    baseline: str,
    setting: Setting,
    settings: Sequence[Setting],
    difference: PairedDifference,
    adjusted: float,
    name: Cell,
) -> list[Cell]:
    """Name, setting, difference, both p-values, the probability of improvement and the number of pairs."""
    more = difference.estimate.value > 0
    tone: Literal["", "good", "bad"] = "" if adjusted >= PROBABLE else "good" if more else "bad"
    return [
        name,
        *setting_cells(setting, settings),
        change_cell(MEASURES[ENDPOINT], difference.estimate),
        Cell(p_text(difference.p_value), value=difference.p_value),
        Cell(p_text(adjusted), value=adjusted, tone=tone),
        number_cell("improvement", results.improvement(setting, label, baseline, ENDPOINT)),
        Cell(str(difference.n), value=difference.n),
    ]


BAND = "Interquartile means over seeds; the band holds the middle half of them, or all if there are fewer than four."


def curve_picture(
    results: Results, curves: Curves, style: Style, name: str, key: str, y_label: str, caption: str, bins: int = 0
) -> Picture | None:
    panels: list[Panel] = []
    legend: dict[str, None] = {}
    for setting in results.settings():
        lines = curves.lines(setting, key, bins)
        if lines:

            def draw(axes: Any, lines: dict[str, Line] = lines) -> None:
                figures.curves(axes, lines, style, "iteration", y_label)

            panels.append(Panel(str(setting), draw))
            legend |= dict.fromkeys(lines)
    return Picture(name, panels, caption, list(legend)) if panels else None


def learning(results: Results, curves: Curves, style: Style) -> Section | None:
    pictures = [
        curve_picture(results, curves, style, "learning", "validation/correct_chains", "correct chains, %",
                      f"Correct chains of the student alone on the validation split. {BAND}"),
        curve_picture(results, curves, style, "learning_entropy", "validation/entropy", "entropy, nats a token",
                      f"Entropy of the student alone on the validation split. {BAND}"),
    ]  # fmt: skip
    blocks: list[Block] = [p for p in pictures if p]
    return Section("learning", "Learning curves", blocks) if blocks else None


def difficulty(results: Results, style: Style) -> Section | None:
    panels: list[Panel] = []
    legend: dict[str, None] = {}
    for setting in results.settings():
        inside, outside = results.buckets(setting), results.buckets(setting, "ood/")
        keys = {b: f"{ENDPOINT}/{b}" for b in inside} | {b: f"ood/{ENDPOINT}/{b}" for b in outside if b not in inside}
        values = {
            label: {b: in_unit(ENDPOINT, e) for b, k in keys.items() if (e := results.estimate(setting, label, k))}
            for label in results.labels(setting)
        }
        values = {k: v for k, v in values.items() if v}
        if values:
            beyond = [b for b in outside if b not in inside]

            def draw(axes: Any, values: Any = values, beyond: Sequence[int] = beyond) -> None:
                figures.by_difficulty(axes, values, beyond, style, "correct chains, %")

            panels.append(Panel(str(setting), draw))
            legend |= dict.fromkeys(values)
    if not panels:
        return None
    caption = f"Correct chains by the difficulty of the problem, on test problems. {INTERVALS}"
    return Section("difficulty", "Difficulty", [Picture("difficulty_buckets", panels, caption, list(legend))])


def out_of_distribution(results: Results, style: Style) -> Section | None:
    panels = scatter_panels(results, style, ENDPOINT, f"ood/{ENDPOINT}", diagonals=(0.25, 0.5, 0.75, 1.0))
    if not panels:
        return None
    caption = (
        "Accuracy on problems unlike any trained on, against accuracy on the usual ones. The dashed lines are shares "
        f"kept: out of distribution over in distribution. {INTERVALS}"
    )
    return Section("out-of-distribution", "In and out of distribution", [Picture("in_and_out", panels, caption)])


def hard_steps(results: Results, curves: Curves, seen: dict[str, dict[str, Any]], style: Style) -> Section | None:
    blocks: list[Block] = []
    over_training = curve_picture(
        results, curves, style, "hard_training", "rollout/hard_share", "hard steps, %",
        "Share of steps with D\u209c of at least tau among the states that were trained on, which are the student's, "
        f"the teacher's, or both, as the method has it. {BAND}", BINS,
    )  # fmt: skip
    if over_training:
        blocks.append(over_training)
    lines = {}
    for label, found in seen.items():
        shares = 100 * np.array(found["hard_by_position"])
        lines[label] = Line(np.arange(1, len(shares) + 1.0), shares, shares, shares)
    if lines:
        where = next(iter(seen.values()))["setting"]

        def draw(axes: Any) -> None:
            figures.curves(axes, lines, style, "position in the answer, tokens", "hard steps, %")

        caption = (
            "Share of hard steps at each position of answers that the trained student writes alone, 100 or so of one "
            "run a contender. At late positions only long answers are left."
        )
        blocks.append(Picture("hard_position", [Panel(where, draw)], caption, list(lines)))
    return Section("hard-steps", "Hard steps", blocks) if blocks else None


def stability(results: Results, style: Style) -> Section | None:
    panels = []
    for setting in results.primary():
        for key in ("loss_oscillation", "grad_norm", "collapse"):
            values = {k: in_unit(key, e) for k in results.labels(setting) if (e := results.estimate(setting, k, key))}
            if values:

                def draw(axes: Any, values: Any = values, title: str = measure(key).title) -> None:
                    figures.dots(axes, values, style, title)

                panels.append(Panel(f"{measure(key).label}: {setting}", draw, 0.75 + 0.27 * max(len(values), 4)))
    if not panels:
        return None
    caption = (
        "Loss oscillation is the mean change of the loss from one iteration to the next, the gradient norm is the mean "
        "before clipping, collapse the share of prompts all of whose answers are the same. The losses are different "
        f"divergences, so that their sizes do not compare as they are. {INTERVALS}"
    )
    return Section("stability", "Stability", [Picture("stability_dots", panels, caption)])


def two_by_two(results: Results) -> Section | None:
    settings = dict.fromkeys([*results.settings("two_by_two"), *results.settings()])
    blocks: list[Block] = []
    for setting in settings:
        found = crossed(results, setting)
        if found is not None:
            blocks += [crossed_table(found), effects_sentence(found)]
    if not blocks:
        return None
    note = (
        "Who writes the prefixes that a student is trained on, and which objective is descended there, apart from each "
        "other: correct chains in distribution, %."
    )
    return Section("prefix-and-objective", "Prefix and objective", [note, *blocks])


def crossed_table(found: Crossed) -> Table:
    estimates = {c: interquartile_mean(list(v.values())) for c, v in found.runs.items()}
    values = [e.value for e in estimates.values()]
    low, high = min(values), max(values)
    rows = []
    for prefix in found.prefixes:
        cells = [Cell(f"{prefix} prefix")]
        for objective in found.objectives:
            estimate = estimates.get((prefix, objective))
            cell = number_cell(ENDPOINT, estimate)
            shade = None if estimate is None else (estimate.value - low) / (high - low) if high > low else 0.5
            cells.append(Cell(cell.text, cell.note, cell.value, heat=shade))
        rows.append(cells)
    name = "crossed-" + "".join(c if c.isalnum() else "-" for c in f"{found.setting.env}-{found.setting.warm}")
    columns = [str(found.setting), *(f"{o} objective" for o in found.objectives)]
    return Table(name, columns, rows, sortable=False)


def ablations(results: Results) -> Section | None:
    keys = (ENDPOINT, f"ood/{ENDPOINT}", "distinct_ways", "entropy", "teacher_share")
    blocks: list[Block] = []
    for study in results.studies():
        if study in ("main", "two_by_two", "rivals"):
            continue  # they have their places above
        settings = results.settings(study)
        shown = [k for k in keys if any(k in r for r in results.rows if r["study"] == study)]
        rows = []
        for setting in settings:
            labels = results.labels(setting, study)
            found = {(k, c): results.estimate(setting, c, k, study) for k in shown for c in labels}
            for label in labels:
                cells = [number_cell(k, found[k, label], is_best(k, label, labels, found)) for k in shown]
                rows.append([Cell(label), *setting_cells(setting, settings), *cells])
        columns = [study.removeprefix("ablation:"), *setting_columns(settings), *(measure(k).title for k in shown)]
        name = "study-" + "".join(c if c.isalnum() else "-" for c in study)
        blocks.append(
            Table(name, columns, rows, f"{study.capitalize()}. {INTERVALS}", 1 + len(setting_columns(settings)))
        )
    return Section("ablations", "Ablations", blocks) if blocks else None


def gate_viewer(seen: dict[str, dict[str, Any]], style: Style) -> Section | None:
    if not seen:
        return None
    first = next(iter(seen.values()))
    tau = first["tau"]
    scale = 2 * tau if tau else 1.0
    data = {
        "prompts": first["prompts"],
        "scale": scale,
        "contenders": [
            {"label": k, "colour": style[k][0], **{key: found[key] for key in ("tau", "on_call", "alone")}}
            for k, found in seen.items()
        ],
    }
    seeds = sorted({found["seed"] for found in seen.values()})
    common = (
        f"{first['setting']}, seed {', '.join(map(str, seeds))}. The ground of a token is D\u209c = KL(student || "
        "teacher) at the state before it; hard steps are underlined, what the teacher wrote is boxed. All contenders "
        "and both ways of writing use the same random numbers, so that answers part only where their distributions do."
    )
    caption = (
        f"{common} Point at a token, or go to it with the Tab and arrow keys, for both distributions' likeliest tokens."
    )
    rewrites = [
        sum(t["rewritten"] for found in seen.values() for t in found["on_call"][i]["tokens"])
        for i in range(len(first["prompts"]))
    ]
    at = int(np.argmax(rewrites))  # the prompt that shows most
    chosen = [{"label": k, **found["on_call"][at]} for k, found in seen.items()]

    def draw(axes: Any) -> None:
        figures.written(axes, chosen, scale)

    panel = Panel(f"{first['prompts'][at][:60]}, the teacher on call", draw, 0.5 + 0.36 * len(chosen))
    picture = Picture("gate", [panel], f"Answers to one prompt with the teacher on call. {common}")
    return Section("gate-viewer", "Gate viewer", [Viewer(data, caption, picture)])


def how(results: Results) -> Section:
    warm = f" from the {PRIMARY_WARM} warm start" if PRIMARY_WARM in {r["warm"] for r in results.rows} else ""
    return Section(
        "method",
        "How the numbers are made",
        [
            "What is measured is the student alone, on problems that were not trained on. Runs of one seed begin with "
            "the same student in each setting, so that contenders are compared run by run.",
            "Estimates are interquartile means over runs (Agarwal et al. 2021, arXiv 2108.13264; the mean of up "
            "to three runs) with the t interval of Tukey and McLaughlin (1963) for trimmed means. Differences are "
            "means over pairs of runs that share a seed, with Student's t interval and sign-flip tests. "
            f"All intervals are 95 %. The primary endpoint is correct chains in distribution{warm}; everything else "
            "is description.",
            "The share kept is accuracy out of distribution over accuracy in distribution, of each run: who is bad at "
            "both drops little and keeps little.",
        ],
    )
