"""The report: its numbers are those of the statistics, its words follow them, and hostile text in it is inert."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from experiments import report
from experiments.comparing.results_file import ENDPOINT
from experiments.comparing.statistics import Estimate, holm, interquartile_mean, paired_difference
from experiments.reporting import pictures, tables
from experiments.reporting.answer import answer
from experiments.reporting.claims import CLAIMS, findings, judge, primary_comparisons, secondary_comparisons
from experiments.reporting.crossed import ALL, crossed
from experiments.reporting.drawing import INK, MUTED, Panel, Style, svg
from experiments.reporting.figures import scatter
from experiments.reporting.material import Material
from experiments.reporting.page import Page, Picture, Section, Viewer, inline, plain, to_html
from experiments.reporting.results import BEFORE, Results, Setting, load_results
from experiments.reporting.sections import SECTIONS, heading
from experiments.reporting.training_curves import Curves
from experiments.running.metric_display import METRICS, metric
from tests.helpers.comparisons import LABELS, random_rows, write_comparison
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


def test_estimates_are_those_of_the_statistics(tmp_path: Path) -> None:
    results = results_of(tmp_path, settings=[("sums", "weak"), ("coins", "weak")], seeds=5)
    rows = [r for r in results.rows if r["env"] == "sums" and r["label"] == "gated"]
    assert results.estimate(SUMS, "gated", "entropy") == interquartile_mean([r["entropy"] for r in rows])
    kept = [r["ood/correct_chains"] / r[ENDPOINT] for r in rows]
    estimate = results.estimate(SUMS, "gated", "retention")
    assert estimate is not None
    assert estimate.value == pytest.approx(interquartile_mean(kept).value)
    certain = made_results(gated=[1.0, 0.9, 1.0]).estimate(SUMS, "gated", ENDPOINT)
    assert certain is not None
    assert certain.high == 1 < interquartile_mean([1.0, 0.9, 1.0]).high  # no share is above 1


def test_seeds_are_paired_whatever_their_order_and_only_those_of_both() -> None:
    results = made_results(gated=[0.5, 0.7, 0.9], rkl=[0.4, 0.5, 0.6])
    results.rows = [r for r in reversed(results.rows) if (r["label"], r["seed"]) != ("rkl", 1)]
    assert results.difference(SUMS, "gated", "rkl", ENDPOINT) == paired_difference([0.5, 0.9], [0.4, 0.6])


def test_families_of_holm(tmp_path: Path) -> None:
    """All primary comparisons together; of the others the tasks of each contender."""
    results = results_of(tmp_path, settings=[("sums", "weak"), ("sums", "strong"), ("coins", "weak")], seeds=5)
    tests = primary_comparisons(results)
    assert [(*c.setting, c.baseline) for c in tests] == [
        (env, "weak", baseline) for env in ("sums", "coins") for baseline in ("rkl", "fkl", "rewrite_only")
    ]
    p_values = {str(i): c.difference.p_value for i, c in enumerate(tests)}
    assert [c.adjusted for c in tests] == list(holm(p_values).values())
    others = secondary_comparisons(results, "rkl")
    for label in ("gated", "fkl", "rewrite_only"):
        mine = {c.setting.env: c for c in others if c.label == label}
        assert {env: c.adjusted for env, c in mine.items()} == holm({e: c.difference.p_value for e, c in mine.items()})


def test_methods_that_ran_as_cells_or_rivals_are_contenders(tmp_path: Path) -> None:
    """Unless the main study has them itself."""
    cells = random_rows(
        labels=("gated prefix, gated", "student prefix, reverse", "random prefix, gated"), study="two_by_two"
    )
    rows = [*random_rows(labels=("rkl", "fkl")), *cells, *random_rows(labels=("gkd", "fkl"), study="rivals")]
    write_comparison(tmp_path, rows)
    results = Results(load_results(tmp_path))
    assert results.labels() == ["gated", "rkl", "fkl", "gkd"]
    ran = {r["seed"]: r[ENDPOINT] for r in cells if r["label"] == "gated prefix, gated"}
    assert results.by_seed(SUMS, "gated", ENDPOINT) == pytest.approx(ran)
    own = {r["seed"]: r[ENDPOINT] for r in rows if r["label"] == "rkl"}
    assert results.by_seed(SUMS, "rkl", ENDPOINT) == pytest.approx(own)
    assert Results(load_results(tmp_path, ["main", "two_by_two"])).labels() == ["gated", "rkl", "fkl"]


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ([(0.1, 0.2), (0.3, 0.4)], "yes"),
        ([(0.1, 0.2), (-0.1, 0.4)], "undecided"),
        ([(-0.1, 0.2), (-0.4, -0.3)], "no"),
        ([(0.1, 0.2), (np.nan, np.nan)], "undecided"),
        ([], "undecided"),
    ],
)
def test_verdicts(bounds: list[tuple[float, float]], verdict: str) -> None:
    assert judge(Estimate((low + high) / 2, low, high) for low, high in bounds) == verdict


def test_claims_are_judged_by_their_direction() -> None:
    """Entropy: between, whichever is the lower; oscillation: less was expected."""

    def verdicts(**levels: tuple[float, float]) -> dict[str, str]:
        base = {"env": "sums", "warm": "weak", "run": "", "study": "main"}
        rows = [
            {**base, "label": k, "seed": s, "entropy": e + s / 1000, "loss_oscillation": o + s / 1000}
            for k, (e, o) in levels.items()
            for s in range(4)
        ]
        return {f.claim.key: f.verdict for f in findings(Results(rows), SUMS)}

    between = verdicts(gated=(0.3, 0.1), rkl=(0.4, 0.2), fkl=(0.2, 0.3))
    assert between == {"entropy": "yes", "loss_oscillation": "yes"}
    outside = verdicts(gated=(0.5, 0.25), rkl=(0.4, 0.2), fkl=(0.2, 0.3))
    assert outside == {"entropy": "no", "loss_oscillation": "no"}
    half_of_the_evidence = verdicts(gated=(0.3, 0.1), rkl=(0.4, 0.2))
    assert half_of_the_evidence == {"entropy": "undecided", "loss_oscillation": "undecided"}


def test_the_answer_follows_the_numbers() -> None:
    (good,) = answer(made_results(gated=[0.8, 0.81], rkl=[0.7, 0.72], fkl=[0.6, 0.61], soft=[0.9, 0.91]))
    assert "`soft` has the most correct chains, 90.5 %" in good
    assert "`gated` is at least as good as both" in good
    (worse,) = answer(made_results(gated=[0.65, 0.66], rkl=[0.7, 0.711], fkl=[0.6, 0.61]))
    assert "`gated` minus `rkl` is -5.0" in worse
    assert "`gated` is not at least as good as both" in worse
    (unknown,) = answer(made_results(gated=[0.8], rkl=[0.7], fkl=[0.6]))
    assert "may or may not" in unknown
    (missing,) = answer(made_results(gated=[0.8, 0.8], rkl=[0.7, 0.8]))
    assert "no runs of `fkl`" in missing
    (without_ours,) = answer(made_results(rkl=[0.8, 0.8], gkd=[0.7, 0.8]))
    assert "gated" not in without_ours
    assert len(answer(made_results())) == 1


def test_ungraded_tasks_are_judged_by_the_forward_kl(tmp_path: Path) -> None:
    """Less is better: in the answer, in the verdict, and in the chance that a run is better."""
    levels = {"gated": [0.2, 0.21, 0.22], "rkl": [0.4, 0.42, 0.43], "fkl": [0.3, 0.31, 0.32]}
    graded = made_results(**{label: [1.0] * 3 for label in levels})
    rows = [
        {k: v for k, v in row.items() if k != ENDPOINT} | {"forward_kl": levels[row["label"]][row["seed"]], "env": "lm"}
        for row in graded.rows
    ]
    results = Results(rows)
    setting = Setting("lm", "weak")
    assert results.endpoint(setting) == "forward_kl"
    (paragraph,) = answer(results)
    assert "`gated` has the lowest forward KL" in paragraph
    assert "0.210" in paragraph
    assert "so `gated` is at least as good as both" in paragraph
    (finding,) = findings(results, setting)
    assert (finding.key, finding.verdict) == ("forward_kl", "yes")
    assert all(c.better.value == 1 and c.difference.estimate.value < 0 for c in primary_comparisons(results))
    material = Material(results, Curves(tmp_path, results), Style(tuple(levels)))
    cells = [row for block in tables.differences(material)[1:] for row in block.rows]  # type: ignore[union-attr]
    assert all("forward KL on the teacher's completions, nats per token" in row for row in cells)
    both = Results([*rows, *graded.rows])
    assert [both.endpoint(s) for s in both.settings()] == ["forward_kl", ENDPOINT]
    assert len(answer(both)) == 2
    mixed = Material(both, Curves(tmp_path, both), Style(tuple(levels)))
    assert to_html(Page("", "", (), (), [Section("d", "", tables.differences(mixed))], mixed.style))


def test_the_colours_of_the_viewer_fit_what_was_seen() -> None:
    def run(tau: float | None, *divergences: float) -> dict[str, Any]:
        tokens = [{"d": d} for d in divergences]
        return {"tau": tau, "assisted": [{"tokens": tokens}], "alone": [{"tokens": tokens}]}

    assert pictures.colour_scale({"far": run(0.5, *[8.0] * 9)}) == 8.0
    assert pictures.colour_scale({"near": run(0.01, *[0.002] * 9)}) == 0.01
    assert pictures.colour_scale({"one": run(None, 0.0), "other": run(None, *[0.04] * 99)}) == 0.04
    assert pictures.colour_scale({"same": run(None, 0.0)}) > 0


def test_the_title_says_what_was_compared() -> None:
    assert heading(["gated", "rkl", "fkl"])[0] != heading(["gated", "rkl"])[0] == heading(["rkl", "gkd"])[0]
    assert "`rkl`" in heading(["rkl", "gkd"])[1]
    assert "gate" not in " ".join(heading(["rkl", "gkd"]))


def test_the_best_is_marked_where_its_interval_is_apart() -> None:
    def best(key: str = "accuracy", **estimates: tuple[float, float, float]) -> str:
        return tables.best_of(key, {label: Estimate(*values) for label, values in estimates.items()})

    assert best(a=(0.8, 0.7, 0.9), b=(0.5, 0.4, 0.6)) == "a"
    assert best("divergence", a=(0.8, 0.7, 0.9), b=(0.5, 0.4, 0.6)) == "b"
    assert best(a=(0.8, 0.7, 0.9), b=(0.5, 0.4, 0.75)) == ""
    assert best(a=(0.8, math.nan, math.nan), b=(0.5, 0.4, 0.6)) == ""  # one seed
    assert best(a=(0.8, 0.7, 0.9)) == ""


def test_main_effects_of_an_additive_table() -> None:
    """Cells that are prefix + loss + seed have these as their effects, on average and at every level."""
    prefixes, losses = {"student": 0.5, "gated": 0.6}, {"reverse": 0.0, "gated": -0.1, "forward": -0.2}
    rows = [
        {"env": "sums", "warm": "weak", "study": "two_by_two", "run": "", "seed": seed,
         "label": f"{p} prefix, {o}", ENDPOINT: prefixes[p] + losses[o] + seed / 50}
        for p in prefixes for o in losses for seed in range(3)
    ]  # fmt: skip
    found = crossed(Results(rows), SUMS)
    assert found is not None
    assert (found.prefixes, found.losses) == (("student", "gated"), ("reverse", "gated", "forward"))
    effects = {change: test.estimate.value for change, test in found.effects.items()}
    expected = {"gated prefix instead of student prefix": 0.1}
    expected |= {"gated loss instead of reverse loss": -0.1, "forward loss instead of reverse loss": -0.2}
    assert {change for change, _ in effects} == set(expected)
    assert next(level for change, level in effects if "prefix instead" in change) == ALL
    assert len(effects) == 4 + 3 + 3
    for (change, _), value in effects.items():
        assert value == pytest.approx(expected[change])


def test_the_methods_stand_in_for_the_crossed_study() -> None:
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


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of scripts."""

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
    write_comparison(folder, rows, curves=True)
    assert report.main(["--runs", str(folder), "--no-viewer"]) == 0
    return folder


