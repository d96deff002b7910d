"""Models on a device: the same results as on the CPU, and nothing as wide as the vocabulary crosses to the host.

These tests run in a process of their own (`tests/agents/test_device.py`), as the stand-in becomes the accelerator of
the whole process.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from agents import teacher_buffer
from agents.base import Metrics
from agents.collector import Collector
from agents.config import DistillConfig, OptimizerConfig, SB3Config
from agents.distill import DistillAgent
from agents.evaluation import evaluate
from agents.methods import GATED, METHODS, Method, variant
from agents.prompts import PromptStream
from agents.sb3 import SB3Agent
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import Gate
from distill_env.models.adapters import add_adapter
from distill_env.models.causal_lm import CausalLM
from distill_env.models.pretrained import recompute_layers
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
    graded: bool = True

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return tuple(Prompt(ids, "", reference_completion=(7, 2, 0)) for ids in ((1,), (4, 2), (5, 6, 7), (3, 1)))

    def grade(self, prompt: Prompt, tokens: Any) -> Grade:
        return Grade(len(tokens) / self.max_new_tokens, 0 in tokens, None)

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


NEAR = ("gated on memory", "minillm", "truncated")  # the default suite has these cases


@pytest.mark.parametrize(
    ("where", "name"),
    [
        pytest.param(where, name, marks=() if name in usual else pytest.mark.slow)
        for where, usual in {"both": NEAR, "student": NEAR[:1], "teacher": NEAR[:1]}.items()
        for name in CASES
    ],
)
def test_an_iteration_equals_that_of_the_cpu(where: str, name: str) -> None:
    """Tokens, writers, rewards, scores, metrics and gradients, with either model or both on the device."""
    expected, _ = iteration(CASES[name], 50, "nothing")
    with stand_in_device():
        results, _ = iteration(CASES[name], 50, where)
    assert_same(results, expected)


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"rewrite": "argmax"}, marks=pytest.mark.slow),
        pytest.param({"rewrite": "nucleus"}, marks=pytest.mark.slow),
        pytest.param({"rewrite_span": "step"}, marks=pytest.mark.slow),
    ],
)
def test_ways_of_rewriting_equal_those_of_the_cpu(environment: dict[str, Any]) -> None:
    expected, _ = iteration(CASES["gated"], 50, "nothing", **environment)
    with stand_in_device():
        results, _ = iteration(CASES["gated"], 50, "both", **environment)
    assert_same(results, expected)


class World:
    """A student, a teacher and their environment in float64, so that devices differ by its rounding alone."""

    def __init__(self, there: bool, lora: bool = False, recompute: bool = False, **environment: Any) -> None:
        student, teacher = llama(20, 16, 0).double(), llama(20, 32, 1).double()
        if lora:
            add_adapter(student, 2, 4.0, "all-linear", seed=0)
            with torch.no_grad():
                for name, parameter in student.named_parameters():
                    if "lora_B" in name:  # 0 at first
                        parameter.fill_(0.1)
        if recompute:
            recompute_layers(student)
        self.student, self.teacher = (
            CausalLM(move(model) if there else model, eos_token_id=0) for model in (student, teacher)
        )
        options = {"max_new_tokens": HORIZON, "chunk": 4, "reveal_teacher": False, "autoreset_mode": "Disabled"}
        self.env = DistillVectorEnv(ROWS, Prompts(20), self.teacher, **{**options, **environment})

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu() for name, p in self.student.model.named_parameters() if p.requires_grad}


def run(world: World, agent: Any, gate: Gate | None = None) -> dict[str, Any]:
    """An iteration and an evaluation: all numbers but seconds, and the weights."""
    torch.manual_seed(0)
    seen: dict[str, float] = {}

    def note(iteration: int, metrics: Metrics) -> None:
        seen.update({f"{key} {iteration}": x for key, x in metrics.items() if "time" not in key and "cost" not in key})

    agent.learn(world.env, 1, note)
    env = DistillVectorEnv(2, Prompts(20), world.teacher, reveal_teacher=False, max_new_tokens=HORIZON)
    metrics, completions, _ = evaluate(agent, env, env.prompts[:2], 1, 0, gate)
    return {"tokens": [c.tokens for c in completions]} | seen | metrics | world.weights()


def assert_equal_in_float64(results: dict[str, Any], expected: dict[str, Any]) -> None:
    assert results.keys() == expected.keys()
    assert results.pop("tokens") == expected.pop("tokens")
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-7, equal_nan=True)  # AdamW divides small numbers


def distill(world: World, method: Method, **config: Any) -> DistillAgent:
    config = {"batch_size": 5, "draft_length": 3, "seed": 1} | config
    return DistillAgent(world.student, DistillConfig(method, OptimizerConfig(1e-2), **config))


def by_name(name: str) -> Method:
    """A row of the table with a threshold that some of these models' states reach."""
    method = METHODS[name]
    thresholds = {"divergence": 1.5, "teacher_entropy": 1.5, "rank": 8.0, "forward_kl": 1.5}
    return method if not method.gate.needs_scores else method.with_tau(thresholds[method.gate.score])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "gated" else pytest.mark.slow) for name in METHODS]
)
def test_every_method_learns_and_is_evaluated_as_on_the_cpu(name: str) -> None:
    """An iteration with refilled rows, and an evaluation by the method's gate."""
    method = by_name(name)
    world = World(False)
    expected = run(world, distill(world, method), method.gate)
    with stand_in_device():
        world = World(True)
        results = run(world, distill(world, method), method.gate)
    assert_equal_in_float64(results, expected)


