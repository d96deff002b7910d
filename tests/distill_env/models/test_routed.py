"""Several teachers: every completion is that of its own teacher, and each has its costs."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agents.collector import collect
from agents.config import DistillConfig
from agents.distill import DistillAgent
from agents.methods import METHODS
from agents.rollout import Rollout
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import Gate
from distill_env.models.routed import RoutedModel
from distill_env.models.tabular import markov
from distill_env.randomness import episode_keys
from distill_env.tasks.base import Prompt, Split
from experiments.running.summary import summarise_training
from tests.helpers.servers import CompletionsServer
from tests.helpers.tables import Ragged, at, perturbed

V, HORIZON, N = 8, 9, 14
TEACHERS = {"a": markov(V, order=2, seed=4, sharpness=1.5), "b": markov(V, order=1, seed=9, sharpness=1.5)}
STUDENT = perturbed(TEACHERS["a"], 1.0)


class Named(Ragged):
    """Every third prompt names b, and b's prompts have a token more for it."""

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        every = enumerate(super().prompts(split))
        b = {"teacher": "b", "teacher_ids": (3, 3)}
        return tuple(replace(p, **b) if i % 3 == 1 else replace(p, teacher="a") for i, p in every)  # type: ignore[arg-type]


def make_env(teacher: Any, rows: int = 5, **kwargs: Any) -> DistillVectorEnv:
    return DistillVectorEnv(rows, Named(V, HORIZON), teacher, chunk=8, autoreset_mode="Disabled", **kwargs)


def write(env: DistillVectorEnv, only: str = "", top_k: int = 0) -> Rollout:
    """Completions of all prompts, or of those of one teacher, with the same keys."""
    prompts = [env.prompts[i % len(env.prompts)] for i in range(N)]
    keys = episode_keys(0, np.arange(N))
    chosen = [i for i in range(N) if only in ("", prompts[i].teacher)]
    return collect(env, STUDENT, [prompts[i] for i in chosen], keys[chosen], Gate(tau=0.5), 4, top_k)


def test_each_teacher_reads_and_writes_as_alone_and_has_its_own_costs() -> None:
    """Rows are refilled with prompts of another teacher; tokens, scores and costs are those of runs with one."""
    env = make_env(TEACHERS)
    both = write(env)
    assert bool(both.rewritten.any())
    for name, teacher in TEACHERS.items():
        own = make_env(teacher, rows=2)
        alone = write(own, only=name)
        rows = [i for i, p in enumerate(both.prompts) if p.teacher == name]
        longest = alone.tokens.shape[1]
        assert both.tokens[rows, :longest].equal(alone.tokens)
        assert both.rewritten[rows, :longest].equal(alone.rewritten)
        torch.testing.assert_close(both.score[rows, :longest], alone.score, rtol=0, atol=1e-12, equal_nan=True)
        assert env.teacher_usage_by_name[name].tokens == own.teacher_usage.tokens == int(alone.rewritten.sum())
    for what in ("positions", "tokens"):
        parts = [getattr(usage, what) for usage in env.teacher_usage_by_name.values()]
        assert sum(parts) == getattr(env.teacher_usage, what)
        assert min(parts) > 0


@pytest.mark.parametrize("top_k", [0, 2])
def test_one_may_be_served(top_k: int) -> None:
    """With all ids it is as if it were local; with its likeliest ones, divergences of both are truncated alike."""
    with CompletionsServer(TEACHERS["b"]) as server:
        arguments = {"vocab_size": V, "eos_token_id": V - 1, "top_k": top_k}
        env = make_env({"a": TEACHERS["a"], "b": server.url}, teacher_kwargs={"b": arguments})
        mixed = write(env, top_k=top_k)
        assert env.teacher_top_k == top_k
        assert {len(r["prompt"]) for r in server.requests if not isinstance(r["prompt"][0], list)} >= {2}
        env.teacher.teachers["b"].close()  # type: ignore[attr-defined]
    local = write(make_env(TEACHERS), top_k=top_k)
    if top_k == 0:
        assert mixed.tokens.equal(local.tokens)
        assert mixed.rewritten.equal(local.rewritten)
    else:
        assert mixed.teacher is not None
        assert mixed.teacher.shape[1] == top_k + 1


