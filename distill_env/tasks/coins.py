"""Coins: pay an amount exactly with coins from a purse, writing each coin and what remains to be paid.

    2 5 7 > 9   ->   7 2 ; 2 0   or   2 7 ; 7 0

One token a number. A step is a coin and the amount that remains after it; `;` ends a step, the end token ends the
answer. Who takes the 5 first is lost: 4 cannot be paid with 2 and 7, and no right answer goes through that state. So a
teacher that was trained on right answers has never seen what follows a wrong coin, and its guidance there means little.
The difficulty is the number of coins in the purse.
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

LARGEST_COIN = 9
LARGEST_PURSE = 5
LARGEST_AMOUNT = LARGEST_COIN * LARGEST_PURSE
GIVES, SEMICOLON, EOS = LARGEST_AMOUNT + 1, LARGEST_AMOUNT + 2, LARGEST_AMOUNT + 3
SYMBOLS = (*map(str, range(LARGEST_AMOUNT + 1)), ">", ";")
TRAIN_LENGTHS = (2, 3, 4)
OOD_LENGTHS = (5,)


@cache
def right_ways(purse: tuple[int, ...], amount: int) -> tuple[tuple[int, ...], ...]:
    """All orders of coins of a sorted purse that pay the amount, each once."""
    ways: set[tuple[int, ...]] = set()
    for size in range(1, len(purse) + 1):
        for chosen in set(itertools.combinations(purse, size)):
            if sum(chosen) == amount:
                ways |= set(itertools.permutations(chosen))
    return tuple(sorted(ways))


@cache
def problems(length: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    """All sorted purses of so many coins with all amounts that two or more of their coins pay."""
    return tuple(
        (purse, amount)
        for purse in itertools.combinations_with_replacement(range(1, LARGEST_COIN + 1), length)
        for amount in sorted({sum(c) for size in range(2, length + 1) for c in itertools.combinations(purse, size)})
    )


def split_of(purse: tuple[int, ...], amount: int) -> Split:
    """The split of a problem, by a hash of its sorted purse and amount: no order of a test problem is trained on."""
    name = f"{purse}>{amount}"
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return "train" if bucket < 7 else "validation" if bucket < 8 else "test"


@cache
def problems_of(length: int, split: Split) -> tuple[tuple[tuple[int, ...], int], ...]:
    """The problems that the hash puts into `split` (one of train, validation, test)."""
    return tuple(p for p in problems(length) if split_of(*p) == split)


def encode_problem(purse: Sequence[int], amount: int) -> tuple[int, ...]:
    """`[2, 5, 7], 9` -> the ids of `2 5 7 > 9`."""
    return (*purse, GIVES, amount)


def encode_answer(way: Sequence[int], amount: int) -> tuple[int, ...]:
    """`[7, 2], 9` -> the ids of `7 2 ; 2 0` and the end token."""
    ids: list[int] = []
    for coin in way:
        amount -= coin
        ids += [coin, amount, SEMICOLON]
    return (*ids[:-1], EOS)


@cache
def prompts_of_length(length: int, split: Split, count: int) -> tuple[Prompt, ...]:
    """`count` problems with so many coins, drawn once and for all; as many as there are at most."""
    rng = np.random.default_rng([length, SPLITS.index(split)])
    pool = problems_of(length, split)
    available = sum(math.factorial(length) // math.prod(map(math.factorial, Counter(p).values())) for p, _ in pool)
    drawn: dict[tuple[tuple[int, ...], int], None] = {}  # an ordered set
    while len(drawn) < min(count, available):
        purse, amount = pool[rng.integers(len(pool))]
        drawn.setdefault((tuple(int(c) for c in rng.permutation(purse)), amount))
    prompts = []
    for purse, amount in drawn:
        ways = right_ways(tuple(sorted(purse)), amount)
        ids = encode_problem(purse, amount)
        reference = encode_answer(ways[rng.integers(len(ways))], amount)
        prompts.append(Prompt(ids, text(ids), difficulty=length, reference_completion=reference))
    return tuple(prompts)


def text(tokens: Sequence[int]) -> str:
    """Ids to text; the end token is not shown."""
    return decode(tokens).strip()


def decode(tokens: Sequence[int]) -> str:
    """The same with a space before every token, so that pieces of an answer can be joined."""
    return "".join(f" {SYMBOLS[t]}" for t in tokens if 0 <= t < len(SYMBOLS))


class CoinsTask(LengthTask):
    """The Coins task: a length is a number of coins in the purse."""

    name = "coins"
    train_lengths = TRAIN_LENGTHS
    longer_lengths = OOD_LENGTHS
    vocab_size = len(SYMBOLS) + 1
    eos_token_id = EOS
    step_end_ids = frozenset({SEMICOLON})

    def prompts_of_length(self, length: int, split: Split, count: int) -> tuple[Prompt, ...]:
        return prompts_of_length(length, split, count)

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        """Grade an answer for the coins and for every step.

        `correct`: it ends, and its coins are of the purse and pay the amount. `chain_correct`: the amounts between are
        right, too. `score` is 1 for a correct chain and 0 otherwise; `way` is the order taken; `final_value` the coins
        taken, in no order.
        """
        at = prompt.ids.index(GIVES)
        purse, amount = prompt.ids[:at], prompt.ids[at + 1]
        tokens = [int(t) for t in tokens]
        coins = tuple(tokens[0::3])
        ended = len(tokens) % 3 == 0 and len(tokens) > 0 and tokens[-1] == EOS
        correct = ended and not Counter(coins) - Counter(purse) and sum(coins) == amount
        chain = correct and tuple(tokens) == encode_answer(coins, amount)
        way = " ".join(map(str, coins)) if chain else None
        return Grade(
            float(chain), correct, chain, way, final_value=" ".join(map(str, sorted(coins))) if ended else None
        )

    def draw(self, rng: np.random.Generator, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A random training problem of so many coins and a random right answer."""
        pool = problems_of(length, "train")
        purse, amount = pool[rng.integers(len(pool))]
        ways = right_ways(purse, amount)
        return encode_problem(rng.permutation(purse).tolist(), amount), encode_answer(
            ways[rng.integers(len(ways))], amount
        )

    def number_of_ways(self, prompt: Prompt) -> int:
        """How many right answers there are."""
        at = prompt.ids.index(GIVES)
        return len(right_ways(tuple(sorted(prompt.ids[:at])), prompt.ids[at + 1]))

    def decode(self, tokens: Sequence[int]) -> str:
        return decode(tokens)
