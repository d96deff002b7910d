"""Losses of the agent: their gradients, their expectations, their optima."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agents.losses import (
    akl,
    cost_to_go,
    exact_loss,
    gated_dual_kl,
    imitation_loss,
    importance_weight,
    leave_one_out_baseline,
    length_normalized,
    negative_advantage,
    policy_gradient_loss,
    todi,
)
from agents.methods import Method, method, variant
from distill_env.divergence import forward_kl, jensen_shannon, reverse_kl, skew_forward_kl, skew_reverse_kl

M, V = 12, 5


def states(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of students, with gradient, and log-probabilities of teachers, float64 [M, V] each."""
    logits, teacher = torch.randn(2, M, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.requires_grad_(), teacher.log_softmax(-1)


def slope(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]


def test_gradient_of_the_gated_dual_kl() -> None:
    """It is lambda RKL' + (1 - lambda) FKL' with lambda held fixed: moving the gate gives none. Against the formulas in
    the logits and against finite differences, though lambda comes from the student, gradient and all."""
    logits, teacher = states()
    student = logits.log_softmax(-1)
    q, p = student.exp(), teacher.exp()
    d = reverse_kl(student, teacher)[:, None]
    weight = torch.sigmoid(4.0 * (0.5 - d))  # with gradient
    formula = weight * q * (student - teacher - d) + (1 - weight) * (q - p)
    actual = slope(gated_dual_kl(student, teacher, weight[:, 0]), logits)
    torch.testing.assert_close(actual, formula, rtol=0, atol=1e-13)

    frozen = weight[:, 0].detach()
    with torch.no_grad():
        columns = []
        for step in 1e-5 * torch.eye(V, dtype=torch.float64):
            up, down = (gated_dual_kl((logits + s).log_softmax(-1), teacher, frozen) for s in (step, -step))
            columns.append((up - down) / 2e-5)
    torch.testing.assert_close(actual, torch.stack(columns, -1), rtol=0, atol=1e-8)

    moving = weight[:, 0] * reverse_kl(student, teacher) + (1 - weight[:, 0]) * forward_kl(student, teacher)
    assert float((slope(moving, logits) - actual).abs().max()) > 0.01  # the distinction matters here


def test_the_sampled_parts_have_the_exact_gradients_in_expectation() -> None:
    """Over the student's own tokens `log q` times the cost gives the reverse KL's gradient; over the teacher's `-log q`
    gives the forward KL's. And neither touches the other's tokens."""
    logits, teacher = states()
    student = logits.log_softmax(-1)
    reverse = forward = torch.zeros_like(logits)
    for token in range(V):
        log_q, log_p = student[:, token], teacher[:, token]
        own = torch.arange(M) % 2 == 0
        policy = slope(policy_gradient_loss(log_q, log_q - log_p, own), logits)
        imitation = slope(imitation_loss(log_q, ~own), logits)
        assert not policy[~own].any()
        assert not imitation[own].any()
        everywhere = torch.ones(M, dtype=torch.bool)
        policy = slope(policy_gradient_loss(log_q, log_q - log_p, everywhere), logits)
        reverse = reverse + log_q.exp()[:, None].detach() * policy
        forward = forward + log_p.exp()[:, None] * slope(imitation_loss(log_q, everywhere), logits)
    torch.testing.assert_close(reverse, slope(reverse_kl(student, teacher), logits), rtol=0, atol=1e-13)
    torch.testing.assert_close(forward, slope(forward_kl(student, teacher), logits), rtol=0, atol=1e-13)


def test_exact_losses() -> None:
    """Each name stands for its divergence; a clipped loss keeps the direction of its gradient."""
    logits, teacher = states()
    student = logits.log_softmax(-1)
    own, weight = student[:, 1], torch.linspace(0, 1, M)
    expected = {
        "nll": -own,
        "forward": forward_kl(student, teacher),
        "reverse": reverse_kl(student, teacher),
        "jensen_shannon": jensen_shannon(student, teacher, 0.3),
        "skew_forward": skew_forward_kl(student, teacher, 0.2),
        "skew_reverse": skew_reverse_kl(student, teacher, 0.2),
        "todi": forward_kl(student, teacher) + reverse_kl(student, teacher),
        "reverse_plus_forward": reverse_kl(student, teacher) + (1 - weight) * forward_kl(student, teacher),
        "weighted": weight * reverse_kl(student, teacher) + (1 - weight) * forward_kl(student, teacher),
    }
    for name, value in expected.items():
        row = Method(loss=name, beta=0.3, skew=0.2)  # type: ignore[arg-type]
        torch.testing.assert_close(exact_loss(row, student, teacher, own, weight), value)
        limit = float(value.detach().median())
        clipped = exact_loss(variant(row, loss_clip=limit), student, teacher, own, weight)
        torch.testing.assert_close(clipped, value.clamp(max=limit))
        if name == "todi":
            value = exact_loss(row, student, teacher, own, weight)  # the same value, another gradient
        scale = (limit / value.detach()).clamp(max=1)[:, None]
        torch.testing.assert_close(slope(clipped, logits), scale * slope(value, logits))


def test_todi() -> None:
    """Its gradient, against the formula in the logits: with the weights a_i = p_i / (p_i + q_i) held fixed,
    dL/dlog q_i = -a_i p_i + (1 - a_i) q_i (1 + log(q_i / p_i)). It is not that of forward plus reverse KL."""
    logits, teacher = states()
    student = logits.log_softmax(-1)
    q, p = student.exp(), teacher.exp()
    a = p / (p + q)
    of_log_q = -a * p + (1 - a) * q * (1 + student - teacher)
    formula = of_log_q - q * of_log_q.sum(-1, keepdim=True)
    actual = slope(todi(student, teacher), logits)
    torch.testing.assert_close(actual, formula, rtol=0, atol=1e-13)
    both = slope(forward_kl(student, teacher) + reverse_kl(student, teacher), logits)
    assert float((actual - both).abs().max()) > 0.01
    exact = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    assert bool(todi(exact.flip(0), exact).isfinite())


def test_akl_by_hand() -> None:
    """p = (.1, .4, .05, .35, .1), its likeliest token has .4 and the first two .75, more than half: the head is token 1
    alone, off by .2; the others are off by .1, .05, .05, 0. So forward KL weighs .2 / .4 and reverse KL the rest."""
    p = torch.tensor([0.10, 0.40, 0.05, 0.35, 0.10], dtype=torch.float64).log()
    logits = torch.tensor([0.20, 0.20, 0.10, 0.40, 0.10], dtype=torch.float64).log().requires_grad_()
    q = logits.log_softmax(-1)
    expected = 0.5 * forward_kl(q, p) + 0.5 * reverse_kl(q, p)
    torch.testing.assert_close(akl(q, p), expected)
    torch.testing.assert_close(slope(akl(q, p), logits), slope(expected, logits))  # the weights are held fixed
    peaked = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()  # the first token is always in the head
    other = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64).log()
    torch.testing.assert_close(akl(other, peaked), 0.5 * forward_kl(other, peaked) + 0.5 * reverse_kl(other, peaked))
    assert float(akl(p, p)) == 0