def test_a_row_goes_from_one_teacher_to_another() -> None:
    """Rows that are started, extended, cut and given up in turn say what the model that they belong to says."""
    routed = RoutedModel({name: teacher.fork() for name, teacher in TEACHERS.items()})
    rng = np.random.default_rng(0)
    names = rng.choice(["a", "b"], 4).tolist()
    written: list[list[int]] = [[i] for i in range(4)]
    routed.start(written, None, names)
    for _ in range(60):
        row = int(rng.integers(4))
        if rng.random() < 0.4:
            names[row], written[row] = str(rng.choice(["a", "b"])), rng.integers(0, V, 2).tolist()
            (log_probs,) = routed.start([written[row]], [row], [names[row]])
            torch.testing.assert_close(log_probs, at(TEACHERS[names[row]], written[row]).detach())
            lengths = [0 if i == row else len(written[i]) for i in range(4)]
            routed.rewind(lengths)
        tokens = torch.full((4, 2), -1)
        tokens[row, : rng.integers(1, 3)] = 2
        after = routed.extend(tokens)
        for j, token in enumerate(t for t in tokens[row].tolist() if t >= 0):
            written[row].append(token)
            torch.testing.assert_close(after[row, j], at(TEACHERS[names[row]], written[row]).detach())


def test_metrics_and_summary_have_the_costs_of_each() -> None:
    """Per iteration and in total; together they are those of all teachers."""
    env, seen = make_env(TEACHERS), list[dict[str, float]]()
    agent = DistillAgent(perturbed(TEACHERS["a"], 1.0), DistillConfig(METHODS["gated"], batch_size=7, draft_length=3))
    agent.learn(env, 2, lambda _, metrics: seen.append(metrics))
    training = summarise_training(seen)
    for what in ("positions", "tokens"):
        for row in seen:
            parts = [row[f"cost/teacher_{what}/{name}"] for name in TEACHERS]
            assert sum(parts) == row[f"cost/teacher_{what}"]
        for name, usage in env.teacher_usage_by_name.items():
            assert training[f"teacher_{what}/{name}"] == getattr(usage, what)


@pytest.mark.parametrize("name", ["", "c"])
def test_a_prompt_must_name_a_teacher(name: str) -> None:
    class Wrong(Named):
        def prompts(self, split: Split) -> tuple[Prompt, ...]:
            first, *rest = super().prompts(split)
            return replace(first, teacher=name), *rest

    with pytest.raises(ValueError, match=r"teacher: .*a, b") as error:
        DistillVectorEnv(2, Wrong(V, HORIZON), TEACHERS)
    assert "\n" not in str(error.value)
    env = make_env(TEACHERS)
    with pytest.raises(ValueError, match="teacher"):
        env.reset(options={"prompts": [Prompt((1,), "", teacher=name)] * 5})


def test_teachers_have_the_same_ids() -> None:
    with pytest.raises(ValueError, match="teacher"):
        RoutedModel({"a": markov(5), "b": markov(6)})


def test_a_copied_environment_goes_on_alike() -> None:
    """Also after pickling, which loads the teachers again."""
    env = make_env(TEACHERS, reveal_teacher=False)
    env.reset(seed=3)
    env.step(np.full((5, 2), env.rewrite_action))
    twin = pickle.loads(pickle.dumps(env))
    for actions in (np.full((5, 1), 2), np.full((5, 1), env.rewrite_action)):
        rewards, expected = twin.step(actions)[1], env.step(actions)[1]
        np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-12)
    assert twin.teacher_usage_by_name["a"].tokens == env.teacher_usage_by_name["a"].tokens
