"""What Sums and Coins share: problems of several lengths, split by a hash; the longest are out of distribution."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np

from distill_env.tasks.base import SPLITS, Prompt, Split

Problem = tuple[tuple[int, ...], int]  # the numbers of a problem, and the value that they have to reach


class LengthTask:
    """Problems by length, the number of their numbers. A subclass defines what is only declared here, and `grade`.

    A completion is a list of steps of two tokens, a number and the value after it, separated by `;` and followed by the
    end token.

    Args:
        lengths: of the problems in train, validation and test; the task's own by default.
        ood_lengths: of the problems in the out-of-distribution split; the task's own by default.
        prompts_per_length: the most prompts of one length in a split; train has ten times as many.
    """

    name: str
    train_lengths: tuple[int, ...]
    longer_lengths: tuple[int, ...]
    symbols: tuple[str, ...]  # the text of each id but the last, the end token
    separator = ""  # before each symbol
    vocab_size: int
    eos_token_id: int
    step_end_ids: frozenset[int]
    graded = True

    problems: Callable[[int], Iterable[Problem]]  # all of a length, with sorted numbers
    split_key: Callable[[Problem], str]  # the text whose hash decides the split; its numbers are sorted
    encode_problem: Callable[[Problem], tuple[int, ...]]
    encode_completion: Callable[[Sequence[int], int], tuple[int, ...]]  # takes these numbers in order to a target
    draw_way: Callable[[np.random.Generator, Problem], Sequence[int]]  # one of the correct orders, all equally likely

    def __init__(
        self,
        lengths: Sequence[int] | None = None,
        ood_lengths: Sequence[int] | None = None,
        prompts_per_length: int = 100,
    ) -> None:
        self.lengths = self.train_lengths if lengths is None else tuple(lengths)
        self.ood_lengths = self.longer_lengths if ood_lengths is None else tuple(ood_lengths)
        self.prompts_per_length = prompts_per_length
        self.max_new_tokens = 3 * max(self.lengths + self.ood_lengths)

    @classmethod
    def split_of(cls, problem: Problem) -> Split:
        """train, validation or test, the same for all orders of the numbers."""
        numbers, target = problem
        key = cls.split_key((tuple(sorted(numbers)), target))
        bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
        return "train" if bucket < 7 else "validation" if bucket < 8 else "test"

    @classmethod
    @cache
    def problems_of(cls, length: int, split: Split) -> tuple[Problem, ...]:
        """The problems of this length in train, validation or test, with sorted numbers."""
        return tuple(p for p in cls.problems(length) if cls.split_of(p) == split)

    @classmethod
    def _draw_problem(cls, rng: np.random.Generator, length: int, split: Split) -> Problem:
        """A problem with its numbers in a random order."""
        pool = cls.problems_of(length, split)
        numbers, target = pool[rng.integers(len(pool))]
        return tuple(rng.permutation(numbers).tolist()), target

    @classmethod
    def draw(cls, rng: np.random.Generator, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of a random training problem and of a random correct completion."""
        problem = cls._draw_problem(rng, length, "train")
        return cls.encode_problem(problem), cls.encode_completion(cls.draw_way(rng, problem), problem[1])

    @classmethod
    @cache
    def prompts_of_length(cls, length: int, split: Split, count: int) -> tuple[Prompt, ...]:
        """`count` different prompts of train, validation or test, or all there are; the same at every call."""
        rng = np.random.default_rng([length, SPLITS.index(split)])
        available = sum(number_of_orders(numbers) for numbers, _ in cls.problems_of(length, split))
        drawn: dict[Problem, None] = {}  # an ordered set
        while len(drawn) < min(count, available):
            drawn.setdefault(cls._draw_problem(rng, length, split))
        prompts = []
        for problem in drawn:
            ids, completion = cls.encode_problem(problem), cls.encode_completion(cls.draw_way(rng, problem), problem[1])
            prompts.append(Prompt(ids, cls.decode(ids).strip(), length, reference_completion=completion))
        return tuple(prompts)

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        """A fixed list of prompts, the same at every call."""
        if split not in SPLITS:
            raise ValueError(f"split: {split!r} is unknown to {self.name}; expected one of {', '.join(SPLITS)}")
        lengths = self.ood_lengths if split == "ood" else self.lengths
        count = self.prompts_per_length * (10 if split == "train" else 1)
        return tuple(p for n in lengths for p in self.prompts_of_length(n, "test" if split == "ood" else split, count))

    @classmethod
    def decode(cls, tokens: Sequence[int]) -> str:
        """Ids to text, without the end token; the texts of the pieces of a completion can be joined."""
        return "".join(cls.separator + cls.symbols[t] for t in tokens if 0 <= t < len(cls.symbols))


def number_of_orders(numbers: Sequence[int]) -> int:
    """n! / prod(m_i!), where m_i counts equal numbers."""
    return math.factorial(len(numbers)) // math.prod(math.factorial(m) for m in Counter(numbers).values())
