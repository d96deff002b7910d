"""The metrics, each against its definition; and answers that are measured as they were written."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agents.config import DistillConfig
from agents.distill import DistillAgent
from agents.evaluation import completion_metrics, evaluate, forward_kl_by_prompt
from agents.generation import Completion, generate, hard_positions
from agents.likelihood import corpus_perplexity, reference_log_probs
from agents.methods import METHODS
from distill_env.divergence import entropy, forward_kl, reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import Gate
from distill_env.models.load import build_model
from distill_env.models.tabular import markov, uniform
from distill_env.tasks.base import Grade, Prompt
from tests.helpers.tables import at


def graded(prompt: int, tokens: list[int], right: bool, way: str | None = None, difficulty: int = 1) -> Completion:
    n = len(tokens)
    return Completion(
        Prompt((prompt,), "", difficulty),
        tokens,
        [-1.0] * n,
        [-2.0] * n,
        [0.5] * n,
        [0.5 * i for i in range(n)],
        hard=[i == 1 for i in range(n)],
        grade=Grade(float(right), right, right, way),
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
    metrics = completion_metrics(answers)
    assert metrics["accuracy"] == metrics["correct_chains"] == metrics["pass@3"] == metrics["ended"] == 0.5
    assert metrics["correct_chains/1"] == 1
    assert metrics["correct_chains/2"] == 0
    assert metrics["distinct_ways"] == 1  # two ways to the one prompt, none to the other
    assert metrics["collapse"] == 0.5
    assert metrics["hard_share"] == 0.5  # the second of two tokens
    assert metrics["high_divergence_share"] == 0.5  # D_t = 0 and 0.5, and 0.5 is high
    assert metrics["divergence"] == 0.25
    assert metrics["length"] == 2
    assert metrics["hard_share_quarter/1"] == 0  # the first of two tokens
    assert metrics["hard_share_quarter/3"] == 1
    assert metrics["hard_share/1"] == metrics["hard_share/2"] == 0.5
    assert metrics["distinct_answers"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert metrics["pass@1"] == metrics["pass@2"] == 0.5
    assert not {k for k in metrics if k.startswith("majority")}  # right answers without a vote: no values are named


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (Gate(tau=1.0), [False, True, True, True]),
        (Gate(tau=1.0, hand_over_rest=True), [False, True, False, False]),  # nothing is scored after a hand-over
        (Gate("rank", 2.0), [True, False, False, True]),  # a threshold in ranks, not in nats of D_t
        (Gate(tau=1.5, step_reduction="mean"), [False, False, True, True]),
    ],
)
def test_what_is_hard_is_what_the_gate_finds_hard(gate: Gate, expected: list[bool]) -> None:
    """Read along a completion of four tokens, the second of which ends a reasoning step."""
    scores = [2.0, 1.0, 0.0, 3.0] if gate.score == "rank" else [0.5, 1.25, 1.75, 2.0]
    completion = Completion(Prompt((0,), ""), [1, 2, 3, 1], scores=scores)
    assert hard_positions(gate, completion, frozenset({2})) == expected


def test_metrics_of_a_task_that_cannot_check_steps() -> None:
    """Final values take the place of chains; what the grader gave up is told."""
    answers = [graded(0, [1], True), graded(0, [2], False), graded(7, [3], False, difficulty=2), graded(7, [3], True)]
    for answer in answers:
        assert answer.grade is not None
        answer.grade = replace(answer.grade, chain_correct=None, undecided=answer is answers[1])
    metrics = completion_metrics(answers)
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


def test_every_window_of_a_corpus_begins_with_the_opening() -> None:
    """And the first token of the text has a context then."""
    model, opening = build_model("sums"), [13]
    ids = [7, 10, 2, 11, 7, 7, 12, 2, 9, 13, 1, 10, 4, 11, 4, 4]
    with torch.no_grad():
        losses = [
            model.model(input_ids=torch.tensor([[*opening, *ids[max(0, t - 6) : t]]])).logits[0, -1].log_softmax(-1)[i]
            for t, i in enumerate(ids)
        ]
    scored: list[int] = []
    value = corpus_perplexity(model, ids, 8, 1, scored.append, opening)
    assert math.log(value) == pytest.approx(-float(torch.stack(losses).mean()), rel=1e-4)
    assert sum(scored) == len(ids)


def test_windows_that_cannot_be_are_named() -> None:
    model = build_model("sums")
    with pytest.raises(ValueError, match=r"^window: 65"):
        corpus_perplexity(model, [1, 2, 3], 65, 8)
    with pytest.raises(ValueError, match=r"^stride: 8"):
        corpus_perplexity(model, [1, 2, 3], 8, 8)
    with pytest.raises(ValueError, match=r"^ids: 1"):
        corpus_perplexity(model, [1], 8, 4)


def test_references_are_read_as_far_as_the_context_goes() -> None:
    """Each as if it were alone; one that exceeds the 64 tokens is cut, one that could not begin is left out."""
    model = build_model("sums")
    prompts = [
        Prompt((7, 10, 2, 11), "", reference_completion=(7, 7, 12, 2, 9, 13)),
        Prompt((7, 10, 2, 11), ""),
        Prompt((3, 11), "", reference_completion=(5,) * 70),
        Prompt((3,) * 64, "", reference_completion=(5, 13)),
        Prompt((1, 10, 1, 11), "", reference_completion=(1, 1, 12, 1, 2, 13)),
    ]
    found = reference_log_probs(model, prompts, rows=2)
    assert [len(f) for f in found] == [6, 62, 6]
    for prompt, log_probs in zip([prompts[0], prompts[2], prompts[4]], found, strict=True):
        ids = [*prompt.ids, *(prompt.reference_completion or ())][:64]
        with torch.no_grad():
            rows = model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(rows[t - 1, ids[t]]) for t in range(len(prompt.ids), len(ids))]
        assert log_probs == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("task", ["sums", "coins"])
def test_an_evaluation_of_a_small_task_by_itself(task: str) -> None:
    """The teacher as student: perplexities, gap and votes against what its answers say."""
    teacher = build_model(task)
    env = DistillVectorEnv(64, task, task, autoreset_mode="Disabled")
    prompts = list(env.prompts[:32])
    metrics, answers, teachers = evaluate(agent_like(teacher), env, prompts, 4, 0)
    assert len(answers) == 4 * len(teachers) == 128
    assert abs(metrics["exposure_gap"]) < 1e-3
    assert 1 < metrics["reference_perplexity"] < 3
    assert metrics["majority@1"] == pytest.approx(metrics["accuracy"])
    assert metrics["majority@4"] >= metrics["accuracy"] > 0.9
    assert metrics["pass@1"] == pytest.approx(metrics["correct_chains"])
    assert metrics["pass@1"] <= metrics["pass@2"] <= metrics["pass@4"]
    assert metrics["steps"] == pytest.approx(metrics["length"] / 3)  # a step is three tokens
    assert 0 < metrics["self_bleu"] <= 1
    assert all(a.grade is not None and (a.grade.final_value is not None or not a.grade.correct) for a in answers)


def agent_like(student: Any) -> DistillAgent:
    return DistillAgent(student, DistillConfig(method=METHODS["rkl"]))


def test_what_is_measured_is_what_the_models_say() -> None:
    """Every answer walked again by hand through both tables."""
    student, teacher = markov(5, seed=1), markov(5, seed=2)
    env = DistillVectorEnv(7, "categorical", teacher, task_kwargs={"vocab_size": 5}, autoreset_mode="Disabled")
    answers = generate(agent_like(student), env, [env.prompts[i % 4] for i in range(23)], seed=3)
    assert len(answers) == 23
    for answer in answers:
        history = list(answer.prompt.ids)
        for t, token in enumerate(answer.tokens):
            q, p = at(student, history).detach(), at(teacher, history).detach()
            assert answer.log_probs[t] == pytest.approx(float(q[token]))
            assert answer.teacher_log_probs[t] == pytest.approx(float(p[token]), rel=1e-5)
            assert answer.entropies[t] == pytest.approx(float(entropy(q)))
            assert answer.divergences[t] == pytest.approx(float(reverse_kl(q, p)), rel=1e-4)
            assert answer.forward_kls[t] == pytest.approx(float(forward_kl(q, p)), rel=1e-4)
            history.append(token)
        assert answer.ended == (answer.tokens[-1] == 4)
        assert answer.ended or len(answer.tokens) == env.max_new_tokens


def test_a_student_that_is_the_teacher_has_its_entropy_as_perplexity() -> None:
    """And no divergence: log perplexity on the teacher's own answers is their mean entropy, here of many answers."""
    teacher = markov(5, seed=2)
    env = DistillVectorEnv(256, "categorical", teacher, task_kwargs={"vocab_size": 5}, autoreset_mode="Disabled")
    prompts = [env.prompts[i % 4] for i in range(2048)]
    metrics, answers, _ = evaluate(agent_like(teacher.fork()), env, prompts, 1, 0, Gate(tau=0.5))
    assert metrics["divergence"] < 1e-6
    assert metrics["hard_share"] == 0
    spread = np.std([x for a in answers for x in a.log_probs]) / math.sqrt(sum(len(a.tokens) for a in answers))
    assert math.log(metrics["perplexity"]) == pytest.approx(metrics["entropy"], abs=6 * spread)


