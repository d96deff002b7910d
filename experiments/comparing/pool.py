"""Independent items of work, over local processes or Ray. An item fails alone, and is retried if its worker dies."""

from __future__ import annotations

import multiprocessing
import os
import threading
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


def for_each(work: Callable[[T], None], items: Sequence[T], workers: int, fan_out: FanOut, report: Report[T]) -> None:
    """Do `work` on every item, in other processes with one thread each.

    Args:
        work: picklable; an exception is reported and stops no other item.
        items: hashable and picklable, all different.
        workers: items at the same time, at most; a Ray cluster takes as many as it has processors.
        fan_out: local processes, or Ray: the cluster of $RAY_ADDRESS, otherwise a local one with `workers` processors.
        report: called after each item.

    Raises:
        ValueError: if Ray is not installed.
    """
    if not items:
        return
    if fan_out == "ray":
        _over_ray(work, items, workers, report)
    else:
        _over_processes(work, items, workers, report)


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


def _over_processes(work: Callable[[T], None], items: Sequence[T], workers: int, report: Report[T]) -> None:
    stopped = threading.Event()
    with ThreadPoolExecutor(workers) as threads:
        running = {threads.submit(_in_a_process, work, item, stopped): item for item in items}
        try:
            for done, future in enumerate(as_completed(running), 1):
                report(running[future], done, future.result())
        finally:
            stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)


def _in_a_process(work: Callable[[T], None], item: T, stopped: threading.Event) -> str | None:
    """Do the work in a process of its own, and again if it dies, unless everything stops. Returns the error."""
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    for _ in range(ATTEMPTS):
        with ProcessPoolExecutor(1, spawn, _begin) as process:
            error = process.submit(work, item).exception()
        if stopped.is_set() or not isinstance(error, BrokenProcessPool):
            return f"{type(error).__name__}: {error}" if error else None
    return f"its worker died {ATTEMPTS} times"


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
