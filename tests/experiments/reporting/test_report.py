"""The report: its numbers are the functions', its sentences follow its numbers, and hostile text in it is inert."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import report
from experiments.comparing.statistics import Estimate, holm, interquartile_mean, paired_difference
from experiments.reporting import sections
from experiments.reporting.figures import INK, Panel, Point, Style, scatter, svg
from experiments.reporting.findings import (
    CLAIMS,
    answer,
    crossed,
    effects_sentence,
    findings,
    judge,
    primary_comparisons,
    secondary_comparisons,
)
from experiments.reporting.pages import Page, Viewer, inline, plain, script_json, to_html
from experiments.reporting.results import BEFORE, ENDPOINT, MEASURES, Curves, Results, Setting, load_results
from tests.helpers.comparisons import random_rows, write_comparison
from tests.helpers.paths import REPOSITORY

SUMS = Setting("sums", "weak")
HOSTILE = """</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'"&`{{data}}"""


def results_of(folder: Path, **kwargs: Any) -> Results:
    return Results(load_results(write_comparison(folder, random_rows(**kwargs))))


def made_results(**levels: list[float]) -> Results:
    """Contenders with these shares of correct chains, a run a seed."""
    rows = [
        {"env": "sums", "warm": "weak", "label": label, "seed": seed, "run": "", "study": "main", ENDPOINT: value}
        for label, values in levels.items()
        for seed, value in enumerate(values)
    ]
    return Results(rows)


# ---------------------------------------------------------------------- numbers


def test_estimates_are_those_of_the_functions(tmp_path: Path) -> None:
    results = results_of(tmp_path, settings=[("sums", "weak"), ("coins", "weak")], seeds=5)
    rows = [r for r in results.rows if r["env"] == "sums" and r["label"] == "gated"]
    values = [r[ENDPOINT] for r in rows]
    assert results.estimate(SUMS, "gated", ENDPOINT) == interquartile_mean(values)
    kept = [r["ood/correct_chains"] / r[ENDPOINT] for r in rows]
    estimate = results.estimate(SUMS, "gated", "retention")
    assert estimate is not None
    assert estimate.value == pytest.approx(interquartile_mean(kept).value)


def test_seeds_are_paired_whatever_their_order_and_only_those_of_both() -> None:
    results = made_results(gated=[0.5, 0.7, 0.9], rkl=[0.4, 0.5, 0.6])
    results.rows = [r for r in reversed(results.rows) if (r["label"], r["seed"]) != ("rkl", 1)]
    difference = results.difference(SUMS, "gated", "rkl", ENDPOINT)
    assert difference == paired_difference([0.5, 0.9], [0.4, 0.6])


def test_holm_is_over_the_tasks_of_each_comparison(tmp_path: Path) -> None:
    results = results_of(tmp_path, settings=[("sums", "weak"), ("sums", "strong"), ("coins", "weak")], seeds=5)
    tests = secondary_comparisons(results, "rkl")
    assert {(s.env, s.warm) for s, *_ in tests} == {("sums", "weak"), ("coins", "weak")}  # the primary warm start
    for label in ("gated", "fkl", "rewrite_only"):
        mine = {s.env: (d.p_value, adjusted) for s, name, d, adjusted in tests if name == label}
        assert {env: p for env, (_, p) in mine.items()} == holm({env: p for env, (p, _) in mine.items()})


def test_holm_is_over_all_primary_comparisons(tmp_path: Path) -> None:
    results = results_of(tmp_path, settings=[("sums", "weak"), ("coins", "weak")], seeds=5)
    tests = primary_comparisons(results)
    assert [(s.env, baseline) for s, baseline, *_ in tests] == [
        (env, baseline) for env in ("sums", "coins") for baseline in ("rkl", "fkl", "rewrite_only")
    ]
    p_values = {str(i): d.p_value for i, (*_, d, _) in enumerate(tests)}
    assert [adjusted for *_, adjusted in tests] == list(holm(p_values).values())


