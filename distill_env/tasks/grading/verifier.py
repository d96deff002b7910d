"""math-verify in a process of its own (`worker.py`), one comparison at a time, with limits of time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

SECONDS = 3.0  # processor time for one comparison
MEBIBYTES = 2048  # address space of the process


class Verifier:
    """A child process, which starts when it is needed and again after it was killed.

    Args:
        seconds: limit on processor time for one comparison; the limit on wall time is three times as long.
        mebibytes: address space of the child.
    """

    def __init__(self, seconds: float = SECONDS, mebibytes: int = MEBIBYTES) -> None:
        self.seconds = seconds
        self.mebibytes = mebibytes
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def same(self, reference: str, answer: str) -> bool | None:
        """Whether two LaTeX expressions are equal; None if the comparison reached a limit of time or memory."""
        with self._lock:
            if self._child is None:
                self._start()
            reply = self._ask(json.dumps({"reference": reference, "answer": answer}), 3 * self.seconds)
            if reply is None:
                self.close()
                return None
            same: bool | None = reply["same"]
            return same

    def _start(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
        self._child = subprocess.Popen(
            [*command, str(self.seconds), str(self.mebibytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._ask(None, 120.0) is None:
            self.close()
            raise RuntimeError(f"grading: {' '.join(command)} does not start; expected math-verify to be installed")

    def _ask(self, line: str | None, seconds: float) -> dict[str, bool | None] | None:
        """Write a line and read the reply; None if the child has died, or took too long and was killed."""
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        clock = threading.Timer(seconds, child.kill)
        clock.start()
        try:
            if line is not None:
                child.stdin.write(line + "\n")
                child.stdin.flush()
            reply = child.stdout.readline()
            return json.loads(reply) if reply else None
        except (BrokenPipeError, json.JSONDecodeError):
            return None
        finally:
            clock.cancel()

    def close(self) -> None:
        """End the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with suppress(BrokenPipeError), child:  # closes the pipes, which may hold a request, and waits
                pass
