"""PPO and A2C in the environment: they reach the fixed points known in closed form; a loaded agent equals the saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.base import Metrics
from agents.config import SB3Config
from agents.sb3 import SB3Agent, state_features
from distill_env.divergence import reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.tabular import TabularModel, markov, suffix_automaton, uniform
from distill_env.models.toy import small_teacher
from distill_env.ragged import PAD
from distill_env.tasks.categorical import CategoricalTask
from distill_env.wrappers import RewriteImplausible

COST = 0.7
SKEWED = torch.tensor([[0.55, 0.25, 0.10, 0.03, 0.07]], dtype=torch.float64)


def one_state(probabilities: Tensor) -> TabularModel:
    vocab_size = probabilities.shape[1]
    return TabularModel(suffix_automaton(vocab_size, 0), probabilities.log(), vocab_size - 1)


def table_env(teacher: TabularModel, rows: int = 64, **kwargs: Any) -> DistillVectorEnv:
    task = CategoricalTask(teacher.vocab_size, max_new_tokens=4, empty_prompt=True)
    arguments: dict[str, Any] = {"rewrite_cost": COST, "autoreset_mode": "SameStep", **kwargs}
    return DistillVectorEnv(rows, task=task, teacher=teacher, **arguments)


def states(histories: list[list[int]], width: int = 4) -> NDArray[np.int64]:
    """Observations of these tokens, padded."""
    return np.array([h + [PAD] * (width - len(h)) for h in histories])


def average_policy(
    agent: SB3Agent, env: Any, observation: NDArray[np.int64], iterations: int, last: int
) -> NDArray[np.float64]:
    """pi at some states, [n, V + 1], averaged over the last iterations of a training."""
    seen = []
    agent.learn(env, iterations, lambda *_: seen.append(np.exp(agent.action_log_probs(observation))))
    return np.mean(seen[-last:], 0)


def tensors_of(agent: SB3Agent) -> list[Tensor]:
    parameters = [*agent.student.parameters(), *agent.heads.parameters()]
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize(("algorithm", "learning_rate", "iterations"), [("ppo", 0.02, 30), ("a2c", 0.03, 60)])
def test_with_an_entropy_bonus_and_gamma_0_the_fixed_point_is_the_teacher(
    algorithm: Any, learning_rate: float, iterations: int
) -> None:
    """p_T(a) / (1 + e^-c) for tokens and 1 / (1 + e^c) for REWRITE."""
    config = SB3Config(algorithm, 64, learning_rate, seed=1)
    agent = SB3Agent(uniform(5, order=0), config)
    policy = average_policy(agent, table_env(one_state(SKEWED)), states([[]]), iterations, iterations // 3)
    rewrite = 1 / (1 + np.exp(COST))
    expected = [*(SKEWED[0].numpy() * (1 - rewrite)), rewrite]
    np.testing.assert_allclose(policy[0], expected, atol=0.02)
    np.testing.assert_allclose(np.exp(agent.log_probs(states([[]])))[0], SKEWED[0], atol=0.05)  # what is deployed


def test_with_tokens_frozen_the_rewrite_probability_is_the_soft_gate() -> None:
    """P(REWRITE) = sigmoid(D_t - c) for a rewrite of cost c, state by state, and q is unchanged."""
    teacher, student = markov(3, seed=3, sharpness=1.5), markov(3, seed=4, sharpness=1.5)
    student.table.requires_grad_(False)
    before = student.log_table().clone()
    agent = SB3Agent(student, SB3Config(batch_size=128, learning_rate=0.06))
    observation = states([[], [0], [1]])
    policy = average_policy(agent, table_env(teacher, rows=128), observation, 30, 12)
    divergence = reverse_kl(student.log_table(), teacher.log_table())[:3].detach().numpy()
    assert np.ptp(divergence) > 0.5
    np.testing.assert_allclose(policy[:, -1], 1 / (1 + np.exp(COST - divergence)), atol=0.03)
    assert torch.equal(student.log_table(), before)


def test_what_is_logged_of_rewriting_is_what_the_policy_does() -> None:
    """At the fixed point with tokens frozen P(REWRITE) rises with D_t, so it is larger in hard states, and the mean D_t
    is that of the states that were visited."""
    teacher, student = markov(3, seed=3, sharpness=1.5), markov(3, seed=4, sharpness=1.5)
    student.table.requires_grad_(False)
    agent = SB3Agent(student, SB3Config(batch_size=128, learning_rate=0.06))
    seen: list[dict[str, float]] = []
    agent.learn(table_env(teacher, rows=128), 30, lambda _, metrics: seen.append(metrics))
    divergence = reverse_kl(student.log_table(), teacher.log_table()).detach()
    last = seen[-1]
    assert float(divergence.min()) < last["rollout/divergence"] < float(divergence.max())
    assert last["rollout/rewrite_hard"] > last["rollout/rewrite_easy"] + 0.1
    assert last["rollout/rewrite_correlation"] > 0.9
    first, gap = seen[0], last["rollout/rewrite_hard"] - last["rollout/rewrite_easy"]
    assert first["rollout/rewrite_hard"] - first["rollout/rewrite_easy"] < gap


def test_act_never_rewrites() -> None:
    """Tokens are drawn from q however likely REWRITE is in pi; reseeded, the draws repeat."""
    agent = SB3Agent(one_state(SKEWED), SB3Config())
    with torch.no_grad():
        agent.heads.rewrite.weight.fill_(9.0)
    observation = states([[]] * 4000)
    assert np.exp(agent.action_log_probs(observation[:1]))[0, -1] > 0.999
    tokens = agent.act(observation)
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / 4000, SKEWED[0], atol=0.03)
    second = agent.act(observation)
    assert not np.array_equal(tokens, second)
    agent.reseed(agent.config.seed)
    assert np.array_equal(agent.act(observation), tokens)


@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_same_seed_same_training(algorithm: Any) -> None:
    def train(seed: int) -> tuple[list[Metrics], list[Tensor]]:
        agent = SB3Agent(uniform(5), SB3Config(algorithm, 16, 0.02, seed=seed))
        logged: list[Metrics] = []
        agent.learn(table_env(markov(5), 16), 3, lambda _, metrics: logged.append(metrics))
        return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in logged], tensors_of(agent)

    (logged, weights), (again, weights_again), (_, others) = train(0), train(0), train(1)
    assert logged == again
    assert all(map(torch.equal, weights, weights_again))
    assert not all(map(torch.equal, weights, others))


def sums_student() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(small_teacher("sums", 16, 1))


@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
@pytest.mark.parametrize("kind", ["table", "language model"])
def test_a_loaded_agent_learns_what_the_saved_one_does(algorithm: Any, kind: str, tmp_path: Path) -> None:
    """Weights, optimiser and the number of iterations: what both learn next is equal."""
    config = SB3Config(algorithm, 8, 0.01)
    if kind == "table":
        agent, env = SB3Agent(uniform(5), config), table_env(markov(5), 8)
        observation = states([[], [0], [1, 2]])
    else:
        env = DistillVectorEnv(8, "sums", "sums", rewrite_cost=1.0, max_new_tokens=6, autoreset_mode="SameStep")
        agent, observation = SB3Agent(sums_student(), config), env.reset(seed=0)[0]
    agent.learn(env, 2)
    agent.save(tmp_path / "agent")
    assert not [p.name for p in (tmp_path / "agent").rglob("*") if p.suffix in (".zip", ".pkl", ".pt", ".pth", ".bin")]
    loaded = SB3Agent.load(tmp_path / "agent")
    assert (loaded.config, loaded.iteration) == (config, 2)
    np.testing.assert_allclose(loaded.action_log_probs(observation), agent.action_log_probs(observation), atol=1e-6)
    before = agent.action_log_probs(observation)
    agent.learn(env, 2)
    loaded.learn(env, 2)
    assert loaded.iteration == 4
    assert np.abs(agent.action_log_probs(observation) - before).max() > 1e-3
    np.testing.assert_allclose(loaded.action_log_probs(observation), agent.action_log_probs(observation), atol=1e-5)


def test_a_language_model_is_read_at_every_state() -> None:
    """log pi of a row is the student's log q after that row plus log(1 - r); every parameter learns."""
    agent = SB3Agent(sums_student(), SB3Config(batch_size=8, learning_rate=0.01, n_epochs=1, minibatches=1))
    rows = [[7, 10, 2, 11], [7, 10, 2, 11, 7, 7], [1]]
    log_pi = agent.action_log_probs(states(rows, 9))
    expected = agent.student.start(rows).numpy()
    np.testing.assert_allclose(log_pi[:, :-1], expected + np.log(0.5), atol=1e-5)
    np.testing.assert_allclose(log_pi[:, -1], np.log(0.5), atol=1e-6)
    before = tensors_of(agent)
    agent.learn(DistillVectorEnv(8, "sums", "sums", max_new_tokens=6, autoreset_mode="SameStep"), 1)
    assert not any(map(torch.equal, before, tensors_of(agent)))


