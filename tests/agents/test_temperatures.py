"""Temperatures: of the student's draws, of the teacher's, and in the loss; each changes that and nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.collector import collect
from agents.config import DistillConfig
from agents.distill import DistillAgent
from agents.losses import exact_loss
from agents.methods import METHODS, Method, variant
from agents.rollout import Rollout
from distill_env.divergence import forward_kl, reverse_kl
from distill_env.env import DistillEnv, DistillVectorEnv
from distill_env.gate_settings import ALWAYS, NEVER, Gate
from distill_env.models.tabular import TabularModel, markov
from distill_env.randomness import episode_keys
from tests.helpers.tables import Ragged, at, perturbed

V, HORIZON = 8, 9
TEACHER = markov(V, order=2, seed=4, sharpness=1.5)
STUDENT = perturbed(TEACHER, 1.0)


def at_temperature(model: TabularModel, temperature: float) -> TabularModel:
    """The model whose distributions are those of another at this temperature."""
    return TabularModel(model.next_state, model.table.detach() / temperature, model.eos_token_id)


def write(
    gate: Gate, student: Any = STUDENT, teacher: Any = TEACHER, temperature: float = 1.0, length: int = 4, **kwargs: Any
) -> Rollout:
    env = DistillVectorEnv(4, Ragged(V, HORIZON), teacher, chunk=8, autoreset_mode="Disabled", **kwargs)
    prompts = list(env.prompts) * 3
    keys = episode_keys(0, np.arange(len(prompts)))
    return collect(env, student, prompts, keys, gate, length, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize("length", [1, 4])
def test_the_student_draws_as_one_with_these_distributions(temperature: float, length: int) -> None:
    """Token for token, from the same random numbers; rewards and log q are those at 1."""
    hot = write(NEVER, temperature=temperature, length=length)
    expected = write(NEVER, student=at_temperature(STUDENT, temperature), length=length)
    assert hot.tokens.equal(expected.tokens)
    assert not hot.tokens.equal(write(NEVER).tokens)
    assert hot.rewards.equal(expected.rewards)
    for i, prompt in enumerate(hot.prompts):
        tokens = hot.tokens[i][hot.mask[i]].tolist()
        log_q = [at(STUDENT, (*prompt.ids, *tokens[:t])).detach()[x] for t, x in enumerate(tokens)]
        torch.testing.assert_close(hot.token_log_prob[i][hot.mask[i]], torch.stack(log_q))


@pytest.mark.parametrize("gate", [Gate(tau=0.4), Gate("student_entropy", 1.2)], ids=["verified", "alone"])
def test_the_gate_reads_the_students_distribution_at_1(gate: Gate) -> None:
    rollout = write(gate, temperature=2.0)
    assert bool(rollout.rewritten.any())
    for i, prompt in enumerate(rollout.prompts):
        tokens = rollout.tokens[i][rollout.mask[i]].tolist()
        for t, score in enumerate(rollout.score[i][rollout.mask[i]].tolist()):
            log_q, log_p = (at(m, (*prompt.ids, *tokens[:t])).detach() for m in (STUDENT, TEACHER))
            expected = reverse_kl(log_q, log_p) if gate.reads_teacher else -(log_q.exp() * log_q).sum()
            assert score == pytest.approx(float(expected))


@pytest.mark.parametrize("kwargs", [{}, {"rewrite": "nucleus", "rewrite_top_p": 0.6}, {"rewrite_span": "step"}])
def test_the_teacher_draws_as_one_with_these_distributions(kwargs: dict[str, Any]) -> None:
    """In a batch and in the plain numbers of one row; the environment pays the student's tokens at 1."""
    hot = write(ALWAYS, rewrite_temperature=0.4, **kwargs)
    expected = write(ALWAYS, teacher=at_temperature(TEACHER, 0.4), **kwargs)
    assert hot.tokens.equal(expected.tokens)
    assert not hot.tokens.equal(write(ALWAYS, **kwargs).tokens)
    mixed = write(Gate(tau=0.4), rewrite_temperature=0.4, **kwargs)
    own = mixed.mask & ~mixed.rewritten
    assert bool(own.any())
    for i, t in own.nonzero().tolist():
        tokens = mixed.tokens[i, : t + 1].tolist()
        log_p = at(TEACHER, (*mixed.prompts[i].ids, *tokens[:t])).detach()
        assert float(mixed.rewards[i, t]) == pytest.approx(float(log_p[tokens[t]]))
    one = DistillEnv(task=Ragged(V, HORIZON), teacher=TEACHER, rewrite_temperature=0.4, **kwargs)
    batch = DistillVectorEnv(
        1, Ragged(V, HORIZON), TEACHER, rewrite_temperature=0.4, autoreset_mode="Disabled", **kwargs
    )
    for seed in range(4):
        one.reset(seed=seed)
        batch.reset(seed=seed)
        assert one.step(V)[4]["tokens"].tolist() == batch.step(np.array([V]))[4]["tokens"][0].tolist()


