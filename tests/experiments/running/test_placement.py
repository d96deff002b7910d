"""Where the models of a run are and in which data types, and that a run keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments import run as run_module
from experiments.running.build import make_env, make_student
from experiments.running.config_file import load_config
from experiments.running.flags import parse
from experiments.running.placement import Placement, keep_placement, placement
from tests.helpers.tiny_models import flags, write_model, write_prompts

LM = ["--env", "lm", "--teacher", "t", "--student", "s", "--name", "run"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def chosen(*more: str) -> Placement:
    return placement(parse([*LM, *more]))


def test_language_models_take_the_gpu_in_bfloat16(gpu: None) -> None:
    assert chosen() == Placement("cuda", "bfloat16", "bfloat16")
    assert chosen("--device", "cpu") == Placement("cpu", "float32", "float32")
    assert chosen("--device", "mps") == Placement("mps", "bfloat16", "bfloat16")
    assert chosen("--dtype", "float32") == Placement("cuda", "float32", "bfloat16")
    assert chosen("--student-dtype", "float32") == Placement("cuda", "bfloat16", "float32")
    assert chosen("--agent", "ppo") == Placement("cuda", "bfloat16", "float32")
    assert placement(parse(["--env", "sums"])) == Placement("cpu", "float32", "float32")


def test_without_a_gpu_they_stay_on_the_cpu_in_float32(no_gpu: None) -> None:
    assert chosen() == Placement("cpu", "float32", "float32")
    assert chosen("--student-dtype", "bfloat16") == Placement("cpu", "float32", "bfloat16")


@pytest.mark.parametrize("there", [False, True])
def test_a_run_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """A run from a GPU goes on in its data types where there is none; a run from the CPU stays there."""
    config = parse([*LM, "--out", str(tmp_path)])
    config.folder.mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    before = placement(config)
    keep_placement(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not there)
    keep_placement(config)
    assert placement(config) == Placement("cpu", before.dtype, before.student_dtype)
    assert placement(parse([*LM, "--out", str(tmp_path), "--device", "cuda"])).dtype == before.dtype


def test_the_models_are_loaded_so(tmp_path: Path, no_gpu: None) -> None:
    pair = write_model(tmp_path / "t", 1), write_model(tmp_path / "s", 2), write_prompts(tmp_path)
    config = parse(flags(*pair, "--dtype", "bfloat16", "--out", tmp_path))
    env = make_env(config, "train", 2, purpose="train")
    assert env.teacher.model.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert make_student(config, env).model.dtype == torch.float32  # type: ignore[attr-defined]


def test_a_run_says_it_first_and_stores_what_was_asked(
    tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = write_model(tmp_path / "t", 1), write_model(tmp_path / "s", 2), write_prompts(tmp_path)
    common = ["--out", str(tmp_path), "--name", "run", "--iterations"]
    assert run_module.main([*flags(*pair, "--student-dtype", "bfloat16"), *common, "1"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert {"cpu", "float32", "bfloat16", "6"} <= {*first.replace(",", "").split()}
    asked = json.loads((tmp_path / "run" / "config.json").read_text())
    values = asked["loading"]["device"], asked["teacher"]["dtype"], asked["student"]["dtype"]
    assert values == ("auto", "auto", "bfloat16")
    assert run_module.main(["--resume", *common, "2"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == first
    assert load_config(tmp_path / "run").loading.device == "auto"
