"""AgentStack: each agent's run is the one it makes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from agents.base import Metrics
from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.methods import METHODS
from agents.prompts import PromptStream
from agents.stacked import AgentStack, can_learn_together
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.load import load_model
from distill_env.models.remembered import RememberedLM
from distill_env.models.stacked import StackedLM
from distill_env.models.toy import toy_student

SEEDS, BATCH, ITERATIONS = 3, 8, 3
SHARED = ("cost/", "time/")  # of a rollout of all, no part belongs to one agent alone


def agent(method: str, seed: int, **options: Any) -> DistillAgent:
    torch.manual_seed(seed)
    model = toy_student("sums", 8, 1, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    optimizer = OptimizerConfig(1e-2, warmup_iterations=1, weight_decay=0.1, max_grad_norm=0.5)
    own = DistillConfig(METHODS[method], optimizer, batch_size=BATCH, draft_length=3, seed=seed)
    return DistillAgent(CausalLM(model.double(), eos_token_id=13), replace(own, **options))


def make_env(rows: int, teacher: Any = None) -> DistillVectorEnv:
    teacher = teacher or load_model("sums", dtype="float64")
    return DistillVectorEnv(rows, "sums", teacher, chunk=3, max_new_tokens=9, autoreset_mode="Disabled")


OTHERS = ("soft", "fkl", "constant", "rewrite_only", "minillm", "adaswitch")


@pytest.mark.parametrize("method", ["gated", "rkl", *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)])
def test_each_run_is_the_one_that_it_makes_alone(method: str) -> None:
    """Tokens, gradients, clipping and steps: in float64 the weights after three iterations are equal to rounding."""
    alone = [agent(method, seed) for seed in range(SEEDS)]
    expected: list[list[Metrics]] = []
    for one in alone:
        expected.append([])
        one.learn(make_env(BATCH), ITERATIONS, lambda _, metrics: expected[-1].append(metrics))

    together = [agent(method, seed) for seed in range(SEEDS)]
    seen: list[list[Metrics]] = []
    AgentStack(together).learn(make_env(SEEDS * BATCH), ITERATIONS, lambda _, metrics: seen.append(metrics))

    for seed, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert other.iteration == ITERATIONS
        for p, q in zip(one.student.parameters(), other.student.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-9, rtol=0)
        for iteration in range(ITERATIONS):
            mine, its = expected[seed][iteration], seen[iteration][seed]
            assert mine.keys() == its.keys()
            own = [key for key in mine if not key.startswith(SHARED)] + ["cost/teacher_tokens"]
            assert {k: its[k] for k in own} == pytest.approx({k: mine[k] for k in own}, abs=1e-9, nan_ok=True)


def test_a_teacher_that_remembers_changes_nothing() -> None:
    plain, remembered = ([agent("gated", seed) for seed in range(SEEDS)] for _ in range(2))
    AgentStack(plain).learn(make_env(SEEDS * BATCH), ITERATIONS)
    teacher = RememberedLM(StackedLM([load_model("sums", dtype="float64")]))  # type: ignore[list-item]
    AgentStack(remembered).learn(make_env(SEEDS * BATCH, teacher), ITERATIONS)
    for one, other in zip(plain, remembered, strict=True):
        for p, q in zip(one.student.parameters(), other.student.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-7, rtol=0)


def test_the_parts_of_a_rollout_make_up_the_whole() -> None:
    """Counts of each agent are its own, and what is shared adds up."""
    agents = [agent("gated", seed) for seed in range(SEEDS)]
    env = make_env(SEEDS * BATCH)
    streams = [PromptStream(env.prompts, a.config.seed) for a in agents]
    rollouts = AgentStack(agents).rollouts(env, streams)
    for one, rollout in zip(agents, rollouts, strict=True):
        assert rollout.prompts == one.next_batch(PromptStream(env.prompts, one.config.seed))[0]
        assert len(rollout.teacher) == int(rollout.mask.sum())  # type: ignore[arg-type]
        assert rollout.cost.teacher_tokens == int(rollout.rewritten.sum())
    assert sum(r.cost.teacher_tokens for r in rollouts) == env.teacher_usage.tokens
    assert sum(r.cost.teacher_positions for r in rollouts) == pytest.approx(env.teacher_usage.positions)


@pytest.mark.parametrize("method", ["budget", "random_rewrite"])
def test_a_gate_that_depends_on_the_batch_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="agents"):
        AgentStack([agent(method, seed) for seed in range(2)])


def test_agents_of_different_settings_are_refused() -> None:
    assert can_learn_together([agent("gated", 0), agent("gated", 1)])
    assert not can_learn_together([agent("gated", 0), agent("rkl", 1)])
    assert not can_learn_together([agent("gated", 0, batch_size=4), agent("gated", 1)])
    assert not can_learn_together([agent("gated", seed, micro_batch=2) for seed in range(2)])
