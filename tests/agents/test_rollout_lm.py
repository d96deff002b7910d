"""Draft and verify over language models with a key/value cache: the token-by-token rollout again.

In exact arithmetic the two are equal; here they are except where a draw lies within 1e-9 of the edge between two tokens
or a score within 1e-9 of the threshold. Such an answer may part there, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.collector import collect
from agents.rollout import Rollout
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import ALWAYS, NEVER, Gate, random_gate
from distill_env.models.causal_lm import CausalLM
from distill_env.randomness import Purpose, episode_keys, uniform
from distill_env.tasks.base import Grade, Prompt, Split
from tests.distill_env.models.test_causal_lm import V, build

HORIZON, N, EDGE = 12, 6, 1e-9
SEMICOLON = 2


class Words:
    """Ragged prompts over the vocabulary of the small models, whose end token is 1 and step end 2 or 3."""

    vocab_size, eos_token_id, graded, max_new_tokens = V, 1, False, HORIZON
    step_end_ids = frozenset({SEMICOLON, 3})

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return tuple(Prompt(ids, "") for ids in [(5,), (7, 8, 9, 4), (2, 6), (9, 9, 30, 31, 2), (12, 4, 17), (39,)])

    def grade(self, prompt: Prompt, tokens: Any) -> Grade:
        return Grade(0.0, False, False)

    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))


GATES = {
    "hard": Gate(tau=0.22),
    "soft": Gate(tau=0.22, alpha=8.0),
    "rank": Gate("rank", 4.0),
    "random": random_gate(0.2),
    "step mean": Gate(tau=0.22, step_reduction="mean"),
    "smoothed": Gate(tau=0.22, smoothing=0.5),
    "adaswitch": Gate("forward_kl", 1.5, relative=True, hand_over_rest=True),
    "cumulative": Gate(tau=0.5, cumulative=True),
    "never": NEVER,
    "always": ALWAYS,
}


def pair(kind: str, noise: float = 0.15) -> tuple[CausalLM, CausalLM]:
    """A teacher, and a student whose weights are near: easy and hard steps both occur."""
    teacher, student = build(kind), build(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return CausalLM(teacher), CausalLM(student)


PAIRS = {kind: pair(kind) for kind in ("Llama", "Qwen2", "GPT2")}


def write(kind: str, gate: Gate, k: int, num_envs: int, seed: int = 0, **kwargs: Any) -> Rollout:
    teacher, student = PAIRS[kind]
    env = DistillVectorEnv(
        num_envs, Words(), teacher, chunk=16, autoreset_mode="Disabled", reveal_teacher=False, **kwargs
    )
    prompts = [env.prompts[i % len(env.prompts)] for i in range(N)]
    return collect(env, student.fork(), prompts, episode_keys(seed, np.arange(N)), gate, k)


def parted(actual: Rollout, expected: Rollout, gate: Gate, seed: int) -> int:
    """The number of answers that part on a knife's edge. All others have to be equal."""
    edges = 0
    keys = episode_keys(seed, np.arange(N))
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), expected.mask.sum(1).cumsum(0)])
    for i in range(N):
        a, b = answer(actual, i), answer(expected, i)
        if a[0] == b[0] and a[1] == b[1]:
            torch.testing.assert_close(a[2], b[2], rtol=0, atol=EDGE, equal_nan=True)
            continue
        t = next(
            t
            for t, (x, y) in enumerate(zip(zip(*a[:2], strict=True), zip(*b[:2], strict=True), strict=False))
            if x != y
        )
        near = abs(float(b[2][t]) - gate.tau) < EDGE
        assert expected.teacher is not None
        cumulative = expected.teacher[offsets[i] + t].exp().cumsum(-1)
        draw = uniform(keys[i : i + 1], t, Purpose.TEACHER)[0]
        near |= bool(((cumulative - draw).abs() < EDGE).any())
        assert near, f"answer {i} parts at {t}: {a[0][t]} and {b[0][t]}"
        edges += 1
    return edges


def answer(rollout: Rollout, i: int) -> tuple[list[int], list[bool], torch.Tensor]:
    mask = rollout.mask[i]
    return rollout.tokens[i][mask].tolist(), rollout.rewritten[i][mask].tolist(), rollout.score[i][mask]


CASES = [("Llama", name) for name in GATES] + [(kind, name) for kind in ("Qwen2", "GPT2") for name in ("hard", "soft")]


SOME = (2, 6, 16)  # with 3, 1 and 5 rows; the last is longer than any answer


@pytest.mark.parametrize("lengths", [SOME, pytest.param(range(2, 17), marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_no_draft_length_and_no_batch_changes_an_answer(kind: str, name: str, lengths: Sequence[int]) -> None:
    """Drafts of 1 to 16 tokens, 1 to 6 rows with refilling; none of these answers lies on an edge."""
    gate = GATES[name]
    expected = write(kind, gate, 1, N)
    for k in lengths:
        assert parted(write(kind, gate, k, 1 + k % N), expected, gate, 0) == 0


@given(
    st.integers(0, 2**32),
    st.sampled_from(list(GATES.values())),
    st.integers(1, 16),
    st.integers(1, N),
    st.sampled_from(["sample", "nucleus", "argmax"]),
    st.sampled_from(["token", "step"]),
)
@settings(deadline=None, max_examples=12)
def test_equality_over_seeds(seed: int, gate: Gate, k: int, num_envs: int, rewrite: Any, span: Any) -> None:
    kwargs = {"rewrite": rewrite, "rewrite_span": span}
    actual, expected = write("Llama", gate, k, num_envs, seed, **kwargs), write("Llama", gate, 1, N, seed, **kwargs)
    assert parted(actual, expected, gate, seed) <= 1


def test_the_answers_have_easy_and_hard_steps_and_all_lengths() -> None:
    firsts = set()
    for kind in PAIRS:
        rollouts = [write(kind, GATES["hard"], 4, 3, seed) for seed in range(6)]
        lengths = {int(n) for r in rollouts for n in r.mask.sum(1)}
        assert len(lengths) > 3
        share = np.mean([float(r.rewritten[r.mask].double().mean()) for r in rollouts])
        assert 0.05 < share < 0.95, (kind, share)
        firsts |= {bool(f) for r in rollouts for f in r.rewritten[:, 0]}
    assert firsts == {True, False}


def test_drafting_saves_teacher_passes() -> None:
    one, four = write("Llama", GATES["hard"], 1, N), write("Llama", GATES["hard"], 4, N)
    assert four.cost.teacher_passes < one.cost.teacher_passes
    assert 0 < int(one.rewritten.sum()) < int(one.mask.sum())
