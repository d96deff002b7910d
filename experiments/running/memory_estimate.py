"""An estimate of the memory that a run of language models needs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FLOAT = 4  # bytes; distributions over the vocabulary are float32
LOSS_ARRAYS = 10  # [positions, V] that a chunk of the loss and its gradient hold at a time; counted, 7 to 11 by method
DRAFT_ARRAYS = 8  # [rows, K + 1, V] around a draft: both models', their copies, the gate's arithmetic


def bytes_of(model: Any) -> int:
    """Bytes of a model's weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def training_bytes(model: Any, shards: int = 1) -> dict[str, int]:
    """Bytes of gradients and AdamW for the trained weights: two float32 moments, and float32 copies of shorter weights.
    A sharded student needs a share of these, and a share of the weights besides the whole ones."""
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = sum(p.numel() * (2 * FLOAT if p.element_size() >= FLOAT else 3 * FLOAT) for p in trained)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    own = {"student's shards": bytes_of(model) // shards} if shards > 1 else {}
    return {"gradients": gradients // shards, "AdamW": moments // shards, **own}


def cache_bytes(config: Any, rows: int, length: int, element: int) -> int:
    """Bytes of keys and values; the cache grows by half."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(1.5 * 2 * config.num_hidden_layers * heads * width * rows * length * element)


def activation_bytes(config: Any, rows: int, length: int, element: int, recomputed: bool) -> int:
    """Bytes of activations for the backward pass. Measured on Llama, Qwen2 and GPT-2 with sdpa: 10 hidden and 4
    intermediate widths per token and layer."""
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    layer = 10 * config.hidden_size + 4 * inner
    layers = config.num_hidden_layers
    floats = layers * config.hidden_size + layer if recomputed else layers * layer
    return rows * length * floats * element


def estimate(teacher: Any, student: Any, shape: dict[str, int], recomputed: bool) -> dict[str, int]:
    """Bytes by purpose, in the order of allocation.

    Args:
        teacher, student: Transformers models.
        shape: `rows` of the environment, `batch`, `micro` (completions per backward pass), `prompt` and `completion`
            (tokens), `draft` (the longest), `chunk` (positions of the loss at a time), `ids` (V), `stored` (numbers of
            the teacher per position), `shards` (processes that a student is split over; 1).
        recomputed: whether gradient checkpointing is used.
    """
    length = shape["prompt"] + shape["completion"]
    configs = [m.config.get_text_config(decoder=True) for m in (teacher, student)]
    elements = [m.dtype.itemsize for m in (teacher, student)]
    caches = sum(cache_bytes(c, shape["rows"], length, e) for c, e in zip(configs, elements, strict=True))
    positions = min(shape["chunk"], shape["micro"] * shape["completion"])
    drafts = DRAFT_ARRAYS * shape["rows"] * (shape["draft"] + 1) * shape["ids"] * FLOAT
    backward = activation_bytes(configs[1], shape["micro"], length, elements[1], recomputed)
    backward += LOSS_ARRAYS * positions * shape["ids"] * FLOAT
    return {
        "teacher": bytes_of(teacher),
        "student": bytes_of(student),
        **training_bytes(student, shape.get("shards", 1)),
        "key/value caches": caches,
        "teacher's distributions of a batch": shape["batch"] * shape["completion"] * shape["stored"] * FLOAT,
        # one after the other
        "drafts or backward pass": max(drafts, backward),
    }


def free_bytes(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        import psutil
    except ImportError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.virtual_memory().available)


def in_words(size: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
