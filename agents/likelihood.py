"""Log-probabilities of given texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from agents import metrics as measures
from distill_env.models.base import TrainableModel
from distill_env.ragged import PAD
from distill_env.tasks.base import Prompt

HEAD_POSITIONS = 256  # positions of the vocabulary's logits in memory at a time


def corpus_perplexity(
    model: TrainableModel,
    ids: Sequence[int],
    window: int,
    stride: int,
    progress: Callable[[int], None] | None = None,
) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, each counted once, without the first, of no context.

    Args:
        model: any model with `features` and `head`.
        ids: the text, at least two tokens.
        window: tokens that a forward pass reads.
        stride: tokens that it scores (the first pass: all it reads); so each has at least `window - stride` before it,
            if the text has.
        progress: is told how many tokens each pass has scored.

    Raises:
        ValueError: for a window that the model cannot read, a stride that it does not hold, or a text too short.
    """
    longest = getattr(model, "max_length", None)
    if window < 2 or (longest is not None and window > longest):
        raise ValueError(f"window: {window}; accepted: at least 2, and at most the model's context of {longest} tokens")
    if not 1 <= stride < window:
        raise ValueError(f"stride: {stride}; accepted: 1 to {window - 1}, less than the window")
    if len(ids) < 2:
        raise ValueError(f"ids: {len(ids)} tokens; accepted: at least 2")
    log_probs: list[float] = []
    scored, end = 1, min(window, len(ids))
    while scored < len(ids):
        begin = max(0, end - window)
        log_probs += token_log_probs(model, [ids[begin:scored]], [ids[scored:end]])[0]
        if progress is not None:
            progress(end - scored)
        scored, end = end, min(end + stride, len(ids))
    return measures.perplexity(log_probs)


@torch.no_grad()
def token_log_probs(
    model: TrainableModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[list[float]]:
    """log p of every token of given answers under a model that reads them, nats: a list an answer."""
    width = max(map(len, answers))
    tokens = torch.full((len(answers), width), PAD)  # [n, T]
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    features = model.features(prompts, tokens, tokens != PAD)
    flat: list[float] = []
    for part, ids in zip(features.split(HEAD_POSITIONS), tokens[tokens != PAD].split(HEAD_POSITIONS), strict=True):
        log_probs = model.head(part)  # [m, V]
        flat += log_probs.gather(1, ids.to(part.device)[:, None])[:, 0].double().tolist()
    ends = np.cumsum([len(a) for a in answers])
    return [flat[end - len(a) : end] for a, end in zip(answers, ends, strict=True)]


def reference_log_probs(model: TrainableModel, prompts: Sequence[Prompt], rows: int) -> list[list[float]]:
    """log p of the tokens of the prompts' reference answers, nats, `rows` at a time; none for a prompt without one.

    A reference that exceeds the model's context is read as far as that.
    """
    longest = getattr(model, "max_length", None)
    cut = [(p.ids, (p.ids + p.reference_completion)[len(p.ids) : longest]) for p in prompts if p.reference_completion]
    pairs = [(ids, reference) for ids, reference in cut if reference]
    found: list[list[float]] = []
    for begin in range(0, len(pairs), rows):
        ids, references = zip(*pairs[begin : begin + rows], strict=True)
        found += token_log_probs(model, ids, references)
    return found
