"""Rows of like lengths share a pass."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_env.models.batching import length_groups


def price(groups: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + overhead for group in groups)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 40))
def test_no_split_of_the_sorted_rows_is_cheaper(lengths: list[int], overhead: int) -> None:
    groups = length_groups(lengths, overhead)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(group == sorted(group) for group in groups)
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    cuts = (c for k in range(len(lengths)) for c in combinations(range(1, len(lengths)), k))
    splits = ([order[a:b] for a, b in zip((0, *c), (*c, len(order)), strict=True)] for c in cuts)
    assert price(groups, lengths, overhead) == min(price(split, lengths, overhead) for split in splits)


@pytest.mark.parametrize(
    ("overhead", "groups"), [(0, [[1, 3], [0], [2]]), (10, [[0, 1, 3], [2]]), (99, [[0, 1, 2, 3]])]
)
def test_the_dearer_a_pass_the_fewer(overhead: int, groups: list[list[int]]) -> None:
    assert length_groups([4, 1, 20, 1], overhead) == groups