def test_negative_advantage() -> None:
    """Own tokens at hard steps go down, whatever they are; in expectation over the student's tokens nothing moves, and
    no state's gradient is longer than sqrt(2)."""
    logits, _ = states()
    student = logits.log_softmax(-1)
    hard = torch.arange(M) % 3 == 0
    mean = torch.zeros_like(logits)
    for token in range(V):
        gradient = slope(negative_advantage(student[:, token], (~hard).double()), logits)
        assert bool((gradient[hard, token] > 0).all())
        assert not gradient[~hard].any()
        assert float(gradient.norm(dim=-1).max()) <= 2**0.5
        mean = mean + student[:, token, None].exp().detach() * gradient
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-14)


def test_importance_weights_by_hand() -> None:
    """q = .5 and .1 against p = .25 and .9 with a fifth of the teacher: .5 / .45 and .1 / .26; at most 1 / .8."""
    log_q = torch.tensor([[0.5, 0.1]], dtype=torch.float64).log()
    log_p = torch.tensor([[0.25, 0.9]], dtype=torch.float64).log()
    one, two = 0.5 / (0.2 * 0.25 + 0.8 * 0.5), 0.1 / (0.2 * 0.9 + 0.8 * 0.1)
    assert importance_weight(log_q, log_p, 0.2).tolist()[0] == pytest.approx([one, two])
    assert importance_weight(log_q, log_p, 0.0).tolist() == [[1.0, 1.0]]
    never_teacher = torch.full_like(log_p, -1e4)
    assert importance_weight(log_q, never_teacher, 0.2).tolist()[0] == pytest.approx([1.25, 1.25])
    assert importance_weight(never_teacher, log_p, 0.2).tolist() == [[0.0, 0.0]]


def test_per_step_to_come() -> None:
    """Divided by the steps that follow, two, one and none; the end of an answer counts as none."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    value = torch.tensor([[6.0, 5.0, 0.0], [4.0, 0.0, 0.0]], dtype=torch.float64)
    assert length_normalized(value, mask).tolist() == [[3.0, 5.0, 0.0], [4.0, 0.0, 0.0]]


def test_cost_to_go() -> None:
    """By hand: costs 1, 2, 4 at discount 1/2 are worth 3, 4, 4 with the present and 2, 2, 0 without; 0 is the present
    alone, 1 is the plain sum."""
    cost = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    assert cost_to_go(cost, 0.5, True).tolist() == [[3.0, 4.0, 4.0]]
    assert cost_to_go(cost, 0.5, False).tolist() == [[2.0, 2.0, 0.0]]
    assert cost_to_go(cost, 0.0, True).tolist() == [[1.0, 2.0, 4.0]]
    assert cost_to_go(cost, 0.0, False).tolist() == [[0.0, 0.0, 0.0]]
    assert cost_to_go(cost, 1.0, True).tolist() == [[7.0, 6.0, 4.0]]


def test_leave_one_out_baseline() -> None:
    """The mean of the others that are still being written, never the answer's own; 0 where there is none."""
    value = torch.tensor([[1.0, 5.0, 7.0], [2.0, 6.0, 0.0], [6.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    baseline = leave_one_out_baseline(value, mask)
    assert (baseline * mask).tolist() == [[4.0, 6.0, 0.0], [3.5, 5.0, 0.0], [1.5, 0.0, 0.0]]


@pytest.mark.parametrize("name", ["fkl", "rkl"])
def test_where_aliased_contexts_meet(name: str) -> None:
    """One student state for several contexts of fixed weight: forward KL ends at the mean of the teacher's
    distributions, reverse KL at their normalised geometric mean."""
    _, teacher = states()
    weight = torch.rand(M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = weight / weight.sum()
    logits = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    row, nothing = method(name), torch.zeros(M, dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        student = logits.log_softmax(-1).expand(M, V)
        loss = (weight * exact_loss(row, student, teacher, nothing, nothing)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    mean, geometric = (weight[:, None] * teacher.exp()).sum(0), (weight[:, None] * teacher).sum(0).softmax(-1)
    optimum, other = (mean, geometric) if name == "fkl" else (geometric, mean)
    torch.testing.assert_close(logits.detach().softmax(-1), optimum, rtol=0, atol=1e-7)
    assert float((optimum - other).abs().max()) > 0.01
