"""Losses of the agent: pure functions of log-probabilities, one number a state.

Names as in the paper: at state t the student's log-probabilities are `student` [..., V], the teacher's `teacher`
[..., V] (or both on a truncated support), lambda_t is `reverse_weight`. Nothing here looks at more than its arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.methods import Method
from distill_env.divergence import (
    clip_by_rescaling,
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


def exact_loss(
    method: Method, student: Tensor, teacher: Tensor, token_log_prob: Tensor, reverse_weight: Tensor
) -> Tensor:
    """The loss of the states at hand in closed form over the vocabulary.

    Args:
        method: which loss.
        student, teacher: [m, V].
        token_log_prob: [m], the student's log-probability of the token that stands, with gradient.
        reverse_weight: [m].

    Returns:
        [m], nats, clipped by rescaling.
    """
    if method.loss == "nll":
        loss = -token_log_prob
    elif method.loss == "forward":
        loss = forward_kl(student, teacher)
    elif method.loss == "reverse":
        loss = reverse_kl(student, teacher)
    elif method.loss == "jensen_shannon":
        loss = jensen_shannon(student, teacher, method.beta)
    elif method.loss == "skew_forward":
        loss = skew_forward_kl(student, teacher, method.skew)
    elif method.loss == "skew_reverse":
        loss = skew_reverse_kl(student, teacher, method.skew)
    else:
        loss = gated_dual_kl(student, teacher, reverse_weight)
    return clip_by_rescaling(loss, method.loss_clip)


def imitation_loss(token_log_prob: Tensor, rewritten: Tensor) -> Tensor:
    """-log q of the tokens that the teacher drew: its expectation is the forward KL plus a constant. [m] -> [m]."""
    return -token_log_prob * rewritten


def policy_gradient_loss(token_log_prob: Tensor, cost_to_go: Tensor, own: Tensor) -> Tensor:
    """log q(a_t) times what followed, on own tokens only: the student did not choose the others. [m] -> [m].

    Its gradient is the score-function estimate of the gradient of the expected cost (Williams 1992, REINFORCE).
    """
    return token_log_prob * cost_to_go.detach().to(token_log_prob.dtype) * own


def cost_to_go(cost: Tensor, gamma: float, include_present: bool) -> Tensor:
    """sum_{k >= t} gamma^(k - t) cost_k, or the same for k > t.

    Args:
        cost: float64 [n, T], 0 after the end of an answer.
        gamma: discount.
        include_present: whether the sum begins at t.
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
    """The mean of the other answers' cost-to-go at the same position, float64 [n, T]; 0 where there is no other.

    It does not depend on the answer's own tokens, so subtracting it leaves the gradient's expectation as it is.
    """
    valid = mask.to(cost_to_go.dtype)
    others = valid.sum(0, keepdim=True) - valid
    return ((cost_to_go * valid).sum(0, keepdim=True) - cost_to_go * valid) / others.clamp(min=1)