def logits(seed: int) -> Tensor:
    return torch.randn(5, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).requires_grad_()


def loss_of(method: Method, student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return exact_loss(method, log_q, log_p, log_q[:, 0], torch.full((5,), 0.3, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("loss", ["forward", "reverse", "weighted"])
def test_the_loss_is_that_of_the_softened_logits_times_the_square(temperature: float, loss: str) -> None:
    """Value and gradient in the student's logits."""
    student, teacher = logits(0), logits(1).detach()
    method = Method(teacher_writes="never", loss=loss, loss_temperature=temperature)  # type: ignore[arg-type]
    q, p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    parts = {"forward": forward_kl(q, p), "reverse": reverse_kl(q, p)}
    parts["weighted"] = 0.3 * parts["reverse"] + 0.7 * parts["forward"]
    actual, expected = loss_of(method, student, teacher), temperature**2 * parts[loss]
    torch.testing.assert_close(actual, expected)
    gradient, by_hand = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (actual, expected))
    torch.testing.assert_close(gradient, by_hand)


@pytest.mark.parametrize("loss", ["forward", "reverse"])
def test_at_a_high_temperature_logits_are_matched(loss: str) -> None:
    """Hinton et al. 2015, equation 4: the gradient goes to (z_i - v_i) / V for logits without their means."""
    student, teacher = logits(0), logits(1).detach()
    method = Method(teacher_writes="never", loss=loss, loss_temperature=1e4)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss_of(method, student, teacher).sum(), student)
    difference = (student - teacher).detach()
    expected = (difference - difference.mean(-1, keepdim=True)) / V
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-3)


def test_clipping_is_of_the_scaled_loss() -> None:
    method = Method(teacher_writes="never", loss="forward", loss_temperature=2.0, loss_clip=0.5)
    assert float(loss_of(method, logits(0), logits(1)).detach().max()) <= 0.5 + 1e-12


@pytest.mark.parametrize(
    ("name", "row", "fields"),
    [
        ("temperature", "gated", {"temperature": 0.7, "gamma": 1.0}),
        ("temperature", "rkl", {"temperature": 0.7, "estimator": "sampled"}),
        ("temperature", "minillm", {"temperature": 0.7}),
        ("temperature", "negative", {"temperature": 0.7}),
        ("loss_temperature", "sft", {"loss_temperature": 2.0}),
        ("loss_temperature", "gated", {"loss_temperature": 2.0, "top_k": 4}),
        ("loss_temperature", "gated", {"loss_temperature": 2.0, "top_p": 0.9}),
        ("loss_temperature", "rkl", {"loss_temperature": 2.0, "estimator": "sampled"}),
        ("temperature", "gated", {"temperature": 0.0}),
        ("loss_temperature", "gated", {"loss_temperature": math.inf}),
    ],
)
def test_where_sampling_and_loss_would_differ_it_is_refused(name: str, row: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: ") as error:
        variant(METHODS[row], **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("row", ["minillm", "fkl"])
def test_a_teacher_at_another_temperature_gives_no_score_function(row: str) -> None:
    method = METHODS[row] if row == "minillm" else variant(METHODS[row], estimator="sampled")
    env = DistillVectorEnv(4, Ragged(V, HORIZON), TEACHER, chunk=4, autoreset_mode="Disabled", rewrite_temperature=0.5)
    with pytest.raises(ValueError, match="rewrite_temperature"):
        DistillAgent(perturbed(TEACHER, 1.0), DistillConfig(method, batch_size=4)).learn(env, 1)
