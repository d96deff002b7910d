"""Several processes end where one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.ranks import Ranks

ROOT = Path(__file__).parents[1]
FLAGS = ["--env", "categorical", "--batch-size", "5", "--eval-prompts", "2", "--eval-samples", "2", "--threads", "1"]


@pytest.mark.parametrize(("size", "count"), [(5, 2), (8, 3), (7, 7), (64, 4)])
def test_the_parts_of_a_batch_are_all_of_it_in_order(size: int, count: int) -> None:
    parts = [range(size)[Ranks(i, count).part(size)] for i in range(count)]
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def run(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    # --multi_gpu is its way to start several processes, which without a GPU talk over gloo
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / "experiments/run.py"), *FLAGS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)


def table(folder: Path) -> torch.Tensor:
    return next(v for k, v in load_file(folder / "student/table.safetensors").items() if v.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["gated", "budget"])
def test_two_processes_end_at_the_weights_of_one_and_resume_as_one(tmp_path: Path, agent: str) -> None:
    pytest.importorskip("accelerate")
    where = ["--agent", agent, "--out", tmp_path]
    for processes in (1, 2):
        done = run(processes, *where, "--name", processes, "--iterations", 6)
        assert done.returncode == 0, done.stderr
    assert run(2, *where, "--name", "resumed", "--iterations", 3).returncode == 0
    assert run(1, *where, "--name", "resumed", "--iterations", 6, "--resume").returncode == 0
    one = table(tmp_path / "1")
    assert one.abs().max() > 0.05  # it has learned something
    for name in ("2", "resumed"):
        torch.testing.assert_close(table(tmp_path / name), one, rtol=0, atol=1e-9)
    training = [json.loads((tmp_path / name / "evaluation.json").read_text())["training"] for name in ("1", "2")]
    for key in ("tokens", "student_tokens", "teacher_tokens", "rewritten_share_last", "grad_norm", "hard_share_first"):
        assert training[0][key] == pytest.approx(training[1][key], rel=1e-9), key


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_told_once(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    done = run(2, "--agent", "ppo", "--out", tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("agent: 'ppo' with 2 processes") == 1
    done = run(2, "--agent", "gated", "--gamma", "1", "--out", tmp_path)
    assert done.returncode != 0
    assert "with 2 processes accepted" in done.stderr
