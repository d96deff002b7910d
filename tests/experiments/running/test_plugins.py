"""Agents of somebody else's: their flags, what they are given, and that they write alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agents.base import Agent
from experiments import run as run_module
from experiments.running.alone import fresh_process
from experiments.running.build import make_agent, make_env, make_student
from experiments.running.config import RunConfig
from experiments.running.evaluating import evaluate_before
from experiments.running.flags import parse
from experiments.running.plugins import wants_student

AGENTS = "tests.helpers.plugin_agents"
SMALL = ["--env", "categorical", "--eval-samples", "2", "--batch-size", "8", "--iterations", "3"]


def made(name: str, *flags: str) -> tuple[RunConfig, Any]:
    config = parse(["--agent", f"{AGENTS}:{name}", *SMALL, *flags])
    env = make_env(config, "train", 8, purpose="train")
    return config, make_agent(config, make_student(config, env), env)


def write(config: RunConfig, agent: Agent) -> list[list[int]]:
    prompts = make_env(config, "test", 1, purpose="evaluate").prompts[:4]
    with fresh_process(config, agent) as write_there:
        return write_there("test", prompts, 2, 0)


def test_an_agent_writes_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As it was saved, and the same completions each time. It is not this object that writes."""
    config, agent = made("Silent")
    completions = write(config, agent)
    assert len(completions) == 4
    agent.act = None
    assert write(config, agent) == completions


@pytest.mark.parametrize("name", ["AsksForEverything", "Copies", "Remembers"])
def test_what_is_written_by_the_teacher_does_not_count(name: str) -> None:
    """REWRITE, the teacher's distribution in `info`, and a teacher that was kept from the training: all are refused in
    one line."""
    with pytest.raises(ValueError, match=r"^agent: ") as error:
        write(*made(name))
    assert "\n" not in str(error.value)


def test_parameters_of_an_agent_are_flags() -> None:
    config, agent = made("Configured", "--smoothing-steps", "7", "--mode", "slow", "--epsilon", "0.5")
    assert agent.settings == {"smoothing_steps": 7, "mode": "slow", "epsilon": 0.5}
    assert wants_student(config.agent)
    assert not wants_student(f"{AGENTS}:Silent")
    for flags in (["--smoothing-steps", "x"], ["--mode", "other"], ["--no-such-flag", "1"]):
        with pytest.raises((SystemExit, ValueError)):
            made("Configured", *flags)


@pytest.mark.parametrize("name", [f"{AGENTS}:Needy", f"{AGENTS}:NoSuchAgent", "no_such_module:Agent", f"{AGENTS}:json"])
def test_an_agent_that_cannot_be_made_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=r"^agent: ") as error:
        parse(["--agent", name, *SMALL])
    assert "\n" not in str(error.value)


def test_a_run_of_an_agent_that_calls_no_callback(tmp_path: Path) -> None:
    """It is saved and evaluated all the same."""
    assert run_module.main(["--agent", f"{AGENTS}:Silent", *SMALL, "--out", str(tmp_path), "--name", "Silent"]) == 0
    assert (tmp_path / "Silent" / "checkpoints" / "000003").is_dir()
    evaluation = json.loads((tmp_path / "Silent" / "evaluation.json").read_text())
    assert evaluation["training"]["iterations"] == 0
    assert evaluation["after"]["length"] > 0


def test_modules_beside_an_agent_and_metrics_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is imported in `learn` is found; metrics that mean something else raise no alarm; a limit on what
    the environment counts is kept."""
    (tmp_path / "beside_it.py").write_text("")
    monkeypatch.chdir(tmp_path)
    flags = ["--agent", f"{AGENTS}:ImportsLate", *SMALL, "--iterations", "40", "--out", str(tmp_path), "--name", "late"]
    assert run_module.main([*flags, "--limit", "50", "--limit-of", "teacher_positions"]) == 0
    rows = (tmp_path / "late" / "metrics.csv").read_text().splitlines()[1:]
    assert 0 < len(rows) < 40
    alarms = tmp_path / "late" / "alarms.log"
    assert not alarms.exists() or not alarms.read_text()


def test_what_an_agent_does_before_training_is_its_own(tmp_path: Path) -> None:
    """The cached evaluation of a warm student is not that of another policy, in either order."""
    folder = tmp_path / "warm"
    config, agent = made("Silent")
    agent.counts[0] = 100.0  # the student's policy is uniform
    ours = parse(["--agent", "rkl", *SMALL])
    env = make_env(ours, "train", 8, purpose="train")
    student = make_agent(ours, make_student(ours, env), env)
    quiet = Console(quiet=True)
    expected = evaluate_before(ours, student, None, quiet)
    alone = evaluate_before(config, agent, None, quiet)
    assert alone["length"] != expected["length"]
    assert evaluate_before(config, agent, folder, quiet)["length"] == alone["length"]
    assert evaluate_before(ours, student, folder, quiet)["length"] == expected["length"]
    assert evaluate_before(config, agent, folder, quiet)["length"] == alone["length"]
