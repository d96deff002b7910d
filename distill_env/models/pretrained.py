"""From a name to a Transformers model: reading, placing, quantising and adapting its weights.

Devices, quantisation and placement go through Transformers' own arguments. Several devices and bitsandbytes are
untested.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from distill_env.models.adapters import add_adapter, add_configured_adapter, load_adapter, merge_adapter
from distill_env.models.hub import no_progress_bars, reason_of, require
from distill_env.models.names import base_and_adapter, base_of, is_adapter

DTYPES = ("float32", "float64", "bfloat16", "float16")


def read_pretrained(
    name_or_path: str | Path,
    *,
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
    device: str | torch.device = "cpu",
    device_map: str = "",
    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto",
    trust_remote_code: bool = False,
    quantize: Literal["none", "8bit", "4bit"] = "none",
    gguf_file: str = "",
    lora_rank: int = 0,
    lora_alpha: float = 16.0,
    lora_targets: str = "all-linear",
    lora_seed: int = 0,
    peft_config: Any = None,
    gradient_checkpointing: bool = False,
) -> Any:
    """A causal language model from a folder or hub id. The folder of a peft adapter is loaded onto its base model, to
    train it further; BASE+ADAPTER is a plain model, the adapter merged into the base.

    Args:
        name_or_path: folder or hub id, or BASE+ADAPTER, where the adapter is a folder or `word_problems`.
        dtype: of the weights; of the computation if they are quantised.
        device: "auto" takes cuda if there is one, else the cpu.
        device_map: Transformers' own placement of the weights, instead of `device`.
        attn_implementation: "auto" leaves it to Transformers.
        trust_remote_code: run Python code that comes with the model.
        quantize: load the weights in 8 or 4 bits, by bitsandbytes.
        gguf_file: a GGUF file in the folder or repository, which Transformers converts to `dtype`.
        lora_rank: rank of a new LoRA adapter, which alone is trainable; 0 for none. It has no dropout, since the model
            runs in evaluation mode.
        lora_alpha: scale of the adapter, times its rank.
        lora_targets: modules that it is added to, names or ends of names separated by commas; "all-linear" is all
            linear ones but the head.
        lora_seed: of its initial weights.
        peft_config: a `peft.LoraConfig` in place of the three arguments before.
        gradient_checkpointing: keep only each layer's input for the backward pass, which computes the rest again.

    Raises:
        ValueError: for an argument out of range, or one that needs a package that is not installed.
        OSError: if no model can be loaded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; expected one of {', '.join(DTYPES)}")
    target = find_device(device)
    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if attn_implementation != "auto":
        arguments["attn_implementation"] = attn_implementation
    if device_map:
        require("accelerate", f"device_map: {device_map!r}", "distributed")
        arguments["device_map"] = device_map
    if gguf_file:
        require("gguf", f"gguf_file: {gguf_file!r}", "gguf")
        arguments["gguf_file"] = gguf_file
    if quantize != "none":
        arguments["quantization_config"] = _quantization(quantize, arguments["dtype"])
        arguments.setdefault("device_map", {"": target})  # quantised weights cannot be moved
    if is_adapter(name_or_path) or base_and_adapter(name_or_path):
        require("peft", f"name_or_path: {str(name_or_path)!r} is an adapter and", "peft")
        if lora_rank:
            raise ValueError(f"lora_rank: {lora_rank} with {str(name_or_path)!r}, an adapter; expected 0, to train it")
        if peft_config is not None:
            raise ValueError(f"peft_config: with {str(name_or_path)!r}, an adapter; expected None, to train it")
    if lora_rank and peft_config is not None:
        raise ValueError(f"lora_rank: {lora_rank} with peft_config; expected one of the two")
    model = _load(name_or_path, arguments)
    if lora_rank:
        add_adapter(model, lora_rank, lora_alpha, lora_targets, lora_seed)
    elif peft_config is not None:
        add_configured_adapter(model, peft_config, lora_seed)
    if gradient_checkpointing:
        recompute_layers(model)
    return model if "device_map" in arguments else model.to(target)


def _quantization(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantize not in ("8bit", "4bit"):
        raise ValueError(f"quantize: {quantize!r} is unknown; expected none, 8bit or 4bit")
    require("bitsandbytes", f"quantize: {quantize!r}", "quantize")
    return BitsAndBytesConfig(**{f"load_in_{quantize}": True}, bnb_4bit_compute_dtype=dtype)


def _load(name_or_path: str | Path, arguments: dict[str, Any]) -> Any:
    """The model, complete and with its adapter if it is one. Raises OSError."""
    try:
        with no_progress_bars():
            # With the tensors that do not fit in the report, by name.
            options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(base_of(name_or_path), **arguments, **options)
            model, report = loaded
            refuse_incomplete(model, report)
            if parts := base_and_adapter(name_or_path):
                load_adapter(model, parts[1])
                merge_adapter(model)
            elif is_adapter(name_or_path):
                load_adapter(model, Path(name_or_path))
    except Exception as error:  # its type depends on the damage
        raise OSError(
            f"name_or_path: no causal language model can be loaded from {str(name_or_path)!r}; expected a folder with "
            f"config.json and weights, or a Hugging Face hub id ({reason_of(error)})"
        ) from error
    return model


def refuse_incomplete(model: Any, report: dict[str, Any]) -> None:
    """Raise ValueError for missing or misshapen weights, which Transformers draws at random, and for NaN."""
    wrong = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if wrong:
        raise ValueError(f"{len(wrong)} of its weights are missing or of another shape, among them {min(wrong)}")
    # formats of one byte have no isfinite, and weights on other devices cannot be read
    readable = ((n, p) for n, p in model.named_parameters() if p.element_size() > 1 and not p.is_meta)
    bad = [name for name, parameter in readable if not bool(parameter.isfinite().all())]
    if bad:
        raise ValueError(f"weights are NaN or infinite, among them {bad[0]}")


def find_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises ValueError if it does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device: {device!r} is not available; expected 'auto', 'cpu', 'cuda', 'cuda:1', ..."
        ) from error
    return target


def whole_state(model: Any) -> dict[str, Any]:
    """The model's `state_dict`, also of a sharded model whose weights are gathered at the moment, which FSDP's own
    method would split again."""
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model.state_dict()
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        tensors = {**module._parameters, **buffers}
        state |= {f"{name}.{key}": tensor.detach() for key, tensor in tensors.items() if tensor is not None}
    return {name.removeprefix("."): tensor for name, tensor in state.items()}


def decoder_layers(model: Any) -> list[Any]:
    """The modules that Transformers marks as layers, outer ones before those inside them; empty if it marks none."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(model: Any) -> None:
    """Let the backward pass compute each layer again from its input (Chen et al. 2016, 1604.06174).

    Transformers does so in training mode only, which would turn on dropout, too; this works in any mode.

    Raises:
        ValueError: if the model does not mark its layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} does not support it; expected it off")
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # without dropout there is no random state to restore
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
