"""Divergences: their gradients in the logits, their limits, and what truncation and zeros do to them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill_env.divergence import (
    clip_by_rescaling,
    entropy,
    forward_kl,
    jensen_shannon,
    kl,
    project,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    support,
    tails_apart,
)

V = 6
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "reverse": reverse_kl,
    "forward": forward_kl,
    "jensen_shannon": lambda s, t: jensen_shannon(s, t, 0.3),
    "skew_forward": lambda s, t: skew_forward_kl(s, t, 0.2),
    "skew_reverse": lambda s, t: skew_reverse_kl(s, t, 0.2),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def pairs(n: int = 20, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of students and log-probabilities of teachers, float64 [n, V] each."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, n, V, generator=generator, dtype=torch.float64)
    return student, teacher.log_softmax(-1)


def gradient(loss: Loss, logits: Tensor, teacher: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    loss(logits.log_softmax(-1), teacher).sum().backward()
    assert logits.grad is not None
    return logits.grad


def finite_differences(loss: Loss, logits: Tensor, teacher: Tensor, h: float = 1e-5) -> Tensor:
    """Central differences; their error, h^2 and rounding / h, stays below 1e-8."""
    columns = []
    for step in h * torch.eye(V, dtype=torch.float64):
        up, down = (loss((logits + s).log_softmax(-1), teacher) for s in (step, -step))
        columns.append((up - down) / (2 * h))
    return torch.stack(columns, -1)


def test_gradient_of_reverse_kl() -> None:
    """In the student's logits it is q_i (log(q_i / p_i) - D)."""
    logits, teacher = pairs()
    log_q = logits.log_softmax(-1)
    formula = log_q.exp() * (log_q - teacher - reverse_kl(log_q, teacher)[:, None])
    torch.testing.assert_close(gradient(reverse_kl, logits, teacher), formula, rtol=0, atol=1e-13)
    torch.testing.assert_close(finite_differences(reverse_kl, logits, teacher), formula, rtol=0, atol=1e-8)


def test_gradient_of_forward_kl() -> None:
    """In the student's logits it is q - p."""
    logits, teacher = pairs()
    formula = logits.softmax(-1) - teacher.exp()
    torch.testing.assert_close(gradient(forward_kl, logits, teacher), formula, rtol=0, atol=1e-13)
    torch.testing.assert_close(finite_differences(forward_kl, logits, teacher), formula, rtol=0, atol=1e-8)


@every_loss
def test_every_gradient_is_the_derivative(loss: Loss) -> None:
    """Autograd agrees with finite differences, truncated to a support with a tail bucket as well."""
    logits, teacher = pairs()
    ids = support(teacher, top_k=3)
    for f in (loss, lambda s, t: loss(project(s, ids), project(t, ids))):
        expected = finite_differences(f, logits, teacher)
        torch.testing.assert_close(gradient(f, logits, teacher), expected, rtol=0, atol=1e-8)


@every_loss
def test_the_teacher_is_stationary_and_optimal(loss: Loss) -> None:
    """At q = p value and gradient vanish; elsewhere the value is positive."""
    logits, teacher = pairs()
    assert float(loss(teacher, teacher).abs().max()) < 1e-14
    assert float(gradient(loss, teacher, teacher).abs().max()) < 1e-14
    assert float(loss(logits.log_softmax(-1), teacher).min()) > 1e-3


def test_autograd_saves_only_the_arguments() -> None:
    """The backward pass keeps no new tensor of the size of the vocabulary in memory."""
    logits, teacher = pairs()
    student = logits.log_softmax(-1).requires_grad_()
    for p, q in ((student, teacher), (teacher, student)):
        remembered: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: remembered.append(t.data_ptr()) or t, lambda t: t):  # noqa: B023
            kl(p, q)
        assert set(remembered) == {student.data_ptr(), teacher.data_ptr()}


def test_gradients_where_probabilities_are_zero() -> None:
    """A logarithm of zero that was replaced has no gradient, and spoils no other."""
    p = torch.tensor([0.5, 0.5, 0.0]).double().log().requires_grad_()
    q = torch.tensor([0.25, 0.0, 0.75]).double().log().requires_grad_()
    kl(p, q).backward()
    torch.testing.assert_close(
        p.grad, torch.tensor([0.5 * (math.log(2) + 1), 0.5 * (math.log(0.5) + 1e4 + 1), 0]).double()
    )
    torch.testing.assert_close(q.grad, torch.tensor([-0.5, 0, 0]).double())


def test_values() -> None:
    """Numbers worked out by hand, for student (1/2, 1/2) and teacher (1/4, 3/4)."""
    q, p = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.25, 0.75]).double().log()
    assert float(reverse_kl(q, p)) == pytest.approx(0.5 * math.log(4 / 3))
    assert float(forward_kl(q, p)) == pytest.approx(0.75 * math.log(3) - math.log(2))
    assert float(entropy(q)) == pytest.approx(math.log(2))
    # the mixture with the teacher's weight 0.2 is (0.45, 0.55), with 0.8 it is (0.3, 0.7)
    skewed = 0.25 * math.log(0.25 / 0.45) + 0.75 * math.log(0.75 / 0.55)
    assert float(skew_forward_kl(q, p, 0.2)) == pytest.approx(skewed)
    assert float(skew_reverse_kl(q, p, 0.2)) == pytest.approx(0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7))
    from_student = 0.5 * math.log(0.5 / 0.45) + 0.5 * math.log(0.5 / 0.55)
    assert float(jensen_shannon(q, p, 0.2)) == pytest.approx(0.2 * skewed + 0.8 * from_student)