def test_methods_that_ran_as_cells_or_rivals_are_contenders(tmp_path: Path) -> None:
    """Unless the main study has them itself."""
    cells = random_rows(
        labels=("gated prefix, gated", "student prefix, reverse", "random prefix, gated"), study="two_by_two"
    )
    rows = [*random_rows(labels=("rkl", "fkl")), *cells, *random_rows(labels=("gkd", "fkl"), study="rivals")]
    results = Results(load_results(write_comparison(tmp_path, rows)))
    assert results.labels() == ["gated", "rkl", "fkl", "gkd"]
    ran = {r["seed"]: r[ENDPOINT] for r in cells if r["label"] == "gated prefix, gated"}
    assert results.by_seed(SUMS, "gated", ENDPOINT) == pytest.approx(ran)
    own = {r["seed"]: r[ENDPOINT] for r in rows if r["label"] == "rkl"}
    assert results.by_seed(SUMS, "rkl", ENDPOINT) == pytest.approx(own)


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ([(0.1, 0.2), (0.3, 0.4)], "holds"),
        ([(0.1, 0.2), (-0.1, 0.4)], "cannot be told"),
        ([(-0.1, 0.2), (-0.4, -0.3)], "does not hold"),
        ([(0.1, 0.2), (np.nan, np.nan)], "cannot be told"),
        ([], "cannot be told"),
    ],
)
def test_verdicts(bounds: list[tuple[float, float]], verdict: str) -> None:
    assert judge(Estimate((low + high) / 2, low, high) for low, high in bounds) == verdict


def test_what_was_expected_is_judged_by_its_direction() -> None:
    """Entropy: between, whichever is the lower; oscillation: less is what was expected."""
    base = {"env": "sums", "warm": "weak", "run": "", "study": "main"}

    def rows(**levels: tuple[float, float]) -> Results:
        return Results(
            [
                {**base, "label": k, "seed": s, "entropy": e + s / 1000, "loss_oscillation": o + s / 1000}
                for k, (e, o) in levels.items()
                for s in range(4)
            ],
        )

    def verdicts(results: Results) -> dict[str, str]:
        return {f.claim.key: f.verdict for f in findings(results, SUMS)}

    between = rows(gated=(0.3, 0.1), rkl=(0.4, 0.2), fkl=(0.2, 0.3))
    assert verdicts(between) == {"entropy": "holds", "loss_oscillation": "holds"}
    outside = rows(gated=(0.5, 0.25), rkl=(0.4, 0.2), fkl=(0.2, 0.3))
    assert verdicts(outside) == {"entropy": "does not hold", "loss_oscillation": "does not hold"}
    alone = rows(gated=(0.3, 0.1), rkl=(0.4, 0.2))  # half of the evidence
    assert verdicts(alone) == {"entropy": "cannot be told", "loss_oscillation": "cannot be told"}


def test_the_answer_follows_the_numbers() -> None:
    best, good, _ = answer(made_results(gated=[0.8, 0.81], rkl=[0.7, 0.72], fkl=[0.6, 0.61], soft=[0.9, 0.91]))
    assert "by `soft` on sums (90.5 % [84.1, 96.9]; `gated` 80.5 %" in best
    assert good.startswith("`gated` is at least as good as both pure methods on sums")
    _, worse, _ = answer(made_results(gated=[0.65, 0.66], rkl=[0.7, 0.711], fkl=[0.6, 0.61]))
    assert worse.startswith("`gated` is not at least as good as both pure methods on sums")
    _, unknown, _ = answer(made_results(gated=[0.8], rkl=[0.7], fkl=[0.6]))
    assert unknown.startswith("`gated` may or may not be")
    assert "one seed" in unknown
    _, missing, _ = answer(made_results(gated=[0.8, 0.8]))
    assert "cannot be compared" in missing
    assert answer(made_results()) == ["No finished run of the main study was graded, so there is no answer yet."]


def test_main_effects_of_an_additive_table() -> None:
    """Cells that are prefix + objective + seed have these as their main effects, with nothing left over."""
    prefixes, objectives = {"student": 0.5, "gated": 0.6}, {"reverse": 0.0, "gated": -0.1, "forward": -0.2}
    rows = [
        {"env": "sums", "warm": "weak", "study": "two_by_two", "run": "", "seed": seed,
         "label": f"{p} prefix, {o}", ENDPOINT: prefixes[p] + objectives[o] + seed / 50}
        for p in prefixes for o in objectives for seed in range(3)
    ]  # fmt: skip
    found = crossed(Results(rows), SUMS)
    assert found is not None
    assert (found.prefixes, found.objectives) == (("student", "gated"), ("reverse", "gated", "forward"))
    effects = {name: (e.estimate.value, e.estimate.low, e.estimate.high) for name, e in found.effects.items()}
    assert effects == {
        "the gated prefix instead of the student prefix": pytest.approx((0.1, 0.1, 0.1)),
        "the gated objective instead of the reverse one": pytest.approx((-0.1, -0.1, -0.1)),
        "the forward objective instead of the reverse one": pytest.approx((-0.2, -0.2, -0.2)),
    }
    assert "the gated prefix instead of the student prefix adds +10.0 [+10.0, +10.0] points" in effects_sentence(found)
    assert "the gated prefix changes it by +10.0 [+10.0, +10.0] under the reverse objective" in effects_sentence(found)


