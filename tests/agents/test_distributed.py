"""Several processes end at the weights of one, whether each holds the whole student or a shard of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from agents.distributed import ProcessGroup, init_distributed
from distill_env.models.causal_lm import CausalLM
from experiments.running.flags import parse
from experiments.running.lifecycle import run_as_main_process
from tests.helpers.paths import REPOSITORY
from tests.helpers.sharded_runs import fresh_student, train

SMALL = ["--batch-size", 5, "--eval-prompts", 2, "--eval-samples", 2, "--threads", 1]
FLAGS = ["--env", "categorical", *SMALL]
SUMS = ["--env", "sums", *SMALL, "--micro-batch", 2, "--warm-start", 0, "--max-new-tokens", 12, "--checkpoint-every", 1]
KINDS = ("plain", "tied", "bfloat16")


@pytest.mark.parametrize(("size", "count"), [(5, 2), (8, 3), (7, 7), (64, 4)])
def test_the_parts_of_a_batch_are_all_of_it_in_order(size: int, count: int) -> None:
    parts = [range(size)[ProcessGroup(i, count).local_slice(size)] for i in range(count)]
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("micro", [0, 1, 2, 3, 9])
@pytest.mark.parametrize(("size", "count"), [(5, 2), (8, 3), (7, 7), (64, 4)])
def test_with_the_extra_passes_all_processes_make_equally_many(size: int, count: int, micro: int) -> None:
    all_passes = []
    for i in range(count):
        processes = ProcessGroup(i, count, mesh="some")
        own = len(range(size)[processes.local_slice(size)])
        passes = len(range(0, own, micro or own))
        assert ProcessGroup(i, count).extra_passes(size, passes, micro) == 0
        all_passes.append(passes + processes.extra_passes(size, passes, micro))
        assert passes <= all_passes[-1] <= passes + 1
    assert len(set(all_passes)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FSDP_OFFLOAD_PARAMS", "true"),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
    ],
)
def test_settings_of_accelerate_without_effect_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    pytest.importorskip("accelerate")
    for variable, setting in (("WORLD_SIZE", "2"), ("ACCELERATE_USE_FSDP", "true"), (name, value)):
        monkeypatch.setenv(variable, setting)
    with pytest.raises(ValueError, match=f"^{name.lower().removeprefix('accelerate_')}: '{value}'"):
        init_distributed()


@pytest.mark.parametrize("flags", [["--env", "categorical"], ["--lora-rank", "2", "--env", "lm"]])
def test_students_that_cannot_be_sharded_are_refused(tmp_path: Path, flags: list[str]) -> None:
    config = parse([*flags, "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"with --use_fsdp; "):
        run_as_main_process(config, Console(quiet=True), ProcessGroup(0, 2, mesh="some"))


def test_the_end_may_be_told_to_processes_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have raised the error that the main process is about to print; another iteration would need them."""

    def closed(*_: object) -> None:
        raise RuntimeError("connection closed")

    monkeypatch.setattr(ProcessGroup, "broadcast", closed)
    processes = ProcessGroup(0, 2)
    processes.continue_or_stop(False)
    with pytest.raises(RuntimeError):
        processes.continue_or_stop()


@pytest.fixture
def mesh() -> Iterator[Any]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["tied", "gpt2", "qwen2"])
def test_in_one_shard_a_student_learns_and_is_saved_as_without(tmp_path: Path, mesh: Any, kind: str) -> None:
    train(tmp_path / "alone", iterations=2, kind=kind)
    train(tmp_path / "sharded", ProcessGroup(mesh=mesh), iterations=2, kind=kind)
    same(tmp_path / "sharded", tmp_path / "alone")
    logits_of(tmp_path / "sharded/student")


