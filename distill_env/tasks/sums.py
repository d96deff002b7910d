"""Sums: add the digits of a prompt in any order, writing each digit and the running total modulo 10.

    7+2+9=   ->   77;29;98   or   99;76;28   or another of the n!/prod(m_i!) ways

A step is one digit and the total after it; `;` ends a step, the end token ends the completion. The difficulty is the
number of digits. Every step can be checked, there are many correct ways, and their number is known. So accuracy,
diversity and collapse can be measured at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from distill_env.tasks.base import Grade, Prompt
from distill_env.tasks.by_length import LengthTask, Problem, number_of_orders

PLUS, EQUALS, SEMICOLON, EOS = 10, 11, 12, 13


class SumsTask(LengthTask):
    """The Sums task. A problem is its digits and their sum modulo 10."""

    name = "sums"
    train_lengths = (2, 3, 4, 5)
    longer_lengths = (6, 7)
    symbols = tuple("0123456789+=;")
    vocab_size = len(symbols) + 1
    eos_token_id = EOS
    step_end_ids = frozenset({SEMICOLON})

    @staticmethod
    def problem(digits: Sequence[int]) -> Problem:
        """The problem of these digits."""
        return tuple(digits), sum(digits) % 10

    @staticmethod
    def problems(length: int) -> Iterable[Problem]:
        return map(SumsTask.problem, itertools.combinations_with_replacement(range(10), length))

    @staticmethod
    def split_key(problem: Problem) -> str:
        return "".join(map(str, problem[0]))

    @staticmethod
    def read_problem(ids: Sequence[int]) -> Problem:
        return SumsTask.problem([t for t in ids if t < 10])

    @staticmethod
    def encode_problem(problem: Problem) -> tuple[int, ...]:
        """`(7, 2, 9), 8` -> the ids of `7+2+9=`."""
        ids = [t for digit in problem[0] for t in (digit, PLUS)]
        return (*ids[:-1], EQUALS)

    @staticmethod
    def encode_completion(way: Sequence[int], target: int = 0) -> tuple[int, ...]:
        """`[7, 2, 9]` -> the ids of `77;29;98` and the end token; the way alone decides, not the target."""
        totals = itertools.accumulate(way)
        ids = [t for digit, total in zip(way, totals, strict=True) for t in (digit, total % 10, SEMICOLON)]
        return (*ids[:-1], EOS)

    @staticmethod
    def draw_way(rng: np.random.Generator, problem: Problem) -> Sequence[int]:
        way: list[int] = rng.permutation(problem[0]).tolist()
        return way

    def number_of_ways(self, prompt: Prompt) -> int:
        return number_of_orders(self.read_problem(prompt.ids)[0])

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        """Grade the final value and every step.

        `correct`: the completion ends, and its last running total is the sum modulo 10. `chain_correct`: it is, token
        for token, one of the correct ways. `score` is 1 for a correct chain and 0 otherwise; `way` is the order of the
        digits; `final_value` the last total.
        """
        digits, target = self.read_problem(prompt.ids)
        tokens = [int(t) for t in tokens]
        ended, way = tokens[-1:] == [EOS], tokens[0::3]
        chain = ended and sorted(way) == sorted(digits) and tuple(tokens) == self.encode_completion(way)
        value = self.decode(tokens[-2:]) or None if ended else None
        correct = ended and tokens[-2:-1] == [target]
        return Grade(float(chain), correct, chain, self.decode(way) if chain else None, final_value=value)
