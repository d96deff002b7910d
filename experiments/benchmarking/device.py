"""Checks and measurements on a device: the same results as on the CPU, and what an iteration costs there."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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
from distill_env.tasks.base import Grade, Prompt, Split

METHODS_CHECKED = ("gated", "rkl", "fkl", "minillm")


def qwen2(*sizes: int, tied: bool = False) -> Qwen2Config:
    """The configuration with these sizes: vocabulary, hidden, intermediate, layers, heads, key/value heads."""
    names = ("vocab_size", "hidden_size", "intermediate_size")
    names += ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")  # type: ignore[assignment]
    fields: dict[str, Any] = dict(zip(names, sizes, strict=True))
    return Qwen2Config(**fields, tie_word_embeddings=tied, eos_token_id=0)


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "student": qwen2(1000, 64, 128, 2, 4, 2),
        "teacher": qwen2(1000, 128, 256, 4, 8, 4),
        "completions": 8,
        "prompt": 16,
        "completion": 32,
    },
    "qwen2.5-0.5b": {
        "student": qwen2(151_936, 896, 4864, 24, 14, 2, tied=True),
        "teacher": qwen2(151_936, 3584, 18_944, 28, 28, 4),
        "completions": 32,
        "prompt": 128,
        "completion": 256,
    },
    "qwen2.5-1.5b": {
        "student": qwen2(151_936, 1536, 8960, 28, 12, 2, tied=True),
        "teacher": qwen2(151_936, 3584, 18_944, 28, 28, 4),
        "completions": 32,
        "prompt": 128,
        "completion": 256,
    },
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


class RandomPrompts:
    """A task of random prompts without grades."""

    graded = False
    step_end_ids: frozenset[int] = frozenset({2})

    def __init__(self, vocab_size: int, length: int, completion: int, count: int) -> None:
        self.vocab_size, self.eos_token_id, self.max_new_tokens = vocab_size, 0, completion
        rng = np.random.default_rng(0)
        ids = rng.integers(1, vocab_size, (count, length))
        self._prompts = tuple(Prompt(tuple(map(int, row)), "") for row in ids)

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return self._prompts

    def grade(self, prompt: Prompt, tokens: Any) -> Grade:
        raise NotImplementedError

    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    task = RandomPrompts(1000, 12, 24, 16)
    llama: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 0,
        "initializer_range": 0.3,
    }
    sizes = ((64, 128, 2), (96, 192, 3))
    configs = [
        LlamaConfig(vocab_size=1000, hidden_size=h, intermediate_size=i, num_hidden_layers=n, **llama)
        for h, i, n in sizes
    ]
    models = [random_model(c, torch.device("cpu"), torch.float32, seed) for seed, c in enumerate(configs)]

    def world(where: torch.device) -> tuple[CausalLM, CausalLM]:
        student, teacher = (CausalLM(copy.deepcopy(m).to(where), eos_token_id=0) for m in models)
        return student, teacher

    prompts = [p.ids for p in task.prompts("train")]
    scored: list[list[Tensor]] = []
    for where in (torch.device("cpu"), device):
        tokens = torch.randint(1, 1000, (16, 8), generator=torch.Generator().manual_seed(0))
        both = []
        for model in world(where):
            model.start(prompts)
            both.append(model.extend(tokens).cpu())
        scored.append(both)
    yield Row("log-probabilities", max(float((a - b).abs().max()) for a, b in zip(*scored, strict=True)), "nats", 1e-3)
    divergences = [reverse_kl(*pair) for pair in scored]
    yield Row("D_t", float((divergences[0] - divergences[1]).abs().max()), "nats", 1e-3)
    tau = float(divergences[0].median())

    def one_update(where: torch.device, name: str, draft_length: int) -> tuple[Rollout, list[Tensor]]:
        student, teacher = world(where)
        env = DistillVectorEnv(16, task, teacher, chunk=8, reveal_teacher=False, autoreset_mode="Disabled")
        config = DistillConfig(METHODS[name].with_tau(tau), OptimizerConfig(1e-4), 16, draft_length=draft_length)
        agent = DistillAgent(student, config)
        rollout = agent.rollout(env, PromptStream(env.prompts, 0))
        agent.optimizer.zero_grad()
        agent.backward(rollout)
        return rollout, [p.grad.cpu().double() for p in student.parameters() if p.grad is not None]

    for name in METHODS_CHECKED:
        (here, grads), (there, others) = one_update(torch.device("cpu"), name, 8), one_update(device, name, 8)
        longest = max(here.tokens.shape[1], there.tokens.shape[1])
        a, b = (torch.nn.functional.pad(r.tokens, (0, longest - r.tokens.shape[1]), value=-1) for r in (here, there))
        same = (a == b).all(1)
        yield Row(f"{name}: completions that differ", float((~same).double().mean()), "share", 0.25)
        if bool(same.all()):  # gradients of the same completions
            difference = sum(float((x - y).square().sum()) for x, y in zip(grads, others, strict=True)) ** 0.5
            size = sum(float(x.square().sum()) for x in grads) ** 0.5
            yield Row(f"{name}: gradient", difference / size, "relative", 1e-3)
    one, eight = (one_update(device, "gated", k)[0] for k in (1, 8))
    width = max(one.tokens.shape[1], eight.tokens.shape[1])
    a, b = (torch.nn.functional.pad(r.tokens, (0, width - r.tokens.shape[1]), value=-1) for r in (one, eight))
    yield Row("draft lengths 1 and 8: completions that differ", float((a != b).any(1).double().mean()), "share", 0.25)


def measurements(device: torch.device, shape: str, dtype: torch.dtype) -> Iterator[Row]:
    """Seconds and memory of an iteration of `gated` and `rkl`, beside `generate`, with random weights.

    Random models agree, since neither knows anything, so tau is the median of their D_t.
    """
    sizes = SHAPES[shape]
    n, completion = sizes["completions"], sizes["completion"]
    teacher_model = random_model(sizes["teacher"], device, dtype, 0, scale=1.5)
    student_model = random_model(sizes["student"], device, dtype, 1, scale=1.5)
    vocabulary = sizes["student"].vocab_size
    task = RandomPrompts(vocabulary, sizes["prompt"], completion, n)
    teacher, student = (CausalLM(m, vocab_size=vocabulary, eos_token_id=0) for m in (teacher_model, student_model))
    env = DistillVectorEnv(n, task, teacher, chunk=16, reveal_teacher=False, autoreset_mode="Disabled")
    keys = episode_keys(0, np.arange(n))

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(device)
        started = time.perf_counter()
        result = work()
        synchronize(device)
        return time.perf_counter() - started, result

    inputs = torch.tensor([p.ids for p in task.prompts("train")], device=device)
    length = {"min_new_tokens": completion, "max_new_tokens": completion}
    student_model.generation_config.pad_token_id = 0
    timed(lambda: student_model.generate(inputs, do_sample=True, **length))
    seconds, _ = timed(lambda: student_model.generate(inputs, do_sample=True, **length))
    yield Row(f"generate, {n} x {completion} tokens", seconds, "s")
    probe = collect(env, student, list(env.prompts), keys, METHODS["gated"].with_tau(1e9).hard_gate, 16)
    taus = {"1 %": 0.99, "5 %": 0.95, "20 %": 0.8}
    quantiles = {k: float(probe.score[probe.mask].nanquantile(q)) for k, q in taus.items()}
    del probe
    for name, tau in (("rkl", 1e9), *((f"gated, {k} hard", t) for k, t in quantiles.items())):
        config = DistillConfig(
            METHODS[name.split(",")[0]].with_tau(tau), OptimizerConfig(1e-9), n, micro_batch=min(n, 8)
        )
        yield from iteration(name, DistillAgent(student, config), env, device)


def iteration(name: str, agent: DistillAgent, env: DistillVectorEnv, device: torch.device) -> Iterator[Row]:
    """Seconds, tokens and memory of the second iteration of an agent."""
    last: dict[str, float] = {}
    agent.learn(env, 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    agent.learn(env, 1, lambda _, metrics: last.update(metrics))
    yield Row(f"{name}: iteration", last["time/seconds"], "s")
    yield Row(f"{name}: rollout", last["time/rollout_seconds"], "s")
    yield Row(f"{name}: student", last["time/student_seconds"], "s")
    yield Row(f"{name}: teacher", last["time/teacher_seconds"], "s")
    yield Row(f"{name}: update", last["time/update_seconds"], "s")
    yield Row(f"{name}: speed", last["time/tokens_per_second"], "tokens/s")
    yield Row(f"{name}: rewritten", last["rollout/rewritten_share"], "share")
    if device.type == "cuda":
        yield Row(f"{name}: peak memory", torch.cuda.max_memory_allocated(device) / 2**30, "GiB")