def test_the_value_does_not_move_the_student() -> None:
    agent = SB3Agent(sums_student(), SB3Config())
    _, value = agent.policy_and_value(torch.tensor(states([[7, 10, 2, 11]])))
    value.sum().backward()
    assert agent.heads.value.weight.grad is not None
    assert all(p.grad is None for p in agent.student.parameters())


def test_metrics_equal_counts_of_the_environment() -> None:
    """Completions, lengths, rewrites and the cost of the teacher."""
    env = table_env(one_state(SKEWED), rows=8)
    seen: dict[str, float] = dict.fromkeys(("tokens", "rewritten", "answers", "reward", "length"), 0.0)
    lengths, returns, step = np.zeros(8), np.zeros(8), env.step

    def watched(actions: Any) -> Any:
        nonlocal lengths, returns
        observation, rewards, terminated, truncated, info = step(actions)
        lengths, returns, done = lengths + 1, returns + rewards, terminated | truncated
        seen["tokens"] += 8
        seen["rewritten"] += int((actions == 5).sum())
        seen["answers"] += int(done.sum())
        seen["length"] += lengths[done].sum()
        seen["reward"] += returns[done].sum()
        lengths[done] = returns[done] = 0
        return observation, rewards, terminated, truncated, info

    env.step = watched  # type: ignore[method-assign]
    logged: list[Metrics] = []
    SB3Agent(uniform(5, order=0), SB3Config(batch_size=32)).learn(env, 1, lambda _, metrics: logged.append(metrics))
    (metrics,) = logged
    assert seen["tokens"] == metrics["rollout/tokens"] == 32 * 4
    assert metrics["rollout/rewritten_share"] == pytest.approx(seen["rewritten"] / 128)
    assert metrics["rollout/length"] == pytest.approx(seen["length"] / seen["answers"])
    assert metrics["rollout/reward"] == pytest.approx(seen["reward"] / seen["answers"], abs=1e-4)
    own = seen["tokens"] - seen["rewritten"]
    assert metrics["rollout/teacher_tokens_per_student_token"] == pytest.approx(seen["rewritten"] / own)
    assert metrics["cost/teacher_tokens"] == env.teacher_usage.tokens == seen["rewritten"]
    assert metrics["cost/teacher_passes"] == env.teacher_usage.passes
    assert metrics["cost/teacher_positions"] == env.teacher_usage.positions