def test_limits_of_jensen_shannon() -> None:
    """By beta it tends to the forward KL as beta -> 0, by 1 - beta to the reverse KL as beta -> 1; gradients too."""
    logits, teacher = pairs(scale=1.0)
    small = 1e-6  # the error is of first order in it
    for limit, f in (
        (forward_kl, lambda s, t: jensen_shannon(s, t, small) / small),
        (reverse_kl, lambda s, t: jensen_shannon(s, t, 1 - small) / small),
    ):
        student = logits.log_softmax(-1)
        torch.testing.assert_close(f(student, teacher), limit(student, teacher), rtol=1e-4, atol=1e-5)
        expected = gradient(limit, logits, teacher)
        torch.testing.assert_close(gradient(f, logits, teacher), expected, rtol=1e-4, atol=1e-4)


def test_jensen_shannon_is_symmetric_and_bounded() -> None:
    """At beta = 1/2 neither side is preferred, and no pair is further apart than log 2."""
    logits, teacher = pairs(scale=20.0)
    student = logits.log_softmax(-1)
    d = jensen_shannon(student, teacher, 0.5)
    torch.testing.assert_close(d, jensen_shannon(teacher, student, 0.5))
    assert 0.6 < float(d.max()) <= math.log(2) + 1e-12


def test_skew_kls_tend_to_the_plain_ones() -> None:
    logits, teacher = pairs(scale=1.0)
    student = logits.log_softmax(-1)
    for skew, plain in ((skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)):
        torch.testing.assert_close(skew(student, teacher, 1e-7), plain(student, teacher), rtol=1e-4, atol=1e-5)


@every_loss
def test_truncation_is_a_lower_bound(loss: Loss) -> None:
    """A longer support never lowers a truncated divergence, and the whole vocabulary gives the full one, gradient
    included."""
    logits, teacher = pairs()
    student = logits.log_softmax(-1)
    truncated = []
    for k in range(1, V + 1):
        ids = support(teacher, top_k=k)
        truncated.append(loss(project(student, ids), project(teacher, ids)))
        torch.testing.assert_close(project(student, ids).exp().sum(-1), torch.ones(20).double())
    for fewer, more in itertools.pairwise(truncated):
        assert bool((fewer <= more + 1e-14).all())
    torch.testing.assert_close(truncated[-1], loss(student, teacher), rtol=0, atol=1e-13)
    full = gradient(loss, logits, teacher)
    whole = gradient(lambda s, t: loss(project(s, ids), project(t, ids)), logits, teacher)
    torch.testing.assert_close(whole, full, rtol=0, atol=1e-13)


