"""PPO and A2C at their defaults improve the warm student of both small tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import run as run_module


@pytest.mark.slow
@pytest.mark.parametrize("env", ["sums", "coins"])
@pytest.mark.parametrize("agent", ["ppo", "a2c"])
def test_the_student_is_better_after_training(agent: str, env: str, tmp_path: Path) -> None:
    """By 2 points of correct chains and more, of 1,600 completions before and after; no alarm says it is ruined."""
    flags = ["--agent", agent, "--env", env, "--iterations", "50", "--threads", "1", "--out", str(tmp_path)]
    assert run_module.main([*flags, "--name", "run", "--validate-every", "10"]) == 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["after"]["correct_chains"] > evaluation["before"]["correct_chains"] + 0.02
    alarms = tmp_path / "run" / "alarms.log"
    assert not alarms.exists() or "ruined" not in alarms.read_text()
