"""Groups of rows of similar length, which share a forward pass so that little padding is computed."""

from __future__ import annotations

from collections.abc import Sequence


def length_groups(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Split rows into passes of the least total cost.

    A pass over n rows, the longest of L tokens, costs n L + overhead. In the order of length the best groups are
    consecutive rows, found by dynamic programming in O(rows^2).

    Args:
        lengths: tokens of each row.
        overhead: cost of a pass of any size, in token positions.

    Returns:
        row numbers, ascending in each group; every row once.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    cost, begins = [0], [0]  # of the first i rows, and where their last group begins
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        best = min((cost[begin] + (stop - begin) * longest + overhead, begin) for begin in range(stop))
        cost.append(best[0])
        begins.append(best[1])
    groups, stop = [], len(order)
    while stop > 0:
        groups.append(sorted(order[begins[stop] : stop]))
        stop = begins[stop]
    return groups[::-1]