def test_a_truncated_jensen_shannon_divergence_is_bounded_on_both_sides() -> None:
    """The projections give a lower bound, the tails apart an upper one; both are reached."""
    student, teacher = torch.randn(2, 500, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    ids = support(teacher, 3)
    full = jensen_shannon(student, teacher, 0.5)
    projected = project(student, ids), project(teacher, ids)
    low, high = (jensen_shannon(*pair, 0.5) for pair in (projected, tails_apart(*projected)))
    tails = sum(x[:, -1].exp() for x in projected)
    assert (low <= full + 1e-12).all()
    assert (full <= high + 1e-12).all()
    assert (high - low <= tails / 2 * math.log(2) + 1e-12).all()
    apart = [torch.tensor(x).log() for x in ([0.6, 0.2, 0.2, 0.0, 0.0], [0.5, 0.3, 0.0, 0.1, 0.1])]
    kept = [project(x, torch.tensor([0, 1])) for x in apart]
    torch.testing.assert_close(jensen_shannon(*tails_apart(*kept), 0.5), jensen_shannon(*apart, 0.5))


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
def test_top_p_is_the_smallest_set_with_the_mass(top_p: float) -> None:
    """No smaller set of tokens, of all subsets, has the mass. Whatever is not in the set is in the tail bucket."""
    _, teacher = pairs()
    ids = support(teacher, top_p=top_p)
    assert ids is not None
    for p, row, projected in zip(teacher.exp().tolist(), ids.tolist(), project(teacher, ids).exp(), strict=True):
        chosen = [i for i in row if i >= 0]
        subsets = (s for k in range(1, V) for s in itertools.combinations(p, k))  # the smallest first
        assert len(chosen) == min((len(s) for s in subsets if sum(s) >= top_p), default=V)
        inside = sum(p[i] for i in chosen)
        assert inside >= top_p
        torch.testing.assert_close(float(projected[-1]), 1 - inside, rtol=0, atol=1e-12)
        assert [float(x) for x in projected[:-1]] == pytest.approx([p[i] if i >= 0 else 0.0 for i in row])


def test_top_k_and_top_p_together() -> None:
    """The shorter of the two supports; nothing is truncated with neither."""
    _, teacher = pairs()
    by_k, by_p, both = support(teacher, top_k=3), support(teacher, top_p=0.8), support(teacher, 3, 0.8)
    assert by_k is not None
    assert by_p is not None
    assert both is not None
    for row, k, p in zip(both.tolist(), by_k.tolist(), by_p.tolist(), strict=True):
        assert [i for i in row if i >= 0] == min([i for i in k if i >= 0], [i for i in p if i >= 0], key=len)
    assert support(teacher) is None
    assert project(teacher, None) is teacher


def test_without_a_tail_bucket_reverse_kl_is_gamed() -> None:
    """Descended on the support alone it is lowered below 0 by leaving the support; with the bucket q = p stays."""
    _, teacher = pairs(n=1)
    ids = support(teacher, top_k=2)
    assert ids is not None

    def descend(loss: Loss) -> tuple[float, float]:
        logits = teacher.clone()
        for _ in range(300):
            logits = logits - gradient(loss, logits, teacher)
        student = logits.log_softmax(-1)
        return float(loss(student, teacher)), float(student.gather(-1, ids).exp().sum())

    mass = float(teacher.gather(-1, ids).exp().sum())
    value, left = descend(lambda s, t: kl(s.gather(-1, ids), t.gather(-1, ids)))
    assert value < -0.1
    assert left < mass - 0.2
    value, left = descend(lambda s, t: reverse_kl(project(s, ids), project(t, ids)))
    assert abs(value) < 1e-12
    assert left == pytest.approx(mass)


@every_loss
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("zeros", ["teacher", "student", "both"])
def test_zero_probabilities_are_safe(loss: Loss, truncated: bool, zeros: str) -> None:
    """With `-inf` on either side values and gradients are finite."""
    logits, teacher = pairs()
    impossible = torch.arange(V) % 3 == 1
    if zeros != "teacher":
        logits = logits.masked_fill(impossible, -torch.inf)
    if zeros != "student":
        teacher = teacher.masked_fill(impossible, -torch.inf).log_softmax(-1)
    ids = support(teacher, top_p=0.95) if truncated else None

    def f(s: Tensor, t: Tensor) -> Tensor:
        return loss(project(s, ids), project(t, ids))

    value, slope = f(logits.log_softmax(-1), teacher), gradient(f, logits, teacher)
    assert bool(torch.isfinite(value).all())
    assert bool((value >= -1e-12).all())
    assert bool(torch.isfinite(slope).all())


def test_zero_probabilities_contribute_nothing() -> None:
    """0 log 0 = 0: a token that neither side writes changes no divergence, and the gradient of FKL stays q - p."""
    logits, teacher = pairs()
    wide = torch.cat([logits, torch.full((20, 1), -torch.inf)], 1)
    wide_teacher = torch.cat([teacher, torch.full((20, 1), -torch.inf)], 1)
    for loss in LOSSES.values():
        value = loss(logits.log_softmax(-1), teacher)
        torch.testing.assert_close(loss(wide.log_softmax(-1), wide_teacher), value, rtol=0, atol=1e-13)
    impossible = teacher.masked_fill(torch.arange(V) == 2, -torch.inf).log_softmax(-1)
    expected = logits.softmax(-1) - impossible.exp()
    torch.testing.assert_close(gradient(forward_kl, logits, impossible), expected, rtol=0, atol=1e-13)


def test_clipping_keeps_the_direction_of_the_gradient() -> None:
    """A loss above the limit becomes the limit and its gradient shrinks with it, but does not vanish."""
    logits, teacher = pairs()
    student = logits.log_softmax(-1)
    limit = float(reverse_kl(student, teacher).median())

    def clipped(s: Tensor, t: Tensor) -> Tensor:
        return clip_by_rescaling(reverse_kl(s, t), limit)

    value = reverse_kl(student, teacher)
    assert 0 < int((value > limit).sum()) < len(value)
    torch.testing.assert_close(clipped(student, teacher), value.clamp(max=limit))
    scale = (limit / value).clamp(max=1.0)[:, None]
    expected = gradient(reverse_kl, logits, teacher) * scale
    torch.testing.assert_close(gradient(clipped, logits, teacher), expected, rtol=0, atol=1e-13)
    assert clip_by_rescaling(value, math.inf) is value


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    """The result is float32, and is what float32 gives for the same rounded inputs."""
    logits, teacher = pairs()
    student, teacher = logits.log_softmax(-1).to(dtype), teacher.to(dtype)
    ids = support(teacher, top_k=3)
    for s, t in ((student, teacher), (project(student, ids), project(teacher, ids))):
        value = loss(s, t)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(s.float(), t.float()), rtol=0, atol=0)
    assert entropy(student).dtype == torch.float32
    assert loss(student.double(), teacher.double()).dtype == torch.float64
