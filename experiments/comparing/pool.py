"""Independent pieces of work over local processes or over Ray. A piece fails alone, and one whose worker died is done
again."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, TypeVar

from rich.console import Console

T = TypeVar("T")
FanOut = Literal["local", "ray"]
Told = Callable[[T, int, str | None], None]  # what is done, how many are, and what went wrong
ATTEMPTS = 2  # at a piece of work whose worker dies


def for_each(
    work: Callable[[T], None], items: Sequence[T], workers: int, fan_out: FanOut, console: Console, tell: Told[T]
) -> None:
    """`work` on every item, in other processes with one thread each.

    Args:
        work: picklable; what it raises is told and stops nothing else.
        items: hashable and picklable, all different.
        workers: at most so many at a time, on a Ray cluster as many as it has processors for.
        fan_out: local processes, or Ray: the cluster that $RAY_ADDRESS names, else one of `workers` processors here.
        console: where deaths are told.
        tell: is called after each item, with its error if it had one.

    Raises:
        ValueError: if Ray is not installed.
    """
    if not items:
        return
    if fan_out == "ray":
        _over_ray(work, items, workers, tell)
    else:
        _over_processes(work, items, workers, console, tell)


def _over_ray(work: Callable[[T], None], items: Sequence[T], workers: int, tell: Told[T]) -> None:
    try:
        import ray
    except ImportError:
        raise ValueError('fan_out: ray is not installed; accepted: local, or pip install -e ".[ray]"') from None
    ours = not ray.is_initialized()
    if ours:
        here = None if os.environ.get("RAY_ADDRESS") else workers  # a cluster knows its own processors
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        quiet: Any = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(num_cpus=here, runtime_env=environment, **quiet)
    try:

        @ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)  # Ray does again what died, not what raised
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
            tell(item, done, error)
    finally:
        if ours:
            ray.shutdown()


def _over_processes(
    work: Callable[[T], None], items: Sequence[T], workers: int, console: Console, tell: Told[T]
) -> None:
    waiting, attempts, done = list(items), dict.fromkeys(items, 0), 0
    while waiting:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        pool = ProcessPoolExecutor(min(workers, len(waiting)), mp_context=context, initializer=_begin)
        running: dict[Future[None], T] = {}
        try:
            while waiting or running:
                # a death takes all that run with it, so the suspects are tried again one by one
                alone = any(attempts[item] for item in [*running.values(), *waiting[:1]])
                while waiting and len(running) < (1 if alone else workers):
                    item = waiting.pop(0)
                    running[pool.submit(work, item)] = item
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item, error = running[future], None
                    try:
                        future.result()
                    except BrokenProcessPool:
                        raise
                    except Exception as raised:  # a run's failure is its own
                        error = f"{type(raised).__name__}: {raised}"
                    del running[future]
                    done += 1
                    tell(item, done, error)
        except BrokenProcessPool:
            console.print("[red]a worker died[/]; what was running goes on in a new one")
            for item in running.values():
                attempts[item] += 1
                if attempts[item] < ATTEMPTS:
                    waiting.insert(0, item)
                else:
                    done += 1
                    tell(item, done, f"its worker died {ATTEMPTS} times")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
