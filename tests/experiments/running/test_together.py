"""Runs that are trained together: each is the one that it is by itself, with the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from experiments.comparing.grid import Contender, Job, run_stack, stacks
from experiments.running.config import RunConfig
from experiments.running.flags import parse
from experiments.running.lifecycle import run
from experiments.running.run_folder import read_json, read_metrics
from experiments.running.together import can_run_together, run_together

FLAGS = ["--env", "sums", "--warm-start", "0", "--batch-size", "8", "--iterations", "2", "--validate-every", "2"]
SMALL = ["--student-width", "8", "--student-layers", "1", "--eval-prompts", "2", "--eval-samples", "2"]
QUIET = Console(quiet=True)


def config(out: Path, seed: int, *more: str) -> RunConfig:
    name = f"s{seed}"
    return parse([*FLAGS, *SMALL, "--agent", "gated", "--out", str(out), "--name", name, "--seed", str(seed), *more])


def job(seed: int, agent: str = "gated") -> Job:
    return Job("main", "sums", "none", Contender(agent, agent), seed)


def files(folder: Path) -> set[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {"events" if name.startswith("events.out") else name for name in names}


def test_each_run_is_the_one_that_it_is_by_itself(tmp_path: Path) -> None:
    seeds = (0, 1)
    run_together([config(tmp_path / "together", seed) for seed in seeds], [QUIET] * len(seeds))
    for seed in seeds:
        alone = config(tmp_path / "alone", seed)
        run(alone, QUIET)
        mine, its = alone.folder, tmp_path / "together" / alone.name
        assert files(its) == files(mine)
        weights, others = (load_file(folder / "student/model.safetensors") for folder in (mine, its))
        for name, weight in weights.items():
            torch.testing.assert_close(others[name], weight, atol=1e-5, rtol=0)  # float32
        for row, other in zip(read_metrics(mine), read_metrics(its), strict=True):
            assert row.keys() == other.keys()
            same = [key for key in row if not key.startswith(("time/", "cost/"))]
            assert {k: other[k] for k in same} == pytest.approx({k: row[k] for k in same}, rel=1e-3, abs=1e-4)
        results = [read_json(folder / "evaluation.json") for folder in (mine, its)]
        assert results[1]["after"] == pytest.approx(results[0]["after"], rel=1e-3, abs=1e-4)
        assert results[1]["training"].keys() == results[0]["training"].keys()


def test_what_cannot_run_together(tmp_path: Path) -> None:
    """Runs that differ in more than their seeds, that follow a budget or a limit, or that are resumed."""
    first = config(tmp_path, 0)
    assert can_run_together([first, config(tmp_path, 1)])
    assert not can_run_together([first, config(tmp_path, 1, "--tau", "2")])
    for more in (["--budget", "0.1"], ["--teacher-writes", "matched"], ["--limit", "100"], ["--micro-batch", "4"]):
        assert not can_run_together([config(tmp_path, seed, *more) for seed in (0, 1)])


def test_stacks_hold_the_seeds_of_a_contender(tmp_path: Path) -> None:
    """At most so many, and never a run that was interrupted, which is resumed by itself."""
    (tmp_path / job(1).name).mkdir()
    (tmp_path / job(1).name / "config.json").touch()
    jobs = [job(seed, agent) for seed in range(4) for agent in ("gated", "rkl")]
    stacked = stacks(jobs, tmp_path, 3)
    assert sorted(sum(stacked, ()), key=str) == sorted(jobs, key=str)
    assert {tuple(j.seed for j in s if j.contender.agent == "gated") for s in stacked} == {(0, 2, 3), (1,), ()}
    assert {tuple(j.seed for j in s if j.contender.agent == "rkl") for s in stacked} == {(0, 1, 2), (3,), ()}


def test_a_stack_that_is_none_runs_one_by_one(tmp_path: Path) -> None:
    """A failing job stops no other of its stack."""
    jobs = [Job("main", "categorical", "none", Contender("rkl", "rkl"), seed) for seed in (0, 1)]
    (tmp_path / jobs[0].name).write_text("in the way")
    with pytest.raises((ValueError, OSError)):
        run_stack(jobs, tmp_path, ["--iterations", "1", "--eval-prompts", "2", "--eval-samples", "1"])
    assert "after" in read_json(tmp_path / jobs[1].name / "evaluation.json")
