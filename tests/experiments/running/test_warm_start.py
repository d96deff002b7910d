"""The warm start: every answer once a round, and an end by its rule."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from rich.console import Console

from agents.config import DistillConfig
from agents.distill import DistillAgent
from agents.evaluation import completion_metrics
from agents.generation import generate
from agents.methods import METHODS
from distill_env.env import DistillVectorEnv
from distill_env.models.tabular import uniform
from experiments.running import warm_start as module
from experiments.running.build import make_env
from experiments.running.evaluating import EVALUATION_SEED
from experiments.running.flags import parse
from experiments.running.warm_start import epochs, teacher_completions, warm_start


def test_every_round_visits_every_batch_once_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    env = DistillVectorEnv(4, "categorical", "markov", autoreset_mode="Disabled", reveal_teacher=False)
    agent = DistillAgent(uniform(6), DistillConfig(method=METHODS["sft"], batch_size=4))
    data = teacher_completions(agent, env, 7)
    assert agent.iteration == 0
    assert all(bool(batch.rewritten[batch.mask].all()) for batch in data)
    assert len({tuple(batch.tokens.flatten().tolist()) for batch in data}) == 7
    seen: list[int] = []
    monkeypatch.setattr(agent, "update", lambda batch: seen.append(next(i for i, b in enumerate(data) if b is batch)))
    assert list(itertools.islice(epochs(agent, data), 21)) == list(range(1, 22))
    rounds = [seen[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(r) == list(range(7)) for r in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_the_data_of_a_warm_start_is_not_the_training_data_of_any_run() -> None:
    """Neither its prompts nor its draws, index by index, are those of a run, whose seeds end before its own."""
    env = make_env(parse(["--agent", "fkl"]), "train", 64, purpose="train")
    agents = (
        DistillAgent(uniform(env.vocab_size), DistillConfig(METHODS["fkl"], seed=s)) for s in (0, module.DATA_SEED)
    )
    first, data = (teacher_completions(agent, env, 1)[0] for agent in agents)
    same = [a.ids == b.ids for a, b in zip(first.prompts, data.prompts, strict=True)]
    assert sum(same) < 8  # by chance one in hundreds
    with pytest.raises(ValueError, match="seed:"):
        parse(["--seed", str(module.DATA_SEED)])


def test_a_warm_start_ends_at_the_first_validation_that_reaches_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DATA_SET", 2)
    monkeypatch.setattr(module, "VALIDATE_EVERY", 20)
    flags = ["--env", "coins", "--warm-start", "0.002", "--out", str(tmp_path)]
    config = parse(flags)
    student, folder = warm_start(config, Console(quiet=True))
    agent = DistillAgent.load(folder)
    assert agent.iteration % 20 == 0
    validation = make_env(config, "validation", 300, purpose="evaluate")
    reached = completion_metrics(generate(agent, validation, validation.prompts, EVALUATION_SEED))["correct_chains"]
    assert 0.0019 <= reached < 0.5
    again, _ = warm_start(config, Console(quiet=True))  # from disk
    for a, b in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(module, "GIVE_UP_AFTER", 20)
    with pytest.raises(ValueError, match=r"^warm_start: "):
        warm_start(parse([*flags, "--warm-start", "0.95"]), Console(quiet=True))
