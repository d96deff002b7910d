"""Instructions, prompts and conversations for any causal language model; nothing is graded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from distill_env.models.hub import TokenizerName
from distill_env.models.toy import TEACHERS
from distill_env.tasks.conversations import TrainOn, read_conversation, unread_columns
from distill_env.tasks.language import Example, ExampleTask, Reading
from distill_env.tasks.sources import Data

EXAMPLE_PATH = Path(__file__).parents[1] / "data" / "example_prompts.txt"


class InstructTask(ExampleTask):
    """Instructions, prompts and conversations, in the formats of `conversations`; nothing is graded.

    Each line of a text file is a prompt.

    Args:
        path, tokenizer, options: see `ExampleTask`; by default the example prompts with the tokenizer of Sums.
        few_shot: number of solved examples before each question.
        train_on: which messages of the assistant are reference completions: the last one, or all of them, each
            with the messages before it as the prompt.
    """

    horizon = 48

    def __init__(
        self,
        path: Data = EXAMPLE_PATH,
        tokenizer: TokenizerName = TEACHERS["sums"],
        *,
        few_shot: int = 0,
        train_on: TrainOn = "last",
        **options: Any,
    ) -> None:
        if train_on not in get_args(TrainOn):
            raise ValueError(f"train_on: {train_on!r}; expected one of {', '.join(get_args(TrainOn))}")
        self.plain = "{}\n" if few_shot else "{}"
        self.train_on = train_on
        super().__init__(tokenizer, path, few_shot=few_shot, **options)

    def read_row(self, row: dict[str, Any]) -> Reading:
        """A row's prompts. Raises ValueError as `read_conversation` does."""
        conversation = read_conversation(row)
        turns = [(message.role, message.content) for message in conversation.messages]
        examples = []
        for end in conversation.targets(self.train_on):
            solution = turns[end][1] if end < len(turns) else None
            examples.append(Example(turns[end - 1][1], solution, before=tuple(turns[: end - 1])))
        return Reading(examples, unread_columns(row, conversation.columns))