def test_grades_and_rewritten_reasoning_steps_are_counted() -> None:
    """If the teacher writes whole reasoning steps, a completion has more tokens than actions, and it is right."""
    agent = SB3Agent(sums_student(), SB3Config(batch_size=16))
    with torch.no_grad():
        agent.heads.get_parameter("rewrite.bias").fill_(30.0)  # always hand over
    env = DistillVectorEnv(16, "sums", "sums", rewrite_span="step", autoreset_mode="SameStep", max_new_tokens=21)
    logged: list[Metrics] = []
    agent.learn(env, 1, lambda _, metrics: logged.append(metrics))
    assert logged[0]["rollout/grade"] > 0.9
    assert logged[0]["rollout/rewritten_share"] == 1.0
    assert logged[0]["rollout/tokens"] > 16 * 21  # more than a token an action
    assert 6 <= logged[0]["rollout/length"] <= 15


def test_it_trains_through_a_wrapper() -> None:
    """Tokens that the teacher finds implausible are rewritten, although the policy does not take REWRITE."""
    agent = SB3Agent(one_state(SKEWED.flip(1)), SB3Config(batch_size=8))
    with torch.no_grad():
        agent.heads.rewrite.weight.fill_(-9.0)
    logged: list[Metrics] = []
    env = RewriteImplausible(table_env(one_state(SKEWED), rows=8), top_k=2)
    agent.learn(env, 1, lambda _, metrics: logged.append(metrics))
    assert logged[0]["rollout/rewritten_share"] > 0.6  # two likeliest tokens of five
    assert 0 < logged[0]["train/entropy"] <= math.log(6)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"autoreset_mode": "Disabled"}, "autoreset_mode is Disabled"),
        ({"chunk": 2}, "chunk is 2"),
        ({"observation": "float"}, "'float'"),
    ],
)
def test_another_environment_is_an_error_of_one_line(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^env: .*{named}") as error:
        SB3Agent(uniform(5), SB3Config()).learn(table_env(markov(5), 4, **arguments), 1)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^student: 4 .* 5$"):
        SB3Agent(uniform(4), SB3Config()).learn(table_env(markov(5), 4), 1)


def test_nan_is_an_error_that_names_the_iteration() -> None:
    student = uniform(5)
    with torch.no_grad():
        student.table[1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"^iteration 1: "):
        SB3Agent(student, SB3Config(batch_size=16)).learn(table_env(markov(5), 16), 1)


@pytest.mark.parametrize(
    "bad",
    [
        {"algorithm": "dqn"},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"gamma": 1.5},
        {"ent_coef": float("nan")},
        {"n_epochs": 0},
    ],
)
def test_a_bad_option_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SB3Config(**bad)


def test_a_batch_that_does_not_divide_is_split_into_fewer() -> None:
    """Stable-Baselines3 would warn of a truncated minibatch."""
    SB3Agent(uniform(5), SB3Config(batch_size=5, minibatches=8)).learn(table_env(markov(5), 5, max_new_tokens=1), 1)


def test_features_are_those_of_the_tokens_whatever_their_dtype() -> None:
    """Stable-Baselines3 casts observations to float32."""
    observation = torch.tensor(states([[7, 10, 2, 11], [1]]))
    student = sums_student()
    assert torch.equal(state_features(student, observation), state_features(student, observation.float()))
