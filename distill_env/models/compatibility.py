"""Which Transformers models the cached, two-part forward pass of `CausalLM` computes correctly, and up to which length.

A row's distributions may depend on that row alone. Some models choose how they compute from the length of the whole
pass: longrope switches its frequencies, dynamic NTK rope scales them. Their cached keys go stale and short rows change
beside long ones, so they are used up to the length at which nothing of this happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_FAILURES = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)
_NARROW = 3  # tokens: the attention window with which sliding windows are tried out


class Limit(NamedTuple):
    """The most tokens of a prompt and its completion, None if any number will do, and what sets it if it is not the
    context."""

    tokens: int | None
    reason: str = ""

    @property
    def because(self) -> str:
        """The reason as the end of a message."""
        return f", {self.reason}" if self.reason else ""


def decoder_config(model: PreTrainedModel) -> Any:
    """The configuration of a causal language model with attention that takes a slot-wise mask.

    Raises:
        ValueError: for any other model.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.base_model is model or model.get_output_embeddings() is None:
        raise ValueError(f"model: {name} is not a Transformers model with a decoder and, on top of it, a head")
    config: Any = model.config.get_text_config(decoder=True)
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"model: its attention is {config._attn_implementation!r}; expected 'sdpa' or 'eager'")
    if "local" in getattr(config, "attention_layers", ()):
        raise ValueError(f"model: {name} is not supported: it windows its attention by its own means")
    return config


def length_limit(config: Any) -> Limit:
    """The least length at which the context ends or the model begins to compute otherwise, sliding windows apart."""
    limits = [Limit(getattr(config, "max_position_embeddings", None))]
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters, *parameters.values()]:  # of the model, or of each type of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            reason = "the original length of its longrope, beyond which the frequencies of all positions change"
            limits.append(Limit(rope.get("original_max_position_embeddings"), reason))
    limits.append(Limit(getattr(config, "keep_window_size", None), "the number of keys that its dynamic mask keeps"))
    return least(limits)


def least(limits: Iterable[Limit]) -> Limit:
    """The limit of the fewest tokens."""
    numbers = [limit for limit in limits if limit.tokens is not None and limit.tokens > 0]
    return min(numbers, key=lambda limit: limit.tokens or 0, default=Limit(None))


def sliding_windows(model: PreTrainedModel, config: Any) -> list[int | None]:
    """The window of each layer's attention; None if the layer attends to all earlier tokens.

    Raises:
        ValueError: for a model whose state is more than keys and values.
    """
    layers = DynamicCache(config=config).layers
    recurrent = [i for i, layer in enumerate(layers) if type(layer).__name__.startswith("LinearAttention")]
    if recurrent:
        types = getattr(config, "layer_types", None) or [type(layer).__name__ for layer in layers]
        kinds = ", ".join(sorted({str(types[i]) for i in recurrent}))
        raise ValueError(
            f"model: {type(model).__name__} is not supported: {len(recurrent)} of its {len(layers)} layers ({kinds}) "
            "keep a state that cannot be cut back to an earlier token, which a rejected draft requires; expected keys "
            "and values in every layer, or, of a teacher, the URL of its server"
        )
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(f"model: {type(model).__name__} is not supported: it caches in a {type(layer).__name__}")
    return [layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None for layer in layers]


@contextmanager
def narrowed(config: Any, window: int) -> Iterator[None]:
    """With another sliding window, so that a few tokens are enough to cross it."""
    before = config.sliding_window
    config.sliding_window = window
    try:
        yield
    finally:
        config.sliding_window = before


