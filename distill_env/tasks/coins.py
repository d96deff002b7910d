"""Coins: pay an amount exactly with coins from a purse, writing each coin and what remains to be paid.

    2 5 7 > 9   ->   7 2 ; 2 0   or   2 7 ; 7 0

One token a number. A step is a coin and the amount that remains after it; `;` ends a step, the end token ends the
completion. Who takes the 5 first is lost: 4 cannot be paid with 2 and 7, so no correct completion goes through that
state. A teacher that was trained on correct completions has never seen what follows a wrong coin, and its guidance
there means little. The difficulty is the number of coins in the purse.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from distill_env.tasks.base import Grade, Prompt
from distill_env.tasks.by_length import LengthTask, Problem

LARGEST_COIN = 9
LARGEST_PURSE = 5
LARGEST_AMOUNT = LARGEST_COIN * LARGEST_PURSE
GIVES, SEMICOLON, EOS = LARGEST_AMOUNT + 1, LARGEST_AMOUNT + 2, LARGEST_AMOUNT + 3


@cache
def correct_ways(purse: tuple[int, ...], amount: int) -> tuple[tuple[int, ...], ...]:
    """All orders of coins of a sorted purse that pay the amount, each once."""
    chosen = {c for size in range(1, len(purse) + 1) for c in itertools.combinations(purse, size) if sum(c) == amount}
    return tuple(sorted({way for coins in chosen for way in itertools.permutations(coins)}))


class CoinsTask(LengthTask):
    """The Coins task. A problem is the coins of a purse and an amount."""

    name = "coins"
    train_lengths = (2, 3, 4)
    longer_lengths = (5,)
    symbols = (*map(str, range(LARGEST_AMOUNT + 1)), ">", ";")
    separator = " "
    vocab_size = len(symbols) + 1
    eos_token_id = EOS
    step_end_ids = frozenset({SEMICOLON})

    @staticmethod
    def problems(length: int) -> Iterable[Problem]:
        """All purses of this many coins with all amounts that two or more of their coins pay."""
        for purse in itertools.combinations_with_replacement(range(1, LARGEST_COIN + 1), length):
            chosen = (c for size in range(2, length + 1) for c in itertools.combinations(purse, size))
            yield from ((purse, amount) for amount in sorted(set(map(sum, chosen))))

    @staticmethod
    def split_key(problem: Problem) -> str:
        return f"{problem[0]}>{problem[1]}"

    @staticmethod
    def read_problem(ids: Sequence[int]) -> Problem:
        return tuple(ids[:-2]), ids[-1]

    @staticmethod
    def encode_problem(problem: Problem) -> tuple[int, ...]:
        """`(2, 5, 7), 9` -> the ids of `2 5 7 > 9`."""
        return (*problem[0], GIVES, problem[1])

    @staticmethod
    def encode_completion(way: Sequence[int], target: int) -> tuple[int, ...]:
        """`[7, 2], 9` -> the ids of `7 2 ; 2 0` and the end token."""
        totals = itertools.accumulate(way)
        ids = [t for coin, total in zip(way, totals, strict=True) for t in (coin, target - total, SEMICOLON)]
        return (*ids[:-1], EOS)

    @staticmethod
    def draw_way(rng: np.random.Generator, problem: Problem) -> Sequence[int]:
        purse, amount = problem
        ways = correct_ways(tuple(sorted(purse)), amount)
        return ways[rng.integers(len(ways))]

    def number_of_ways(self, prompt: Prompt) -> int:
        purse, amount = self.read_problem(prompt.ids)
        return len(correct_ways(tuple(sorted(purse)), amount))

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        """Grade the coins and every step.

        `correct`: the completion ends, and its coins are of the purse and pay the amount. `chain_correct`: the amounts
        between are correct, too. `score` is 1 for a correct chain and 0 otherwise; `way` is the order of the coins;
        `final_value` the sorted coins.
        """
        purse, amount = self.read_problem(prompt.ids)
        tokens = [int(t) for t in tokens]
        ended, coins = len(tokens) % 3 == 0 and tokens[-1:] == [EOS], tokens[0::3]
        correct = ended and not Counter(coins) - Counter(purse) and sum(coins) == amount
        chain = correct and tuple(tokens) == self.encode_completion(coins, amount)
        value = " ".join(map(str, sorted(coins))) if ended else None
        return Grade(float(chain), correct, chain, self.decode(coins).strip() if chain else None, final_value=value)
