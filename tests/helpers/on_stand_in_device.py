"""Models on a device: the same results as on the CPU, and nothing as wide as the vocabulary crosses to the host.

These tests run in a process of their own (`tests/agents/test_device.py`), as the stand-in becomes the accelerator of
the whole process.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agents.collector import Collector
from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.methods import METHODS, Method, variant
from agents.prompts import PromptStream
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.tasks.base import Grade, Prompt, Split
from tests.helpers.stand_in_device import DEVICE, move, stand_in_device

ROWS, HORIZON = 3, 6


@dataclass
class Prompts:
    """Prompts of several lengths over a vocabulary of any size."""

    vocab_size: int
    eos_token_id: int = 0
    step_end_ids: frozenset[int] = frozenset({2, 3})
    max_new_tokens: int = HORIZON
    graded: bool = False

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return tuple(Prompt(ids, "") for ids in ((1,), (4, 2), (5, 6, 7), (3, 1)))

    def grade(self, prompt: Prompt, tokens: Any) -> Grade:
        raise NotImplementedError

    def decode(self, tokens: Any) -> str:
        return str(tokens)


def llama(vocab_size: int, width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 0, "initializer_range": 0.4}
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, **sizes)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def agent_and_env(
    method: Method, vocab_size: int, where: str, draft_length: int = 3, **environment: Any
) -> tuple[DistillAgent, DistillVectorEnv]:
    """`where` names what is on the device: nothing, student, teacher or both."""
    student, teacher = (
        CausalLM(move(model) if where in (name, "both") else model, eos_token_id=0)
        for name, model in (("student", llama(vocab_size, 16, 0)), ("teacher", llama(vocab_size, 32, 1)))
    )
    options = {"max_new_tokens": HORIZON, "chunk": 4, "reveal_teacher": False, "autoreset_mode": "Disabled"}
    env = DistillVectorEnv(ROWS, Prompts(vocab_size), teacher, **{**options, **environment})
    return DistillAgent(student, DistillConfig(method, OptimizerConfig(1e-3), ROWS, draft_length=draft_length)), env


def iteration(
    method: Method, vocab_size: int, where: str, draft_length: int = 3, **environment: Any
) -> tuple[dict[str, Any], int]:
    """One rollout and one gradient.

    Returns:
        the results on the CPU, and the number of tokens.
    """
    agent, env = agent_and_env(method, vocab_size, where, draft_length, **environment)
    rollout = agent.rollout(env, PromptStream(env.prompts, 0))
    metrics = agent.backward(rollout)
    gradients = [p.grad.cpu() for p in agent.student.parameters() if p.grad is not None]
    results = {"tokens": rollout.tokens, "rewritten": rollout.rewritten, "rewards": rollout.rewards}
    results |= {
        "score": rollout.score,
        "log q": rollout.token_log_prob,
        "metrics": torch.tensor(list(metrics.values())),
    }
    return results | {f"gradient {i}": g for i, g in enumerate(gradients)}, int(rollout.mask.sum())


def assert_same(results: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tokens and writers are equal, numbers are equal to rounding: a CPU has products of its own for few states."""
    assert list(results) == list(expected)
    for key, value in expected.items():
        rtol, atol = (0, 0) if key in ("tokens", "rewritten") else (1e-4, 1e-5)
        torch.testing.assert_close(
            results[key], value, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
        )


CASES = {
    "gated": METHODS["gated"].with_tau(0.8),
    "gated on memory": variant(METHODS["step_mean"], tau=0.8, weighting="hard"),
    "soft": METHODS["soft"].with_tau(0.8),
    "rank": variant(METHODS["skd"], tau=40.0),
    "rkl": METHODS["rkl"],
    "fkl": METHODS["fkl"],
    "minillm": METHODS["minillm"],
    "truncated": replace(METHODS["gated"].with_tau(0.5), top_k=8),
    "nucleus": replace(METHODS["fkl"], top_p=0.8),
}


