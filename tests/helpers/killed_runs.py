"""Kill a run by SIGKILL just before its k-th change of the file system, resume it, and so on over its life.

    python -m tests.helpers.killed_runs OUT '{"NAME": [POINTS, [FLAG, ...]], ...}'

Between two such changes the disk is the same whenever the kill comes. Every run is a fork of this process, which has
imported everything. OUT/NAME then has the run `whole`, and for every point a run `<k>` that was killed and resumed. The
change before which each was killed is printed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu  # noqa: F401
import torch
import torch.utils.tensorboard

import agents.sb3  # noqa: F401
import distill_env.models.causal_lm  # noqa: F401
import experiments.running.warm_start  # noqa: F401
from experiments import run
from experiments.running import lifecycle

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR


def forked(work: Callable[[], int]) -> int:
    """Fork, do the work in the child, and return its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def watched(folder: Path, arguments: list[str], die_at: int | None) -> int:
    """Run until change number `die_at`, print it and die; without one, write the number of changes to `count`."""
    seen, running = 0, True

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if not running or not (event in CHANGES or (event == "open" and values[2] & WRITING)):
            return
        if str(values[0]).startswith(str(folder)) or (event in ("os.remove", "os.rmdir") and values[1] >= 0):
            if seen == die_at:
                os.write(1, f"{die_at} {event} {Path(str(values[0])).name}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)
    code = run.main(arguments)
    running = False
    (folder.parent / "count").write_text(str(seen))
    return code


def main(out: Path, points: int, flags: list[str]) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True)
    lifecycle.draw_curves = lambda *_: None  # it takes most of a short run's time, and no run resumes from it

    def arguments(name: str) -> list[str]:
        return [*flags, "--out", str(out), "--name", name]

    def quiet(name: str, die_at: int | None, *more: str) -> int:
        def work() -> int:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            return watched(out / name, [*arguments(name), *more], die_at)

        return forked(work)

    assert quiet("whole", None) == 0
    count = int((out / "count").read_text())
    for k in np.unique(np.linspace(0, count - 1, points).astype(int)).tolist():
        status = quiet(str(k), k)
        assert os.WIFSIGNALED(status), (k, status)
        assert os.WTERMSIG(status) == signal.SIGKILL, (k, status)
        begun = (out / str(k) / "config.json").exists()
        status = quiet(str(k), None, *(["--resume"] if begun else []))
        assert status == 0, (k, status)


if __name__ == "__main__":
    for name, (points, flags) in json.loads(sys.argv[2]).items():
        main(Path(sys.argv[1]) / name, points, flags)
