"""Distributions are popped in order, whatever the order in which they were appended and the size of a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import teacher_buffer
from agents.teacher_buffer import TeacherBuffer
from distill_env.divergence import LOG_ZERO
from distill_env.ragged import PAD


@given(st.integers(0, 2**32), st.sampled_from([1, 7, 12, 100, 2**25]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_states_are_popped_completion_by_completion(seed: int, block: int, truncated: bool) -> None:
    """In any order and in any parts, with any number of numbers in a block. Supports of differing sizes are filled up
    with log 0 and id -1, before the tail."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, rng.integers(1, 6))
    states = [(e, t) for e, length in enumerate(lengths.tolist()) for t in range(length)]
    width = 4
    rows = {state: torch.from_numpy(rng.standard_normal(width)) for state in states}
    ids = {state: torch.from_numpy(rng.permutation(9)[: width - 1]) for state in states}
    order = [states[i] for i in rng.permutation(len(states))] if seed % 2 else states
    cuts = sorted(rng.integers(0, len(order) + 1, 3).tolist())
    expected, expected_ids = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_buffer, "_BLOCK", block)
        buffer = TeacherBuffer(len(states))
        singles = {}  # how many ids each state has
        for begin, end in zip([0, *cuts], [*cuts, len(order)], strict=True):
            part = order[begin:end]
            if not part:
                continue
            single = int(rng.integers(1, width)) if truncated else width - 1
            singles |= dict.fromkeys(part, single)
            log_probs = torch.stack([torch.cat([rows[s][:single], rows[s][-1:]]) for s in part])
            buffer.append(
                np.array([e for e, _ in part]),
                np.array([t for _, t in part]),
                log_probs,
                torch.stack([ids[s][:single] for s in part]) if truncated else None,
            )
        teacher, support = buffer.pop()
    widest = max(singles.values())
    for state in states:
        missing = widest - singles[state]
        row, single = rows[state], singles[state]
        expected.append(torch.cat([row[:single], row.new_full((missing,), LOG_ZERO), row[-1:]]))
        expected_ids.append(torch.cat([ids[state][:single], torch.full((missing,), PAD)]))
    assert teacher.equal(torch.stack(expected))
    if truncated:
        assert support is not None
        assert support.equal(torch.stack(expected_ids))
    else:
        assert support is None


def test_rows_in_order_are_not_copied_again() -> None:
    """Completions that are appended whole and in order stay where they were first written."""
    buffer = TeacherBuffer(6)
    buffer.append(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), torch.ones(4, 3), None)
    first = buffer._blocks[0][0].data_ptr()
    assert buffer.pop()[0].data_ptr() == first
