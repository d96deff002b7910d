"""Grids of runs: each run as by itself, finished ones skipped, failures reported, results joined."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from experiments.comparing.grid import Contender, GridConfig, Job, check_jobs, load_results, run_jobs
from experiments.comparing.pool import for_each
from experiments.comparing.results_file import read_results, write_results
from experiments.comparing.studies import studies
from experiments.comparing.tables import paired_table, write_summary
from experiments.running.flags import parse
from experiments.running.lifecycle import run
from tests.helpers.paths import HELPERS

FLAGS = ["--iterations", "3", "--eval-prompts", "2", "--eval-samples", "2"]
QUIET = Console(quiet=True)


def job(text: str, seed: int = 0) -> Job:
    return Job("main", "categorical", "none", Contender.read(text), seed)


def run_all(jobs: list[Job], out: Path, told: list[int] | None = None) -> list[Job]:
    counted = [] if told is None else told
    return run_jobs(jobs, out, FLAGS, 2, QUIET, lambda: counted.append(len(load_results(jobs, out))))


def test_a_contender_is_a_method_or_a_label_with_an_agent_and_flags() -> None:
    assert Contender.read("gated") == Contender("gated", "gated")
    assert Contender.read("very loose=gated --tau 1") == Contender("very loose", "gated", ("--tau", "1"))


def test_runs_equal_those_by_hand_and_only_what_is_not_finished_is_run_again(tmp_path: Path) -> None:
    """A failing run stops no other, an interrupted one goes on, and a finished one is left alone."""
    out = tmp_path / "grid"
    finished, failing, other = jobs = [job("rkl", 1), job("nowhere:Agent"), job("loose=gated --tau 1")]
    run(parse(finished.arguments(out, FLAGS)), QUIET)
    path, before = out / finished.name / "evaluation.json", (out / finished.name / "evaluation.json").stat().st_mtime_ns
    told: list[int] = []
    assert run_all(jobs, out, told) == [failing]
    assert len(told) == 2
    assert told[-1] == 2
    assert path.stat().st_mtime_ns == before
    run(parse(other.arguments(tmp_path / "hand", FLAGS)), QUIET)
    by_grid, by_hand = (load_file(root / other.name / "student/table.safetensors") for root in (out, tmp_path / "hand"))
    assert all(bool((by_grid[k] == by_hand[k]).all()) for k in by_hand)
    path = out / other.name / "evaluation.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({k: whole[k] for k in ("before", "seconds")}))  # as if killed before its evaluation
    assert run_all([finished, other], out) == []
    assert json.loads(path.read_text())["after"] == whole["after"]
    assert [row["label"] for row in load_results(jobs, out)] == ["rkl", "loose"]


@pytest.mark.slow
def test_a_run_whose_worker_dies_is_tried_again_and_then_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os\n"
        "class Agent:\n"
        "    def __init__(self, env, seed):\n"
        "        with open('tries', 'a') as file:\n"
        "            file.write('x')\n"
        "        os._exit(1)\n"
        "    learn = act = save = load = print\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as a command does
    jobs = [job("deadly:Agent"), job("gated")]
    assert run_all(jobs, tmp_path / "out") == jobs[:1]
    assert (tmp_path / "tries").read_text() == "xx"
    assert [row["label"] for row in load_results(jobs, tmp_path / "out")] == ["gated"]


def end_or_die(item: str, folder: Path) -> None:
    """`die` leaves a mark and dies, the first time when the pipe is opened for writing."""
    if item == "die":
        with (folder / "tries").open("a") as file:
            first = file.tell() == 0
            file.write("x")
        if first:
            (folder / "pipe").open().close()
        os._exit(1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes")
def test_what_dies_of_an_interrupt_is_not_tried_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def interrupted(*_: object) -> None:
        (tmp_path / "pipe").open("w").close()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for_each(partial(end_or_die, folder=tmp_path), ["end", "die"], 2, "local", interrupted)
    assert (tmp_path / "tries").read_text() == "x"


def test_mistakes_are_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^agents: .*'gated'"):
        check_jobs([job("gated"), job("gated=gated --tau 1")], tmp_path, FLAGS)
    with pytest.raises(ValueError, match=r"^agents: .*'gated' and 'ours'"):
        check_jobs([job("gated"), job("ours=gated")], tmp_path, FLAGS)
    with pytest.raises(ValueError, match=r"loose: .*tau"):
        check_jobs([job("loose=gated --tau -1")], tmp_path, FLAGS)
    run(parse(job("gated").arguments(tmp_path, FLAGS)), QUIET)
    check_jobs([job("gated")], tmp_path, FLAGS)
    with pytest.raises(ValueError, match=r"^out: .*iterations"):
        check_jobs([job("gated")], tmp_path, ["--iterations", "4", *FLAGS[2:]])


def test_results_are_joined_by_run_and_study(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write_results([{"study": "a", "run": "x", "seed": 0, "correct_chains": 0.1}], path)
    write_results([{"study": "a", "run": "y", "seed": 1, "entropy": 2.0}], path)
    write_results([{"study": "a", "run": "x", "seed": 0, "correct_chains": 0.5}], path)
    assert read_results(path) == [
        {"study": "a", "run": "x", "seed": 0, "correct_chains": 0.5},
        {"study": "a", "run": "y", "seed": 1, "entropy": 2.0},
    ]


def test_language_models_have_no_warm_start_of_small_tasks(tmp_path: Path) -> None:
    config = GridConfig(seeds=(0,), envs=("sums", "lm"), warm=("weak", "strong"))
    jobs = config.grid("main", [Contender.read("rkl")])
    assert [(job.env, job.warm) for job in jobs] == [("sums", "weak"), ("sums", "strong"), ("lm", "none")]
    pair = ["--teacher", "t", "--student", "s", "--warm-start", "sft:7"]
    assert parse(jobs[-1].arguments(tmp_path, pair)).training.warm_updates == 7


def test_the_paired_table_compares_by_seed(tmp_path: Path) -> None:
    rows = [
        {"study": "main", "env": "sums", "warm": "weak", "label": label, "seed": seed, "correct_chains": value}
        for label, numbers in (("rkl", (0.5, 0.6, 0.9)), ("gated", (0.6, 0.7, 1.0)))
        for seed, value in enumerate(numbers)
    ]
    (head, line) = paired_table(rows, ["rkl", "gated"], "rkl")
    assert head[0] == "minus rkl"
    # always ten points better; three pairs have eight signs, of which two are as extreme; in six of nine pairs larger
    assert line == ["gated", "+10.0", "0.250", "0.250", line[4], "3"]
    assert line[4].startswith("0.72")  # 5 wins, one tie at 0.6, one tie at... see P(X > Y) + half of ties: 6.5 / 9
    write_summary(rows, ["rkl", "gated"], "rkl", tmp_path, QUIET)
    assert "| gated | +10.0 | 0.250 |" in (tmp_path / "summary-main.md").read_text()


def test_every_study_of_the_ablation_parses_and_has_labels_of_its_own(tmp_path: Path) -> None:
    """A flag is parsed with one value for each agent: parsing is slow."""
    checked: set[tuple[str, tuple[str, ...]]] = set()
    for name, contenders in studies().items():
        assert len({c.label for c in contenders}) == len({(c.agent, c.flags) for c in contenders}) == len(contenders)
        kinds = {(c.agent, c.flags[::2]): c for c in contenders}
        check_jobs([Job(name, "sums", "weak", c, 0) for k, c in kinds.items() if k not in checked], tmp_path, FLAGS)
        checked |= set(kinds)


def test_seeds_come_first_so_that_partial_results_can_be_compared() -> None:
    config = GridConfig(seeds=(3, 4), envs=("sums", "categorical"))
    jobs = config.grid("main", [Contender.read("rkl"), Contender.read("gated")])
    assert [j.seed for j in jobs] == [3] * 4 + [4] * 4


@pytest.mark.slow
def test_ray_runs_the_grid_as_local_processes_do_and_runs_again_what_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    theirs = (HELPERS / "plugin_agent.py").read_text()
    (tmp_path / "flaky.py").write_text(
        theirs + "\n\nimport os\n"
        "class Flaky(Frequencies):\n"
        "    def __init__(self, env, seed):\n"
        "        if not Path('tried').exists():\n"
        "            Path('tried').touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        super().__init__(env, seed)\n"
    )
    jobs = [job("gated"), job("rkl", 1), job("nowhere:Agent"), job("flaky:Flaky")]
    failed = run_jobs(jobs, tmp_path / "ray", FLAGS, 2, QUIET, lambda: None, "ray")
    assert failed == [jobs[2]]
    assert (tmp_path / "tried").exists()
    assert run_all(jobs[:2], tmp_path / "local") == []
    for one in jobs[:2]:
        here, there = (
            load_file(tmp_path / where / one.name / "student/table.safetensors") for where in ("local", "ray")
        )
        assert all(bool((here[k] == there[k]).all()) for k in here)
    assert len(load_results(jobs, tmp_path / "ray")) == 3
