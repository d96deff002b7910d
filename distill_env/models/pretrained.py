"""From a name to a Transformers model: how its weights are read, placed, quantised and adapted, and written plainly.

What needs a GPU (cuda, bitsandbytes, several devices) goes through Transformers' own arguments; not run on CUDA yet.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

_DTYPES = ("float32", "float64", "bfloat16", "float16")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names


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
    gradient_checkpointing: bool = False,
) -> Any:
    """A causal language model from a folder or hub id; a folder of a peft adapter is read onto its base model.

    Args:
        dtype: of the weights, or of what is computed if they are quantised.
        device: `auto` takes cuda if there is one, else the cpu.
        device_map: Transformers' own; then it places the weights instead of `device`.
        attn_implementation: `auto` leaves it to Transformers.
        trust_remote_code: run Python code that comes with the model.
        quantize: read the weights in so few bits, by bitsandbytes.
        gguf_file: a file of the folder or repository in the GGUF format, which Transformers turns into `dtype`.
        lora_rank: rank of a new LoRA adapter (Hu et al. 2021, 2106.09685), which alone is trainable; 0 for none. There
            is no dropout in it, since the model runs in evaluation mode.
        lora_alpha: its scale times its rank.
        lora_targets: the modules that it is added to, names or ends of names separated by commas; `all-linear` is all
            linear ones but the head.
        lora_seed: of its fresh weights.
        gradient_checkpointing: keep only each layer's input for the backward pass, which computes the rest again.

    Raises:
        ValueError: for an argument out of range, or one that needs a package that is not installed.
        OSError: if there is no loadable model of that name.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; accepted: {', '.join(_DTYPES)}")
    target = find_device(device)
    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if attn_implementation != "auto":
        arguments["attn_implementation"] = attn_implementation
    if device_map:
        _need("accelerate", f"device_map: {device_map!r}", "pip install accelerate")
        arguments["device_map"] = device_map
    if gguf_file:
        _need("gguf", f"gguf_file: {gguf_file!r}", "pip install 'distill-env[gguf]'")
        arguments["gguf_file"] = gguf_file
    if quantize != "none":
        _need("bitsandbytes", f"quantize: {quantize!r}", "pip install 'distill-env[quantize]'")
        arguments["quantization_config"] = _bits(quantize, getattr(torch, dtype))
        arguments.setdefault("device_map", {"": target})  # quantised weights cannot be moved
    adapter = Path(name_or_path) if (Path(name_or_path) / ADAPTER_CONFIG).is_file() else None
    if adapter:
        _need("peft", f"name_or_path: {str(adapter)!r} is an adapter and", "pip install 'distill-env[peft]'")
        if lora_rank:
            raise ValueError(f"lora_rank: {lora_rank}, but {str(adapter)!r} is an adapter; accepted: 0 trains it on")
    try:
        with no_progress_bars():
            loaded = cast(
                Any,
                AutoModelForCausalLM.from_pretrained(
                    base_of(name_or_path),
                    **arguments,
                    ignore_mismatched_sizes=True,  # they are in the report, with their names
                    output_loading_info=True,
                ),
            )
            model, report = loaded
            refuse_incomplete(model, report)
            if adapter:
                load_adapter(model, adapter)
    except Exception as error:  # what Transformers raises differs with the damage
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(
            f"name_or_path: no causal language model can be loaded from {str(name_or_path)!r}; accepted: a folder "
            f"with config.json and weights, or a Hugging Face hub id ({reason})"
        ) from error
    if lora_rank:
        add_adapter(model, lora_rank, lora_alpha, lora_targets, lora_seed)
    if gradient_checkpointing:
        recompute_layers(model)
    return model if "device_map" in arguments else model.to(target)


def refuse_incomplete(model: Any, report: dict[str, Any]) -> None:
    """Transformers draws weights that a file lacks at random, and takes NaN as it finds it. Raises ValueError."""
    wrong = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if wrong:
        raise ValueError(f"{len(wrong)} of its weights are missing or of another shape, {min(wrong)} among them")
    # formats of a byte cannot be asked, nor weights that are elsewhere
    asked = ((n, p) for n, p in model.named_parameters() if p.element_size() > 1 and not p.is_meta)
    bad = [name for name, parameter in asked if not bool(parameter.isfinite().all())]
    if bad:
        raise ValueError(f"weights are not numbers, {bad[0]} among them")


def find_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises ValueError if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device: {device!r} is not available; accepted: 'auto', 'cpu', 'cuda', 'cuda:1', ..."
        ) from error
    return target


