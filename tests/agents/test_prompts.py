"""Which prompts are taken."""

from __future__ import annotations

import itertools

import pytest

from agents.prompts import PromptStream, evenly_spaced
from distill_env.tasks.base import Prompt


@pytest.mark.parametrize(("available", "count"), [(311, 60), (311, 200), (217, 216), (7, 7), (9, 1), (2, 5)])
def test_as_many_prompts_as_asked_from_first_to_last(available: int, count: int) -> None:
    """In order, none twice while there are enough, and no gap more than one larger than another."""
    chosen = [p.ids[0] for p in evenly_spaced([Prompt((i,), "") for i in range(available)], count)]
    assert len(chosen) == count
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    if 1 < count <= available:
        gaps = {b - a for a, b in itertools.pairwise(chosen)}
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1
        assert chosen[-1] == available - 1


def test_repeated_prompts_are_those_of_the_stream_in_its_order() -> None:
    """However the stream is cut into batches, also over the end of an epoch."""
    prompts = tuple(Prompt((i,), "") for i in range(5))
    expected = [p for p in PromptStream(prompts, 3).take(0, 12) for _ in range(3)]
    stream = PromptStream(prompts, 3, repeats=3)
    assert stream.take(0, 36) == expected
    assert [p for start in range(0, 36, 4) for p in stream.take(start, 4)] == expected
