r"""Grading of final answers by value. A completion is data: it is compared, never run.

1. `extract` finds the final answer in the last `LONGEST_COMPLETION` characters of the completion.
2. `normalize` and `prose` read numbers as fractions; this decides GSM8K, SVAMP and AIME.
3. `compare` compares texts, times, and the parts of lists, sets, tuples and intervals.
4. What remains goes to math-verify in a process of its own (`verifier`, `worker`), one pair at a time, with limits on
   processor time, wall time and memory. The process reads LaTeX by a grammar, and refuses `eval`, writing files,
   starting processes and connections. If it reaches a limit, the answer counts as wrong and as `undecided`, and the
   next pair gets a new process.
"""

from __future__ import annotations

import atexit
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache

from distill_env.tasks.grading.compare import same
from distill_env.tasks.grading.extract import (
    LONGEST_ANSWER,
    final_answer,
    last_boxed,
    last_formula,
    said_answers,
    sentences,
    without_reasoning,
)
from distill_env.tasks.grading.normalize import clean, number, read
from distill_env.tasks.grading.prose import last_number, leading_number
from distill_env.tasks.grading.verifier import Verifier

__all__ = ["LONGEST_ANSWER", "Verdict", "Verifier", "final_answer", "grade", "last_boxed", "number", "verifier"]

LONGEST_COMPLETION = 10_000  # characters; only the end of a longer one is read

_DIGIT = re.compile(r"\d", re.ASCII)
_MARKUP = " .$*\n)]\\"  # what may follow a formula at the end
_WORDS = re.compile(r"(?!.*(?:\b[B-H]\b|ption A\b))[^\d\\]*[A-Za-z]{3}[^\d\\]*", re.ASCII)


@dataclass(frozen=True)
class Verdict:
    """Whether a final answer is correct, and its value."""

    correct: bool
    undecided: bool = False  # the comparison reached a limit, which counts as wrong
    value: str | None = field(default=None, compare=False)  # normalised; the reference's if it is correct


def grade(reference: str, completion: str, symbolic: bool, ended: bool = True) -> Verdict:
    """Whether the final answer of a completion has the reference's value.

    Args:
        reference: the final answer in the data, a number or LaTeX.
        completion: any text.
        symbolic: math-verify compares what is not two plain numbers; otherwise only numbers can be correct.
        ended: the completion was not cut off; if it marks no answer, its last number or formula counts.
    """
    answer = _find_answer(reference, without_reasoning(completion[-LONGEST_COMPLETION:]), ended)
    if answer is None or len(answer) > LONGEST_ANSWER:
        return Verdict(False)
    correct = same(reference, answer, (lambda a, b: verifier().same(a, b)) if symbolic else None)
    return Verdict(bool(correct), correct is None, _normalised(reference if correct else answer))


def _find_answer(reference: str, text: str, ended: bool) -> str | None:
    """The final answer, and of one that says more than a number only the number, if the reference is one."""
    numeric = number(reference) is not None
    words = _WORDS.fullmatch(clean(reference)) is not None
    answer = last_boxed(text)
    if answer is None:
        # "the answer is correct" marks nothing, unless a word is expected, or a number in words
        answer = next(
            (a for a in said_answers(text) if words or not _WORDS.fullmatch(a) or (numeric and read(a))), None
        )
    if answer is None and ended:
        answer = last_formula(text)
        if numeric and not (answer and text.rstrip(_MARKUP).endswith(answer.rstrip(_MARKUP))):
            return next(filter(None, map(last_number, filter(_DIGIT.search, sentences(text)))), None)
    if answer is None or len(answer) > LONGEST_ANSWER or not numeric:
        return answer
    whole = read(answer, loose=True) or "approx" in clean(answer)
    return answer if whole else leading_number(answer) or answer


def _normalised(answer: str) -> str | None:
    """One text for equal numbers, and for formulas that differ in spaces; None for an empty answer."""
    value = read(answer, loose=True)
    return str(value[0]) if value else re.sub(r"\s", "", clean(answer)) or None


def verifier() -> Verifier:
    """The verifier of this process; a forked process gets its own."""
    return _verifier(os.getpid())


@lru_cache
def _verifier(process: int) -> Verifier:
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier
