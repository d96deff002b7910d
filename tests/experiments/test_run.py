"""The command lines: what they leave behind, that they go on where they stopped, and what they say to bad input."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file, save_file

from agents.checkpoint import checkpoints
from agents.distill import DistillAgent
from experiments import run as run_module
from experiments.running import lifecycle
from experiments.running.build import make_agent, make_env, make_student
from experiments.running.completions_file import read_lines
from experiments.running.config_file import load_config
from experiments.running.evaluating import evaluate_before
from experiments.running.flags import parse
from experiments.running.loop import LIMITS
from experiments.running.run_folder import finite
from experiments.running.summary import summarise_training
from tests.helpers.paths import HELPERS, REPOSITORY

SMALL = ["--env", "categorical", "--eval-samples", "2", "--batch-size", "8", "--validate-every", "4"]
OURS = [*SMALL, "--draft-length", "4"]  # the adaptive length follows a clock


def run(*arguments: object) -> int:
    plugged_in = any(":" in str(a) for a in arguments)
    return run_module.main([str(a) for a in (*(SMALL if plugged_in else OURS), *arguments)])


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock says."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def last(folder: Path) -> Path:
    """What the agent saved in the newest checkpoint."""
    return checkpoints(folder / "checkpoints")[0] / "agent"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six iterations."""
    out = tmp_path_factory.mktemp("runs")
    assert run("--iterations", 6, "--out", out, "--name", "whole", "--checkpoint-every", 2) == 0
    return out / "whole"


