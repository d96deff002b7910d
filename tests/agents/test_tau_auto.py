"""tau auto: the share that it makes hard, that it is chosen once, and that a resumed agent keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.assisted import write_assisted
from agents.config import DistillConfig, OptimizerConfig
from agents.distill import AUTO_SHARE, DistillAgent
from agents.methods import METHODS, Method, for_new_pair, variant
from agents.prompts import PromptStream
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import Gate
from distill_env.models.tabular import markov
from tests.helpers.tables import perturbed

BATCH = 200
TEACHER = markov(30, seed=1)


def environment() -> DistillVectorEnv:
    task = {"vocab_size": TEACHER.vocab_size, "max_new_tokens": 8, "empty_prompt": True}
    return DistillVectorEnv(BATCH, "categorical", TEACHER, task_kwargs=task, chunk=8, autoreset_mode="Disabled")


def agent_of(method: Method) -> DistillAgent:
    config = DistillConfig(method, OptimizerConfig(0.02, warmup_iterations=0), batch_size=BATCH, draft_length=3)
    return DistillAgent(perturbed(TEACHER, 1.0), config)


METHODS_BY_SHARE = {
    "gated": (METHODS["gated"], AUTO_SHARE),
    "soft": (METHODS["soft"], AUTO_SHARE),
    "no writer": (METHODS["gate_only"], AUTO_SHARE),
    "budget": (variant(METHODS["budget"], budget=0.3), 0.3),
}


@pytest.mark.parametrize(("method", "share"), METHODS_BY_SHARE.values(), ids=METHODS_BY_SHARE)
def test_the_chosen_share_of_the_first_batch_is_hard(method: Method, share: float) -> None:
    """Up to the mass of the table's single states, and up to the text that changes with the threshold."""
    seen: list[float] = []
    agent = agent_of(method.with_tau("auto"))
    agent.learn(environment(), 1, lambda _, metrics: seen.append(metrics["rollout/hard_share"]))
    assert seen[0] == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("name", ["gate_only", "eopd"])
def test_it_is_a_quantile_of_what_the_gate_reads(name: str) -> None:
    """Without rewrites the text does not depend on tau: at most the share lies above it, and at least the share not
    below."""
    agent, env = agent_of(METHODS[name].with_tau("auto")), environment()
    agent.choose_tau(env)
    tau = agent.method.gate.threshold
    prompts = PromptStream(env.prompts, 0).take(0, BATCH)
    rollout = write_assisted(env, agent.student, prompts, METHODS[name].with_tau(1e6).hard_gate, 0)
    scores = rollout.score[rollout.mask]
    assert float((scores > tau).double().mean()) <= AUTO_SHARE <= float((scores >= tau).double().mean()) + 1e-3


def test_it_is_chosen_once_and_a_number_is_kept() -> None:
    agent = agent_of(METHODS["gated"].with_tau("auto"))
    agent.learn(environment(), 1)
    tau = agent.method.gate.tau
    agent.learn(environment(), 3)
    assert agent.method.gate.tau == tau != "auto"
    numbered = agent_of(METHODS["gated"])
    numbered.choose_tau(environment())
    assert numbered.method == METHODS["gated"]


def test_a_resumed_agent_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {"whole": [], "parts": []}
    agent_of(METHODS["gated"].with_tau("auto")).learn(
        environment(), 4, lambda _, m: losses["whole"].append(m["train/loss"])
    )
    first = agent_of(METHODS["gated"].with_tau("auto"))
    first.learn(environment(), 2, lambda _, m: losses["parts"].append(m["train/loss"]))
    first.save(tmp_path / "agent")
    second = DistillAgent.load(tmp_path / "agent")
    assert second.method.gate.tau == first.method.gate.tau
    second.learn(environment(), 2, lambda _, m: losses["parts"].append(m["train/loss"]))
    assert losses["whole"] == losses["parts"]


def test_language_models_take_it_where_nats_of_a_new_pair_are_the_unit() -> None:
    auto = {name for name in METHODS if for_new_pair(METHODS[name]).gate.tau == "auto"}
    assert {"gated", "soft", "gate_only", "step_mean", "budget"} <= auto
    assert not {"rkl", "fkl", "skd", "eopd", "adaswitch", "cumulative", "constant"} & auto


@pytest.mark.parametrize("more", [{"cumulative": True}, {"hand_over_rest": True}])
def test_gates_whose_scores_depend_on_earlier_decisions_refuse_it(more: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"^tau: "):
        Gate(tau="auto", **more)
    with pytest.raises(ValueError, match=r"^tau: "):
        Gate(tau="auto").threshold  # noqa: B018
