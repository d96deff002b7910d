"""StackedLM: every member computes as it does alone, and shares its weights and gradients with the stack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distill_env.models.causal_lm import CausalLM
from distill_env.models.stacked import StackedLM
from distill_env.models.toy import SYMBOLS, small_teacher, toy_student

V = EOS = len(SYMBOLS["sums"])
ROWS = 5  # of each member


def members(kind: str, count: int = 3, width: int = 16) -> list[CausalLM]:
    """Models far from uniform, so that every mistake shows: students without positions, teachers with rotary ones."""
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = toy_student("sums", width, 2, 24) if kind == "student" else small_teacher("sums", width, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        models.append(CausalLM(model.double(), eos_token_id=EOS))
    return models


def prompts_of(rng: np.random.Generator, count: int) -> list[list[int]]:
    return [rng.integers(0, V - 2, rng.integers(2, 9)).tolist() for _ in range(count)]


def parts(x: Tensor | np.ndarray | list[list[int]]) -> list:
    return [x[i : i + ROWS] for i in range(0, len(x), ROWS)]


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_rows_are_those_of_each_member_alone(kind: str) -> None:
    """Through rows that are extended unevenly, rewound, given up and started again."""
    models = members(kind)
    alone, stack = [m.fork() for m in models], StackedLM(models)
    rng, n = np.random.default_rng(0), ROWS * len(models)
    prompts = prompts_of(rng, n)
    expected = torch.cat([m.start(p) for m, p in zip(alone, parts(prompts), strict=True)])
    torch.testing.assert_close(stack.start(prompts), expected, atol=1e-5, rtol=0)  # rotary angles are in float32
    live, lengths = np.ones(n, bool), np.zeros(n, int)
    for step in range(12):
        width = int(rng.integers(1, 4))
        counts = np.where(live, rng.integers(0, width + 1, n), 0)
        if step % 3 == 0:
            counts[rng.random(n) < 0.8] = 0  # few rows are busy
        drawn = np.where(np.arange(width) < counts[:, None], rng.integers(0, V, (n, width)), -1)
        tokens = torch.from_numpy(drawn)
        expected = torch.cat([m.extend(t) for m, t in zip(alone, parts(tokens), strict=True)])
        got, present = stack.extend(tokens), tokens >= 0
        torch.testing.assert_close(got[present], expected[present], atol=1e-5, rtol=0)
        lengths += counts
        live &= rng.random(n) < 0.9
        keep = np.where(live, np.maximum(lengths - rng.integers(0, 2, n), 0), -1)
        lengths = np.minimum(lengths, np.maximum(keep, 0))
        stack.rewind(keep)
        for model, kept in zip(alone, parts(keep), strict=True):
            model.rewind(kept)
        if step == 6:
            rows = [1, ROWS, n - 1]
            fresh = prompts_of(rng, 3)
            expected = torch.cat([alone[r // ROWS].start([p], [r % ROWS]) for r, p in zip(rows, fresh, strict=True)])
            torch.testing.assert_close(stack.start(fresh, rows), expected, atol=1e-5, rtol=0)
            live[rows], lengths[rows] = True, 0


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_gradients_are_those_of_each_member_alone(kind: str) -> None:
    models = members(kind)
    rng = np.random.default_rng(1)
    prompts = prompts_of(rng, 3 * ROWS)
    lengths = torch.from_numpy(rng.integers(1, 7, 3 * ROWS))
    mask = torch.arange(6) < lengths[:, None]
    tokens = torch.where(mask, torch.from_numpy(rng.integers(0, V, (3 * ROWS, 6))), -1)
    weights = torch.randn(int(mask.sum()), V + 1, dtype=torch.float64)

    read = [m.head(m.features(*x)) for m, *x in zip(models, *map(parts, (prompts, tokens, mask)), strict=True)]
    (torch.cat(read) * weights).sum().backward()
    expected = [[p.grad for p in m.parameters()] for m in models]
    for model in models:
        for parameter in model.parameters():
            parameter.grad = None

    stack = StackedLM(models)
    counts = [int(m.sum()) for m in parts(mask)]
    states = stack.features(prompts, tokens, mask).split(counts)
    log_probs = torch.cat([m.head(x) for m, x in zip(models, states, strict=True)])
    torch.testing.assert_close(log_probs, torch.cat(read), atol=1e-5, rtol=0)
    (log_probs * weights).sum().backward()
    stack.distribute_gradients()
    for model, gradients in zip(models, expected, strict=True):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)
    assert all(weight.grad is None for weight in stack.weights.values())


def test_a_step_on_one_member_is_a_step_of_the_stack() -> None:
    models = members("student", 2)
    stack = StackedLM(models)
    before = stack.start([[1, 2]] * 2)
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(0.5)
    after = stack.start([[1, 2]] * 2)
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1:], models[1].start([[1, 2]]))
    assert not torch.equal(after[1], before[1])


def test_members_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="models"):
        StackedLM([*members("student", 1), *members("student", 1, width=24)])
    with pytest.raises(ValueError, match="prompts"):
        StackedLM(members("student", 2)).start([[1, 2]] * 3)
