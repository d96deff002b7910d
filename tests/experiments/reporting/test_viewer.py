"""What the gate viewer shows, against the two models asked state by state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.checkpoint import load_checkpoint
from agents.distill import DistillAgent
from agents.prompts import evenly_spaced
from distill_env.divergence import entropy, reverse_kl
from distill_env.models.load import build_model, load_model
from distill_env.rendering import END
from distill_env.tasks.registry import make_task
from experiments import run as run_module
from experiments.reporting.viewer import see_run, token_text
from experiments.running.build import CATEGORICAL_VOCABULARY
from experiments.running.config_file import load_config

TAU = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three iterations on a table."""
    out = tmp_path_factory.mktemp("viewer")
    arguments = ["--env", "categorical", "--iterations", "3", "--batch-size", "8", "--eval-samples", "2"]
    arguments += ["--tau", str(TAU), "--out", str(out), "--name", "run"]
    assert run_module.main(arguments) == 0
    return out / "run"


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return see_run(folder, prompts=4, positions_from=40, top=3)


def ids_of(answer: dict[str, Any]) -> list[int]:
    task = make_task("categorical")
    names = {token_text(task, i): i for i in range(task.vocab_size)}
    return [names[token["text"]] for token in answer["tokens"]]


@pytest.mark.parametrize("mode", ["assisted", "alone"])
def test_every_state_is_that_of_the_two_models(folder: Path, seen: dict[str, Any], mode: str) -> None:
    student = build_model(folder / "student")
    teacher = load_model("markov", vocab_size=CATEGORICAL_VOCABULARY)
    task = make_task("categorical")
    prompts = evenly_spaced(task.prompts("test"), 4)
    assert [p.text for p in prompts] == seen["prompts"]
    hard = 0
    for prompt, answer in zip(prompts, seen[mode], strict=True):
        ids = ids_of(answer)
        for t, token in enumerate(answer["tokens"]):
            read = [*prompt.ids, *ids[:t]]
            q, p = (model.start([read])[0].double() for model in (student, teacher))
            divergence = float(reverse_kl(q, p))
            assert token["d"] == pytest.approx(divergence, abs=1e-4)
            assert token["hard"] == (divergence >= TAU)
            assert token["rewritten"] == (token["hard"] and mode == "assisted")
            assert token["q"] == pytest.approx(float(q[ids[t]].exp()), abs=1e-4)
            assert token["p"] == pytest.approx(float(p[ids[t]].exp()), abs=1e-4)
            for name, log_probs in (("student", q), ("teacher", p)):
                assert [share for _, share in token[name]] == pytest.approx(
                    log_probs.exp().sort(descending=True).values[:3].tolist(), abs=1e-4
                )
            hard += token["hard"]
    assert hard  # otherwise the test shows little


def test_both_ways_of_writing_are_one_until_the_first_hard_step(seen: dict[str, Any]) -> None:
    for assisted, alone in zip(seen["assisted"], seen["alone"], strict=True):
        first = next((t for t, token in enumerate(alone["tokens"]) if token["hard"]), None)
        assert ids_of(assisted)[:first] == ids_of(alone)[:first]


def test_hard_shares_by_position(folder: Path) -> None:
    """Counted again over the answers that the viewer describes."""
    seen = see_run(folder, prompts=40, positions_from=40)
    longest = max(len(a["tokens"]) for a in seen["alone"])
    counted = [np.mean([a["tokens"][t]["hard"] for a in seen["alone"] if len(a["tokens"]) > t]) for t in range(longest)]
    assert seen["hard_by_position"] == pytest.approx(counted, abs=1e-4)


def test_the_end_token_is_visible() -> None:
    task = make_task("sums")
    assert token_text(task, task.eos_token_id) == END
    assert token_text(task, 7) == "7"


def test_a_folder_without_a_student_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        see_run(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="holds no student"):
        see_run(tmp_path)


def test_the_viewer_shows_the_tau_that_a_budget_ended_at(tmp_path: Path) -> None:
    arguments = ["--env", "categorical", "--agent", "budget", "--iterations", "5", "--batch-size", "8"]
    assert run_module.main([*arguments, "--eval-samples", "2", "--out", str(tmp_path), "--name", "run"]) == 0
    agent, _, _ = load_checkpoint(tmp_path / "run" / "checkpoints", DistillAgent.load)
    config = load_config(tmp_path / "run")
    assert config.method is not None
    assert agent.method.gate.tau != config.method.gate.tau
    assert see_run(tmp_path / "run", prompts=2, positions_from=4)["tau"] == agent.method.gate.tau


def test_what_is_hard_is_what_the_gate_finds_hard(tmp_path: Path) -> None:
    """A gate on the teacher's entropy: hard positions are those with an entropy of at least tau, not a D_t."""
    arguments = ["--env", "categorical", "--score", "teacher_entropy", "--tau", "1.2", "--iterations", "2"]
    arguments += ["--batch-size", "8", "--eval-samples", "2", "--out", str(tmp_path), "--name", "run"]
    assert run_module.main(arguments) == 0
    seen = see_run(tmp_path / "run", prompts=4, positions_from=4)
    assert seen["tau"] is None
    teacher, task = load_model("markov", vocab_size=CATEGORICAL_VOCABULARY), make_task("categorical")
    found = []
    for prompt, completion in zip(evenly_spaced(task.prompts("test"), 4), seen["assisted"], strict=True):
        ids = ids_of(completion)
        for t, token in enumerate(completion["tokens"]):
            expected = float(entropy(teacher.start([[*prompt.ids, *ids[:t]]])[0].double())) >= 1.2
            assert token["hard"] == token["rewritten"] == expected
            found.append(expected)
    assert 0 < sum(found) < len(found)
