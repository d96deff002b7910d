"""How many tokens to draft before the teacher looks: by the times of the latest blocks and by what cut them short."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class _Line:
    """Seconds as a line over an amount of work, fitted to the latest blocks."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []

    def add(self, amount: float, seconds: float) -> None:
        self._seen = [*self._seen[-63:], (amount, seconds)]

    def __len__(self) -> int:
        return len(self._seen)

    def __call__(self, amount: NDArray[np.int64] | int) -> NDArray[np.float64]:
        work, seconds = np.array(self._seen).T
        centred = work - work.mean()
        slope = centred @ seconds / max(centred @ centred, 1e-12)  # 0 where all amounts are one
        base = seconds.mean() - slope * work.mean()
        if slope < 0:  # noise
            slope, base = 0.0, seconds.mean()
        return max(base, 1e-9) + slope * np.asarray(amount, np.float64)


class DraftLength:
    """How many tokens to draft: the number that promises the most committed tokens a second.

    A row's draft is cut short by a hard step or by the end of its answer. With h the rate of both together a draft of
    K commits (1 - (1 - h)^K) / h tokens of a row on average; its cost is K student steps over the rows that still write
    and a teacher pass over K positions of each (with the gate's and the environment's work, which small models wait
    for), both lines a + b x measured as the run goes: towards the end of a batch, when few rows are left, long drafts
    are cheap. The choice changes the cost of a rollout, never its outcome.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.cut_rate = 0.1
        self._student, self._rest = _Line(), _Line()  # a step by rows, all else by positions

    def choose(self, rows: int) -> int:
        """The draft length for a batch in which so many rows write."""
        if len(self._rest) < 2 or len(self._student) == 0:
            return min(8, self.longest)
        lengths = np.arange(1, self.longest + 1)
        h = min(max(self.cut_rate, 1e-6), 1.0)
        committed = (1 - (1 - h) ** lengths) / h
        return int(lengths[np.argmax(committed / (lengths * self._student(rows) + self._rest(rows * lengths)))])

    def observe(self, rows: int, cut: int, looked_at: int, student_step: float, width: int, rest: float) -> None:
        """Tell what a block of `rows` showed: the drafts that were cut short, by a hard step or an end token, among the
        states looked at; seconds of a student step (0: none was made), and of all the rest, the teacher's pass over
        `width` positions a row above all."""
        if looked_at:
            self.cut_rate += 0.1 * (cut / looked_at - self.cut_rate)
        if student_step > 0:
            self._student.add(rows, student_step)
        self._rest.add(rows * width, rest)
