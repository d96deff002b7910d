"""The training of the word problems' teacher: its gradients, and the folder that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill_env.models.causal_lm import CausalLM
from experiments.making.train_word_teacher import MergedLinear, TrainWordTeacherConfig, main
from tests.helpers.byte_tokenizer import save_byte_tokenizer
from tests.helpers.tiny_models import write_model

pytest.importorskip("peft")


def test_the_gradients_are_those_of_the_merged_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, b, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5), (2, 5), (4, 2), (4, 5))
    )
    arguments = [t.requires_grad_() for t in (x, a, b)]

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = MergedLinear.apply(x, a, b, (weight + b @ a).detach())
        return out

    assert torch.autograd.gradcheck(layer, arguments)


def test_a_training_goes_on_and_ships_a_small_adapter(tmp_path: Path) -> None:
    """Stopped after one step and started again, it writes what it would have written."""
    base = write_model(tmp_path / "base", rows=257, max_position_embeddings=1024, eos_token_id=256)
    save_byte_tokenizer(base)
    made = {}
    for name, stops in (("at once", (2,)), ("in two", (1, 2))):
        for steps in stops:
            folders = {"base": Path(base), "run": tmp_path / name, "out": tmp_path / name / "out"}
            main(TrainWordTeacherConfig(**folders, steps=steps, batch=2, rank=2, eval_problems=1))
        made[name] = load_file(tmp_path / name / "out/adapter_model.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in made["at once"].values())
    assert any(tensor.count_nonzero() for name, tensor in made["at once"].items() if "lora_B" in name)
    assert all(torch.equal(tensor, made["in two"][name]) for name, tensor in made["at once"].items())
    CausalLM.load(f"{base}+{tmp_path / 'at once/out'}")
    assert "| 6 | plain |" in (tmp_path / "at once/out/README.md").read_text()
