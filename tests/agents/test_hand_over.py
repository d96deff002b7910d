"""The hand-over head: it learns beside the student, changes nothing of it, and is a gate of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agents.collector import collect
from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.distributed import SINGLE_PROCESS
from agents.hand_over import HandOverTrainer, predict, target
from agents.methods import METHODS
from distill_env.divergence import reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import Gate
from distill_env.models.causal_lm import CausalLM
from distill_env.models.hand_over import FILE, HandOverHead
from distill_env.models.toy import toy_student
from distill_env.randomness import episode_keys

HORIZON = 8


def new_student(width: int = 8) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(toy_student("sums", width, 1, 16))


def sums(num_envs: int = 8) -> DistillVectorEnv:
    return DistillVectorEnv(
        num_envs, "sums", "sums", max_new_tokens=HORIZON, chunk=6, reveal_teacher=False, autoreset_mode="Disabled"
    )


def train(iterations: int, method: str = "gated", agent: DistillAgent | None = None, **options: Any) -> DistillAgent:
    if agent is None:
        optimizer = OptimizerConfig(learning_rate=1e-2)
        agent = DistillAgent(
            new_student(), DistillConfig(METHODS[method], optimizer, batch_size=8, draft_length=4, **options)
        )
    agent.learn(sums(), iterations, lambda _, metrics: reports.append(metrics))
    return agent


reports: list[dict[str, float]] = []


@pytest.fixture(autouse=True)
def no_reports() -> None:
    reports.clear()


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize("method", ["gated", "rkl"])
def test_the_student_learns_as_without_a_head(method: str) -> None:
    """Bit by bit, and at the same cost of its teacher; unless the head's loss has a weight in its own."""
    without = train(3, method, hand_over_width=0)
    costs = [{k: v for k, v in m.items() if k.startswith(("cost/", "rollout/"))} for m in reports]
    assert not any("hand_over" in k for m in reports for k in m)
    reports.clear()
    beside = train(3, method)
    assert same(without.student.state_dict(), beside.student.state_dict())
    assert costs == [{k: v for k, v in m.items() if k.startswith(("cost/", "rollout/"))} for m in reports]
    assert all(m["train/hand_over_loss"] > 0 for m in reports)
    weighted = train(3, method, hand_over_weight=0.1)
    assert not same(without.student.state_dict(), weighted.student.state_dict())


def test_the_head_learns_where_the_student_is_far_from_its_teacher() -> None:
    """Also at positions that it has not been trained on."""
    agent = train(20)
    assert reports[-1]["train/hand_over_loss"] < 0.25 * reports[0]["train/hand_over_loss"]
    env = sums(32)
    keys = episode_keys(99, np.arange(32))
    rollout = collect(env, agent.student, env.prompts[:32], keys, Gate(tau=0.5), 4)
    prompts = [p.ids for p in rollout.prompts]
    said = predict(agent.student, prompts, rollout.tokens, rollout.mask)
    assert said is not None
    with torch.no_grad():
        log_q = agent.student.head(agent.student.features(prompts, rollout.tokens, rollout.mask))
    assert rollout.teacher is not None
    true = target(reverse_kl(log_q, rollout.teacher).clamp(min=0))
    assert float(torch.corrcoef(torch.stack([target(said), true]))[0, 1]) > 0.6


def test_a_head_fits_what_depends_on_the_state() -> None:
    torch.manual_seed(0)
    head = HandOverHead(16, 6, 32)
    trainer = HandOverTrainer(head)
    states, log_probs = torch.randn(256, 16), torch.randn(256, 6).log_softmax(-1)
    divergence = states[:, 0].exp()
    for _ in range(40):
        trainer.add(states, log_probs, divergence)
        metrics = trainer.update(1.0, SINGLE_PROCESS)
    assert metrics["train/hand_over_auroc"] > 0.98
    assert float((target(head.divergence(states, log_probs)) - target(divergence)).abs().mean()) < 0.2


def test_drafts_and_batches_do_not_change_what_the_head_decides() -> None:
    """It calls the teacher at the same states as token by token, from the same predictions, and never to verify."""
    student = train(10).student
    env = sums(1)
    prompts, keys = env.prompts[:12], episode_keys(3, np.arange(12))
    said = predict(student, [p.ids for p in prompts], torch.zeros(12, 1, dtype=torch.long), torch.ones(12, 1).bool())
    assert said is not None
    gate = Gate("predicted_divergence", float(said.sort().values[5:7].mean()))  # between two of them
    one = collect(env, student.fork(), prompts, keys, gate, 1)
    assert 0 < int(one.rewritten.sum()) < int(one.mask.sum())
    assert one.cost.calls == int(one.rewritten.sum())
    for length, rows in ((4, 5), (6, 12)):
        other = collect(sums(rows), student.fork(), prompts, keys, gate, length)
        assert other.tokens.equal(one.tokens)
        assert other.rewritten.equal(one.rewritten)
        torch.testing.assert_close(other.score, one.score, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_resumed_head_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = train(4)
    half = train(2)
    half.save(tmp_path / "agent")
    resumed = train(2, agent=DistillAgent.load(tmp_path / "agent"))
    assert whole.hand_over is not None
    assert resumed.hand_over is not None
    assert same(whole.hand_over.head.state_dict(), resumed.hand_over.head.state_dict())


def test_the_head_is_saved_beside_a_plain_student(tmp_path: Path) -> None:
    """Both load it exactly, and plain Transformers loads the student."""
    student: Any = train(1).student
    student.save_pretrained(tmp_path)
    loaded = CausalLM.load(tmp_path)
    assert loaded.hand_over is not None
    assert same(loaded.hand_over.state_dict(), student.hand_over.state_dict())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(plain.state_dict(), student.model.state_dict())


def test_a_head_of_another_student_is_refused(tmp_path: Path) -> None:
    new_student(12).save_pretrained(tmp_path)
    HandOverHead(8, 13, 64).save(tmp_path)
    with pytest.raises(ValueError, match=r"^student: .*8, this student has 12") as error:
        CausalLM.load(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^student: ") as error:
        CausalLM.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_gate_without_its_head_is_refused() -> None:
    env = sums(2)
    with pytest.raises(ValueError, match=r"^score: .*hand-over-width"):
        collect(env, new_student(), env.prompts[:2], episode_keys(0, np.arange(2)), Gate("predicted_divergence", 0.5))
    with pytest.raises(ValueError, match=r"^hand_over_weight: "):
        DistillConfig(hand_over_width=0, hand_over_weight=0.1)
