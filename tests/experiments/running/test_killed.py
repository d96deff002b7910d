"""A run that was killed by SIGKILL, at any moment, and resumed ends like one that was not: bit for bit."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import REPOSITORY

TABLE = ["--env", "categorical", "--batch-size", "8"]
SUMS = ["--env", "sums", "--batch-size", "8", "--warm-start", "0.002", "--eval-prompts", "8", "--max-new-tokens", "8"]
SMALL = ["--iterations", "6", "--checkpoint-every", "2", "--eval-samples", "2", "--draft-length", "4"]


def end_of(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, without times."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]
    weights = {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("student", "checkpoints")
        for path in sorted((folder / part).rglob("*.safetensors"))
    }
    return {"before": evaluation["before"], "after": evaluation["after"], "metrics": rows, **weights}


# how many kills, and the flags of the run
CASES: dict[str, tuple[int, list[str]]] = {
    "gated": (5, [*TABLE, *SMALL]),
    "ppo": (3, [*TABLE, *SMALL[:-2], "--agent", "ppo"]),
    "gated, everywhere": (1000, [*TABLE, *SMALL]),
    "a2c": (9, [*TABLE, *SMALL[:-2], "--agent", "a2c"]),
    "sums": (6, [*SUMS, *SMALL]),
}


@pytest.mark.parametrize(
    "names", [("gated", "ppo"), pytest.param(("gated, everywhere", "a2c", "sums"), marks=pytest.mark.slow)]
)
def test_killed_and_resumed_it_ends_the_same(names: tuple[str, ...], tmp_path: Path) -> None:
    chosen = json.dumps({name: CASES[name] for name in names})
    command = [sys.executable, "-m", "tests.helpers.killed_runs", str(tmp_path), chosen]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    for name in names:
        whole = end_of(tmp_path / name / "whole")
        assert len(whole["metrics"]) == 6
        assert "checkpoints/000006/random.safetensors" in whole
        killed = [path for path in (tmp_path / name).iterdir() if path.name.isdecimal()]
        assert len(killed) >= min(CASES[name][0], 40)
        for folder in killed:
            end = end_of(folder)
            # only Stable-Baselines3 uses torch's global generator, and it seeds it anew
            assert {k for k in whole if end.get(k) != whole[k] and "random" not in k} == set(), folder
            assert end.keys() == whole.keys()
