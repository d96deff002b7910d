"""Runs beside one another: every number where it belongs, and no answer's text taken for markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments import side_by_side as command
from experiments.comparing.side_by_side import side_by_side
from experiments.running import completions_file as answers
from experiments.running.flags import parse
from experiments.running.lifecycle import run

QUIET = Console(quiet=True)
FLAGS = ["--env", "categorical", "--iterations", "2", "--eval-prompts", "2", "--eval-samples", "2", "--track", "none"]


def test_every_column_is_its_runs_evaluation_and_hostile_answers_are_text(tmp_path: Path) -> None:
    for agent in ("gated", "rkl"):
        run(parse([*FLAGS, "--agent", agent, "--name", agent, "--out", str(tmp_path)]), QUIET)
        hostile = {"prompt": "p|q", "completion": f"<script>| **{agent}**\n# no", "writer": "student"}
        teacher = {"prompt": "p|q", "completion": "right", "writer": "teacher"}
        answers.write_lines(tmp_path / agent / answers.FILE, [hostile, teacher])
    text = side_by_side((tmp_path / "gated", tmp_path / "rkl"), 10)
    head, _, *lines = (line.strip("| ").split(" | ") for line in text.split("\n\n")[0].splitlines())
    assert head[-2:] == ["gated", "rkl"]
    found = {line[0]: line[-2:] for line in lines}
    evaluated = [json.loads((tmp_path / a / "evaluation.json").read_text()) for a in ("gated", "rkl")]
    assert found["entropy, nats per token"] == [f"{e['after']['entropy']:.3f}" for e in evaluated]
    assert found["training tokens"] == [f"{e['training']['tokens']:,.0f}" for e in evaluated]
    assert r"**p\|q**" in text
    assert r"| `rkl` | \<script\>\| \*\*rkl\*\* \# no |" in text
    assert text.count("| `teacher` | right |") == 1


def test_what_is_no_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "run" in line
