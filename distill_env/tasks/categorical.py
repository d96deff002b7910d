"""Categorical: prompts of one token, or of none, for tabular teachers; nothing is graded."""

from __future__ import annotations

from collections.abc import Sequence

from distill_env.tasks.base import Grade, Prompt, Split


class CategoricalTask:
    """All splits have the same prompts: each token but the end token.

    Args:
        vocab_size: V; the last id is the end token.
        max_new_tokens: horizon.
        step_end_id: the id that ends a reasoning step.
        empty_prompt: one empty prompt instead of these.
    """

    graded = False

    def __init__(
        self, vocab_size: int = 6, max_new_tokens: int = 6, step_end_id: int = 0, empty_prompt: bool = False
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_id = vocab_size - 1
        self.step_end_ids = frozenset({step_end_id})
        self.max_new_tokens = max_new_tokens
        self.empty_prompt = empty_prompt

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        if self.empty_prompt:
            return (Prompt((), ""),)
        return tuple(Prompt((v,), self.decode((v,))) for v in range(self.vocab_size - 1))

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        return Grade(0.0, False, False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Ids to letters (or to numbers, if there are more than 26), without the end token."""
        if self.vocab_size <= 27:
            return "".join(chr(ord("a") + t) for t in tokens if 0 <= t < self.eos_token_id)
        return " ".join(str(t) for t in tokens if 0 <= t < self.eos_token_id)
