"""Independent items of work, over local processes or Ray. An item fails alone, and is retried if its worker dies."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, TypeVar

CHECKOUT = Path(__file__).resolve().parents[2]
T = TypeVar("T")
FanOut = Literal["local", "ray"]
Report = Callable[[T, int, str | None], None]  # the item that is done, how many are, and its error
ATTEMPTS = 2  # at an item whose worker dies


def for_each(
    work: Callable[[T], None],
    items: Sequence[T],
    workers: int,
    fan_out: FanOut,
    report: Report[T],
    reuse: bool = False,
) -> None:
    """Do `work` on every item, in other processes with one thread each.

    Args:
        work: picklable; an exception is reported and stops no other item.
        items: hashable and picklable, all different.
        workers: items at the same time, at most; a Ray cluster takes as many as it has processors.
        fan_out: local processes, or Ray: the cluster of $RAY_ADDRESS, otherwise a local one with `workers` processors.
        report: called after each item.
        reuse: whether a local process may do one item after another, which imports and loads things once.

    Raises:
        ValueError: if Ray is not installed.
    """
    if not items:
        return
    if fan_out == "ray":
        _over_ray(work, items, workers, report)
    else:
        _over_processes(work, items, workers, report, reuse)


def _over_ray(work: Callable[[T], None], items: Sequence[T], workers: int, report: Report[T]) -> None:
    try:
        import ray
    except ImportError:
        raise ValueError('fan_out: ray is not installed; expected local, or pip install -e ".[ray]"') from None
    started = not ray.is_initialized()
    if started:
        processors = None if os.environ.get("RAY_ADDRESS") else workers  # a cluster knows its own
        path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
        environment = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}}
        quiet: Any = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(num_cpus=processors, runtime_env=environment, **quiet)
    try:

        @ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)  # retries after a death, not after an exception
        def task(item: T) -> None:
            work(item)

        running = {task.remote(item): item for item in items}
        done = 0
        while running:
            (finished,), _ = ray.wait(list(running), num_returns=1)
            item, error, done = running.pop(finished), None, done + 1
            try:
                ray.get(finished)
            except ray.exceptions.RayTaskError as raised:
                cause = raised.cause
                error = f"{type(cause).__name__}: {cause}"
            except ray.exceptions.RayError:
                error = f"its worker died {ATTEMPTS} times"
            report(item, done, error)
    finally:
        if started:
            ray.shutdown()


def _over_processes(
    work: Callable[[T], None], items: Sequence[T], workers: int, report: Report[T], reuse: bool
) -> None:
    pool = _Processes(reuse)
    try:
        with ThreadPoolExecutor(workers) as threads:
            running = {threads.submit(pool.do, work, item): item for item in items}
            try:
                for done, future in enumerate(as_completed(running), 1):
                    report(running[future], done, future.result())
            finally:
                pool.stopped = True
                threads.shutdown(wait=False, cancel_futures=True)
    finally:
        for process in pool.idle:
            process.shutdown()


class _Processes:
    """Processes with one thread each, as many as threads ask for one."""

    def __init__(self, reuse: bool) -> None:
        self.reuse, self.stopped = reuse, False
        self.idle: list[ProcessPoolExecutor] = []

    def do(self, work: Callable[[T], None], item: T) -> str | None:
        """Do the work in a process, and again if it dies, unless everything stops. Returns the error."""
        spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        for _ in range(ATTEMPTS):
            process = self.idle.pop() if self.idle else ProcessPoolExecutor(1, spawn, _begin)
            error = process.submit(work, item).exception()
            died = isinstance(error, BrokenProcessPool)
            if self.reuse and not died:
                self.idle.append(process)
            else:
                process.shutdown()
            if self.stopped or not died:
                return f"{type(error).__name__}: {error}" if error else None
        return f"its worker died {ATTEMPTS} times"


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
