"""Checks and measurements on a device: the same results as on the CPU, and what an iteration costs there."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from agents.collector import collect
from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.methods import METHODS
from agents.prompts import PromptStream
from agents.rollout import Rollout
from distill_env.divergence import reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.randomness import episode_keys
from distill_env.tasks.base import Prompt

METHODS_CHECKED = ("gated", "rkl", "fkl", "minillm")


def sized(kind: Callable[..., Any], sizes: str, **options: Any) -> Any:
    """A configuration with these sizes: vocabulary, hidden, intermediate, layers, heads, key/value heads."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    numbers = dict(zip((*names, "num_key_value_heads"), map(int, sizes.split()), strict=True))
    return kind(**numbers, **options, eos_token_id=0)


class Shape(NamedTuple):
    student: Any  # configurations
    teacher: Any
    completions: int
    prompt: int  # tokens
    completion: int  # tokens


QWEN_7B = sized(Qwen2Config, "151936 3584 18944 28 28 4")
SHAPES: dict[str, Shape] = {
    "tiny": Shape(sized(Qwen2Config, "1000 64 128 2 4 2"), sized(Qwen2Config, "1000 128 256 4 8 4"), 8, 16, 32),
    "qwen2.5-0.5b": Shape(
        sized(Qwen2Config, "151936 896 4864 24 14 2", tie_word_embeddings=True), QWEN_7B, 32, 128, 256
    ),
    "qwen2.5-1.5b": Shape(
        sized(Qwen2Config, "151936 1536 8960 28 12 2", tie_word_embeddings=True), QWEN_7B, 32, 128, 256
    ),
}


@dataclass(frozen=True)
class Row:
    """A line of the table. A check has a limit; a measurement has none."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None

    @property
    def passed(self) -> bool | None:
        return None if self.limit is None else self.value <= self.limit


def random_task(vocab_size: int, length: int, completion: int, count: int) -> Any:
    """A task of random prompts without grades."""
    ids = np.random.default_rng(0).integers(1, vocab_size, (count, length))
    prompts = tuple(Prompt(tuple(row), "") for row in ids.tolist())
    limits = {"vocab_size": vocab_size, "eos_token_id": 0, "max_new_tokens": completion}
    return SimpleNamespace(**limits, graded=False, step_end_ids=frozenset({2}), prompts=lambda split: prompts)


def random_model(config: Any, device: torch.device, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Any:
    """A Transformers model with random weights, made on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.eval()


def checks(device: torch.device) -> Iterator[Row]:
    """Compare the device with the CPU on small random models in float32.

    Yields:
        largest differences of log-probabilities and D_t, shares of different tokens and decisions, and relative
        differences of gradients of one update.
    """
    task, cpu = random_task(1000, 12, 24, 16), torch.device("cpu")
    sizes = ("1000 64 128 2 4 2", "1000 96 192 3 4 2")
    configs = [sized(LlamaConfig, numbers, initializer_range=0.3) for numbers in sizes]
    models = [random_model(c, cpu, torch.float32, seed) for seed, c in enumerate(configs)]

    def world(where: torch.device) -> tuple[CausalLM, CausalLM]:
        student, teacher = (CausalLM(copy.deepcopy(m).to(where), eos_token_id=0) for m in models)
        return student, teacher

    def scored(where: torch.device) -> list[Tensor]:
        tokens = torch.randint(1, 1000, (16, 8), generator=torch.Generator().manual_seed(0))
        both = world(where)
        for model in both:
            model.start([p.ids for p in task.prompts("train")])
        return [model.extend(tokens).cpu() for model in both]

    def one_update(where: torch.device, name: str, draft_length: int) -> tuple[Rollout, Tensor]:
        student, teacher = world(where)
        env = DistillVectorEnv(16, task, teacher, chunk=8, reveal_teacher=False, autoreset_mode="Disabled")
        config = DistillConfig(METHODS[name].with_tau(tau), OptimizerConfig(1e-4), 16, draft_length=draft_length)
        agent = DistillAgent(student, config)
        rollout = agent.rollout(env, PromptStream(env.prompts, 0))
        agent.optimizer.zero_grad()
        agent.backward(rollout)
        gradients = [p.grad.cpu().double().ravel() for p in student.parameters() if p.grad is not None]
        return rollout, torch.cat(gradients)

    here, there = scored(cpu), scored(device)
    yield Row(
        "log-probabilities", max(largest_difference(*pair) for pair in zip(here, there, strict=True)), "nats", 1e-3
    )
    divergences = reverse_kl(*here), reverse_kl(*there)
    yield Row("D_t", largest_difference(*divergences), "nats", 1e-3)
    tau = float(divergences[0].median())
    for name in METHODS_CHECKED:
        (by_cpu, expected), (by_device, gradient) = one_update(cpu, name, 8), one_update(device, name, 8)
        differing = differing_share(by_cpu, by_device)
        yield Row(f"{name}: completions that differ", differing, "share", 0.25)
        if differing == 0:  # gradients of the same completions
            yield Row(f"{name}: gradient", float((gradient - expected).norm() / expected.norm()), "relative", 1e-3)
    drafts = (one_update(device, "gated", length)[0] for length in (1, 8))
    yield Row("draft lengths 1 and 8: completions that differ", differing_share(*drafts), "share", 0.25)


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def differing_share(a: Rollout, b: Rollout) -> float:
    """The share of the completions that differ."""
    pairs = zip(a.tokens.tolist(), b.tokens.tolist(), strict=True)
    return float(np.mean([[t for t in x if t >= 0] != [t for t in y if t >= 0] for x, y in pairs]))


