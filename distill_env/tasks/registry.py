"""Tasks by name."""

from __future__ import annotations

import inspect
from functools import lru_cache
from pkgutil import resolve_name
from typing import Any

from distill_env.tasks.base import Task

SMALL_TASKS = {
    "sums": "distill_env.tasks.sums:SumsTask",
    "coins": "distill_env.tasks.coins:CoinsTask",
    "categorical": "distill_env.tasks.categorical:CategoricalTask",
}
LANGUAGE_TASKS = {
    "instruct": "distill_env.tasks.instruct:InstructTask",
    "gsm8k": "distill_env.tasks.math_word:GSM8KTask",
    "math": "distill_env.tasks.math_word:CompetitionMathTask",
    "aime": "distill_env.tasks.math_word:AIMETask",
    "svamp": "distill_env.tasks.math_word:SVAMPTask",
    "word_problems": "distill_env.tasks.word_problems:WordProblemsTask",
    "text": "distill_env.tasks.text:TextTask",
}


def make_task(name: str, **kwargs: Any) -> Task:
    """The task of that name, or of the class `package.module:Class`.

    A language task is made once per process and arguments, and shared; it never changes.

    Raises:
        ValueError: for an unknown name.
    """
    if name in LANGUAGE_TASKS:
        return _shared(LANGUAGE_TASKS[name], tuple(sorted(kwargs.items())))
    task: Task = task_class(name)(**kwargs)
    return task


def task_class(name: str) -> Any:
    """The class of the task of that name, or `package.module:Class`. Raises ValueError for an unknown name."""
    if ":" in name:
        return import_name("task", name)
    paths = SMALL_TASKS | LANGUAGE_TASKS
    if name not in paths:
        raise ValueError(f"task: {name!r} is unknown; expected one of {', '.join([*paths, 'package.module:Class'])}")
    return resolve_name(paths[name])


def task_arguments(kind: Any) -> set[str]:
    """The names of the arguments of a task's class, with those that it passes on to its bases."""
    names: set[str] = set()
    for base in kind.__mro__ if isinstance(kind, type) else ():
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def import_name(argument: str, name: str) -> Any:
    """What `package.module:name` names.

    Raises:
        ValueError: if it cannot be imported; the message names the argument.
    """
    try:
        return resolve_name(name)
    except Exception as error:  # a module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{argument}: {name!r} cannot be imported ({reason}); expected package.module:Class") from None


@lru_cache(maxsize=4)
def _shared(path: str, arguments: tuple[tuple[str, Any], ...]) -> Any:
    return resolve_name(path)(**dict(arguments))