def _need(package: str, what: str, how: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{what} needs {package}, which is not installed: {how}")


def _bits(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantize == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    raise ValueError(f"quantize: {quantize!r} is unknown; accepted: none, 8bit, 4bit")


def base_of(name_or_path: str | Path) -> str:
    """The model that an adapter's folder is for; any other name is its own."""
    config = Path(name_or_path) / ADAPTER_CONFIG
    return str(json.loads(config.read_text())["base_model_name_or_path"]) if config.is_file() else str(name_or_path)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Transformers draws a bar for every file that it reads or writes; a run draws its own."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def whole_state(model: Any) -> dict[str, Any]:
    """The model's `state_dict`, of a sharded one that is gathered for the moment as well: there FSDP's own would split
    the weights again."""
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return model.state_dict()
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kept = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        tensors = {**module._parameters, **kept}
        state |= {f"{name}.{key}": tensor.detach() for key, tensor in tensors.items() if tensor is not None}
    return {name.removeprefix("."): tensor for name, tensor in state.items()}


# ---------------------------------------------------------------------- adapters
# by peft itself: Transformers' own mixin refuses its present release


def add_adapter(model: Any, rank: int, alpha: float, targets: str, seed: int) -> None:
    """A fresh LoRA adapter, which changes nothing yet; everything else is frozen.

    Raises:
        ValueError: if peft is not installed, or for a rank, a scale or targets that it does not take.
    """
    _need("peft", f"lora_rank: {rank}", "pip install 'distill-env[peft]'")
    from peft import LoraConfig

    if rank < 1 or not alpha > 0:
        raise ValueError(f"lora_rank, lora_alpha: {rank}, {alpha}; accepted: a rank of at least 1 and a positive scale")
    names = [name.strip() for name in targets.split(",")]
    folder = Path(model.name_or_path)  # absolute, since whoever loads the adapter may stand elsewhere
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets if targets == "all-linear" else names,
        base_model_name_or_path=str(folder.resolve()) if folder.is_dir() else model.name_or_path,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            _inject(config, model)
    except ValueError as error:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"lora_targets: {targets!r} are no modules of the student; accepted: all-linear, or some of "
            + ", ".join(linear)
        ) from error


def _inject(config: Any, model: Any) -> None:
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # said of GPT-2's layers, and set right by peft itself
        inject_adapter_in_model(config, model)


def is_adapted(model: Any) -> bool:
    """Whether the model has an adapter."""
    return getattr(model, "peft_config", None) is not None


def save_adapter(model: Any, path: str | Path) -> None:
    """Write the adapter and where its base model is, in peft's format."""
    from peft import get_peft_model_state_dict

    Path(path).mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, Path(path) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (config,) = model.peft_config.values()
    config.save_pretrained(str(path))


def load_adapter(model: Any, path: Path) -> None:
    """Put a saved adapter, trainable, on its base model. Raises ValueError if it is not of this model."""
    from peft import PeftConfig, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(path))
    config.inference_mode = False
    _inject(config, model)
    state = {n.removeprefix("base_model.model."): t for n, t in load_file(path / ADAPTER_WEIGHTS).items()}
    found: Any = set_peft_model_state_dict(model, state)
    missing = len(list(filter(_of_adapter, model.state_dict()))) - len(state)
    if found.unexpected_keys or missing:
        raise ValueError(f"adapter: {str(path)!r} is not of {model.name_or_path!r}")


def _of_adapter(name: str) -> bool:
    return ".lora_" in name


def save_merged(model: Any, path: str | Path) -> None:
    """Write a plain model with the adapter folded into its weights, and the adapter beside it in `adapter/`."""
    path = Path(path)
    with torch.device("meta"):  # a shell that takes the weights as they are
        plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(merged_state(model), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    with no_progress_bars():
        plain.save_pretrained(str(path))
    save_adapter(model, path / "adapter")


@torch.no_grad()
def merged_state(model: Any) -> dict[str, Tensor]:
    """The weights with the adapter's change added, under the names of a plain model; the model stays as it is."""
    from peft.tuners.lora import LoraLayer

    state = {name: tensor for name, tensor in model.state_dict().items() if not _of_adapter(name)}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for part in ("weight", "bias"):
                if f"{name}.base_layer.{part}" in state:
                    state[f"{name}.{part}"] = state.pop(f"{name}.base_layer.{part}")
            for adapter in layer.active_adapters:
                weight = state[f"{name}.weight"]
                state[f"{name}.weight"] = weight + cast(Any, layer).get_delta_weight(adapter).to(weight.dtype)
    return state


# ---------------------------------------------------------------------- memory for time


def decoder_layers(model: Any) -> list[Any]:
    """What Transformers marks as layers, outer ones before those in them; none if it marks nothing."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(model: Any) -> None:
    """From now on the backward pass computes each layer again from its input (Chen et al. 2016, 1604.06174).

    Transformers does so only in training mode, which would turn on dropout as well; this does it in any mode.

    Raises:
        ValueError: if the model does not say what its layers are.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} does not support it; accepted: off")
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # without dropout there is no random state to restore
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
