"""Committed tokens and a draft are scored in one pass, each row by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_env.env import DistillVectorEnv
from distill_env.models.tabular import markov
from distill_env.ragged import PAD
from distill_env.tasks.base import Prompt
from distill_env.teacher_scorer import TeacherScorer


@pytest.mark.parametrize(
    ("unread", "draft"),
    [
        ([[1, PAD], [2, 3]], [[0, 1, 2], [4, 0, PAD]]),  # unequal ends of equal blocks
        ([[1], [2]], [[0, 1], [4, 0]]),
        ([[1], [2]], [[0, PAD], [PAD, PAD]]),
        ([[PAD], [2]], [[0, 1], [4, 0]]),
        ([[1, 2], [3, 4]], [[], []]),
    ],
)
def test_one_pass_scores_what_single_tokens_would(unread: list[list[int]], draft: list[list[int]]) -> None:
    teacher = markov(5, order=2, seed=1)
    scorer = TeacherScorer(teacher.fork(), 2, 5)
    scorer.start([Prompt((0,), ""), Prompt((3, 1), "")], np.arange(2))
    tokens = torch.tensor(draft, dtype=torch.long).reshape(2, -1)
    log_probs = scorer.score(np.array(unread), tokens, (tokens >= 0).sum(1).numpy(), np.ones(2, np.bool_))
    for row, prompt in enumerate([(0,), (3, 1)]):
        before = [*prompt, *(t for t in unread[row] if t >= 0)]
        drafted = [t for t in draft[row] if t >= 0]
        for j in range(len(drafted) + 1):
            expected = teacher.log_table()[teacher.walk([*before, *drafted[:j]])]
            torch.testing.assert_close(log_probs[row, j], expected.detach(), rtol=0, atol=1e-12)
        alone = teacher.log_table()[teacher.walk(before)]
        torch.testing.assert_close(scorer.log_probs[row], alone.detach(), rtol=0, atol=1e-12)


def test_what_was_released_is_computed_again() -> None:
    """`release` between a look-ahead and a step, along the draft or away from it, changes no result and frees the
    distributions of the draft."""
    draft = torch.tensor([[0, 1, 2], [3, 0, -1]])
    for actions in ([[0, 1], [3, 6]], [[2, 1], [0, 0]]):
        seen = []
        for released in (False, True):
            env = DistillVectorEnv(2, "categorical", "markov", chunk=3, autoreset_mode="Disabled")
            env.reset(seed=0)
            env.lookahead(draft)
            if released:
                env.release()
                assert env._scorer.cached(np.array([[0, 1], [3, 0]])) is None
            rewards = env.step(np.array(actions))[1]
            seen.append(np.concatenate([rewards, env.lookahead(draft)[:, 0].flatten().numpy()]))
        np.testing.assert_allclose(seen[1], seen[0], rtol=0, atol=1e-12)
