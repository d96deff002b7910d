"""Log-probabilities and perplexity of given texts."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from agents import metrics as measures
from distill_env.models.base import TrainableModel
from distill_env.ragged import PAD
from distill_env.tasks.base import Prompt

HEAD_POSITIONS = 256  # positions whose logits are in memory at a time


def corpus_perplexity(
    model: TrainableModel,
    ids: Sequence[int],
    window: int,
    stride: int,
    progress: Callable[[int], None] | None = None,
    opening: Sequence[int] = (),
) -> float:
    """exp of the mean negative log-likelihood of a text's tokens; the first one counts if it has a context.

    Args:
        model: any model with `features` and `head`.
        ids: the text, at least two tokens with the opening.
        window: tokens read by a forward pass, with the opening.
        stride: tokens scored by a forward pass. The first pass scores all that it reads; later tokens have a context of
            at least `window - stride` tokens.
        progress: called with the number of tokens that each pass has scored.
        opening: tokens that every pass begins with and that are not scored, such as a beginning-of-sequence token.

    Raises:
        ValueError: for a window beyond the model's context, a stride not below the window, or a text too short.
    """
    longest = getattr(model, "max_length", None)
    if window < 2 or (longest is not None and window > longest):
        raise ValueError(f"window: {window} tokens; expected at least 2 and at most the model's context of {longest}")
    window -= len(opening)
    if not 1 <= stride < window:
        raise ValueError(f"stride: {stride}; expected 1 to {window - 1}, less than the window of text")
    scored = 0 if opening else 1
    if len(ids) <= scored:
        raise ValueError(f"ids: {len(ids)} tokens; expected at least {scored + 1}")
    log_probs: list[float] = []
    end = min(window, len(ids))
    while scored < len(ids):
        begin = max(0, end - window)
        log_probs += token_log_probs(model, [[*opening, *ids[begin:scored]]], [ids[scored:end]])[0]
        if progress is not None:
            progress(end - scored)
        scored, end = end, min(end + stride, len(ids))
    return measures.perplexity(log_probs)


@torch.no_grad()
def token_log_probs(
    model: TrainableModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[list[float]]:
    """log p of every token of given completions, nats: one list per completion."""
    tokens = pad_sequence([torch.tensor(c) for c in completions], batch_first=True, padding_value=PAD)  # [n, T]
    features = model.features(prompts, tokens, tokens != PAD)
    read = []
    for part, ids in zip(features.split(HEAD_POSITIONS), tokens[tokens != PAD].split(HEAD_POSITIONS), strict=True):
        log_probs = model.head(part)  # [m, V]
        read.append(log_probs.gather(1, ids.to(part.device)[:, None])[:, 0].double())
    return [row.tolist() for row in torch.cat(read).split([len(c) for c in completions])]


def reference_log_probs(model: TrainableModel, prompts: Sequence[Prompt], rows: int) -> list[list[float]]:
    """log p of the tokens of the prompts' reference completions, nats, `rows` at a time.

    Prompts without a reference are left out. A reference is cut at the end of the model's context.
    """
    longest = getattr(model, "max_length", None)
    cut = [(p.ids, (p.ids + p.reference_completion)[len(p.ids) : longest]) for p in prompts if p.reference_completion]
    pairs = [(ids, reference) for ids, reference in cut if reference]
    log_probs: list[list[float]] = []
    for begin in range(0, len(pairs), rows):
        ids, references = zip(*pairs[begin : begin + rows], strict=True)
        log_probs += token_log_probs(model, ids, references)
    return log_probs
