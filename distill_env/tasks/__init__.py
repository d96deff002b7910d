"""Tasks: which prompts there are, how they are split, and how an answer is graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Split = Literal["train", "validation", "test", "ood"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "ood")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids, its text, and a difficulty by which results are grouped."""

    ids: tuple[int, ...]
    text: str
    difficulty: int = 0
    reference: tuple[int, ...] | None = None  # a reference answer with its end token, if the data has one


@dataclass(frozen=True)
class Grade:
    """What an answer is worth. `score` is what the environment may pay at the end, in [0, 1]."""

    score: float
    correct: bool  # the final value is right
    chain_correct: bool  # every step is right, too
    way: str | None = None  # names the right way that was taken, if there are several


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


def make_task(name: str, **kwargs: Any) -> Task:
    """Build the task of that name.

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
    if name == "prompts":
        from distill_env.tasks.prompts import PromptsTask

        return PromptsTask(**kwargs)
    raise ValueError(f"task: unknown task {name!r}; accepted: categorical, sums, coins, prompts")