def test_the_page_holds_everything_and_loads_nothing(written: Path) -> None:
    page = (written / "report" / "report.html").read_text()
    parsed = Parsed(page)
    sections = [a["id"] for tag, a in parsed.elements if tag == "section"]
    assert sections == [name for name, *_ in SECTIONS if name != "gate-viewer"]
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in parsed.elements:
        assert "src" not in attributes, tag
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", page)
    assert INK not in page.split("</head>")[1]  # pictures follow the page into the dark
    assert "{{" not in page


def test_page_and_markdown_show_the_same_numbers(written: Path) -> None:
    page = (written / "report" / "report.html").read_text().replace("\u00a0", " ")
    text = (written / "report" / "report.md").read_text()
    results = Results(load_results(written))
    for setting in results.settings():
        for label in (*results.labels(setting), BEFORE):
            estimate = results.estimate(setting, label, ENDPOINT)
            assert estimate is not None
            shown = estimate.shown_as(metric(ENDPOINT))
            assert f'data-value="{estimate.value!r}"' in page
            assert re.sub(r"<[^>]+>", "", page).count(shown) >= text.count(shown) >= 1
    for paragraph in answer(results):
        assert str(inline(paragraph)).replace("\u00a0", " ") in page
        assert plain(paragraph) in text
    images = re.findall(r"\]\((images/\w+\.png)\)", text)
    assert len(images) >= 8
    for name in images:
        assert (written / "report" / name).read_bytes().startswith(b"\x89PNG")
    for lines in (block.splitlines() for block in text.split("\n\n") if block.startswith("|")):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, lines[0]