ONE_THERE = ("gated on memory", "truncated", "fkl")  # a gate that remembers, a support and its tail, and no gate


@pytest.mark.parametrize(
    ("where", "name"),
    [
        *(("both", name) for name in CASES),
        *(
            pytest.param(where, name, marks=() if name in ONE_THERE else pytest.mark.slow)
            for where in ("student", "teacher")
            for name in CASES
        ),
    ],
)
def test_an_iteration_equals_that_of_the_cpu(where: str, name: str) -> None:
    """Tokens, writers, rewards, scores, metrics and gradients, with either model or both on the device."""
    expected, _ = iteration(CASES[name], 50, "nothing")
    with stand_in_device():
        results, _ = iteration(CASES[name], 50, where)
    assert_same(results, expected)


@pytest.mark.parametrize("environment", [{"rewrite": "argmax"}, {"rewrite": "nucleus"}, {"rewrite_span": "step"}])
def test_ways_of_rewriting_equal_those_of_the_cpu(environment: dict[str, Any]) -> None:
    expected, _ = iteration(CASES["gated"], 50, "nothing", **environment)
    with stand_in_device():
        results, _ = iteration(CASES["gated"], 50, "both", **environment)
    assert_same(results, expected)


@dataclass
class Cost:
    """What a rollout cost, divided by its tokens (bytes) or its blocks (waits)."""

    bytes_down: float
    waits: float
    blocking_uploads: Counter[str]


def cost_of_a_rollout(method: Method, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> Cost:
    """Of rows of 12 tokens in drafts of 4, with both models on the device; their loading is not counted."""
    blocks = Counter[str]()
    block = Collector._block

    def counted(self: Collector) -> None:
        blocks["all"] += 1
        block(self)

    monkeypatch.setattr(Collector, "_block", counted)
    with stand_in_device() as traffic:
        agent, env = agent_and_env(method, vocab_size, "both", 4, max_new_tokens=12)
        stream = PromptStream(env.prompts, 0)
        traffic.clear()
        rollout = agent.rollout(env, stream)
        waits = sum(traffic.waits.values()) / blocks["all"]
        return Cost(traffic.down / int(rollout.mask.sum()), waits, traffic.blocking_uploads.copy())


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [
        *((1_000, name) for name in ("gated", "gated on memory", "rkl", "fkl", "minillm", "truncated")),
        (50_000, "gated"),
        *(pytest.param(50_000, name, marks=pytest.mark.slow) for name in ("rkl", "fkl", "minillm", "truncated")),
    ],
)
def test_the_host_waits_once_a_block_and_reads_numbers_of_tokens_only(
    name: str, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of a token do not grow with the vocabulary, and no upload makes the host wait."""
    cost = cost_of_a_rollout(CASES[name], vocab_size, monkeypatch)
    assert cost.bytes_down < 400
    assert cost.waits < 2
    assert not cost.blocking_uploads


def test_an_end_token_within_a_draft_ends_the_completion() -> None:
    """On a device a row draws on behind its end token; nothing of that is seen."""
    results = []
    for where in ("nothing", "both"):
        with stand_in_device() if where == "both" else nullcontext():
            results.append(iteration(CASES["gated"], 9, where, 6, max_new_tokens=12, chunk=6)[0])
    assert_same(results[1], results[0])
    tokens = results[0]["tokens"]
    at_end = (tokens == 0).int().argmax(1)
    assert ((tokens == 0).any(1) & (at_end % 6 != 5)).any()


def test_the_test_would_see_a_row_of_the_vocabulary_cross() -> None:
    with stand_in_device() as traffic:
        model = CausalLM(move(llama(2000, 16, 0)), eos_token_id=0)
        before = traffic.down
        model.start([(1,), (2,)]).cpu()
    assert traffic.down - before == 2 * 2000 * 4


def test_a_misplaced_tensor_is_refused() -> None:
    with stand_in_device():
        there = torch.zeros(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
