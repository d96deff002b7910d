"""Environments and tasks of somebody's own in a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import run as run_module
from experiments.running.build import make_env
from experiments.running.flags import parse
from tests.helpers.tiny_models import flags, write_model

OWN = "tests.helpers.own_environment"


@pytest.mark.parametrize("agent", ["gated", "ppo"])
def test_an_environment_of_ones_own_trains(agent: str, tmp_path: Path) -> None:
    """It is evaluated by its own grades, which rise."""
    arguments = ["--agent", agent, "--env", f"{OWN}:Own/Echo-v0", "--iterations", "30", "--out", str(tmp_path)]
    assert run_module.main([*arguments, "--name", "own", "--validate-every", "100"]) == 0
    evaluation = json.loads((tmp_path / "own" / "evaluation.json").read_text())
    assert evaluation["after"]["correct_chains"] > evaluation["before"]["correct_chains"] + 0.1


def test_it_is_made_as_it_is_registered_but_for_the_flags() -> None:
    config = parse(["--env", f"{OWN}:Own/Echo-v0", "--rewrite-cost", "0.25"])
    env = make_env(config, "train", 2, purpose="train")
    assert (type(env.task).__name__, env.task_reward, env.rewrite_cost) == ("Echo", 2.0, 0.25)


@pytest.mark.parametrize(
    "name", ["nothing", f"{OWN}:Own/Other-v0", "no_such_module:Own/Echo-v0", "gymnasium:CartPole-v1"]
)
def test_other_environments_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=r"^env: ") as error:
        make_env(parse(["--env", name]), "train", 2, purpose="train")
    assert "\n" not in str(error.value)


def test_a_task_of_ones_own_trains_language_models(tmp_path: Path) -> None:
    teacher, student = (write_model(tmp_path / name, seed) for seed, name in enumerate(("teacher", "student")))
    arguments = [*flags(teacher, student, "", "--task", f"{OWN}:FirstToken"), "--iterations", "2"]
    assert run_module.main([*arguments, "--out", str(tmp_path), "--name", "own", "--threads", "1"]) == 0
    assert 0 <= json.loads((tmp_path / "own" / "evaluation.json").read_text())["after"]["accuracy"] <= 1
