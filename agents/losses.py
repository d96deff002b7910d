"""Losses: pure functions of log-probabilities, one number per position.

Names follow the paper: at position t the student's log-probabilities are `student` [..., V], the teacher's `teacher`
[..., V] (or both on a truncated support), and lambda_t is `reverse_weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from agents.methods import Method
from distill_env.divergence import (
    clip_by_rescaling,
    finite,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)


def gated_dual_kl(student: Tensor, teacher: Tensor, reverse_weight: Tensor) -> Tensor:
    """lambda_t KL(student || teacher) + (1 - lambda_t) KL(teacher || student), lambda_t detached; [m, V] -> [m]."""
    weight = reverse_weight.detach().to(student.dtype)
    return weight * reverse_kl(student, teacher) + (1 - weight) * forward_kl(student, teacher)


def reverse_plus_forward_kl(student: Tensor, teacher: Tensor, reverse_weight: Tensor) -> Tensor:
    """KL(student || teacher) + (1 - lambda_t) KL(teacher || student), lambda_t detached; [m, V] -> [m].

    With lambda_t = 0 where the teacher's entropy exceeds a threshold (0.8 nats) and 1 elsewhere it is Jin et al. 2026,
    "Entropy-aware on-policy distillation of language models" (arXiv 2603.07079).
    """
    weight = reverse_weight.detach().to(student.dtype)
    return reverse_kl(student, teacher) + (1 - weight) * forward_kl(student, teacher)


def todi(student: Tensor, teacher: Tensor) -> Tensor:
    """sum_i a_i p_i log(p_i / q_i) + (1 - a_i) q_i log(q_i / p_i), a_i = sigmoid(log(p_i / q_i)) detached.

    p is the teacher: Jung et al. 2025, "ToDi: token-wise distillation via fine-grained divergence control" (arXiv
    2505.16297). Its value is that of forward plus reverse KL, for a_i p_i - (1 - a_i) q_i = p_i - q_i; its gradient is
    not. [m, V] -> [m].
    """
    student, teacher = finite(student), finite(teacher)
    log_ratio = teacher - student
    weight = log_ratio.detach().sigmoid()
    return (log_ratio * (weight * teacher.exp() - (1 - weight) * student.exp())).sum(-1)


def akl(student: Tensor, teacher: Tensor, head_mass: float = 0.5) -> Tensor:
    """(g_head KL(teacher || student) + g_tail KL(student || teacher)) / (g_head + g_tail), the gaps g detached.

    g is the sum of |p_i - q_i| over the head, the teacher's likeliest tokens while their mass is at most `head_mass`
    (and the first one always), or over the tail, the others. Wu et al. 2024, "Rethinking Kullback-Leibler divergence in
    knowledge distillation for large language models" (arXiv 2404.02657). [m, V] -> [m].
    """
    p, order = teacher.detach().double().exp().sort(-1, descending=True)
    gap = (p - student.detach().double().exp().gather(-1, order)).abs()
    head = p.cumsum(-1) <= head_mass
    head[..., 0] = True
    total = gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)  # where the models agree both KLs are 0
    weight = ((gap * head).sum(-1) / total).to(student.dtype)
    return weight * forward_kl(student, teacher) + (1 - weight) * reverse_kl(student, teacher)


class Positions(NamedTuple):
    """What a loss may read at m positions."""

    student: Tensor  # log q [m, V], or [m, S] on a truncated support, with gradient
    teacher: Tensor  # log p on the same ids
    token_log_prob: Tensor  # [m], the student's log-probability of the token that was written, with gradient
    reverse_weight: Tensor  # [m], lambda


LOSSES: dict[str, Callable[[Method, Positions], Tensor]] = {
    "nll": lambda _, x: -x.token_log_prob,
    "forward": lambda _, x: forward_kl(x.student, x.teacher),
    "reverse": lambda _, x: reverse_kl(x.student, x.teacher),
    "jensen_shannon": lambda method, x: jensen_shannon(x.student, x.teacher, method.beta),
    "skew_forward": lambda method, x: skew_forward_kl(x.student, x.teacher, method.skew),
    "skew_reverse": lambda method, x: skew_reverse_kl(x.student, x.teacher, method.skew),
    "todi": lambda _, x: todi(x.student, x.teacher),
    "akl": lambda _, x: akl(x.student, x.teacher),
    "weighted": lambda _, x: gated_dual_kl(x.student, x.teacher, x.reverse_weight),
    "reverse_plus_forward": lambda _, x: reverse_plus_forward_kl(x.student, x.teacher, x.reverse_weight),
    "negative": lambda _, x: negative_advantage(x.token_log_prob, x.reverse_weight),
}


def exact_loss(
    method: Method, student: Tensor, teacher: Tensor, token_log_prob: Tensor, reverse_weight: Tensor
) -> Tensor:
    """The loss of the method at m positions, in closed form over the vocabulary; arguments as in `Positions`.

    Returns:
        [m], nats, scaled down to `loss_clip` where it is larger; `negative` is a policy gradient and is not scaled.
    """
    if method.loss_temperature != 1:
        student, teacher = (soften(log_probs, method.loss_temperature) for log_probs in (student, teacher))
    loss = LOSSES[method.loss](method, Positions(student, teacher, token_log_prob, reverse_weight))
    loss = loss * method.loss_temperature**2 if method.loss_temperature != 1 else loss
    return loss if method.loss == "negative" else clip_by_rescaling(loss, method.loss_clip)


def soften(log_probs: Tensor, temperature: float) -> Tensor:
    """log of softmax(log p / T), [..., V] -> [..., V].

    Hinton et al. 2015 (1503.02531) take a divergence of both distributions at T and multiply it by T^2, which keeps the
    size of the gradient in the logits.
    """
    return (log_probs / temperature).log_softmax(-1)


def imitation_loss(token_log_prob: Tensor, rewritten: Tensor) -> Tensor:
    """-log q of the teacher's tokens, whose expectation is the forward KL plus a constant; [m] -> [m]."""
    return -token_log_prob * rewritten


