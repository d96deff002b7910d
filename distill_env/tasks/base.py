"""Tasks: which prompts there are, how they are split, and how an answer is graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "validation", "test", "ood"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "ood")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids, its text, and a difficulty by which results are grouped."""

    ids: tuple[int, ...]
    text: str
    difficulty: int = 0
    reference_completion: tuple[int, ...] | None = None  # with its end token if it ends
    final_answer: str | None = None  # the reference answer, if the data has one


@dataclass(frozen=True)
class Grade:
    """What an answer is worth. `score` is what the environment may pay at the end, in [0, 1]."""

    score: float
    correct: bool  # the final value is right
    chain_correct: bool | None  # every step is right, too; None if the task cannot tell
    way: str | None = None  # names the right way that was taken, if there are several
    undecided: bool = False  # grading ran into its limit of time or memory, which counts as wrong
    final_value: str | None = None  # the final value in one spelling, by which majorities are counted; None: no value

    @property
    def right(self) -> bool:
        """Whether the whole chain is right; only the final value where the task does not judge chains."""
        return self.correct if self.chain_correct is None else self.chain_correct


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