def test_the_table_of_methods_stands_in_for_the_study() -> None:
    levels = {"rkl": [0.8, 0.8], "gate_only": [0.7, 0.7], "rewrite_only": [0.9, 0.9], "gated": [0.6, 0.6]}
    found = crossed(made_results(**levels), SUMS)
    assert found is not None
    assert found.runs["gated", "reverse"] == {0: 0.9, 1: 0.9}
    assert found.runs["student", "gated"] == {0: 0.7, 1: 0.7}
    del levels["gate_only"]
    assert crossed(made_results(**levels), SUMS) is None


def test_curves_are_means_over_runs(tmp_path: Path) -> None:
    rows = random_rows(labels=("gated",), seeds=3)
    results = Results(load_results(write_comparison(tmp_path, rows, curves=True)))
    curves = Curves(tmp_path, results)
    line = curves.lines(SUMS, "validation/entropy")["gated"]
    logged = [np.genfromtxt(tmp_path / str(r["run"]) / "metrics.csv", delimiter=",", names=True) for r in rows]
    np.testing.assert_allclose(line.middle, np.mean([m["validationentropy"][9::10] for m in logged], 0))
    assert line.x.tolist() == list(range(10, 401, 10))
    binned = curves.lines(SUMS, "rollout/hard_share", bins=40)["gated"]
    shares = np.array([m["rollouthard_share"] for m in logged])
    np.testing.assert_allclose(binned.high, 100 * shares.reshape(3, 40, 10).mean(2).max(0))


# ---------------------------------------------------------------------- the page


class Parsed(HTMLParser):
    """Elements with their attributes, the text in scripts, and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two settings with everything but the viewer."""
    folder = tmp_path_factory.mktemp("report")
    settings = [("sums", "weak"), ("sums", "strong")]
    cells = [f"{p} prefix, {o}" for p in ("student", "gated") for o in ("reverse", "gated")]
    rows = random_rows(settings) + random_rows(settings, cells, 3, "two_by_two")
    rows += random_rows(settings[:1], ("tau = 0.1", "tau = 1"), 2, "ablation:tau")
    write_comparison(folder / "runs", rows, curves=True)
    arguments = ["--runs", str(folder / "runs"), "--out", str(folder / "out"), "--no-viewer"]
    assert report.main(arguments) == 0
    return folder


def test_the_page_holds_everything_and_fetches_nothing(written: Path) -> None:
    page = (written / "out" / "report.html").read_text()
    parsed = Parsed(page)
    sections_there = [a["id"] for tag, a in parsed.elements if tag == "section"]
    assert sections_there == [
        *("expected", "diversity", "cost", "contenders", "differences", "learning", "difficulty"),
        *("out-of-distribution", "hard-steps", "stability", "prefix-and-objective", "ablations", "method"),
    ]
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in parsed.elements:
        assert "src" not in attributes, tag
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", page)
    assert INK not in page.split("</head>")[1]  # pictures follow the page into the dark
    assert "{{" not in page


def test_the_page_shows_the_functions_numbers(written: Path) -> None:
    page = (written / "out" / "report.html").read_text().replace("\u00a0", " ")
    results = Results(load_results(written / "runs"))
    for setting in results.settings():
        for label in (*results.labels(setting), BEFORE):
            estimate = results.estimate(setting, label, ENDPOINT)
            assert estimate is not None
            m = MEASURES[ENDPOINT]
            assert f'data-value="{estimate.value!r}"' in page
            assert f'{m.number(estimate.value)} <span class="note">{m.interval(estimate)}</span>' in page
    for sentence in answer(results):
        assert inline(sentence).replace("\u00a0", " ") in page


def test_markdown_has_the_same_and_its_pictures(written: Path) -> None:
    text = (written / "out" / "report.md").read_text()
    results = Results(load_results(written / "runs"))
    for sentence in answer(results):
        assert plain(sentence) in text
    pictures = re.findall(r"\]\((images/\w+\.png)\)", text)
    assert len(pictures) >= 8
    for name in pictures:
        assert (written / "out" / name).read_bytes().startswith(b"\x89PNG")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert tables
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, lines[0]