def measurements(device: torch.device, shape: str, dtype: torch.dtype) -> Iterator[Row]:
    """Seconds and memory of an iteration of `gated` and `rkl`, beside `generate`, with random weights.

    Random models agree, since neither knows anything, so tau is the median of their D_t.
    """
    sizes = SHAPES[shape]
    n, vocabulary = sizes.completions, sizes.student.vocab_size
    student_model = random_model(sizes.student, device, dtype, 1, scale=1.5)
    teacher_model = random_model(sizes.teacher, device, dtype, 0, scale=1.5)
    task = random_task(vocabulary, sizes.prompt, sizes.completion, n)
    teacher, student = (CausalLM(m, vocab_size=vocabulary, eos_token_id=0) for m in (teacher_model, student_model))
    env = DistillVectorEnv(n, task, teacher, chunk=16, reveal_teacher=False, autoreset_mode="Disabled")

    inputs = torch.tensor([p.ids for p in task.prompts("train")], device=device)
    length = {"min_new_tokens": sizes.completion, "max_new_tokens": sizes.completion}
    student_model.generation_config.pad_token_id = 0
    for _ in range(2):  # the first is not counted
        started = time.perf_counter()
        student_model.generate(inputs, do_sample=True, **length).cpu()
        seconds = time.perf_counter() - started
    yield Row(f"generate, {n} x {sizes.completion} tokens", seconds, "s")
    gate = METHODS["gated"].with_tau(1e9).hard_gate
    probe = collect(env, student, list(env.prompts), episode_keys(0, np.arange(n)), gate, 16)
    score = probe.score[probe.mask]
    taus = {f"gated, {share} % hard": float(score.nanquantile(1 - share / 100)) for share in (1, 5, 20)}
    del probe
    for name, tau in {"rkl": 1e9, **taus}.items():
        method = METHODS[name.split(",")[0]].with_tau(tau)
        config = DistillConfig(method, OptimizerConfig(1e-9), n, micro_batch=min(n, 8))
        yield from iteration(name, DistillAgent(student, config), env, device)


def iteration(name: str, agent: DistillAgent, env: DistillVectorEnv, device: torch.device) -> Iterator[Row]:
    """Seconds, tokens and memory of the second iteration of an agent."""
    last: dict[str, float] = {}
    agent.learn(env, 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    agent.learn(env, 1, lambda _, metrics: last.update(metrics))
    yield Row(f"{name}: iteration", last["time/seconds"], "s")
    for part in ("rollout", "student", "teacher", "update"):
        yield Row(f"{name}: {part}", last[f"time/{part}_seconds"], "s")
    yield Row(f"{name}: speed", last["time/tokens_per_second"], "tokens/s")
    yield Row(f"{name}: rewritten", last["rollout/rewritten_share"], "share")
    if device.type == "cuda":
        yield Row(f"{name}: peak memory", torch.cuda.max_memory_allocated(device) / 2**30, "GiB")
