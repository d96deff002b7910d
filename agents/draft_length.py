"""The adaptive draft length: how many tokens the student drafts before the teacher scores them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class _Line:
    """Seconds as a linear function of an amount of work, fitted to the latest 64 blocks."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []

    def add(self, amount: float, seconds: float) -> None:
        self._points = [*self._points[-63:], (amount, seconds)]

    def __len__(self) -> int:
        return len(self._points)

    def __call__(self, amount: NDArray[np.int64] | int) -> NDArray[np.float64]:
        work, seconds = np.array(self._points).T
        centred = work - work.mean()
        slope = centred @ seconds / max(centred @ centred, 1e-12)  # 0 if all amounts are equal
        base = seconds.mean() - slope * work.mean()
        if slope < 0:  # noise
            slope, base = 0.0, seconds.mean()
        return max(base, 1e-9) + slope * np.asarray(amount, np.float64)


class DraftLength:
    """Chooses the draft length with the most expected committed tokens per second.

    A row's draft ends early at a hard position or at the end of its completion. If each position does so with
    probability h, a draft of K tokens commits (1 - (1 - h)^K) / h tokens on average. It costs K student steps over the
    active rows, and one teacher pass over K positions of each, together with the gate and the environment. Both times
    are linear functions, fitted during the run. Towards the end of a batch few rows are active, and long drafts are
    cheap. The draft length changes the cost of a rollout, never its outcome.

    Args:
        longest: the largest draft length.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.cut_rate = 0.1
        self._student, self._rest = _Line(), _Line()  # of a student step by rows; of all else by positions

    def choose(self, rows: int) -> int:
        """The draft length for `rows` active rows."""
        if len(self._rest) < 2 or len(self._student) == 0:
            return min(8, self.longest)
        lengths = np.arange(1, self.longest + 1)
        h = min(max(self.cut_rate, 1e-6), 1.0)
        committed = (1 - (1 - h) ** lengths) / h
        return int(lengths[np.argmax(committed / (lengths * self._student(rows) + self._rest(rows * lengths)))])

    def observe(self, rows: int, cut: int, looked_at: int, student_step: float, width: int, rest: float) -> None:
        """Add the measurements of a block.

        Args:
            rows: active rows.
            cut: rows whose draft ended early, by a hard position or an end token.
            looked_at: positions at which it could have ended.
            student_step: seconds of a student step; 0 if there was none.
            width: positions of a row in the teacher's pass.
            rest: seconds of all else, mostly the teacher's pass.
        """
        if looked_at:
            self.cut_rate += 0.1 * (cut / looked_at - self.cut_rate)
        if student_step > 0:
            self._student.add(rows, student_step)
        self._rest.add(rows * width, rest)