def test_a_run_leaves_everything_in_its_folder(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    expected = {"config.json", "metrics.csv", "evaluation.json", "checkpoints", "student", "curves.png", "samples.txt"}
    assert expected <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [row["iteration"] for row in metrics(finished)] == [str(i) for i in range(1, 7)]
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["after"]["divergence"] < evaluation["before"]["divergence"]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_writes_nothing(finished: Path, tmp_path: Path) -> None:
    assert run("--out", tmp_path / "runs", "--dry-run") == 0
    assert not any(tmp_path.iterdir())
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert run("--out", finished.parent, "--name", finished.name, "--resume", "--dry-run") == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
    assert run("--out", finished.parent, "--name", finished.name, "--dry-run") == 1  # the name is taken


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(finished: Path) -> None:
    assert run("--iterations", 6, "--out", finished.parent, "--name", "again") == 0
    assert run("--iterations", 6, "--out", finished.parent, "--name", "other", "--seed", 1) == 0
    assert metrics(finished.parent / "again") == metrics(finished)
    assert metrics(finished.parent / "other") != metrics(finished)


@pytest.mark.parametrize("agent", ["gated", "random_rewrite"])
def test_a_resumed_run_equals_the_uninterrupted_one(agent: str, tmp_path: Path) -> None:
    """Bit for bit: weights, optimiser, metrics."""
    assert run("--agent", agent, "--iterations", 6, "--out", tmp_path, "--name", "whole") == 0
    assert run("--agent", agent, "--iterations", 3, "--out", tmp_path, "--name", "parts") == 0
    assert run("--agent", agent, "--iterations", 6, "--out", tmp_path, "--name", "parts", "--resume") == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for name in ("student/table.safetensors", "optimizer.safetensors"):
        a, b = load_file(last(whole) / name), load_file(last(parts) / name)
        assert a.keys() == b.keys()
        assert all(bool((a[key] == b[key]).all()) for key in a), name
    skip = ("validation/",)  # the last iteration of every part is validated
    rows = [[{k: v for k, v in r.items() if not k.startswith(skip)} for r in metrics(p)] for p in (whole, parts)]
    assert rows[0] == rows[1]


def test_evaluate_repeats_the_evaluation(finished: Path, tmp_path: Path) -> None:
    """And keeps what was written: two answers to each of five prompts, and one of the teacher."""
    out, file = tmp_path / "again.json", tmp_path / "completions.jsonl"
    command = [sys.executable, "experiments/evaluate.py", str(finished), "--out", str(out), "--completions", str(file)]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
    measured = json.loads(out.read_text())
    assert measured == json.loads((finished / "evaluation.json").read_text())["after"]
    lines = read_lines(file, "completions", ("prompt", "completion", "writer", "split"))
    assert Counter((line["writer"], line["sample"]) for line in lines) == {
        ("student", 0): 5,
        ("student", 1): 5,
        ("teacher", 0): 5,
    }
    lengths = [line["tokens"] for line in lines if line["writer"] == "student"]
    assert sum(lengths) / 10 == pytest.approx(measured["length"])
    assert all(len(line["completion"]) == line["tokens"] - line["ended"] for line in lines)


@pytest.fixture
def signals_as_in_a_shell() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("signals_as_in_a_shell")
def test_an_agent_of_somebody_elses_and_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in runs; interrupted, it leaves a checkpoint that --resume goes on with; what it cannot tell is n/a."""
    monkeypatch.chdir(HELPERS)
    arguments = ["--agent", "plugin_agent:Interrupted", "--iterations", 8, "--out", tmp_path, "--name", "theirs"]
    assert run(*arguments) == 130
    assert json.loads((last(tmp_path / "theirs") / "counts.json").read_text())["iteration"] == 3
    assert run(*arguments, "--resume") == 0
    assert [row["iteration"] for row in metrics(tmp_path / "theirs")] == [str(i) for i in range(1, 9)]
    assert json.loads((tmp_path / "theirs/evaluation.json").read_text())["after"]["perplexity"] is None


@pytest.mark.usefixtures("signals_as_in_a_shell")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_in_the_middle_of_an_update(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, times: int
) -> None:
    """The weights have moved and the iteration is not counted yet: it is finished and saved, or at the second signal
    given up for the last checkpoint. Resumed, both equal the uninterrupted run."""
    update = DistillAgent.update

    def interrupted(agent: DistillAgent, rollout: Any) -> Any:
        metrics = update(agent, rollout)
        if agent.iteration == 4:
            for _ in range(times):
                signal.raise_signal(number)
        return metrics

    flags = ["--iterations", 6, "--out", tmp_path, "--name", "parts", "--checkpoint-every", 2]
    with monkeypatch.context() as patch:
        patch.setattr(DistillAgent, "update", interrupted)
        assert run(*flags) == 128 + number
    assert last(tmp_path / "parts").parent.name == ("000005" if times == 1 else "000004")
    assert run(*flags, "--resume") == 0
    assert metrics(tmp_path / "parts") == metrics(finished)
    for name in ("student/table.safetensors", "optimizer.safetensors"):
        assert (last(tmp_path / "parts") / name).read_bytes() == (last(finished) / name).read_bytes()


def test_a_signal_before_training_ends_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved yet: resumed, it starts over, without being given its flags again."""

    def interrupted(*_: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "make_agent", interrupted)
        assert run("--iterations", 2, "--out", tmp_path, "--name", "early") == 143
    assert run_module.main(["--resume", "--out", str(tmp_path), "--name", "early"]) == 0
    assert len(metrics(tmp_path / "early")) == 2


def test_two_processes_do_not_share_a_folder(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused before it touches anything."""
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*") if p.name != ".lock")
    with FileLock(finished / ".lock"):
        assert run("--resume", "--out", finished.parent, "--name", "whole", "--iterations", 9) == 1
    assert "in use by another process" in capsys.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.rglob("*") if p.name != ".lock") == before


def test_the_command_line_overrides_any_field_of_a_method() -> None:
    config = parse(
        [*SMALL, "--agent", "soft", "--tau", "0.25", "--alpha", "3", "--teacher-writes", "never", "--top-k", "4"]
    )
    method = config.agent_options.method  # type: ignore[union-attr]
    assert (method.gate.tau, method.gate.alpha, method.teacher_writes, method.top_k) == (0.25, 3.0, "never", 4)
    assert (method.loss, method.weighting) == ("weighted", "soft")


def test_a_configuration_survives_its_folder(finished: Path) -> None:
    config = load_config(finished)
    assert config.agent_options.batch_size == 8
    assert config.name == "whole"
    assert config.out == finished.parent


def test_help_imports_no_torch() -> None:
    """`--help` answers at once: nothing heavy is imported before an environment is made."""
    code = "import sys, experiments.run as r, experiments.compare\ntry: r.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'stable_baselines3', 'matplotlib'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert output.stdout.splitlines()[-1] == "[]"
    assert "--tau" in output.stdout


def test_an_existing_name_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "evaluation.json").read_text()
    assert run("--iterations", 1, "--out", finished.parent, "--name", "whole") == 1
    assert "--resume" in capsys.readouterr().err
    assert (finished / "evaluation.json").read_text() == before


def test_a_resumed_run_may_not_change_its_method(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", finished.parent, "--name", "whole", "--resume", "--tau", 3) == 1
    assert capsys.readouterr().err.startswith("error: tau: 3")


def test_a_resumed_run_may_change_its_learning_rate_and_keeps_a_record(tmp_path: Path) -> None:
    """The first update after the change has the new rate: with a rate of nearly 0 the student stays."""
    flags = ("--env", "categorical", "--out", tmp_path, "--name", "slower", "--eval-samples", 1, "--eval-prompts", 2)
    assert run(*flags, "--iterations", 2) == 0
    before = load_file(tmp_path / "slower/checkpoints/000002/agent/student/table.safetensors")
    assert run(*flags, "--resume", "--iterations", 3, "--learning-rate", 1e-30) == 0
    after = load_file(tmp_path / "slower/checkpoints/000003/agent/student/table.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert load_config(tmp_path / "slower").agent_options.optimizer.learning_rate == 1e-30
    assert len((tmp_path / "slower/changes.log").read_text().splitlines()) == 1


def damage(path: Path) -> None:
    file = path / "agent/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result is the same; with all damaged there is an error of one line, and they stay where they are."""
    shutil.copytree(finished, tmp_path / "whole")
    root = tmp_path / "whole/checkpoints"
    damage(root / "000006")
    assert run("--out", tmp_path, "--name", "whole", "--resume") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "000006/agent' is damaged" in said
    assert "after iteration 4" in said
    assert metrics(tmp_path / "whole") == metrics(finished)
    assert (last(tmp_path / "whole") / "optimizer.safetensors").read_bytes() == (
        last(finished) / "optimizer.safetensors"
    ).read_bytes()
    for path in checkpoints(root):
        damage(path)
    assert run("--out", tmp_path, "--name", "whole", "--resume", "--iterations", 9) == 1
    error = capsys.readouterr().err.strip()
    assert "damaged" in error
    assert "checkpoint" in error
    assert len(error.splitlines()) == 1
    assert [p.name for p in checkpoints(root)] == ["000006", "000004"]


def test_a_checkpoint_of_what_is_no_number_is_set_aside(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student of NaN: a warning says so, the run goes on from the checkpoint before, and nothing is deleted."""
    shutil.copytree(finished, tmp_path / "whole")
    path = last(tmp_path / "whole") / "student/table.safetensors"
    tensors = load_file(path)
    tensors["logits"][:] = float("nan")
    save_file(tensors, path)
    before = path.read_bytes()
    assert run("--out", tmp_path, "--name", "whole", "--resume", "--iterations", 9) == 0
    assert "checkpoint" in capsys.readouterr().out
    assert before in [p.read_bytes() for p in (tmp_path / "whole").rglob("*.safetensors")]


def test_a_loss_that_is_no_number_stops_at_the_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights spoilt in iteration 4, where a checkpoint is due: that of iteration 2 stays the last and is named."""
    update = DistillAgent.update

    def spoilt(agent: DistillAgent, rollout: Any) -> Any:
        metrics = update(agent, rollout)
        if agent.iteration == 3:
            agent.student.table.data[:] = float("inf")
        return metrics

    monkeypatch.setattr(DistillAgent, "update", spoilt)
    flags = ["--iterations", 6, "--out", tmp_path, "--name", "spoilt", "--checkpoint-every", 2]
    assert run(*flags, "--validate-every", 5) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "the last good checkpoint is" in error
    assert "checkpoints/000002" in error
    assert [p.name for p in checkpoints(tmp_path / "spoilt/checkpoints")] == ["000002", "000000"]
    assert "not finite" in (tmp_path / "spoilt/alarms.log").read_text()


@pytest.mark.parametrize("of", ["student_tokens", "teacher_positions"])
def test_a_run_ends_with_the_iteration_that_reaches_its_limit(tmp_path: Path, of: str) -> None:
    """And not before; resumed it stays ended."""
    assert run("--limit", 60, "--limit-of", of, "--iterations", 30, "--out", tmp_path, "--name", "short") == 0
    spent = [float(row[LIMITS[of]]) for row in metrics(tmp_path / "short")]
    assert sum(spent[:-1]) < 60 <= sum(spent)
    assert 1 < len(spent) < 30
    assert run("--resume", "--out", tmp_path, "--name", "short") == 0
    assert len(metrics(tmp_path / "short")) == len(spent)


def test_the_ledger_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over a resumed run: what was drafted stands or is wasted, what stands is the student's or the teacher's, and the
    seconds of all parts are those of the training."""
    for more in (("--iterations", 2), ("--resume", "--iterations", 5)):
        assert run("--agent", "gated", *more, "--tau", 1.2, "--out", tmp_path, "--name", "ours") == 0
    training = json.loads((tmp_path / "ours/evaluation.json").read_text())["training"]
    assert training["drafted"] == training["committed"] + training["wasted"]
    assert training["tokens"] == training["committed"] + training["teacher_tokens"]
    assert 0 < training["wasted"] < training["drafted"]
    parts = [training[f"{part}_seconds"] for part in ("student", "teacher", "update", "other")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(training["seconds"])
    assert f"{training['drafted']:,.0f}; {training['committed']:,.0f}" in capsys.readouterr().out
    assert "drafted" not in summarise_training([{"rollout/tokens": 3.0, "time/seconds": 1.0}])


@pytest.mark.parametrize("limit", [(), ("--limit", 30, "--limit-of", "teacher_tokens")], ids=["all", "limit"])
def test_a_run_from_a_warm_cache_is_the_same_run(limit: tuple[object, ...], tmp_path: Path) -> None:
    """Its student, and where a limit ends it; the teacher's tokens are counted in the run that paid for them."""
    flags = ("--agent", "fkl", "--iterations", 4, "--out", tmp_path, *limit)
    assert run(*flags, "--name", "plain") == 0
    for name in ("cold", "warm"):
        assert run(*flags, "--name", name, "--teacher-cache", tmp_path / "cache") == 0
    weights = [load_file(tmp_path / name / "student/table.safetensors")["logits"] for name in ("plain", "cold", "warm")]
    assert all(bool((w == weights[0]).all()) for w in weights)
    paid, cold, free = (
        json.loads((tmp_path / name / "evaluation.json").read_text())["training"] for name in ("plain", "cold", "warm")
    )
    assert paid["teacher_tokens"] == cold["teacher_tokens"] == free["cached_teacher_tokens"] > 0
    assert free["teacher_tokens"] == free["teacher_positions"] == 0
    assert "cached_teacher_tokens" not in cold
    assert paid["iterations"] == free["iterations"]
    assert (free["iterations"] < 4) == bool(limit)


def test_runs_that_share_a_warm_start_share_its_evaluation(tmp_path: Path) -> None:
    config, quiet = parse([*OURS, "--out", str(tmp_path)]), Console(quiet=True)
    env = make_env(config, "train", 4, purpose="train")
    agent = make_agent(config, make_student(config, env), env)
    alone = evaluate_before(config, agent, None, quiet)
    assert evaluate_before(config, agent, tmp_path / "warm", quiet) == finite(alone)
    (kept,) = tmp_path.glob("warm-evaluation-*.json")
    kept.write_text(json.dumps({"entropy": 7.0}))
    assert evaluate_before(config, agent, tmp_path / "warm", quiet) == {"entropy": 7.0}
