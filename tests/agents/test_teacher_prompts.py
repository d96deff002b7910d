"""A teacher whose prompts hold more than the student's: whatever reads the teacher reads it after its own prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agents.collector import collect
from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.evaluation import evaluate
from agents.methods import METHODS
from agents.references import read_references
from agents.rollout import Rollout
from agents.teacher_cache import TeacherCache
from distill_env.env import DistillEnv, DistillVectorEnv
from distill_env.gate_settings import ALWAYS, Gate
from distill_env.models.causal_lm import CausalLM
from distill_env.models.tabular import markov
from distill_env.randomness import episode_keys
from distill_env.tasks.base import Prompt, Split
from tests.agents.test_rollout_lm import Words
from tests.distill_env.models.test_causal_lm import build
from tests.helpers.servers import CompletionsServer
from tests.helpers.tables import Ragged, at, perturbed

V, HORIZON = 8, 9
TABLE = markov(V, order=2, seed=4, sharpness=1.5)
HINT = (6, 9, 8)


class Hinted(Words):
    """The teacher reads a hint before every other prompt."""

    def __init__(self, hint: tuple[int, ...] = HINT, reference: tuple[int, ...] | None = None) -> None:
        self.hint, self.reference = hint, reference

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        both = [(p, (*self.hint, *p.ids) if i % 2 else p.ids) for i, p in enumerate(super().prompts(split))]
        return tuple(replace(p, teacher_ids=ids, reference_completion=self.reference) for p, ids in both)


class HintedTable(Ragged):
    """The same over a table whose states are the last two tokens: the hint follows the prompt."""

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return tuple(replace(p, teacher_ids=(*p.ids, 4, 2)) for p in super().prompts(split))


def write(task: Any, teacher: Any, student: Any, gate: Gate, length: int = 4) -> Rollout:
    env = DistillVectorEnv(3, task, teacher, chunk=8, autoreset_mode="Disabled", reveal_teacher=False)
    keys = episode_keys(0, np.arange(len(env.prompts)))
    return collect(env, student, env.prompts, keys, gate, length)


@torch.no_grad()
def by_hand(model: Any, prompt: tuple[int, ...], tokens: list[int]) -> Tensor:
    """log p at every position of a completion by a plain forward pass of Transformers, [T, V]."""
    logits = model.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].double()
    return F.log_softmax(logits[len(prompt) - 1 : -1, : model.vocab_size], -1)


@pytest.mark.parametrize("length", [1, 4])
def test_divergence_is_the_kl_by_a_plain_forward_pass_after_each_models_prompt(length: int) -> None:
    """The teacher has the student's weights, so that without a hint every D_t is 0."""
    lm = CausalLM(build("Llama"))
    rollout = write(Hinted(), lm, lm, Gate(tau=0.05), length)
    assert bool(rollout.rewritten.any())
    assert not bool(rollout.rewritten.all())
    offset = 0
    for i, (prompt, mask) in enumerate(zip(rollout.prompts, rollout.mask, strict=True)):
        tokens = rollout.tokens[i][mask].tolist()
        log_q, log_p = by_hand(lm, prompt.ids, tokens), by_hand(lm, prompt.ids_for_teacher, tokens)
        expected = (log_q.exp() * (log_q - log_p)).sum(-1)
        torch.testing.assert_close(rollout.score[i][mask], expected.clamp(min=0), rtol=0, atol=1e-8)
        assert rollout.teacher is not None
        torch.testing.assert_close(rollout.teacher[offset : offset + len(tokens)], log_p, rtol=0, atol=1e-8)
        assert (i % 2 == 0) == (float(expected.max()) < 1e-8)
        offset += len(tokens)


def test_references_and_evaluations_read_the_teacher_after_its_own_prompt() -> None:
    lm = CausalLM(build("Llama"))
    env = DistillVectorEnv(6, Hinted(reference=(4, 7, 1)), lm, chunk=8, autoreset_mode="Disabled", reveal_teacher=False)
    rollout = read_references(env, env.prompts)
    assert rollout.teacher is not None
    for i, prompt in enumerate(env.prompts):
        expected = by_hand(lm, prompt.ids_for_teacher, [4, 7, 1])
        torch.testing.assert_close(rollout.teacher[3 * i : 3 * i + 3], expected, rtol=0, atol=1e-8)
    agent = DistillAgent(lm.fork(), DistillConfig(METHODS["rkl"]))
    alone = DistillVectorEnv(6, Hinted(), lm, autoreset_mode="Disabled")
    _, completions, held_out = evaluate(agent, alone, alone.prompts, 1, seed=2)
    for completion in (*completions, *held_out):
        log_p = by_hand(lm, completion.prompt.ids_for_teacher, completion.tokens)
        expected = log_p.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert completion.teacher_log_probs == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("row", ["gated", "rkl", "fkl", "gkd"])