def policy_gradient_loss(token_log_prob: Tensor, cost_to_go: Tensor, weight: Tensor) -> Tensor:
    """log q(a_t) times the cost-to-go times a weight; [m] -> [m].

    Its gradient is the score-function estimate of the gradient of the expected cost (Williams 1992, REINFORCE). The
    weight is 1 on the student's tokens and 0 on the teacher's, which the student did not choose, or an importance
    weight.
    """
    return token_log_prob * cost_to_go.detach().to(token_log_prob.dtype) * weight.to(token_log_prob.dtype)


def negative_advantage(token_log_prob: Tensor, reverse_weight: Tensor) -> Tensor:
    """An advantage of -1 for the student's tokens at hard positions (lambda_t = 0) and of 0 elsewhere; [m] -> [m].

    A control that knows of the teacher only where the gate is hard. On tokens drawn from q it is bounded: the norm of
    the gradient in the logits is at most sqrt(2), and the expected loss, minus the entropy of q at hard positions, is
    at least -log V. Where the gate depends on the state alone, the expected gradient is 0: it is noise.
    """
    return policy_gradient_loss(token_log_prob, torch.ones_like(token_log_prob), 1 - reverse_weight)


def importance_weight(log_q: Tensor, log_p: Tensor, teacher_rate: float) -> Tensor:
    """q(a_t) / (rate p(a_t) + (1 - rate) q(a_t)) for tokens drawn from the mixture; [n, T] -> [n, T].

    Gu et al. 2024, "MiniLLM" (arXiv 2306.08543), with their approximation: each token is weighted by its own ratio
    only, so the tokens before and after it stay those of the mixture.

    Args:
        log_q, log_p: [n, T], log-probabilities of the tokens, nats.
        teacher_rate: the teacher's share of the mixture, in [0, 1).
    """
    return 1 / (teacher_rate * (log_p - log_q).exp() + 1 - teacher_rate)


def length_normalized(cost_to_go: Tensor, mask: Tensor) -> Tensor:
    """The cost after t divided by the number of positions after t, float64 [n, T]: MiniLLM's length normalisation."""
    following = mask.sum(1, keepdim=True) - mask.cumsum(1)
    return cost_to_go / following.clamp(min=1)


def cost_to_go(cost: Tensor, gamma: float, include_present: bool) -> Tensor:
    """sum_{k >= t} gamma^(k - t) cost_k, or the same for k > t.

    Args:
        cost: float64 [n, T], 0 after the end of a completion.
        gamma: discount.
        include_present: whether the sum includes t.
    """
    total = torch.zeros_like(cost)
    running = torch.zeros_like(cost[:, 0])
    for t in reversed(range(cost.shape[1])):
        if include_present:
            running = cost[:, t] + gamma * running
            total[:, t] = running
        else:
            total[:, t] = gamma * running
            running = cost[:, t] + gamma * running
    return total


def leave_one_out_baseline(cost_to_go: Tensor, mask: Tensor) -> Tensor:
    """The mean cost-to-go of the other completions at the same position, float64 [n, T]; 0 where there is no other.

    It does not depend on the completion's own tokens, so subtracting it does not change the expected gradient.
    """
    valid = mask.to(cost_to_go.dtype)
    others = valid.sum(0, keepdim=True) - valid
    return ((cost_to_go * valid).sum(0, keepdim=True) - cost_to_go * valid) / others.clamp(min=1)
