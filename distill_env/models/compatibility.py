"""Which Transformers models the cached, two-part forward pass of `CausalLM` computes correctly; others are refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_FAILURES = (TypeError, ValueError, RuntimeError, IndexError)


def decoder_config(model: PreTrainedModel) -> Any:
    """The configuration of a causal language model with attention that takes a slot-wise mask.

    Raises:
        ValueError: for any other model.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.base_model is model or model.get_output_embeddings() is None:
        raise ValueError(f"model: {name} is not a Transformers causal language model")
    config: Any = model.config.get_text_config(decoder=True)
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"model: its attention is {config._attn_implementation!r}; expected 'sdpa' or 'eager'")
    if "local" in getattr(config, "attention_layers", ()):
        raise ValueError(f"model: {name} is not supported: it windows its attention by its own means")
    return config


def longest_row(model: PreTrainedModel, config: Any) -> int | None:
    """The most tokens of a prompt and its completion; None if there is no limit.

    Raises:
        ValueError: for a model whose state is more than keys and values.
    """
    longest: int | None = getattr(config, "max_position_embeddings", None)
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:  # up to its window it attends to everything
            longest = min(longest or layer.sliding_window, layer.sliding_window)
        elif type(layer) is not DynamicLayer:
            raise ValueError(f"model: {type(model).__name__} is not supported: it caches in a {type(layer).__name__}")
    return longest


@torch.no_grad()
def check_forward_passes(lm: Any) -> bool:
    """Compare the cached forward pass of a `CausalLM` with the model's own on two rows of different lengths.

    Returns:
        whether the model computes the same from embeddings as from ids. It does not if it scales its embeddings, or
        has more than one table of them.

    Raises:
        ValueError: if the model's forward pass fails, gives NaN, or gives other probabilities without a cache.
    """
    name, device = type(lm.model).__name__, lm.model.device
    a, b, c = (i % lm.vocab_size for i in (1, 2, 3))
    prompts, completions = [[a], [c, a]], torch.tensor([[b, -1], [b, a]])
    try:
        full = [lm.model(input_ids=torch.tensor([row], device=device)) for row in ([a, b], [c, a, b, a])]
        expected = torch.stack([x.logits[0, -1, : lm.vocab_size] for x in full]).double().softmax(-1)
        lm.start(prompts)
        cached = lm.extend(completions)[torch.arange(2), torch.arange(2)]
    except _FAILURES as error:
        raise ValueError(f"model: {name} is not supported: its forward pass fails ({error})") from error
    if not bool(expected.isfinite().all()):
        raise ValueError(f"model: {name} gives NaN")

    def distance(log_probs: Tensor) -> float:  # total variation
        return float((log_probs.double().exp() - expected).abs().sum(-1).max()) / 2

    exact = {} if getattr(lm.model, "is_quantized", False) else {torch.float64: 1e-6, torch.float32: 1e-3}
    limit = exact.get(lm.model.dtype, 0.2)
    if distance(cached) > limit:
        raise ValueError(
            f"model: {name} is not supported: with a cache its probabilities change by {distance(cached):.2g} (total "
            "variation)"
        )
    tokens = F.pad(completions.clamp(min=0), (0, 1))  # the states after the completions, whatever follows there
    mask = torch.tensor([[False, True, False], [False, False, True]])
    try:
        return distance(lm.head(lm.features(prompts, tokens, mask))) <= limit
    except _FAILURES:
        return False
