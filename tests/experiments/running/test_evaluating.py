"""What a run of language models shows at its end: held-out forward KL with its interval, answers, a curve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import run as run_module
from experiments.running.completions_file import read_lines
from experiments.running.run_folder import read_metrics
from experiments.running.summary import forward_kl_line
from tests.helpers.tiny_models import flags, write_model, write_prompts


def test_a_run_ends_with_what_it_brought(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, student = write_model(tmp_path / "teacher", seed=0), write_model(tmp_path / "student", seed=1)
    size = ["--eval-prompts", "8", "--eval-samples", "2", "--learning-rate", "1e-2", "--validate-every", "5"]
    arguments = [*flags(teacher, student, write_prompts(tmp_path)), *size, "--out", str(tmp_path), "--name", "r"]
    assert run_module.main([*arguments, "--agent", "fkl", "--iterations", "10"]) == 0
    folder = tmp_path / "r"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    by_prompt = evaluation["forward_kl_by_prompt"]
    for when in ("before", "after"):
        assert len(by_prompt[when]) == 8
        assert np.mean(by_prompt[when]) == pytest.approx(evaluation[when]["forward_kl"])
    assert forward_kl_line(by_prompt) in " ".join(capsys.readouterr().out.split())

    lines = read_lines(folder / "completions.jsonl", "run", ("prompt", "completion", "writer", "split"))
    own = [x for x in lines if (x["writer"], x["sample"], x["split"]) == ("student", 0, "test")]
    answers = (folder / "answers.txt").read_text()
    assert len(own) == 8
    assert all(f"{i}. {x['prompt']}\n\n{x['completion']}\n" in answers for i, x in enumerate(own, 1))

    curve = [row["validation/forward_kl"] for row in read_metrics(folder) if "validation/forward_kl" in row]
    assert len(curve) == 3  # iterations 1, 5 and 10
    assert curve[-1] < curve[0]
    assert (folder / "curves.png").is_file()


def test_a_training_shows_completions_and_how_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With forward KL the teacher writes everything, so what is shown stands between marks, in the terminal as in
    TensorBoard; a schedule is logged as it runs."""
    teacher, student = write_model(tmp_path / "teacher", seed=0), write_model(tmp_path / "student", seed=1)
    arguments = [*flags(teacher, student, write_prompts(tmp_path)), "--out", str(tmp_path), "--name", "r"]
    falling = ["--learning-rate", "1e-3", "--warmup-iterations", "0", "--schedule", "linear", "--decay-iterations", "4"]
    more = ["--agent", "fkl", "--iterations", "4", "--validate-every", "2", "--track", "tensorboard"]
    assert run_module.main([*arguments, *falling, *more]) == 0
    printed = capsys.readouterr().out.splitlines()
    at = [i for i, line in enumerate(printed) if line.startswith("iteration ")]
    assert [printed[i].split(":")[0] for i in at] == ["iteration 1", "iteration 2", "iteration 4"]
    shown = [line.strip() for i in at for line in printed[i + 1 : i + 3]]
    events = EventAccumulator(str(tmp_path / "r")).Reload()
    texts = events.Tensors("completions/text_summary")
    assert [text.step for text in texts] == [1, 2, 4]
    logged = [line.strip() for text in texts for line in text.tensor_proto.string_val[0].decode().splitlines()]
    assert [line for line in logged if line.strip("-")] == shown
    assert all(line.endswith("⟧") and line.split("=")[1].startswith(" ⟦") for line in shown)
    rates = [row["train/learning_rate"] for row in read_metrics(tmp_path / "r")]
    assert rates[0] == 1e-3
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]


def test_the_change_is_paired_by_prompt() -> None:
    """Prompts that differ by whole nats, and a change that is nearly the same for all: its interval is narrow."""
    before = [1.0, 2.0, 3.0, 4.0]
    line = forward_kl_line({"before": before, "after": [0.5, 1.5, 2.5, 3.4]})
    assert "2.500 before, 1.975 after, change -0.525 [-0.605, -0.445]" in line
    assert not forward_kl_line({"before": before, "after": before[:3]})
    assert not forward_kl_line({"before": [], "after": []})
    assert not forward_kl_line({"before": [None], "after": [1.0]})
