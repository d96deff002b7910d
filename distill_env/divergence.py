"""Divergences between next-token distributions: pure functions of log-probabilities.

`student` and `teacher` are log-probabilities in nats, [..., V]; results are in nats, [...]. All arguments may require
gradients. Nothing is estimated from samples: each divergence is a sum over the whole vocabulary, or over a support and
one tail bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG_ZERO = -1e4  # in place of log 0: exp of it is 0 in every dtype, and 0 * LOG_ZERO is 0 where 0 * -inf is NaN


def finite(log_probs: Tensor) -> Tensor:
    """Log-probabilities in at least float32 with `-inf` replaced, so that products with 0 are 0."""
    if log_probs.dtype not in (torch.float32, torch.float64):
        log_probs = log_probs.float()
    return log_probs.clamp(min=LOG_ZERO)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_i p_i (log p_i - log q_i), differentiable once."""
    return _KL.apply(*torch.broadcast_tensors(log_p, log_q))


class _KL(torch.autograd.Function):
    """Saves only its arguments for the backward pass; autograd would save five more tensors of that size."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        ctx.save_for_backward(log_p, log_q)
        p = finite(log_p)
        log_ratio = p - finite(log_q)
        return log_ratio.mul_(p.exp_()).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """d KL / d log p_i = p_i (log p_i - log q_i + 1), d KL / d log q_i = -p_i; 0 where a logarithm was replaced."""
        log_p, log_q = ctx.saved_tensors
        to_p = to_q = None
        p = finite(log_p)
        if ctx.needs_input_grad[0]:
            to_p = p - finite(log_q)
        p = p.exp_().mul_(grad[..., None])  # 0 where log p was replaced
        if to_p is not None:
            to_p = to_p.add_(1).mul_(p).to(log_p.dtype)
        if ctx.needs_input_grad[1]:
            to_q = p.neg_().masked_fill_(log_q < LOG_ZERO, 0.0).to(log_q.dtype)
        return to_p, to_q


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher), mode-seeking; `D_t` is this. Gradient in the student's logits: q_i (log(q_i/p_i) - D)."""
    return kl(student, teacher)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mode-covering. Gradient in the student's logits: q - p."""
    return kl(teacher, student)


def mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q) for 0 < weight < 1."""
    return torch.logaddexp(finite(log_p) + math.log(weight), finite(log_q) + math.log1p(-weight))


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """JSD(beta) = beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student.

    Agarwal et al. 2024, "On-policy distillation of language models" (arXiv 2306.13649), eq. 1. Its limits, divided by
    beta or 1 - beta, are the forward and the reverse KL.
    """
    m = mixture(teacher, student, beta)
    return beta * kl(teacher, m) + (1 - beta) * kl(student, m)


def skew_forward_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """KL(teacher || skew teacher + (1 - skew) student): Ko et al. 2024, "DistiLLM" (arXiv 2402.03898), eq. 4."""
    return kl(teacher, mixture(teacher, student, skew))


def skew_reverse_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """KL(student || (1 - skew) teacher + skew student): the same paper, eq. 5."""
    return kl(student, mixture(student, teacher, skew))


def entropy(log_probs: Tensor) -> Tensor:
    """-sum_i p_i log p_i."""
    log_probs = finite(log_probs)
    return -(log_probs.exp() * log_probs).sum(-1)


def clip_by_rescaling(loss: Tensor, limit: float) -> Tensor:
    """Scale losses above `limit` down to it, and their gradients with them; with `clamp` the gradient would be zero.

    Clip the divergence of a state, never its terms over the vocabulary, which have both signs.
    """
    return loss * (limit / loss.detach().clamp(min=limit)) if math.isfinite(limit) else loss


def support(teacher: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor | None:
    """The token ids that a truncated divergence does not merge: the teacher's `top_k` likeliest, or the fewest whose
    mass is at least `top_p`, or the shorter of both.

    Returns:
        int64 [..., k], padded with -1; None if nothing is truncated.
    """
    vocabulary = teacher.shape[-1]
    if top_k <= 0 and top_p >= 1.0:
        return None
    k = min(top_k, vocabulary) if top_k > 0 else vocabulary
    log_probs, ids = teacher.topk(k, dim=-1)  # sorted, the likeliest first
    if top_p < 1.0:
        probs = log_probs.double().exp()
        inside = probs.cumsum(-1) - probs < top_p  # by the mass before a token
        ids = torch.where(inside, ids, -1)[..., : max(int(inside.sum(-1).max()), 1)]
    return ids


def project(log_probs: Tensor, ids: Tensor | None) -> Tensor:
    """Log-probabilities on the support `ids` and, last, of all other tokens together: the tail bucket.

    Without the bucket, a student lowers the reverse KL by moving its mass off the support. With it, the truncated
    divergence is one of coarser distributions, hence a lower bound of the full divergence.

    Args:
        log_probs: [..., V].
        ids: int64 [..., k], padded with -1, or None for the whole vocabulary.

    Returns:
        [..., k + 1], or `log_probs` itself if `ids` is None. Entries of padding are log 0.
    """
    if ids is None:
        return log_probs
    log_probs = finite(log_probs)
    padding = ids < 0
    singles = log_probs.gather(-1, ids.clamp(min=0)).masked_fill(padding, LOG_ZERO)
    # LOG_ZERO, not -inf: the gradient of logsumexp over -inf alone is NaN
    column = torch.where(padding, log_probs.shape[-1], ids)  # padding goes to a column of its own
    inside = torch.zeros(*log_probs.shape[:-1], log_probs.shape[-1] + 1, dtype=torch.bool, device=log_probs.device)
    inside = inside.scatter(-1, column, True)[..., :-1]
    tail = log_probs.masked_fill(inside, LOG_ZERO).logsumexp(-1, keepdim=True)
    return torch.cat([singles, tail], -1)


def tails_apart(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two projected distributions as if they shared no id of the tail: a bucket for the tail of each.

    A Jensen-Shannon divergence of these is an upper bound of the full one, as that of the projections is a lower bound.
    The two differ by at most (p_T + q_T) / 2 log 2, with the masses of the tail, for beta = 0.5.

    Args:
        student, teacher: [..., k + 1], as `project` returns them.

    Returns:
        [..., k + 2] each.
    """
    nothing = torch.full_like(student[..., :1], LOG_ZERO)
    apart = torch.cat([teacher[..., :-1], nothing.to(teacher), teacher[..., -1:]], -1)
    return torch.cat([student, nothing], -1), apart


LEAST_TAIL = 1e-7  # a smaller tail mass is rounding error


def from_top_k(ids: Tensor, log_probs: Tensor, vocab_size: int, absent: Sequence[int] = ()) -> Tensor:
    """A distribution of which only the likeliest ids are known; the others share the remaining mass equally.

    `project` on these ids returns the known values and the mass of the tail. Single values in the tail mean nothing.

    Args:
        ids: int64 [..., k], distinct.
        log_probs: [..., k], of these ids.
        vocab_size: V.
        absent: ids without probability, none of `ids`.

    Returns:
        [..., V], normalised.
    """
    others = vocab_size - len(absent) - ids.shape[-1]
    mass = log_probs.exp().sum(-1, keepdim=True)
    tail = (1 - mass).clamp(min=LEAST_TAIL).log() - math.log(max(others, 1))
    spread = tail.expand(*ids.shape[:-1], vocab_size).scatter(-1, ids, log_probs)
    if absent:
        spread = spread.index_fill(-1, torch.tensor(absent, device=spread.device), -torch.inf)
    return spread.log_softmax(-1)


def truncation_gap(student: Tensor, teacher: Tensor, ids: Tensor, least: Tensor | float) -> Tensor:
    """An upper bound of the full reverse KL minus the truncated one: q_T (log p_T - least), with T the tail.

    The difference is q_T KL(student in the tail || teacher in the tail), each renormalised. It has no bound unless the
    teacher's probabilities in the tail have one.

    Args:
        student, teacher: [..., V].
        ids: int64 [..., k], the support.
        least: the teacher's smallest log-probability in the tail, or less.
    """
    q_tail, p_tail = project(student, ids)[..., -1], project(teacher, ids)[..., -1]
    return q_tail.exp() * (p_tail - least)