@pytest.mark.parametrize(
    "chosen",
    [
        {"labels": ("gated",), "seeds": 1},
        {"labels": ("rkl", "somebody's"), "seeds": 2},
        {"labels": ("student prefix, reverse",), "study": "two_by_two"},
        {"labels": ("tau = 1",), "study": "ablation:tau"},
    ],
)
def test_any_subset_makes_a_report(chosen: dict[str, Any], tmp_path: Path) -> None:
    write_comparison(tmp_path, random_rows(**chosen))
    assert report.main(["--runs", str(tmp_path)]) == 0  # the viewer finds no run, and says so
    page = (tmp_path / "report" / "report.html").read_text()
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).split("<main>")[1].split("</main>")[0]


def test_columns_may_be_missing(tmp_path: Path) -> None:
    kept = ("env", "warm", "label", "seed", ENDPOINT)
    write_comparison(tmp_path, [{k: v for k, v in row.items() if k in kept} for row in random_rows()])
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("content", [None, "env,warm,label,seed\n", "agent,seed\ngated,0\n"])
def test_nothing_to_report_is_one_line(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "results.csv").write_text(content)
    assert report.main(["--runs", str(tmp_path)]) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: runs: ")
    assert "\n" not in message


def test_help_is_light() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'scipy.stats', 'jinja2'}"
    code = f"import sys, experiments.report; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def hostile_page() -> Page:
    """A report whose contenders, tokens and prompts are an attack."""
    tokens = [
        {"text": HOSTILE if i else "7", "d": 0.4 * i, "hard": i > 1, "rewritten": i == 2, "q": 0.5, "p": 0.25,
         "student": [[HOSTILE, 0.5], ["7", 0.25]], "teacher": [["7", 0.75], [HOSTILE, 0.25]]}
        for i in range(4)
    ]  # fmt: skip
    written = [{"correct": True, "tokens": tokens}, {"correct": None, "tokens": tokens[:1]}]
    run = {"tau": 0.5, "prompts": [HOSTILE, "2+5="], "assisted": written, "alone": written, "setting": HOSTILE}
    run |= {"seed": 0, "hard_by_position": []}
    style = Style((HOSTILE, "gated"))
    results = Results(random_rows(labels=("gated", HOSTILE, "rkl"), seeds=2))
    material = Material(results, Curves(Path(), results), style, {HOSTILE: run, "gated": run})
    made = [pictures.gate_viewer, tables.contenders, tables.differences, pictures.stability]
    sections = [Section(f"s{i}", HOSTILE, make(material)) for i, make in enumerate(made)]
    return Page(HOSTILE, HOSTILE, answer(results), [HOSTILE], sections, style)