@pytest.mark.parametrize(
    "chosen",
    [
        {"labels": ("gated",), "seeds": 1},
        {"labels": ("rkl", "somebody's"), "seeds": 2},
        {"settings": [("coins", "strong")], "seeds": 2},
        {"labels": ("student prefix, reverse",), "study": "two_by_two"},
        {"labels": ("tau = 1",), "study": "ablation:tau"},
    ],
)
def test_any_subset_makes_a_report(chosen: dict[str, Any], tmp_path: Path) -> None:
    write_comparison(tmp_path / "runs", random_rows(**chosen))
    arguments = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert report.main(arguments) == 0  # the viewer finds no run, and says so
    page = (tmp_path / "out" / "report.html").read_text()
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).split("<main>")[1].split("</main>")[0]


def test_columns_may_be_missing(tmp_path: Path) -> None:
    kept = ("env", "warm", "label", "seed", ENDPOINT)
    rows = [{k: v for k, v in row.items() if k in kept} for row in random_rows()]
    write_comparison(tmp_path, rows)
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("content", [None, "env,warm,label,seed\n", "agent,seed\ngated,0\n"])
def test_nothing_to_report_is_one_line(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "results.csv").write_text(content)
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error runs: ")
    assert "\n" not in said


def test_help_is_light() -> None:
    code = "import sys, experiments.report; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


# ---------------------------------------------------------------------- hostile text


def hostile_page() -> Page:
    """A report whose contenders, tokens and prompts are an attack."""
    tokens = [
        {"text": HOSTILE if i else "7", "d": 0.4 * i, "hard": i > 1, "rewritten": i == 2, "q": 0.5, "p": 0.25,
         "student": [[HOSTILE, 0.5], ["7", 0.25]], "teacher": [["7", 0.75], [HOSTILE, 0.25]]}
        for i in range(4)
    ]  # fmt: skip
    answers = [{"correct": True, "tokens": tokens}, {"correct": None, "tokens": tokens[:1]}]
    found = {
        "tau": 0.5,
        "prompts": [HOSTILE, "2+5="],
        "on_call": answers,
        "alone": answers,
        "setting": HOSTILE,
        "seed": 0,
    }
    style = Style((HOSTILE, "gated"))
    results = Results(random_rows(labels=("gated", HOSTILE, "rkl"), seeds=2))
    viewer = sections.gate_viewer({HOSTILE: found, "gated": found}, style)
    made = [viewer, sections.contenders(results), sections.differences(results), sections.stability(results, style)]
    return Page(HOSTILE, HOSTILE, answer(results), [HOSTILE], [s for s in made if s is not None], style)


def test_hostile_text_is_inert() -> None:
    """No element, attribute or script comes of it, and the data come back as they were."""
    page = hostile_page()
    parsed = Parsed(to_html(page))
    assert len(parsed.scripts) == 2
    assert not any(tag == "img" or name.startswith("on") for tag, a in parsed.elements for name in a)
    viewer = page.sections[0].blocks[0]
    assert isinstance(viewer, Viewer)
    assert json.loads(parsed.scripts[0]) == json.loads(json.dumps(viewer.data))
    assert "<" not in script_json(viewer.data)
    assert "innerHTML" not in parsed.scripts[1]


def test_hostile_text_in_a_picture_is_text() -> None:
    def draw(axes: Any) -> None:
        one = Estimate(1.0, 0.5, 1.5)
        return scatter(axes, [Point(HOSTILE, one, one)], Style((HOSTILE,)), HOSTILE, "$\\frac{")  # type: ignore[return-value]

    drawn = Parsed(svg(Panel("", draw), "picture"))
    assert not {"script", "img"} & {tag for tag, _ in drawn.elements}


def test_names_in_a_picture_do_not_lie_on_each_other() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3, 3.1))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = ("gated", "rkl", "fkl", "rewrite_only", "gate_only")
    points = [Point(k, Estimate(1 + i / 100, 0.9, 1.2), Estimate(2, 1.8, 2.3)) for i, k in enumerate(names)]
    place = scatter(axes, points, Style(names), "x", "y")
    figure.draw_without_rendering()
    place()
    boxes = [t.get_window_extent() for t in axes.texts]
    frame = axes.get_window_extent()
    assert len(boxes) == 5
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_every_claim_has_a_measure() -> None:
    assert {c.key for c in CLAIMS} - {"hardest"} <= set(MEASURES)
