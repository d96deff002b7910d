"""RememberedLM: what it looks up is what the model says, whoever visited the prefix first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_env.models.load import load_model
from distill_env.models.remembered import RememberedLM
from distill_env.models.stacked import StackedLM

ROWS = 12
POOL = [[1, 10, 2, 11], [3, 10, 4, 10, 5, 11], [7, 11], [9, 10, 9, 11]]  # few prompts, so that prefixes repeat


@pytest.mark.parametrize("limit", [None, 60])
def test_it_equals_the_model(limit: int | None) -> None:
    """Rows that repeat others and rows that leave them, in several batches; with a limit, also beyond it."""
    model = load_model("sums", dtype="float64")
    alone, remembered = model.fork(), RememberedLM(StackedLM([model]), limit)  # type: ignore[list-item]
    rng = np.random.default_rng(0)
    for _ in range(4):
        remembered = remembered.fork()
        prompts = [POOL[i] for i in rng.integers(0, len(POOL), ROWS)]
        torch.testing.assert_close(remembered.start(prompts), alone.start(prompts), atol=1e-5, rtol=0)
        live, lengths = np.ones(ROWS, bool), np.zeros(ROWS, int)
        for step in range(8):
            width = int(rng.integers(1, 4))
            counts = np.where(live, rng.integers(0, width + 1, ROWS), 0)
            drawn = np.where(np.arange(width) < counts[:, None], rng.integers(0, 2, (ROWS, width)), -1)
            tokens = torch.from_numpy(drawn)
            got, expected, present = remembered.extend(tokens), alone.extend(tokens), tokens >= 0
            torch.testing.assert_close(got[present], expected[present], atol=1e-5, rtol=0)
            lengths += counts
            live &= rng.random(ROWS) < 0.9
            keep = np.where(live, np.maximum(lengths - rng.integers(0, 2, ROWS), 0), -1)
            lengths = np.minimum(lengths, np.maximum(keep, 0))
            remembered.rewind(torch.from_numpy(keep))
            alone.rewind(torch.from_numpy(keep))
            if step == 4:
                rows = [0, 7]
                torch.testing.assert_close(
                    remembered.start(POOL[:2], rows), alone.start(POOL[:2], rows), atol=1e-5, rtol=0
                )
                live[rows], lengths[rows] = True, 0
    assert limit is None or remembered.table.size == limit


def test_a_known_prefix_is_not_computed_again() -> None:
    """After the model is broken, forks still know what it said."""
    stack = StackedLM([load_model("sums")])  # type: ignore[list-item]
    remembered = RememberedLM(stack)
    tokens = torch.tensor([[7, 7], [2, 2]])
    first, then = remembered.start(POOL[:2]), remembered.extend(tokens)
    stack.weights["model.norm.weight"].data = torch.full_like(stack.weights["model.norm.weight"], torch.nan)
    again = remembered.fork()
    assert torch.equal(again.start(POOL[:2]), first)
    assert torch.equal(again.extend(tokens), then)
    assert again.extend(torch.tensor([[1], [1]])).isnan().all()  # unknown
