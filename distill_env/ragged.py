"""Ragged batches of token ids in rectangular arrays: each row is padded on the right with -1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PAD = -1
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def row_and_column(counts: Ints) -> tuple[Ints, Ints]:
    """The places of the first `counts[i]` columns of every row i, as two index arrays in row-major order."""
    rows, columns = np.nonzero(np.arange(counts.max(initial=0)) < counts[:, None])
    return rows, columns


def slice_rows(tokens: Ints, start: Ints, stop: Ints) -> Ints:
    """Row i's `tokens[i, start[i]:stop[i]]`, left-aligned: [n, T] -> [n, w] with w the longest slice."""
    rows, columns = row_and_column(stop - start)
    block = np.full((len(tokens), columns.max(initial=-1) + 1), PAD, np.int64)
    block[rows, columns] = tokens[rows, start[rows] + columns]
    return block
