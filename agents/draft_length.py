"""The adaptive draft length: how many tokens the student drafts before the teacher scores them."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

Points = deque[tuple[float, float]]  # amounts of work, and seconds


def fitted(points: Points, amount: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Seconds of an amount of work, as a linear function fitted to points."""
    work, seconds = np.array(points).T
    centred = work - work.mean()
    slope = centred @ seconds / max(centred @ centred, 1e-12)  # 0 if all amounts are equal
    slope = max(slope, 0.0)  # below 0 is noise
    base = seconds.mean() - slope * work.mean()
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
        self._student: Points = deque(maxlen=64)  # a student step by rows, of the latest blocks
        self._rest: Points = deque(maxlen=64)  # all else by positions

    def choose(self, rows: int) -> int:
        """The draft length for `rows` active rows."""
        if len(self._rest) < 2 or len(self._student) == 0:
            return min(8, self.longest)
        lengths = np.arange(1, self.longest + 1)
        h = min(max(self.cut_rate, 1e-6), 1.0)
        committed = (1 - (1 - h) ** lengths) / h
        seconds = lengths * fitted(self._student, rows) + fitted(self._rest, rows * lengths)
        return int(lengths[np.argmax(committed / seconds)])

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
            self._student.append((rows, student_step))
        self._rest.append((rows * width, rest))
