"""Tasks: which prompts there are, how they are split, and how an answer is graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

Split = Literal["train", "validation", "test", "ood"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "ood")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids, its text, and a difficulty by which results are grouped."""

    ids: tuple[int, ...]
    text: str
    difficulty: int = 0
    reference: tuple[int, ...] | None = None  # a reference answer, with its end token if it ends
    answer: str | None = None  # the right final value, if the data has one


@dataclass(frozen=True)
class Grade:
    """What an answer is worth. `score` is what the environment may pay at the end, in [0, 1]."""

    score: float
    correct: bool  # the final value is right
    chain_correct: bool | None  # every step is right, too; None if the task cannot tell
    way: str | None = None  # names the right way that was taken, if there are several
    undecided: bool = False  # grading ran into its limit of time or memory, which counts as wrong
    vote: str | None = None  # names the final value: answers of one value have one vote; None if there is no value


class Task(Protocol):
    """Prompts, splits and a grader over the token ids of one vocabulary."""

    vocab_size: int
    eos_token_id: int
    step_end_ids: frozenset[int]  # a token of this set ends a reasoning step
    max_new_tokens: int  # a sensible default horizon
    graded: bool  # whether `grade` means something

    def prompts(self, split: Split) -> tuple[Prompt, ...]: ...

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


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