def launch(processes: int, *how: object, script: str = "experiments/run.py") -> list[str]:
    """The command that starts so many processes, which without a GPU talk over gloo."""
    if processes == 1:
        return [sys.executable, str(REPOSITORY / script)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    alone = [] if "--num_machines" in how else ["--num_machines", 1, "--main_process_port", 0]
    return [str(x) for x in (*command, *alone, *(how or ["--multi_gpu"]), REPOSITORY / script)]


def run(command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    # processes that are out of step wait for each other
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=900
    )


def table(folder: Path) -> torch.Tensor:
    return next(v for k, v in load_file(folder / "student/table.safetensors").items() if v.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["gated", "budget"])
def test_two_processes_end_at_the_weights_of_one_and_resume_as_one(tmp_path: Path, agent: str) -> None:
    pytest.importorskip("accelerate")
    where = [*FLAGS, "--agent", agent, "--out", tmp_path]
    for processes in (1, 2):
        done = run(launch(processes), *where, "--name", processes, "--iterations", 6)
        assert done.returncode == 0, done.stderr
    assert run(launch(2), *where, "--name", "resumed", "--iterations", 3).returncode == 0
    assert run(launch(1), *where, "--name", "resumed", "--iterations", 6, "--resume").returncode == 0
    one = table(tmp_path / "1")
    assert one.abs().max() > 0.05  # it has learned something
    for name in ("2", "resumed"):
        torch.testing.assert_close(table(tmp_path / name), one, rtol=0, atol=1e-9)
    training = [json.loads((tmp_path / name / "evaluation.json").read_text())["training"] for name in ("1", "2")]
    for key in ("tokens", "student_tokens", "teacher_tokens", "rewritten_share_last", "grad_norm", "hard_share_first"):
        assert training[0][key] == pytest.approx(training[1][key], rel=1e-9), key


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_one_error(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    done = run(launch(2), *FLAGS, "--agent", "ppo", "--out", tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("agent: 'ppo' with 2 processes") == 1
    done = run(launch(2), *FLAGS, "--agent", "gated", "--gamma", "1", "--out", tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("importance_weights: with 2 processes") == 1
    done = run(launch(2, "--use_fsdp", "--fsdp_offload_params", "true"), *FLAGS, "--out", tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("fsdp_offload_params: 'true'") == 1


@pytest.mark.slow
def test_two_nodes_end_at_the_weights_of_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    where = [*FLAGS, "--agent", "gated", "--out", tmp_path, "--iterations", 4]
    assert run(launch(1), *where, "--name", "one").returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = ["--main_process_ip", "127.0.0.1", "--main_process_port", free.getsockname()[1]]
    nodes = [launch(2, "--multi_gpu", "--num_machines", 2, "--machine_rank", i, *at) for i in (0, 1)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    arguments = [*map(str, where), "--name", "two"]
    other = subprocess.Popen([*nodes[1], *arguments], env=environment)
    first = run(nodes[0], *where, "--name", "two")
    assert other.wait() == 0
    assert first.returncode == 0, first.stderr
    torch.testing.assert_close(table(tmp_path / "two"), table(tmp_path / "one"), rtol=0, atol=1e-12)


def same(folder: Path, other: Path, atol: float = 1e-12, files: int = 3) -> None:
    """Two runs ended at the same student and optimiser."""
    for file in ("student/model", "agent/student/model", "agent/optimizer")[:files]:
        found, expected = (load_file(root / f"{file}.safetensors") for root in (folder, other))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=atol, msg=lambda text, k=key: f"{k}: {text}")


def logits_of(folder: Path) -> torch.Tensor:
    """Of plain Transformers; the student that `CausalLM` reads has to agree."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, 4, 5]])).logits
    own = CausalLM.load(folder, dtype="float64").start([[1, 2, 3, 4, 5]])
    torch.testing.assert_close(logits[:, -1].log_softmax(-1), own, rtol=0, atol=1e-12)
    return logits


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one/<name>` of a process alone, `two/<name>` of two that share a student."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("sharded")
    for kind in KINDS:
        train(folder / "one" / kind, iterations=1 if kind == "bfloat16" else 6, kind=kind)
    train(folder / "one/half", iterations=3)
    runs: dict[str, dict[str, Any]] = {
        kind: {"kind": kind, "iterations": 1 if kind == "bfloat16" else 6} for kind in KINDS
    }
    runs |= {"half": {"iterations": 3}, "resumed": {"iterations": 3, "start": str(folder / "one/half/agent")}}
    (folder / "two").mkdir()
    done = run(launch(2, "--use_fsdp", script="tests/helpers/sharded_runs.py"), folder / "two", json.dumps(runs))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_shards_end_at_the_weights_of_one_process(sharded: Path, kind: str) -> None:
    # in bfloat16 gradients are rounded before they are summed, and AdamW's first step is as large as the step size
    same(sharded / "two" / kind, sharded / "one" / kind, 2e-3 if kind == "bfloat16" else 1e-12)
    one, two = (json.loads((sharded / n / kind / "metrics.json").read_text()) for n in ("one", "two"))
    assert 0 < one[0]["rollout/rewritten_share"] < 1  # both write
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            # what drafting costs depends on who shares the rows
            if not key.startswith(("time/", "cost/")) or key == "cost/teacher_tokens":
                rounding = 1e-2 if kind == "bfloat16" else 1e-11
                assert ours[key] == pytest.approx(theirs[key], rel=rounding, abs=rounding), key


@pytest.mark.slow
def test_a_saved_student_of_two_shards_is_a_plain_one(sharded: Path) -> None:
    two, one = (logits_of(sharded / n / "plain/student") for n in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-10)
    before = fresh_student("plain").model(torch.tensor([[1, 2, 3, 4, 5]])).logits
    assert (one - before).abs().max() > 1e-3  # it has learned something


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_shards(sharded: Path, tmp_path: Path) -> None:
    same(sharded / "two/resumed", sharded / "one/plain")
    train(tmp_path / "resumed", iterations=3, start=str(sharded / "two/half/agent"))
    same(tmp_path / "resumed", sharded / "one/plain")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_process_holds_half_of_a_sharded_student(sharded: Path, kind: str) -> None:
    whole = json.loads((sharded / "one" / f"{kind}-0.json").read_text())
    shares = [json.loads((sharded / "two" / f"{kind}-{i}.json").read_text()) for i in (0, 1)]
    for key in ("in an update", "state"):
        assert sum(share[key] for share in shares) == whole[key]
        assert all(0.45 < share[key] / whole[key] < 0.55 for share in shares)
    assert all(share["at rollout"] == whole["at rollout"] for share in shares)


@pytest.mark.slow
def test_a_sharded_run_of_the_command_line_resumes_unsharded(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    where = [*SUMS, "--out", tmp_path]
    stages = [(launch(2, "--use_fsdp"), 2), (launch(2), 3), (launch(2, "--use_fsdp"), 4)]
    for command, iterations in stages:
        more = ["--resume"] if iterations > 2 else []
        done = run(command, *where, "--name", "stages", "--iterations", iterations, *more)
        assert done.returncode == 0, done.stderr
    assert run(launch(1), *where, "--name", "one", "--iterations", 4).returncode == 0
    same(tmp_path / "stages", tmp_path / "one", 1e-6, files=1)  # float32
    measured = [json.loads((tmp_path / n / "evaluation.json").read_text())["after"] for n in ("stages", "one")]
    assert measured[0]["divergence"] == pytest.approx(measured[1]["divergence"], rel=1e-5)