@torch.no_grad()
def check_forward_passes(lm: Any) -> bool:
    """Compare the cached forward pass of a `CausalLM` with the model's own on two rows of different lengths, and a row
    beside one at the end of the context with the row alone.

    Returns:
        whether the model computes the same from embeddings as from ids. It does not if it scales its embeddings, or
        has more than one table of them.

    Raises:
        ValueError: if the model's forward pass fails, gives NaN, or gives other probabilities without a cache or beside
            a long row.
    """
    name = type(lm.model).__name__
    a, b, c = (i % lm.vocab_size for i in (1, 2, 3))
    rows = [[a, b], [c, a, b, a]]
    try:
        expected, other = _own(lm, rows), _own(lm, [[c, b], [b, a, b, a]])
        cached = _cached(lm, rows)
        beside = _beside_a_far_row(lm, rows[0], lm.max_length) if lm.max_length else expected[:1].log()
    except _FAILURES as error:
        raise ValueError(f"model: {name} is not supported: its forward pass fails ({error})") from error
    if not bool(expected.isfinite().all()):
        raise ValueError(f"model: {name} gives NaN")
    limit = _tolerance(lm, _distance(other.log(), expected))
    if (distance := _distance(cached, expected)) > limit:
        raise ValueError(
            f"model: {name} is not supported: with a cache its probabilities change by {distance:.2g} (total variation)"
        )
    if (distance := _distance(beside, expected[:1])) > limit:
        raise ValueError(
            f"model: {name} is not supported: beside a row of {lm.max_length} tokens the probabilities of a short one "
            f"change by {distance:.2g} (total variation)"
        )
    tokens = torch.tensor([[b, 0, 0], [b, a, 0]])  # the states after the completions, whatever follows there
    mask = torch.tensor([[False, True, False], [False, False, True]])
    try:
        return _distance(lm.head(lm.features([[a], [c, a]], tokens, mask)), expected) <= limit
    except _FAILURES:
        return False


@torch.no_grad()
def windows_are_exact(lm: Any, windows: set[int]) -> bool:
    """Whether the cached forward pass masks sliding windows, of one length in all layers that have one, as the model's
    own does: seen on a short row and one beyond a window of `_NARROW` tokens."""
    if windows != {getattr(lm.config, "sliding_window", None)}:
        return False
    a, b, c = (i % lm.vocab_size for i in (1, 2, 3))
    rows = [[a, b], [c, a, b, a, c, b, b, a]]
    try:
        wide = _own(lm, rows)
        with narrowed(lm.config, _NARROW):
            expected = _own(lm, rows)
            moved = _distance(expected.log(), wide)  # 0: the model does not read its window here
            return moved > 0 and _distance(_cached(lm, rows), expected) <= min(_tolerance(lm, moved), moved / 3)
    except _FAILURES:
        return False


def _own(lm: Any, rows: list[list[int]]) -> Tensor:
    """The probabilities after each row, by the model's own forward pass of that row alone, [n, V]."""
    passes = [lm.model(input_ids=torch.tensor([row], device=lm.model.device)) for row in rows]
    logits = torch.stack([x.logits[0, -1, : lm.vocab_size] for x in passes]).double()
    if lm.absent_ids:
        logits = logits.index_fill(-1, torch.tensor(lm.absent_ids, device=logits.device), -torch.inf)
    return logits.softmax(-1)


def _cached(lm: Any, rows: list[list[int]]) -> Tensor:
    """log p after each of two rows, the first one token and the second two tokens after their prompts, [2, V]."""
    lm.start([rows[0][:-1], rows[1][:-2]])
    return lm.extend(torch.tensor([[rows[0][-1], -1], rows[1][-2:]]))[torch.arange(2), torch.arange(2)]


def _beside_a_far_row(lm: Any, row: list[int], end: int) -> Tensor:
    """log p after a row that shares its pass with a row at the positions before `end`, [1, V]."""
    n = len(row)
    positions = torch.stack([torch.arange(n), torch.arange(n) + max(end - n, 0)])
    ids = torch.tensor([row, row], device=lm.model.device)
    mask = lm.attention_mask(torch.arange(n).expand(2, n), n)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.to(lm.model.device)}
    return lm.head(lm.hidden_states(**inputs, use_cache=False)[:1, -1])


def _distance(log_probs: Tensor, expected: Tensor) -> float:
    """The largest total variation between distributions, [n, V] each."""
    return float((log_probs.double().exp() - expected).abs().sum(-1).max()) / 2


def _tolerance(lm: Any, moved: float) -> float:
    """The total variation that may be rounding; if arithmetic is exact, far less than `moved`, that of two contexts."""
    exact = {} if getattr(lm.model, "is_quantized", False) else {torch.float64: 1e-6, torch.float32: 1e-3}
    most = exact.get(lm.model.dtype)
    return 0.2 if most is None else min(most, max(most / 100, moved / 10))