@pytest.mark.parametrize(
    ("arguments", "config", "method"),
    [
        (
            {"lora": True, "recompute": True, "rewrite_span": "step"},
            {"micro_batch": 2},
            replace(by_name("gated"), top_k=8),
        ),
        pytest.param({}, {"draft_length": 0}, by_name("gated"), marks=pytest.mark.slow),
        pytest.param({}, {}, variant(GATED, teacher_writes="reference", loss="nll"), marks=pytest.mark.slow),
        pytest.param({}, {}, variant(by_name("gated"), score="student_entropy", tau=2.0), marks=pytest.mark.slow),
        pytest.param({}, {}, variant(by_name("gated"), screen="margin", screen_tau=0.5), marks=pytest.mark.slow),
    ],
    ids=["lora, micro-batches, recomputed layers, steps, top-k", "adaptive", "references", "student alone", "screen"],
)
def test_options_equal_those_of_the_cpu(arguments: dict[str, Any], config: dict[str, Any], method: Method) -> None:
    world = World(False, **arguments)
    expected = run(world, distill(world, method, **config))
    with stand_in_device():
        world = World(True, **arguments)
        results = run(world, distill(world, method, **config))
    assert_equal_in_float64(results, expected)


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("a2c", marks=pytest.mark.slow)])
def test_agents_of_stable_baselines_equal_those_of_the_cpu(algorithm: Any) -> None:
    """Training, evaluation, and decoding with the teacher on call."""
    results = []
    for there in (False, True):
        with stand_in_device() if there else nullcontext():
            world = World(there, chunk=1, autoreset_mode="SameStep")
            agent = SB3Agent(world.student, SB3Config(algorithm=algorithm, batch_size=1, n_epochs=1, minibatches=2))
            results.append(run(world, agent))
    for metrics in results:
        assert "on_call/teacher_share" in metrics
    assert results[1].pop("tokens") == results[0].pop("tokens")
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5, equal_nan=True)  # heads are in float32


def test_a_run_goes_on_from_a_checkpoint_on_either_side(tmp_path: Path) -> None:
    """A checkpoint that was written on the device is read on the CPU and there again."""
    world = World(False)
    agent = distill(world, by_name("gated"))
    agent.learn(world.env, 2)
    expected = world.weights()
    with stand_in_device():
        world = World(True)
        agent = distill(world, by_name("gated"))
        agent.learn(world.env, 1)
        agent.save(tmp_path / "agent")
    on_cpu, world = DistillAgent.load(tmp_path / "agent"), World(False)
    tensors, groups = on_cpu.optimizer.tensors()
    with stand_in_device():
        there = World(True)
        student = CausalLM(move(copy.deepcopy(on_cpu.student.model)), eos_token_id=0)  # type: ignore[attr-defined]
        resumed = DistillAgent(student, on_cpu.config)
        resumed.optimizer.restore(tensors, groups)
        resumed.iteration, resumed.mean_length = on_cpu.iteration, on_cpu.mean_length
        resumed.learn(there.env, 1)
        there.student = student
        weights = there.weights()
    on_cpu.learn(world.env, 1)
    world.student = on_cpu.student
    torch.testing.assert_close(world.weights(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)


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


USUAL = ((1_000, "gated on memory"), (1_000, "rkl"), (50_000, "gated"))


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [
        pytest.param(size, name, marks=() if (size, name) in USUAL else pytest.mark.slow)
        for size in (1_000, 50_000)
        for name in ("gated", "gated on memory", "rkl", "fkl", "minillm", "truncated")
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
            results.append(iteration(CASES["rkl"], 9, where, max_new_tokens=9)[0])
    assert_same(results[1], results[0])
    tokens = results[0]["tokens"]
    at_end = (tokens == 0).int().argmax(1)
    assert ((tokens == 0).any(1) & (at_end % 3 != 2)).any()


@pytest.mark.parametrize("name", ["rkl", "truncated"])
def test_beyond_its_budget_the_buffer_is_in_main_memory(name: str) -> None:
    """The update reads it from there, with the same result; also if the first states fitted."""
    results = []
    for budget in (1.0, 1e-9, 1e-6):
        with stand_in_device():
            agent, env = agent_and_env(CASES[name], 50, "both")
            agent.config = replace(agent.config, teacher_buffer_gib=budget)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(teacher_buffer, "_BLOCK", 60)
                rollout = agent.rollout(env, PromptStream(env.prompts, 0))
            assert rollout.teacher is not None
            assert (rollout.teacher.device.type == "cpu") == (budget < 1)
            results.append(agent.backward(rollout))
    assert results[0] == results[1] == results[2]


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