def test_the_forward_kl_is_that_of_whole_completions() -> None:
    """KL(teacher || student) of completions is the mean of log p - log q over the teacher's; here of many of them."""
    student, teacher = markov(5, seed=1), markov(5, seed=2)
    env = DistillVectorEnv(256, "categorical", teacher, task_kwargs={"vocab_size": 5}, autoreset_mode="Disabled")
    metrics, _, written = evaluate(agent_like(student), env, [env.prompts[1]] * 2048, 1, 0)
    per_token = forward_kl_by_prompt(written)
    assert metrics["forward_kl"] == pytest.approx(np.mean(per_token))
    whole = [mean * len(c.tokens) for mean, c in zip(per_token, written, strict=True)]
    ratios = [sum(c.teacher_log_probs) - sum(c.log_probs) for c in written]
    assert np.mean(whole) == pytest.approx(
        np.mean(ratios), abs=5 * np.std(np.subtract(whole, ratios)) / math.sqrt(2048)
    )


def test_the_teacher_alone_writes_by_its_own_law() -> None:
    """The share of each first token, against the table; within five standard errors."""
    teacher, n = markov(5, seed=2), 4000
    env = DistillVectorEnv(500, "categorical", teacher, task_kwargs={"vocab_size": 5}, autoreset_mode="Disabled")
    answers = generate(None, env, [env.prompts[1]] * n, seed=0, teacher_writes=True)
    share = torch.bincount(torch.tensor([a.tokens[0] for a in answers]), minlength=5) / n
    expected = at(teacher, [1]).exp().detach()
    assert bool(((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all())


class AlwaysAsks(DistillAgent):
    """With its teacher on call it lets it write everything."""

    def act_on_call(self, observation: Any, info: Any = None) -> Any:
        return np.full(len(observation), self.student.vocab_size)


def test_with_the_teacher_on_call_an_agent_is_evaluated_apart() -> None:
    """A student that knows nothing is wrong alone, and right where the teacher of Sums writes for it."""
    env = DistillVectorEnv(16, "sums", "sums", autoreset_mode="Disabled")
    agent = AlwaysAsks(uniform(env.vocab_size), DistillConfig(method=METHODS["rkl"]))
    metrics, _, _ = evaluate(agent, env, list(env.prompts[:20]), 2, 0)
    assert metrics["on_call/teacher_share"] == 1
    assert metrics["on_call/correct_chains"] > 0.8
    assert metrics["correct_chains"] < 0.1
    alone, _, _ = evaluate(agent_like(agent.student), env, [env.prompts[0]], 1, 0)
    assert not any(key.startswith("on_call") for key in alone)
