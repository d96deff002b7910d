"""LoRA adapters (Hu et al. 2021, 2106.09685), by peft itself: Transformers' own mixin refuses its present release."""

from __future__ import annotations

import copy
import hashlib
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_env.models.hub import no_progress_bars, require

# Options of a LoraConfig and their values that this module can save and merge. With dropout the student that is trained
# would not be the one that writes.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "lora_dropout": (0,),
    "bias": ("none",),
    "use_dora": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"), (None,)),
}
BASE_DIGEST = "base_sha256"  # an entry of the metadata of an adapter's weights
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # peft's name


def add_adapter(model: Any, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Add a new LoRA adapter, which changes no output yet, and freeze everything else.

    Raises:
        ValueError: if peft is not installed, or for a rank, a scale or targets that it does not take.
    """
    require("peft", f"lora_rank: {rank}", "peft")
    from peft import LoraConfig

    if rank < 1 or not alpha > 0:
        raise ValueError(f"lora_rank, lora_alpha: {rank}, {alpha}; expected a rank of at least 1 and a positive scale")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
    )
    try:
        add_configured_adapter(model, config, seed)
    except ValueError as error:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"lora_targets: {targets!r} are no modules of the model; expected all-linear, or some of "
            + ", ".join(linear)
        ) from error


def add_configured_adapter(model: Any, config: Any, seed: int) -> None:
    """Add a new adapter by the user's own `peft.LoraConfig`, and freeze everything else.

    Raises:
        ValueError: for a configuration of another kind, or with an option that is not supported.
    """
    require("peft", f"peft_config: {type(config).__name__}", "peft")
    from peft import PeftConfig

    kind = str(getattr(config.peft_type, "value", config.peft_type)) if isinstance(config, PeftConfig) else None
    if kind != "LORA":
        raise ValueError(f"peft_config: {kind or type(config).__name__}; expected a LoraConfig")
    for name, accepted in SUPPORTED.items():
        value = getattr(config, name, accepted[0])
        if not any(value is a or value == a for a in accepted) and value != []:
            words = " or ".join(map(repr, accepted))
            raise ValueError(f"peft_config: {name} {value!r:.60}; expected {words}")
    config, folder = copy.deepcopy(config), Path(model.name_or_path)
    config.base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else model.name_or_path
    config.task_type = "CAUSAL_LM"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(config, model)


def _inject(config: Any, model: Any) -> None:
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # about GPT-2's layers, and corrected by peft itself
        inject_adapter_in_model(config, model)


def is_adapted(model: Any) -> bool:
    """Whether the model has an adapter."""
    return getattr(model, "peft_config", None) is not None


def save_adapter(model: Any, path: str | Path) -> None:
    """Write the adapter and the name of its base model, in peft's format."""
    from peft import get_peft_model_state_dict

    Path(path).mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, Path(path) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (config,) = model.peft_config.values()
    config.save_pretrained(str(path))


def load_adapter(model: Any, path: Path) -> None:
    """Put a saved adapter on its base model, trainable. Raises ValueError if it belongs to another model."""
    from peft import PeftConfig, set_peft_model_state_dict

    with safe_open(path / ADAPTER_WEIGHTS, "pt") as file:
        expected = (file.metadata() or {}).get(BASE_DIGEST)
    if expected and expected != (found := digest_of(model)):
        raise ValueError(
            f"adapter: {path.name!r} belongs to a base with the digest {expected[:12]}, but {model.name_or_path!r} has "
            f"{found[:12]}; expected the base that its README.md names"
        )
    config = PeftConfig.from_pretrained(str(path))
    config.inference_mode = False
    _inject(config, model)
    state = {n.removeprefix("base_model.model."): t for n, t in load_file(path / ADAPTER_WEIGHTS).items()}
    loaded: Any = set_peft_model_state_dict(model, state)
    missing = len(list(filter(_of_adapter, model.state_dict()))) - len(state)
    if loaded.unexpected_keys or missing:
        raise ValueError(f"adapter: {str(path)!r} does not belong to {model.name_or_path!r}")


def merge_adapter(model: Any) -> None:
    """Add the adapter's change to the weights, which leaves a plain model."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        cast(Any, layer).merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


@torch.no_grad()
def digest_of(model: Any) -> str:
    """SHA-256 of the names, shapes and values of a plain model's weights in bfloat16, in which float32 and bfloat16
    files of the same model agree."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _of_adapter(name: str) -> bool:
    return ".lora_" in name


def save_merged(model: Any, path: str | Path) -> None:
    """Write a plain model with the adapter merged into its weights, and the adapter itself in the folder `adapter`."""
    path = Path(path)
    with torch.device("meta"):  # no memory: it takes the merged tensors as they are
        plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(merged_state(model), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    with no_progress_bars():
        plain.save_pretrained(str(path))
    save_adapter(model, path / "adapter")


@torch.no_grad()
def merged_state(model: Any) -> dict[str, Tensor]:
    """The weights with the adapter's change added, under the names of a plain model. The model does not change."""
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
