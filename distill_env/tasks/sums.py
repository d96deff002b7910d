"""Sums: add the digits of a prompt in any order, writing each digit and the running total modulo 10.

    7+2+9=   ->   77;29;98   or   99;76;28   or another of the n!/prod(m_i!) ways

A step is one digit and the total after it; `;` ends a step, the end token ends the answer. The difficulty is the
number of digits. Every step can be checked, there are many right ways, and the number of them is known, which makes
accuracy, diversity and collapse measurable at once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np

from distill_env.tasks.base import SPLITS, Grade, Prompt, Split
from distill_env.tasks.by_length import LengthTask

SYMBOLS = "0123456789+=;"
PLUS, EQUALS, SEMICOLON, EOS = 10, 11, 12, 13
TRAIN_LENGTHS = (2, 3, 4, 5)
OOD_LENGTHS = (6, 7)


@cache
def split_of(digits: tuple[int, ...]) -> Split:
    """The split of a problem, by a hash of its multiset: no permutation of a test problem is ever trained on."""
    name = "".join(map(str, sorted(digits)))
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return "train" if bucket < 7 else "validation" if bucket < 8 else "test"


@cache
def multisets(length: int, split: Split) -> tuple[tuple[int, ...], ...]:
    """All multisets of `length` digits that the hash puts into `split` (one of train, validation, test)."""
    return tuple(m for m in itertools.combinations_with_replacement(range(10), length) if split_of(m) == split)


def number_of_ways(digits: Sequence[int]) -> int:
    """n! / prod(m_i!): in how many orders the digits can be added."""
    return math.factorial(len(digits)) // math.prod(math.factorial(m) for m in Counter(digits).values())


def encode_problem(digits: Sequence[int]) -> tuple[int, ...]:
    """`[7, 2, 9]` -> the ids of `7+2+9=`."""
    ids: list[int] = []
    for digit in digits:
        ids += [digit, PLUS]
    return (*ids[:-1], EQUALS)


def encode_answer(order: Sequence[int]) -> tuple[int, ...]:
    """`[7, 2, 9]` -> the ids of `77;29;98` and the end token: the digits are added in this order."""
    ids: list[int] = []
    total = 0
    for digit in order:
        total = (total + digit) % 10
        ids += [digit, total, SEMICOLON]
    return (*ids[:-1], EOS)


@cache
def prompts_of_length(length: int, split: Split, count: int) -> tuple[Prompt, ...]:
    """`count` problems of so many digits, or all there are, drawn once and for all."""
    rng = np.random.default_rng([length, SPLITS.index(split)])
    pool = multisets(length, split)
    available = sum(number_of_ways(m) for m in pool)
    problems: dict[tuple[int, ...], None] = {}  # an ordered set
    while len(problems) < min(count, available):
        digits = tuple(int(d) for d in rng.permutation(pool[rng.integers(len(pool))]))
        problems.setdefault(digits)
    return tuple(
        Prompt(
            encode_problem(digits),
            text(encode_problem(digits)),
            difficulty=length,
            reference_completion=encode_answer([int(d) for d in rng.permutation(digits)]),
        )
        for digits in problems
    )


def text(tokens: Sequence[int]) -> str:
    """Ids to text; the end token is not shown."""
    return "".join(SYMBOLS[t] for t in tokens if 0 <= t < len(SYMBOLS))


class SumsTask(LengthTask):
    """The Sums task: a length is a number of digits."""

    name = "sums"
    train_lengths = TRAIN_LENGTHS
    longer_lengths = OOD_LENGTHS
    vocab_size = len(SYMBOLS) + 1
    eos_token_id = EOS
    step_end_ids = frozenset({SEMICOLON})

    def prompts_of_length(self, length: int, split: Split, count: int) -> tuple[Prompt, ...]:
        return prompts_of_length(length, split, count)

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        """Grade an answer for its final value and for every step.

        `correct`: it ends, and its last running total is the sum modulo 10. `chain_correct`: it is, token for token,
        one of the right ways. `score` is 1 for a correct chain and 0 otherwise; `way` is the order taken;
        `final_value` the last total.
        """
        digits = [t for t in prompt.ids if t < 10]
        tokens = [int(t) for t in tokens]
        ended = len(tokens) > 1 and tokens[-1] == EOS
        correct = ended and tokens[-2] == sum(digits) % 10
        order = tokens[0::3]
        chain = ended and sorted(order) == sorted(digits) and tuple(tokens) == encode_answer(order)
        way = "".join(map(str, order)) if chain else None
        return Grade(float(chain), correct, chain, way, final_value=text(tokens[-2:]) or None if ended else None)

    def draw(self, rng: np.random.Generator, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A random training problem of so many digits and a random right answer."""
        pool = multisets(length, "train")
        digits = rng.permutation(pool[rng.integers(len(pool))])
        return encode_problem(digits.tolist()), encode_answer(rng.permutation(digits).tolist())

    def number_of_ways(self, prompt: Prompt) -> int:
        """How many right answers there are."""
        return number_of_ways([t for t in prompt.ids if t < 10])

    def decode(self, tokens: Sequence[int]) -> str:
        return text(tokens)
