"""A small random model of any causal language model type of Transformers, its sizes overridden by their names."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

VOCABULARY, CONTEXT, ORIGINAL, WINDOW = 64, 72, 24, 8
MOST_WEIGHTS = 100_000_000
# What some types need beyond that.
MORE: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"num_hidden_layers": 2},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "lfm2": {"layer_types": ["full_attention", "conv"] * 3},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 3},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 3},
    "zaya": {"num_experts_per_tok": 1},
}
USUAL = ("head_dim", "num_key_value_heads")
ROPE_TYPES = ("longrope", "dynamic")  # those that depend on the length of the pass

# The first pattern that a field's whole name matches gives its value; other whole numbers above 64 become 16.
SIZES: dict[str, int] = {
    r"eos_token_id": 1,
    r"(bos|pad|decoder_start|forced_eos|sep|cls|mask)_token_id": 0,
    r".*_(token_id|token_index)|image_size|patch_size|num_channels": -1,  # of other inputs: as they are
    r".*vocab_size.*|.*_vocab": VOCABULARY,
    r"original_max_position_embeddings": ORIGINAL,
    r".*max_.*positions?.*|max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length": CONTEXT,
    r"max_window_layers": 2,
    r"floor_scale|log_scaling_n_floor|.*window|.*window_size|.*window_len|attention_chunk_size|local_attention": WINDOW,
    r"(num_)?(hidden_|decoder_|encoder_)?layers|n_layers?": 6,
    r".*num_key_value_heads|.*kv_heads": 2,
    r".*heads?|.*num_.*_heads": 4,
    r".*head_dim|dim_head|attention_head_size|kv_channels|rotary_dim": 16,
    r".*lora_rank": 8,
    r"index_topk.*": 2,
    r"index_block_size": 4,
    r"n_groups?|topk_group": 1,
    r"(moe_)?num_(local_)?experts|n_routed_experts": 4,
    r"(num_)?experts_per_tok|num_experts_per_tok|moe_topk|moe_k": 2,
    r"hidden_size|d_model|n_embd|emb_dim|embedding_size|.*_embedding_size|dim_model_base": 64,
    r".*intermediate_size.*|.*ffn.*|d_inner|dff|dim_ff|feed_forward_size": 48,
}


def small_config(model_type: str, fill: bool = True, **more: Any) -> Any:
    """The default configuration of a model type with small sizes, also in its parts.

    Args:
        model_type: as in `config.json`.
        fill: set sizes that are None by default, too, such as a sliding window.
        more: values of the text part.
    """
    kind = CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(kind)}
    if names & {"qk_nope_head_dim", "qk_rope_head_dim"}:  # latent attention has no groups of heads
        more = {"num_key_value_heads": 4} | more
    return _shrink(kind, fill, MORE.get(model_type, {}) | more)


def _shrink(kind: type[PreTrainedConfig], fill: bool, more: dict[str, Any]) -> Any:
    sizes: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in kind.sub_configs:
            part = kind.sub_configs[field.name]
            if part.__name__ != "AutoConfig":
                sizes[field.name] = _shrink(part, fill, more if field.name == "text_config" else {}).to_dict()
        elif type(field.default) is int or (field.default is None and (fill or field.name in USUAL)):
            size = _size(field.name, field.default)
            if size is not None:
                sizes[field.name] = size
        elif field.name == "use_sliding_window":
            sizes[field.name] = True
    return kind(**sizes | {name: x for name, x in more.items() if "text_config" not in kind.sub_configs})


def _size(name: str, default: int | None) -> int | None:
    for pattern, size in SIZES.items():
        if re.fullmatch(pattern, name):
            return None if size < 0 else size
    return 16 if default is not None and default > 64 else None


def with_rope(model_type: str, kind: str, fill: bool = True) -> Any:
    """The same with rotary positions of this type; None for a model without a choice of them."""
    config = small_config(model_type, fill)
    text = config.get_text_config(decoder=True)
    before = getattr(text, "rope_parameters", None)
    if not before:
        return None
    nested = all(isinstance(parameters, dict) for parameters in before.values())
    after = {key: _rope(kind, p, text) for key, p in before.items()} if nested else _rope(kind, before, text)
    more: dict[str, Any] = {"rope_parameters": after}
    if hasattr(text, "original_max_position_embeddings"):
        more["original_max_position_embeddings"] = ORIGINAL
    return small_config(model_type, fill, **more)


def _rope(kind: str, before: dict[str, Any], config: Any) -> dict[str, Any]:
    width = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    half = int(width * before.get("partial_rotary_factor", 1.0)) // 2
    shared = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    factors = {"short_factor": [1.0] * half, "long_factor": [8.0] * half, "short_mscale": 1.0, "long_mscale": 1.5}
    return before | shared | (factors if kind == "longrope" else {})


def small_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model with random weights, far from uniform."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"{size:,} weights")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3)
    return model
