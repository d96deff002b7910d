"""Write the report of a comparison: one self-contained HTML file, and the same as Markdown with pictures.

python experiments/report.py --runs runs/compare --out docs/results/report
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape

from experiments import figures
from experiments.figures import Line, Panel, Point, Style
from experiments.findings import (
    BASELINES,
    BEFORE,
    ENDPOINT,
    MEASURES,
    OURS,
    PRIMARY_WARM,
    PURE,
    Crossed,
    Results,
    Setting,
    answer,
    crossed,
    effects_sentence,
    findings,
    load_results,
    measure,
    primary_tests,
)
from experiments.pages import Block, Cell, Page, Picture, Section, Table, Viewer, to_html, to_markdown
from experiments.statistics import Estimate
from experiments.tracking import read_metrics

BINS = 40  # points of a curve over training
PROBABLE = 0.05


@dataclass(frozen=True)
class Config:
    """Report a comparison."""

    runs: Path = Path("runs/compare")
    """Folder of the comparison, with its results.csv."""
    out: Path = Path("docs/results/report")
    """Folder to write report.html, report.md and images/ into."""
    viewer: bool = True
    """Let the students write for the gate viewer; without, no model is loaded."""
    contenders: int = 6
    """How many of them the viewer shows at most, a run each."""
    answers: int = 4
    """Answers of each."""
    draws: int = 2000
    """Resamples of every bootstrap."""


def main(args: Sequence[str] | None = None) -> int:
    """Write the report, or say in one line why not. Returns the exit code."""
    config = tyro.cli(Config, args=args, description=__doc__)
    console = Console()
    try:
        results = Results(load_results(config.runs), config.draws)
        page = make_page(config, results, console)
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "report.html").write_text(to_html(page), encoding="utf-8")
        (config.out / "report.md").write_text(to_markdown(page, config.out / "images"), encoding="utf-8")
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 1
    for sentence in page.answer:
        console.print(escape(sentence), highlight=False)
    console.print(f"\nwrote {config.out}/report.html, report.md and images/")
    return 0


def make_page(config: Config, results: Results, console: Console) -> Page:
    """The whole report as data."""
    style = Style(tuple(dict.fromkeys(r["label"] for r in results.rows)))
    seen = look_at_students(config, results, console) if config.viewer else {}
    curves = Curves(config.runs, results)
    made = [
        expectations(results),
        diversity(results, style),
        cost(results, style),
        contenders(results),
        differences(results),
        learning(results, curves, style),
        difficulty(results, style),
        out_of_distribution(results, style),
        hard_steps(results, curves, seen, style),
        stability(results, style),
        two_by_two(results),
        ablations(results),
        gate_viewer(seen, style),
        how(results),
    ]
    return Page(
        title="Does the gate help?",
        question=(
            "A student writes, a teacher rewrites its hard steps; where the student wrote it descends reverse KL, where "
            "the teacher did, forward KL. Is that better than either KL alone, and at what cost?"
        ),
        answer=answer(results),
        facts=facts(results),
        sections=[s for s in made if s is not None],
        style=style,
    )


def facts(results: Results) -> list[str]:
    rows = results.rows
    found = [f"{len(rows)} finished run{'s' if len(rows) > 1 else ''}"]
    for column, noun in (("env", "task"), ("warm", "warm start"), ("seed", "seed")):
        names = sorted({str(r[column]) for r in rows if r[column] != ""})
        if names:
            shown = "" if column == "seed" else f": {', '.join(names)}"
            found.append(f"{len(names)} {noun}{'s' if len(names) > 1 else ''}{shown}")
    found.append(f"{len(results.labels())} contenders")
    iterations = sorted({int(r["iterations"]) for r in rows if "iterations" in r})
    if iterations:
        found.append(f"{' or '.join(f'{i:,}' for i in iterations)} iterations a run")
    return found


# ---------------------------------------------------------------------- cells


def name_cell(label: str) -> Cell:
    return Cell(label, chip="" if label == BEFORE else label)


def number_cell(key: str, estimate: Estimate | None, best: bool = False) -> Cell:
    """An estimate and its interval; a dash where nothing was measured."""
    if estimate is None:
        return Cell("–")
    m = measure(key)
    return Cell(m.number(estimate.value), m.interval(estimate), estimate.value, "best" if best else "")


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


# ---------------------------------------------------------------------- sections


def expectations(results: Results) -> Section | None:
    settings = results.primary()
    rows = []
    for setting in settings:
        for finding in findings(results, setting):
            m = finding.measure
            tone = {"holds": "good", "does not hold": "bad", "cannot be told": "open"}[finding.verdict]
            shown = []
            for baseline in PURE:
                d = finding.differences.get(baseline)
                sign = "" if d is None else m.signed(d.estimate.value)
                interval = "" if d is None else m.change(d.estimate).removeprefix(sign).strip()
                shown.append(Cell(sign or "–", interval, None if d is None else d.estimate.value))
            unit = f" ({m.change_unit})" if m.change_unit else ""
            what = finding.claim.text + (f", difficulty {m.key.rpartition('/')[2]}" if m.key[-1].isdigit() else "")
            verdict = Cell(finding.verdict, tone=tone)  # type: ignore[arg-type]
            rows.append([Cell(what + unit), *setting_cells(setting, settings), verdict, *shown])
    if not rows:
        return None
    columns = ["expected of the gate", *setting_columns(settings), "measured", *(f"`{OURS}` − `{b}`" for b in PURE)]
    caption = (
        "Differences are paired over seeds, with 95 % bootstrap intervals. An expectation holds if every interval it "
        "rests on lies on the expected side of 0, does not hold if one lies on the other side, and cannot be told "
        "otherwise, or with one seed. The losses of the methods are different divergences, so how much they oscillate "
        f"compares sizes that differ to begin with. {start_of(settings)}"
    )
    names = 2 + len(setting_columns(settings))
    return Section("expected", "Expected and measured", [Table("expectations", columns, rows, caption, names)])


def start_of(settings: Sequence[Setting]) -> str:
    warm = sorted({s.warm for s in settings if s.warm})
    return f"All from the {' or '.join(warm)} warm start." if warm else ""


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


def in_unit(key: str, estimate: Estimate) -> Estimate:
    scale = measure(key).scale
    return Estimate(estimate.value * scale, estimate.low * scale, estimate.high * scale)


def diversity(results: Results, style: Style) -> Section | None:
    blocks: list[Block] = []
    for key, why in (
        ("distinct_ways", "how many different right ways a prompt's answers take"),
        ("entropy", "how spread the student's next token is"),
    ):
        panels = scatter_panels(results, style, key, ENDPOINT)
        if panels:
            caption = f"Accuracy against {why}. {INTERVALS}"
            blocks.append(Picture(f"accuracy_{key}", panels, caption))
    return Section("diversity", "Accuracy against diversity", blocks) if blocks else None


INTERVALS = "Interquartile means over seeds with 95 % bootstrap intervals."


def cost(results: Results, style: Style) -> Section | None:
    panels = scatter_panels(results, style, "teacher_share", ENDPOINT)
    if not panels:
        return None
    caption = (
        "Accuracy against the share of the training's tokens that the teacher wrote: none for reverse KL on the "
        f"student's own answers, all for forward KL on the teacher's. {INTERVALS} What the teacher scored is in the "
        "table below."
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
    blocks += pooled(results, settings)
    return Section("contenders", "All contenders", blocks)


def is_best(key: str, label: str, labels: Sequence[str], found: dict[tuple[str, str], Estimate | None]) -> bool:
    less = measure(key).less_is_better
    values = {c: e.value for c in labels if c != BEFORE and (e := found[key, c])}
    if less is None or label not in values or len(values) < 2:
        return False
    return values[label] == (min if less else max)(values.values())


def pooled(results: Results, settings: Sequence[Setting]) -> Iterator[Table]:
    """Over all settings at once, where there are several."""
    if len(settings) < 2:
        return
    keys = [k for k in (ENDPOINT, f"ood/{ENDPOINT}", "distinct_ways") if any(k in r for r in results.rows)]
    found = {(k, c): results.pooled(c, k) for k in keys for c in results.labels()}
    labels = [c for c in results.labels() if any(found[k, c] for k in keys)]
    rows = [[name_cell(c), *(number_cell(k, found[k, c], is_best(k, c, labels, found)) for k in keys)] for c in labels]
    caption = (
        f"All {len(settings)} settings together, for contenders that ran in each: interquartile means with bootstrap "
        "intervals stratified by setting."
    )
    if rows:
        yield Table("pooled", ["contender", *(measure(k).title for k in keys)], rows, caption)


def differences(results: Results) -> Section | None:
    settings = results.primary()
    m = MEASURES[ENDPOINT]
    blocks: list[Block] = []
    for baseline in BASELINES:
        rows = []
        for setting, label, d, adjusted in primary_tests(results, baseline):
            sign = m.signed(d.estimate.value)
            better = results.improvement(label, baseline, ENDPOINT, [setting])
            tone = ("good" if d.estimate.value > 0 else "bad") if adjusted < PROBABLE else ""
            rows.append(
                [
                    name_cell(label),
                    *setting_cells(setting, settings),
                    Cell(sign, m.change(d.estimate).removeprefix(sign).strip(), d.estimate.value),
                    Cell(p_text(d.p_value), value=d.p_value),
                    Cell(p_text(adjusted), value=adjusted, tone=tone),  # type: ignore[arg-type]
                    number_cell("improvement", better) if better else Cell("–"),
                    Cell(str(d.n), value=d.n),
                ]
            )
        if rows:
            columns = [
                "contender",
                *setting_columns(settings),
                "difference, points of correct chains",
                "p",
                "p, Holm over tasks",
                "chance that a run is better, %",
                "pairs",
            ]
            blocks.append(
                Table(
                    f"against-{baseline}",
                    columns,
                    rows,
                    names=1 + len(setting_columns(settings)),
                    title=f"Against `{baseline}`",
                )
            )
    if not blocks:
        return None
    largest = max(d.n for b in BASELINES for *_, d, _ in primary_tests(results, b))
    smallest = 2.0 ** (1 - largest)
    note = (
        f"The primary endpoint: correct chains in distribution. {start_of(settings)} Mean differences of runs that share a "
        "seed, and so a warm start, with bootstrap intervals over pairs; two-sided sign-flip tests; p-values adjusted "
        f"over the tasks by Holm's method. With {largest} pair{'s' if largest > 1 else ''} no p-value can be below "
        f"{p_text(smallest)}."
    )
    return Section("differences", "Paired differences", [note, *blocks])


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


class Curves:
    """What the runs logged as they trained, read once."""

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder, self.results = folder, results
        self._rows: dict[str, list[dict[str, float]]] = {}

    def lines(self, setting: Setting, key: str, bins: int = 0) -> dict[str, Line]:
        """A line a contender: interquartile mean over its runs, and the middle half of them, or all if fewer than four.

        Args:
            setting: whose runs.
            key: a column of metrics.csv.
            bins: average within so many equal parts of the training first; 0 takes every logged point.
        """
        lines = {}
        for label in self.results.labels(setting):
            runs = [points for points in self._points(setting, label, key, bins) if points]
            shared = sorted(set.intersection(*(set(r) for r in runs))) if runs else []
            if len(shared) > 1:
                values = np.array([[run[x] for x in shared] for run in runs])  # [runs, points]
                scaled = values * (100 if key in SHARES else 1)
                ends = (25, 75) if len(runs) > 3 else (0, 100)
                low, high = np.percentile(scaled, ends, axis=0)
                ordered, cut = np.sort(scaled, axis=0), len(runs) // 4
                middle = ordered[cut : len(runs) - cut].mean(0)
                lines[label] = Line(np.array(shared, float), middle, low, high)
        return lines

    def _points(self, setting: Setting, label: str, key: str, bins: int) -> Iterator[dict[float, float]]:
        for row in self.results.rows:
            if row["study"] != "main" or Setting(row["env"], row["warm"]) != setting or row["label"] != label:
                continue
            if row["run"] not in self._rows:
                self._rows[row["run"]] = read_metrics(self.folder / row["run"]) if row["run"] else []
            logged = self._rows[row["run"]]
            found = {r["iteration"]: r[key] for r in logged if key in r and math.isfinite(r[key])}
            if not bins:
                yield dict(found)
                continue
            width = max(1, math.ceil(len(logged) / bins))
            parts: dict[float, list[float]] = {}
            for iteration, value in found.items():
                parts.setdefault((iteration - 1) // width * width + (width + 1) / 2, []).append(value)
            yield {x: float(np.mean(values)) for x, values in parts.items()}


SHARES = {"validation/correct_chains", "validation/hard_share", "rollout/hard_share", "rollout/rewritten_share"}
BAND = "Interquartile means over seeds; the band holds the middle half of them, or all if there are fewer than four."


def curve_picture(
    results: Results, curves: Curves, style: Style, name: str, key: str, y_label: str, caption: str, bins: int = 0
) -> Picture | None:
    panels, legend = [], {}
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
    panels, legend = [], {}
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
    return Section("ood", "In and out of distribution", [Picture("in_and_out", panels, caption)])


def hard_steps(results: Results, curves: Curves, seen: dict[str, dict[str, Any]], style: Style) -> Section | None:
    blocks: list[Block] = []
    over_training = curve_picture(
        results, curves, style, "hard_training", "rollout/hard_share", "hard steps, %",
        "Share of steps with D\u209c of at least tau among the states that were trained on, which are the student's own, "
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
            "Share of hard steps at each position of answers that the trained student writes alone, 100 or so of one run "
            "a contender. At late positions only long answers are left."
        )
        blocks.append(Picture("hard_position", [Panel(where, draw)], caption, list(lines)))
    return Section("hard", "Hard steps", blocks) if blocks else None


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
            blocks += [crossed_table(results, found), effects_sentence(found)]
    if not blocks:
        return None
    note = (
        "Who writes the prefixes that a student is trained on, and which objective is descended there, apart from each "
        "other: correct chains in distribution, %."
    )
    return Section("crossed", "Prefix and objective", [note, *blocks])


def crossed_table(results: Results, found: Crossed) -> Table:
    from experiments.statistics import bootstrap

    estimates = {c: bootstrap([list(v.values())], draws=results.draws) for c, v in found.runs.items()}
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
        if study in ("main", "two_by_two"):
            continue
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


# ---------------------------------------------------------------------- what the students write


def look_at_students(config: Config, results: Results, console: Console) -> dict[str, dict[str, Any]]:
    """What `viewer.see_run` saw of the first run of each contender, in the first task, by contender."""
    from experiments.viewer import see_run

    seen: dict[str, dict[str, Any]] = {}
    for setting in results.primary()[:1]:
        labels = results.labels(setting)
        order = [k for k in figures.HIGHLIGHTED if k in labels] + [k for k in labels if k not in figures.HIGHLIGHTED]
        for label in order:
            if len(seen) == config.contenders:
                break
            row = first_run(results, setting, label)
            if row is None:
                continue
            try:
                found = see_run(config.runs / row["run"], config.answers)
            except (ValueError, OSError) as error:
                console.print(f"viewer: {label} left out, {escape(str(error))}", highlight=False)
                continue
            if seen and found["prompts"] != next(iter(seen.values()))["prompts"]:
                console.print(f"viewer: {label} left out, its prompts are others", highlight=False)
                continue
            seen[label] = found | {"setting": str(setting), "seed": row["seed"]}
    return seen


def first_run(results: Results, setting: Setting, label: str) -> dict[str, Any] | None:
    """The row of the lowest seed that names its folder."""
    mine: Iterable[dict[str, Any]] = (
        r
        for r in results.rows
        if r["study"] == "main" and Setting(r["env"], r["warm"]) == setting and r["label"] == label and r["run"]
    )
    return min(mine, key=lambda r: r["seed"], default=None)


def gate_viewer(seen: dict[str, dict[str, Any]], style: Style) -> Section | None:
    if not seen:
        return None
    first = next(iter(seen.values()))
    tau = first["tau"]
    scale = 2 * tau if 0 < tau < math.inf else 1.0
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
        f"{first['setting']}, seed {', '.join(map(str, seeds))}. The ground of a token is D\u209c = KL(student || teacher) "
        "at the state before it; hard steps are underlined, what the teacher wrote is boxed. All contenders and both "
        "ways of writing use the same random numbers, so answers part only where their distributions do."
    )
    caption = (
        f"{common} Point at a token, or go to it with the Tab and arrow keys, for both distributions' likeliest tokens."
    )
    chosen = [{"label": k, **found["on_call"][0]} for k, found in seen.items()]

    def draw(axes: Any) -> None:
        figures.written(axes, chosen, scale)

    panel = Panel(f"{first['prompts'][0][:60]}, the teacher on call", draw, 0.5 + 0.36 * len(chosen))
    picture = Picture("gate", [panel], f"Answers to one prompt with the teacher on call. {common}")
    return Section("gate", "Gate viewer", [Viewer(data, caption, picture)])


def how(results: Results) -> Section:
    warm = f"from the {PRIMARY_WARM} warm start" if PRIMARY_WARM in {r["warm"] for r in results.rows} else ""
    return Section(
        "how",
        "How the numbers are made",
        [
            "Every contender begins, in runs of one seed, with the same warm student, and has the same budget of answers "
            "and optimiser steps. What is measured is the student alone, on test problems of which no permutation was "
            "trained on.",
            "Estimates are interquartile means over runs with 95 % percentile-bootstrap intervals, runs resampled within "
            "each setting (Agarwal et al. 2021, arXiv 2108.13264); up to three runs the interquartile mean is the mean. "
            "Comparisons are of runs that share a seed: bootstrap over pairs, exact sign-flip tests. The primary endpoint, "
            f"fixed before the runs, is correct chains in distribution {warm}; all else is description.".replace(
                " ;", ";"
            ),
            "Share kept is accuracy out of distribution over accuracy in distribution, of each run: a contender that is "
            "bad at both drops little and keeps little.",
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
