"""Tasks: their prompts by split, and the grade of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

Split = Literal["train", "validation", "test", "ood"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "ood")


class Place(NamedTuple):
    """Where a row of data is."""

    source: str  # a file, or a data set and its split
    unit: str  # line or row
    number: int

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: its token ids, its text, and a difficulty by which results are grouped.

    The teacher may see more than the student: with `teacher_ids` it reads these in place of `ids`, before the same
    completion.
    """

    ids: tuple[int, ...]
    text: str
    difficulty: int = 0
    reference_completion: tuple[int, ...] | None = None  # with its end token if it ends
    final_answer: str | None = None  # the reference answer, if the data has one
    teacher_ids: tuple[int, ...] | None = None  # what the teacher reads; None: the same as the student
    teacher: str = ""  # the name of its teacher, where there are several
    place: Place | None = field(default=None, compare=False)  # of its row in the data

    @property
    def ids_for_teacher(self) -> tuple[int, ...]:
        """What the teacher reads before the completion."""
        return self.ids if self.teacher_ids is None else self.teacher_ids


@dataclass(frozen=True)
class Grade:
    """The grade of a completion. The environment may pay `score`, in [0, 1], at the end."""

    score: float
    correct: bool  # the final value is correct
    chain_correct: bool | None  # every reasoning step is correct, too; None if the task cannot tell
    way: str | None = None  # a name of the correct way that was taken, if there are several
    undecided: bool = False  # grading reached its limit of time or memory, which counts as wrong
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
    max_new_tokens: int  # the default horizon
    graded: bool  # whether `grade` has a meaning

    def prompts(self, split: Split) -> tuple[Prompt, ...]: ...

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade: ...

    def decode(self, tokens: Sequence[int]) -> str: ...