def test_hostile_text_is_inert() -> None:
    """No element, attribute or script comes of it, and the data come back as they were."""
    page = hostile_page()
    parsed = Parsed(to_html(page))
    assert len(parsed.scripts) == 2
    assert not any(tag == "img" or name.startswith("on") for tag, a in parsed.elements for name in a)
    viewer = page.sections[0].blocks[0]
    assert isinstance(viewer, Viewer)
    assert "<" not in parsed.scripts[0]
    assert json.loads(parsed.scripts[0]) == json.loads(json.dumps(viewer.data))
    assert "innerHTML" not in parsed.scripts[1]


def test_hostile_text_in_a_picture_is_text() -> None:
    def draw(axes: Any) -> None:
        one = Estimate(1.0, 0.5, 1.5)
        scatter(axes, {HOSTILE: (one, one)}, Style((HOSTILE,)), [HOSTILE], (HOSTILE, "$\\frac{"))

    drawn = Parsed(svg(Panel("", draw), "picture"))
    assert not {"script", "img"} & {tag for tag, _ in drawn.elements}


def test_whoever_has_a_colour_in_a_picture_is_in_its_legend(tmp_path: Path) -> None:
    """Also where one setting has few contenders and another has many."""
    many = list(LABELS)
    rows = random_rows([("sums", "weak")], many, 2) + random_rows([("coins", "weak")], ("gated", "gate_only"), 2)
    results = Results(load_results(write_comparison(tmp_path, rows)))
    material = Material(results, Curves(tmp_path, results), Style(tuple(results.labels())))
    (picture,) = pictures.cost(material)
    assert isinstance(picture, Picture)
    assert set(picture.legend) == set(many)
    named, _ = material.style.legend(picture.legend)
    assert "gate_only" not in named
    for panel in picture.panels:
        axes = Figure().subplots()
        panel.draw(axes)
        drawn = {to_hex(line.get_color()) for line in axes.lines}
        assert drawn <= {to_hex(MUTED), *(to_hex(material.style[k][0]) for k in named)}
        assert to_hex(material.style["gated"][0]) in drawn


def test_every_claim_and_column_has_a_display() -> None:
    keys = {c.key for c in CLAIMS} | {*tables.QUALITY, *tables.COST}
    assert keys - {"hardest"} <= set(METRICS)


def test_displays_of_keys_with_a_k_a_difficulty_or_a_split() -> None:
    assert metric("pass@8").label == "pass@8"
    assert metric("correct_chains/5").form == metric("ood/correct_chains/7").form == "{:.1%}"
    assert "difficulty 7" in metric("ood/correct_chains/7").label
    assert metric("ood/entropy").label.endswith("out of distribution")
    assert metric("somebody's").label == "somebody's"
