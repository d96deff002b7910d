"""A task, a teacher and an environment of somebody's own: `--env tests.helpers.own_environment:Own/Echo-v0`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from distill_env.tasks.base import Grade, Prompt, Split


class Echo:
    """Write the prompt's token until the end token."""

    vocab_size, eos_token_id, max_new_tokens = 4, 3, 5
    step_end_ids: frozenset[int] = frozenset()
    graded = True

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return tuple(Prompt((token,), self.decode((token,))) for token in range(3))

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        correct = len(tokens) > 1 and tokens[-1] == 3 and all(token == prompt.ids[0] for token in tokens[:-1])
        return Grade(float(correct), correct, correct)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join("abc"[token] for token in tokens if 0 <= token < 3)


class Repeater:
    """It repeats the last token, and ends at times."""

    vocab_size, eos_token_id = 4, 3

    def _after(self, token: Tensor) -> Tensor:
        probs = torch.full((*token.shape, 4), 0.01)
        probs[..., 3] = 0.38
        return probs.scatter(-1, token.clamp(min=0)[..., None], 0.6).log()

    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        return self._after(torch.tensor([prompt[-1] for prompt in prompts]))

    def extend(self, tokens: Tensor) -> Tensor:
        return self._after(tokens)

    def rewind(self, lengths: Any) -> None:
        pass


class FirstToken:
    """A task over a tokenizer's text: the first token has to be the prompt's."""

    step_end_ids: frozenset[int] = frozenset()
    max_new_tokens, graded = 4, True

    def __init__(self, tokenizer: Any) -> None:
        from distill_env.models.hub import load_tokenizer

        self.tokenizer = load_tokenizer(tokenizer)
        self.vocab_size, self.eos_token_id = len(self.tokenizer), int(self.tokenizer.eos_token_id)

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return tuple(Prompt((token,), str(token)) for token in range(4))

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        correct = tuple(tokens[:1]) == prompt.ids
        return Grade(float(correct), correct, None)

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


if "Own/Echo-v0" not in gym.registry:
    gym.register(
        "Own/Echo-v0",
        entry_point="distill_env.env:DistillEnv",
        vector_entry_point="distill_env.env:DistillVectorEnv",
        kwargs={"task": f"{__name__}:Echo", "teacher": f"{__name__}:Repeater", "task_reward": 2.0},
    )
