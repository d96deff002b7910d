"""Tasks by name."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from distill_env.tasks.base import Task

MATH_TASKS = ("gsm8k", "math", "aime", "svamp")

LANGUAGE_TASKS = ("instruct", *MATH_TASKS, "text")


def make_task(name: str, **kwargs: Any) -> Task:
    """The task of that name. Those that read data are made once a process and shared; nothing changes them.

    Raises:
        ValueError: for a name that is not a task.
    """
    if name == "sums":
        from distill_env.tasks.sums import SumsTask

        return SumsTask(**kwargs)
    if name == "coins":
        from distill_env.tasks.coins import CoinsTask

        return CoinsTask(**kwargs)
    if name == "categorical":
        from distill_env.tasks.categorical import CategoricalTask

        return CategoricalTask(**kwargs)
    if name in LANGUAGE_TASKS:
        return _language_task(name, tuple(sorted(kwargs.items())))
    raise ValueError(f"task: unknown task {name!r}; accepted: categorical, sums, coins, {', '.join(LANGUAGE_TASKS)}")


@lru_cache(maxsize=4)
def _language_task(name: str, arguments: tuple[tuple[str, Any], ...]) -> Task:
    kwargs = dict(arguments)
    if name == "instruct":
        from distill_env.tasks.instruct import InstructTask

        return InstructTask(**kwargs)
    if name == "text":
        from distill_env.tasks.text import TextTask

        return TextTask(**kwargs)
    from distill_env.tasks.math_word import MathTask

    return MathTask(name, **kwargs)
