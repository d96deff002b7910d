"""An estimate of the memory that a run of language models needs."""

import os
from typing import Any

import torch

from agents.config import DistillConfig
from distill_env.env import DistillVectorEnv
from experiments.running.config import RunConfig

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
    """Bytes of keys and values."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * rows * length * element


def activation_bytes(config: Any, rows: int, length: int, element: int, recomputed: bool) -> int:
    """Bytes of activations for the backward pass. Measured on Llama, Qwen2 and GPT-2 with sdpa: 10 hidden and 4
    intermediate widths per token and layer."""
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    layer = 10 * config.hidden_size + 4 * inner
    layers = config.num_hidden_layers
    floats = layers * config.hidden_size + layer if recomputed else layers * layer
    return rows * length * floats * element


def local_teachers(teacher: Any) -> dict[str, Any]:
    """The Transformers models of a teacher, or of those of several that are on this machine, by their names."""
    several = getattr(teacher, "teachers", {"": teacher})
    return {f"teacher {name}".rstrip(): m.model for name, m in several.items() if hasattr(m, "state_dict")}


def estimate(config: RunConfig, env: DistillVectorEnv, student: Any, shards: int = 1) -> dict[str, int]:
    """Bytes by purpose, in the order of allocation.

    Args:
        config: of the run.
        env: for the training, with at least one teacher on this machine.
        student: a Transformers model.
        shards: processes that the student is split over.
    """
    options: Any = config.agent_options
    batch, top_k = options.batch_size, config.method.top_k if config.method else 0
    micro = getattr(options, "micro_batch", 0) or batch
    chunk = 1024
    if isinstance(options, DistillConfig):
        chunk = options.positions_at_a_time(env.vocab_size, student.device.type != "cpu")
    stored = 3 * top_k + 1 if top_k else env.vocab_size  # an id is as long as two numbers
    models = (*local_teachers(env.teacher).values(), student)
    configs = [m.config.get_text_config(decoder=True) for m in models]
    elements = [m.dtype.itemsize for m in models]
    length = env.max_prompt_length + env.max_new_tokens
    slots = env.max_new_tokens + env.chunk  # a draft is padded
    lengths = [env.max_teacher_prompt_length + slots] * (len(models) - 1) + [env.max_prompt_length + slots]
    kept = batch * env.max_new_tokens * stored * FLOAT
    if isinstance(options, DistillConfig) and student.device.type != "cpu":
        kept = min(kept, int(options.teacher_buffer_gib * 2**30))
    caches = sum(cache_bytes(c, env.num_envs, n, e) for c, n, e in zip(configs, lengths, elements, strict=True))
    drafts = DRAFT_ARRAYS * env.num_envs * (env.chunk + 1) * env.vocab_size * FLOAT
    backward = activation_bytes(configs[-1], micro, length, elements[-1], config.student.gradient_checkpointing)
    backward += LOSS_ARRAYS * min(chunk, micro * env.max_new_tokens) * env.vocab_size * FLOAT
    return {
        "teacher": sum(map(bytes_of, models[:-1])),
        "student": bytes_of(student),
        **training_bytes(student, shards),
        "key/value caches": caches,
        "teacher's distributions of a batch": kept,
        # one after the other
        "drafts or backward pass": max(drafts, backward),
    }


def free_bytes(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        import psutil
    except ImportError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.virtual_memory().available)
