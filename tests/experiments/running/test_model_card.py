"""The student's folder: it loads as any model of Transformers does, and its card tells the truth."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.methods import METHODS
from distill_env.models.tabular import TabularModel
from experiments import run as run_module
from experiments.running.build import agent_loader
from experiments.running.config_file import load_config
from experiments.running.flags import parse
from experiments.running.metric_display import metric
from experiments.running.model_card import command_of, front_matter, model_card, writers
from experiments.running.run_folder import read_metrics

COMMANDS = [
    [],
    ["--agent", "soft", "--env", "categorical", "--tau", "0.3", "--score", "rank", "--loss-clip", "2", "--seed", "3"],
    ["--agent", "ppo", "--gamma", "0.5", "--normalize-advantage", "--rewrite-span", "step", "--name", "mine"],
    ["--env", "lm", "--teacher", "a/b", "--student", "c/d", "--task-path", "p.txt", "--max-new-tokens", "9"],
    [
        "--agent",
        "tests.helpers.plugin_agent:Frequencies",
        "--warm-start",
        "0",
        "--rewrite-cost",
        "1.5",
        "--track",
        "none",
    ],
]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_the_command_of_a_card_is_that_of_the_run(arguments: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    config = parse([*arguments, *out])
    assert parse([*command_of(config)[2:], *out]) == config


def run(out: Path, *flags: str) -> int:
    flags = (*flags, "--iterations", "2", "--batch-size", "8", "--eval-prompts", "4", "--eval-samples", "2")
    return run_module.main([*flags, "--out", str(out), "--name", "r"])


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert (
        run(
            out,
            "--env",
            "sums",
            "--warm-start",
            "0",
            "--agent",
            "soft",
            "--teacher-writes",
            "random",
            "--tau",
            "2.5",
            "--max-new-tokens",
            "6",
        )
        == 0
    )
    return out / "r"


def test_the_student_loads_with_plain_transformers(sums: Path) -> None:
    """And gives the distribution of the run's own student."""
    model = AutoModelForCausalLM.from_pretrained(sums / "student")
    tokenizer = AutoTokenizer.from_pretrained(sums / "student")
    ids = tokenizer("7+2+9=", return_tensors="pt").input_ids
    config = load_config(sums)
    student = agent_loader(config)(sums / "checkpoints/000002/agent").student
    with torch.no_grad():
        expected = model(ids).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(student.start(ids.tolist()), expected, atol=1e-5, rtol=0)


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (folder / "student/README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_was_done_and_measured(sums: Path) -> None:
    head, body = card_of(sums)
    assert (head["license"], head["library_name"]) == ("apache-2.0", "transformers")
    assert {"distill-env", "soft"} <= set(head["tags"])
    evaluation = json.loads((sums / "evaluation.json").read_text())
    training = evaluation["training"]
    for part in ("before", "after"):
        assert metric("perplexity").text(evaluation[part]["perplexity"]) in body
        assert f"{evaluation[part]['entropy']:.3f}" in body
    assert "out of distribution" in body
    for name in ("hard_share_first", "hard_share_last"):
        assert f"| {metric(name).label} | {training[name]:.1%} |" in body
    assert f"| {training['teacher_tokens_per_student_token']:.3f} |" in body
    assert "weighting `soft`" in body
    assert "`tau` 2.5" in body
    assert torch.__version__ in body
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {3, 4}


def test_base_model_and_licence_are_said_where_they_are_known(tmp_path: Path) -> None:
    def head(student: str) -> dict[str, Any]:
        config = parse(
            [
                "--env",
                "lm",
                "--teacher",
                "t/t",
                "--student",
                student,
                "--task-path",
                "p",
                "--agent",
                "tests.helpers.plugin_agents:Silent",
            ]
        )
        return yaml.safe_load(front_matter(config).strip("-"))

    assert head("owner/model")["base_model"] == "owner/model"
    assert "license" not in head("owner/model")
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- x\n---\n# A model\nlicense: gpl\n")
    assert "base_model" not in head(str(tmp_path))  # the hub refuses a path
    assert head(str(tmp_path))["license"] == "mit"


def test_a_table_says_that_it_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, "--env", "categorical") == 0
    head, body = card_of(tmp_path / "r")
    assert "library_name" not in head
    assert "not a transformer" in body
    assert TabularModel.load(tmp_path / "r/student").vocab_size == 6


def test_what_cannot_be_pushed_is_saved_and_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a network; and the token stays where it is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsNobodysTokenButASecret")
    assert run(tmp_path, "--env", "categorical", "--push-to-hub", "somebody/student") == 1
    said = capfd.readouterr()
    assert len(said.err.strip().splitlines()) == 1
    assert "'somebody/student' was not pushed" in said.err
    assert "hf upload somebody/student" in said.err
    assert "ASecret" not in said.out + said.err
    assert "after" in json.loads((tmp_path / "r/evaluation.json").read_text())
    assert (tmp_path / "r/student/table.safetensors").exists()
    assert "TabularModel.load" in (tmp_path / "r/student/README.md").read_text()
    assert all("ASecret" not in p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())


def test_all_methods_have_a_card() -> None:
    training = {"iterations": 1}
    for name in METHODS:
        config = parse(["--agent", name])
        assert f"row `{name}`" in model_card(config, {"before": {}, "after": {}, "training": training})


def test_the_card_says_who_writes() -> None:
    def said(*flags: str) -> str:
        return writers(parse(flags))

    teacher, student, both = said("--agent", "sft"), said("--agent", "rkl"), said("--agent", "gated")
    data = said("--agent", "sft", "--teacher-writes", "reference")
    agent = said("--agent", "tests.helpers.plugin_agents:Silent")
    assert len({teacher, student, both, data, agent}) == 5
    assert said("--agent", "fkl") == teacher
    assert said("--agent", "ppo") == both
    assert ("teacher" in teacher.lower(), "student" in teacher.lower()) == (True, False)
    assert ("teacher" in student.lower(), "student" in student.lower()) == (False, True)
    assert "teacher" not in data.lower()
    assert "student" not in data.lower()


@pytest.mark.parametrize("track", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_said_before_anything_starts(
    track: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, track, None)
    assert run(tmp_path, "--env", "categorical", "--track", track) == 1
    error = capsys.readouterr().err.strip()
    assert f"pip install 'distill-env[{track}]'" in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_nobody_need_be_told(tmp_path: Path) -> None:
    assert run(tmp_path, "--env", "categorical", "--track", "none") == 0
    assert not list((tmp_path / "r").glob("events*"))
    assert len(read_metrics(tmp_path / "r")) == 2
