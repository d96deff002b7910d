"""The rules of the decision process: what a token pays, from what the teacher draws, when a completion ends.

Pure functions of numbers, arrays or tensors. The batch applies them to all of its rows, and `TableRow` to every action
of a state in advance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_env.env_arguments import RewriteDraw


def own_reward(log_prob: Any, floor: float) -> Any:
    """What an own token pays, nats: its log-probability under the teacher, floored."""
    return np.maximum(log_prob, floor)


def is_floored(log_prob: Any, floor: float) -> Any:
    """Whether the reward of an own token is the floor."""
    return log_prob <= floor


def has_ended(token: Any, length: Any, eos_token_id: int, max_new_tokens: int) -> Any:
    """Whether a completion of this length, whose last token this is, has ended."""
    return (token == eos_token_id) | (length >= max_new_tokens)


def rewrite_distribution(
    log_probs: Tensor, rewrite: RewriteDraw, top_p: float, top_k: int = 0, *, temperature: float
) -> Tensor:
    """From what the teacher draws the tokens that it writes.

    Args:
        log_probs: the teacher's own, [..., V].
        rewrite: `sample` keeps them, `nucleus` the smallest set with mass `top_p`, `argmax` the likeliest token.
        top_p: mass of the nucleus.
        top_k: how many ids of each distribution are exact; the others are never drawn. 0 means all.
        temperature: of the draw; the nucleus is that of the distribution at this temperature.

    Returns:
        log-probabilities that need not be normalised, [..., V]; -inf for what is never drawn.
    """
    if rewrite == "argmax":
        best = log_probs.argmax(-1, keepdim=True)
        return torch.full_like(log_probs, -torch.inf).scatter(-1, best, 0.0)
    if top_k:
        exact, ids = log_probs.topk(top_k, -1)
        log_probs = torch.full_like(log_probs, -torch.inf).scatter(-1, ids, exact)
    if temperature != 1:
        log_probs = (log_probs / temperature).log_softmax(-1)
    if rewrite == "nucleus":
        ordered, ids = log_probs.double().sort(-1, descending=True)
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        inside = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, ids, mass_before < top_p)
        log_probs = log_probs.masked_fill(~inside, -torch.inf)
    return log_probs