def test_a_teacher_that_reads_the_same_changes_nothing(row: str) -> None:
    """Weights after three updates, bit for bit, and costs; with a hint the weights are others."""

    def trained(task: Any) -> tuple[list[Tensor], dict[str, float]]:
        student, seen = CausalLM(build("Llama", num_key_value_heads=1)), {}
        env = DistillVectorEnv(4, task, CausalLM(build("Llama")), chunk=4, autoreset_mode="Disabled")
        config = DistillConfig(METHODS[row], OptimizerConfig(0.01), batch_size=6, draft_length=3)
        DistillAgent(student, config).learn(env, 3, lambda _, metrics: seen.update(metrics))
        return list(student.parameters()), {k: x for k, x in seen.items() if not k.startswith("time/")}

    (plain, seen), (same, seen_too), (hinted, _) = trained(Words()), trained(Hinted(())), trained(Hinted())
    assert all(map(torch.equal, plain, same))
    assert seen == seen_too
    assert not all(map(torch.equal, plain, hinted))


def test_a_server_reads_the_teachers_prompts() -> None:
    task, student = HintedTable(V, HORIZON), perturbed(TABLE, 1.0)
    with CompletionsServer(TABLE) as server:
        kwargs = {"vocab_size": V, "eos_token_id": V - 1, "top_k": 0}
        env = DistillVectorEnv(4, task, server.url, teacher_kwargs=kwargs, chunk=4, autoreset_mode="Disabled")
        served = collect(env, student, env.prompts, episode_keys(0, np.arange(7)), Gate(tau=0.5), 4)
        env.teacher.close()  # type: ignore[attr-defined]
    local = write(task, TABLE, student, Gate(tau=0.5))
    assert served.tokens.equal(local.tokens)
    assert served.rewritten.equal(local.rewritten)


def test_one_row_over_a_table_pays_by_the_teachers_prompt() -> None:
    env = DistillEnv(task=HintedTable(V, HORIZON), teacher=TABLE)
    for seed in range(5):
        env.reset(seed=seed)
        for _ in range(2):
            prompt, written = env.batch.completions.prompts[0], env.batch.completions.completion(0)[0]
            _, reward, ended, _, _ = env.step(3)
            assert reward == pytest.approx(float(at(TABLE, (*prompt.ids_for_teacher, *written))[3].detach()))
            if ended:
                env.reset()


def test_the_context_must_hold_the_teachers_prompts() -> None:
    lm = CausalLM(build("Llama"))
    assert lm.max_length is not None
    room = lm.max_length - max(len(p.ids) for p in Words().prompts("train"))
    DistillVectorEnv(1, Words(), lm, max_new_tokens=room)
    with pytest.raises(ValueError, match="max_new_tokens") as error:
        DistillVectorEnv(1, Hinted((5,) * 9), lm, max_new_tokens=room)
    assert "\n" not in str(error.value)
    env = DistillVectorEnv(1, Words(), lm)
    for wrong in ((5,) * 40, (lm.vocab_size,)):
        with pytest.raises(ValueError, match="prompts"):
            env.reset(options={"prompts": [Prompt((5,), "", teacher_ids=wrong)]})


def test_a_cached_completion_belongs_to_what_its_teacher_read(tmp_path: Path) -> None:
    def run(task: Any) -> dict[str, float]:
        seen: dict[str, float] = {}
        env = DistillVectorEnv(4, task, TABLE, chunk=4, autoreset_mode="Disabled")
        config = DistillConfig(METHODS["fkl"], OptimizerConfig(0.05), batch_size=7)
        agent = DistillAgent(perturbed(TABLE, 1.0), config, TeacherCache(tmp_path))
        agent.learn(env, 1, lambda _, metrics: seen.update(metrics))
        return seen

    assert run(Ragged(V, HORIZON))["cost/teacher_passes"] > 0
    assert run(HintedTable(V, HORIZON))["cost/teacher_passes"] > 0
    assert run(HintedTable(V, HORIZON))["cost/teacher_passes"] == 0


def test_a_call_costs_the_teachers_prompt() -> None:
    """The teacher alone, without a prefix cache: every completion is one call, which reads the prompt and what it
    wrote itself."""
    student = perturbed(TABLE, 1.0)
    rollout = write(HintedTable(V, HORIZON), TABLE, student, ALWAYS, 1)
    prompts, written = sum(len(p.ids_for_teacher) for p in rollout.prompts), int(rollout.mask.sum())
    assert rollout.cost.processed == prompts + written - len(rollout.prompts)
