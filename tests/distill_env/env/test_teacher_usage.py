"""What the teacher computes, and what it hands to a distillation agent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_env.env import DistillVectorEnv
from distill_env.models.tabular import markov
from distill_env.ragged import PAD
from distill_env.tasks.categorical import CategoricalTask
from tests.helpers.environments import REWRITE, arguments_of, one_state


@pytest.mark.parametrize("span", ["token", "step"])
def test_the_teacher_computes_each_state_once(span: str) -> None:
    """A step along a look-ahead costs no pass; nor does a rewritten token, which is read with the next look."""
    teacher = one_state([0.0, 0.3, 0.3, 0.4, 0.0])  # neither ends a step (0) nor the answer (4)
    env = DistillVectorEnv(2, CategoricalTask(5, 6), teacher, rewrite_span=span, chunk=4)  # type: ignore[arg-type]
    env.reset(seed=0)
    use = env.teacher_usage
    assert (use.passes, use.positions, use.tokens) == (1, 2, 0)
    env.lookahead(torch.tensor([[1, 1, 2], [3, 2, PAD]]))
    assert (use.passes, use.positions) == (2, 2 + 5)
    env.step(np.array([[1, 1, 2], [3, PAD, PAD]]))
    env.lookahead(torch.full((2, 2), PAD))
    assert (use.passes, use.positions) == (2, 7)  # all of it was known
    env.step(np.array([[REWRITE - 1], [PAD]]))
    executed = list(env.executed_log_probs())
    rows, positions = (np.concatenate([piece[i] for piece in executed]) for i in (0, 1))
    if span == "token":
        assert (use.passes, use.positions, use.tokens) == (2, 7, 1)
        env.lookahead(torch.tensor([[1], [1]]))
        assert (use.passes, use.positions) == (3, 7 + 2 + 1)  # the rewritten one and two drafted
        assert (rows.tolist(), positions.tolist()) == ([0], [3])
    else:  # three tokens, up to the horizon, of which it has to read two
        assert (use.passes, use.positions, use.tokens) == (4, 9, 3)
        assert (rows.tolist(), positions.tolist()) == ([0] * 3, [3, 4, 5])
    for *_, log_probs in executed:
        torch.testing.assert_close(log_probs, teacher.log_table().expand_as(log_probs))


def test_executed_log_probs_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same states and distributions, at most so many numbers at a time."""
    env = DistillVectorEnv(3, CategoricalTask(5, 6), markov(5), chunk=4, reveal_teacher=False)  # type: ignore[arg-type]
    env.reset(seed=0)
    env.step(np.array([[1, 2, 0, 5], [3, 5, PAD, PAD], [0, 0, 0, 0]]))
    ((rows, positions, log_probs), (written, at, drawn)) = env.executed_log_probs()
    assert (written.tolist(), at.tolist(), len(drawn)) == ([0, 1], [3, 1], 2)
    monkeypatch.setattr("distill_env.env.CHUNK_NUMBERS", 3 * 5)
    pieces = list(env.executed_log_probs())
    assert [len(piece) for *_, piece in pieces] == [3, 3, 2, 2]
    assert np.concatenate([row for row, _, _ in pieces]).tolist() == [*rows.tolist(), *written.tolist()]
    assert np.concatenate([position for _, position, _ in pieces]).tolist() == [*positions.tolist(), *at.tolist()]
    assert torch.cat([piece for *_, piece in pieces]).equal(torch.cat([log_probs, drawn]))


def test_stepping_costs_a_pass_a_step() -> None:
    env = DistillVectorEnv(3, **arguments_of("table"), autoreset_mode="Disabled", reveal_teacher=True)
    env.reset(seed=0)
    for passes in (2, 3, 4):
        env.step(np.array([0, 1, 2]))
        assert env.teacher_usage.passes == passes
    hidden = DistillVectorEnv(3, **arguments_of("table"), reveal_teacher=False)
    _, info = hidden.reset(seed=0)
    assert "teacher_log_probs" not in info
    hidden.step(np.array([0, 1, 2]))
    assert hidden.teacher_usage.passes == 1  # the first distribution came with the prompt
