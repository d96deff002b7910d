"""What the small tasks share: problems of several lengths, of which the longest are out of distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from distill_env.tasks.base import SPLITS, Prompt, Split


class LengthTask(ABC):
    """Prompts by length.

    Args:
        lengths: in train, validation and test; the task's own if not given.
        ood_lengths: in the out-of-distribution split (problems as in test, longer than any trained on).
        prompts_per_length: how many prompts a split has at most of each length; train has ten times as many.
    """

    name: str
    train_lengths: tuple[int, ...]
    longer_lengths: tuple[int, ...]
    graded = True

    def __init__(
        self,
        lengths: Sequence[int] | None = None,
        ood_lengths: Sequence[int] | None = None,
        prompts_per_length: int = 100,
    ) -> None:
        self.lengths = self.train_lengths if lengths is None else tuple(lengths)
        self.ood_lengths = self.longer_lengths if ood_lengths is None else tuple(ood_lengths)
        self.prompts_per_length = prompts_per_length
        self.max_new_tokens = 3 * max(self.lengths + self.ood_lengths)  # a step is three tokens

    @abstractmethod
    def prompts_of_length(self, length: int, split: Split, count: int) -> tuple[Prompt, ...]:
        """`count` prompts, or all there are, the same at every call; `split` is train, validation or test."""

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        """A fixed list of prompts, the same at every call."""
        if split not in SPLITS:
            raise ValueError(f"split: {split!r} is not a split of {self.name}; accepted: {', '.join(SPLITS)}")
        lengths = self.ood_lengths if split == "ood" else self.lengths
        count = self.prompts_per_length * (10 if split == "train" else 1)
        kind: Split = "test" if split == "ood" else split
        return tuple(p for n in lengths for p in self.prompts_of_length(n, kind, count))
