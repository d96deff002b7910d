"""The metrics, each against its definition; and answers that are measured as they were written."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tables import at

from agents.config import DistillConfig
from agents.distill import DistillAgent
from agents.evaluation import (
    Answer,
    answer_metrics,
    corpus_perplexity,
    distinct_n,
    evaluate,
    pass_at_k,
    perplexity,
    write_answers,
)
from agents.methods import METHODS
from distill_env.divergence import entropy, reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.models.load import build_model
from distill_env.models.tabular import markov
from distill_env.tasks import Grade, Prompt


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (8, 3, 8), (8, 7, 2)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, c: int, k: int) -> None:
    """By enumeration of all draws of k answers without replacement."""
    draws = list(itertools.combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(i < c for i in draw) for draw in draws]))


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(ValueError, match="k: 3; accepted: 1 to the number of samples, 2"):
        pass_at_k(2, 1, 3)


def test_distinct_n_counts_n_grams() -> None:
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # 12, 21, 12, 12
    assert math.isnan(distinct_n([[1]], 2))


def graded(prompt: int, tokens: list[int], right: bool, way: str | None = None, difficulty: int = 1) -> Answer:
    n = len(tokens)
    return Answer(
        Prompt((prompt,), "", difficulty),
        tokens,
        [-1.0] * n,
        [-2.0] * n,
        [0.5] * n,
        [0.25 * i for i in range(n)],
        Grade(float(right), right, right, way),
        ended=right,
    )


def test_metrics_of_answers_that_one_can_count() -> None:
    answers = [
        graded(0, [1, 2], True, "a"),
        graded(0, [2, 1], True, "b"),
        graded(0, [1, 2], True, "a"),
        graded(7, [3, 3], False, difficulty=2),
        graded(7, [3, 3], False, difficulty=2),
        graded(7, [3, 3], False, difficulty=2),
    ]
    metrics = answer_metrics(answers, tau=0.25)
    assert metrics["accuracy"] == metrics["correct_chains"] == metrics["pass@3"] == metrics["ended"] == 0.5
    assert metrics["correct_chains/1"] == 1
    assert metrics["correct_chains/2"] == 0
    assert metrics["distinct_ways"] == 1  # two ways to the one prompt, none to the other
    assert metrics["collapse"] == 0.5
    assert metrics["hard_share"] == 0.5  # D_t = 0 and 0.25, and 0.25 is hard
    assert metrics["divergence"] == 0.125
    assert metrics["length"] == 2
    assert perplexity(answers) == pytest.approx(math.e)


def test_metrics_of_a_task_that_cannot_check_steps() -> None:
    """Final values take the place of chains; what the grader gave up is told."""
    answers = [graded(0, [1], True), graded(0, [2], False), graded(7, [3], False, difficulty=2), graded(7, [3], True)]
    for answer in answers:
        assert answer.grade is not None
        answer.grade = replace(answer.grade, chain_correct=None, undecided=answer is answers[1])
    metrics = answer_metrics(answers, tau=0.25)
    assert metrics["accuracy"] == 0.5
    assert metrics["pass@2"] == 1
    assert metrics["accuracy/1"] == pytest.approx(2 / 3)
    assert metrics["accuracy/2"] == 0
    assert metrics["undecided"] == 0.25
    assert not {k for k in metrics if k.startswith("correct_chains")}


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (5, 1), (5, 3), (5, 4), (11, 10), (20, 1), (40, 7)])
def test_the_perplexity_of_a_corpus_counts_every_token_once(window: int, stride: int) -> None:
    """On a table that sees one token back every window has the context it needs: all agree with a walk by hand."""
    model, ids = markov(5, seed=1), np.random.default_rng(0).integers(0, 4, 20).tolist()
    scored: list[int] = []
    value = corpus_perplexity(model, ids, window, stride, scored.append)
    expected = -np.mean([float(at(model, [a]).detach()[b]) for a, b in itertools.pairwise(ids)])
    assert math.log(value) == pytest.approx(expected, rel=1e-6)
    assert sum(scored) == 19


def test_the_perplexity_of_a_corpus_is_transformers_loss() -> None:
    """One window over all, and windows whose contexts are cut as they say."""
    model = build_model("sums")
    ids = [7, 10, 2, 11, 7, 7, 12, 2, 9, 13, 1, 10, 4, 11, 4, 4]
    with torch.no_grad():
        whole = model.model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        losses = [
            model.model(input_ids=torch.tensor([ids[max(0, t - 7) : t]])).logits[0, -1].log_softmax(-1)[ids[t]]
            for t in range(1, 16)
        ]
    assert math.log(corpus_perplexity(model, ids, 16, 8)) == pytest.approx(float(whole), rel=1e-4)
    assert math.log(corpus_perplexity(model, ids, 8, 1)) == pytest.approx(-float(torch.stack(losses).mean()), rel=1e-4)


def test_windows_that_cannot_be_are_named() -> None:
    model = build_model("sums")
    with pytest.raises(ValueError, match="window: 65; accepted: at least 2, and at most the model's context of 64"):
        corpus_perplexity(model, [1, 2, 3], 65, 8)
    with pytest.raises(ValueError, match="stride: 8; accepted: 1 to 7, less than the window"):
        corpus_perplexity(model, [1, 2, 3], 8, 8)
    with pytest.raises(ValueError, match="ids: 1 tokens; accepted: at least 2"):
        corpus_perplexity(model, [1], 8, 4)


def agent_like(student: Any) -> DistillAgent:
    return DistillAgent(student, DistillConfig(method=METHODS["rkl"]))


def test_what_is_measured_is_what_the_models_say() -> None:
    """Every answer walked again by hand through both tables."""
    student, teacher = markov(5, seed=1), markov(5, seed=2)
    env = DistillVectorEnv(7, "categorical", teacher, task_kwargs={"vocab_size": 5}, autoreset_mode="Disabled")
    answers = write_answers(agent_like(student), env, [env.prompts[i % 4] for i in range(23)], seed=3)
    assert len(answers) == 23
    for answer in answers:
        history = list(answer.prompt.ids)
        for t, token in enumerate(answer.tokens):
            q, p = at(student, history).detach(), at(teacher, history).detach()
            assert answer.log_probs[t] == pytest.approx(float(q[token]))
            assert answer.teacher_log_probs[t] == pytest.approx(float(p[token]), rel=1e-5)
            assert answer.entropies[t] == pytest.approx(float(entropy(q)))
            assert answer.divergences[t] == pytest.approx(float(reverse_kl(q, p)), rel=1e-4)
            history.append(token)
        assert answer.ended == (answer.tokens[-1] == 4)
        assert answer.ended or len(answer.tokens) == env.max_new_tokens


def test_a_student_that_is_the_teacher_has_its_entropy_as_perplexity() -> None:
    """And no divergence: log perplexity on the teacher's own answers is their mean entropy, here of many answers."""
    teacher = markov(5, seed=2)
    env = DistillVectorEnv(256, "categorical", teacher, task_kwargs={"vocab_size": 5}, autoreset_mode="Disabled")
    metrics, answers = evaluate(agent_like(teacher.fork()), env, [env.prompts[i % 4] for i in range(2048)], 1, 0.5, 0)
    assert metrics["divergence"] < 1e-6
    assert metrics["hard_share"] == 0
    spread = np.std([x for a in answers for x in a.log_probs]) / math.sqrt(sum(len(a.tokens) for a in answers))
    assert math.log(metrics["perplexity"]) == pytest.approx(metrics["entropy"], abs=6 * spread)


def test_the_teacher_alone_writes_by_its_own_law() -> None:
    """The share of each first token, against the table; within five standard errors."""
    teacher, n = markov(5, seed=2), 4000
    env = DistillVectorEnv(500, "categorical", teacher, task_kwargs={"vocab_size": 5}, autoreset_mode="Disabled")
    answers = write_answers(None, env, [env.prompts[1]] * n, seed=0, teacher_writes=True)
    share = torch.bincount(torch.tensor([a.tokens[0] for a in answers]), minlength=5) / n
    expected = at(teacher, [1]).exp().detach()
    assert bool(((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all())
