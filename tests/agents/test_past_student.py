"""A student that is its own teacher: as it began, or as it was some iterations ago."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.methods import METHODS, variant
from agents.past_student import PastStudent
from agents.teacher_cache import TeacherCache
from distill_env.env import DistillVectorEnv
from distill_env.models.adapters import add_adapter
from distill_env.models.causal_lm import CausalLM
from tests.agents.test_rollout_lm import Words
from tests.agents.test_teacher_prompts import Hinted
from tests.distill_env.models.test_causal_lm import build

RKL, GATED = METHODS["rkl"], variant(METHODS["gated"], tau=0.02)


def make_env(task: Any, **kwargs: Any) -> DistillVectorEnv:
    return DistillVectorEnv(3, task, CausalLM(build("Llama")), chunk=4, autoreset_mode="Disabled", **kwargs)


def make_agent(refresh: int, method: Any = RKL, cache: TeacherCache | None = None) -> DistillAgent:
    optimizer = OptimizerConfig(0.01, warmup_iterations=0)
    config = DistillConfig(method, optimizer, batch_size=6, draft_length=3, refresh_teacher=refresh)
    return DistillAgent(CausalLM(build("Llama")), config, cache)


def test_refreshed_before_every_iteration_nothing_differs_without_a_hint() -> None:
    """D_t is 0 then, though the student moves (the updates are of sft); against the start it grows, and with a hint it
    never is 0."""

    def divergences(refresh: int, task: Any) -> list[float]:
        seen: list[float] = []
        agent = make_agent(refresh, METHODS["sft"])
        agent.learn(make_env(task), 4, lambda _, metrics: seen.append(metrics["rollout/divergence"]))
        return seen

    now, start, hint = divergences(1, Words()), divergences(0, Words()), divergences(1, Hinted())
    assert max(now) < 1e-12
    assert start[0] < 1e-12
    assert start[-1] > 1e-6
    assert min(hint) > 1e-3


def test_between_refreshes_the_teacher_is_the_student_as_it_was() -> None:
    """After the updates 0, 3 and 6 of 7 the teacher has the student's weights of that moment."""
    agent, env = make_agent(3, METHODS["sft"]), make_env(Words())
    was: list[torch.Tensor] = []

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in agent.student.parameters()])

    for i in range(7):
        was.append(weights().clone())
        agent.learn(env, 1)
        assert agent.past is not None
        taught = torch.cat([x.flatten() for x in agent.past.tensors().values()])
        assert taught.equal(was[i // 3 * 3])
        assert not weights().equal(was[i])


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resumed_equals_uninterrupted(stop: int, tmp_path: Path) -> None:
    whole = make_agent(3, GATED)
    whole.learn(make_env(Hinted()), 5)
    first = make_agent(3, GATED)
    first.learn(make_env(Hinted()), stop)
    first.save(tmp_path / "agent")
    resumed = DistillAgent.load(tmp_path / "agent")
    resumed.learn(make_env(Hinted()), 5 - stop)
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert a.equal(b)


def test_a_copy_shares_what_is_not_trained() -> None:
    pytest.importorskip("peft")
    model = build("Llama")
    add_adapter(model, 2, 4.0, "all-linear", seed=0)
    student = CausalLM(model)
    past = PastStudent(student)
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    trained = {p.data_ptr() for p in student.parameters()}
    theirs = {p.data_ptr() for p in past.model.model.parameters()}  # type: ignore[attr-defined]
    assert frozen <= theirs
    assert not trained & theirs
    before = past.model.start([[3, 4]])
    assert before.equal(student.fork().start([[3, 4]]))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1
    assert past.model.start([[3, 4]]).equal(before)
    past.refresh()
    assert past.model.start([[3, 4]]).equal(student.fork().start([[3, 4]]))


def test_another_teacher_reads_what_is_being_written_and_a_copy_has_the_first() -> None:
    env = DistillVectorEnv(3, "sums", "sums", autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(np.full(3, 2))
    twin, other = pickle.loads(pickle.dumps(env)), CausalLM(build("Llama").float(), vocab_size=14, eos_token_id=13)
    env.use_teacher(other)
    assert not torch.allclose(env.lookahead(torch.zeros(3, 0).long()), twin.lookahead(torch.zeros(3, 0).long()))
    prompts = [[*p.ids, 2] for p in env.completions.prompts]
    torch.testing.assert_close(env.lookahead(torch.zeros(3, 0).long())[:, 0], other.fork().start(prompts))
    assert (
        pickle.loads(pickle.dumps(env))
        .lookahead(torch.zeros(3, 0).long())
        .equal(twin.lookahead(torch.zeros(3, 0).long()))
    )


def test_no_cache_with_a_teacher_that_changes(tmp_path: Path) -> None:
    agent = make_agent(1, METHODS["fkl"], TeacherCache(tmp_path))
    with pytest.raises(ValueError, match="refresh_teacher"):
        agent.learn(make_env(Words()), 1)
