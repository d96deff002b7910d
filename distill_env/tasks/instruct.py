"""Instructions for any causal language model, in the usual forms of such data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_env.models.hub import TokenizerName
from distill_env.models.toy import TEACHERS
from distill_env.tasks.language import Example, ExampleTask
from distill_env.tasks.sources import Data, columns_of

QUESTION_KEYS = ("prompt", "instruction", "question", "text")
SOLUTION_KEYS = ("completion", "output", "answer", "response")
ROLES = ("system", "user", "assistant")
ACCEPTED = f"{', '.join(QUESTION_KEYS)} (with input, instances, {', '.join(SOLUTION_KEYS)}), messages or turns"
EXAMPLE_PATH = Path(__file__).parents[1] / "data" / "example_prompts.txt"


class InstructTask(ExampleTask):
    """Instructions; nothing is graded.

    A row has an `instruction` (or `prompt`, `question`, `text`), perhaps with an `input` or `instances` of input and
    output, and perhaps an `output` (or `completion`, `answer`, `response`); or `messages` with role and content, whose
    last one is the reference completion if it is the assistant's; or `turns`, the first of which is the prompt. Each
    line of a text file is a prompt.

    Args:
        path, tokenizer, options: see `ExampleTask`; by default the example prompts with the tokenizer of Sums.
        few_shot: number of solved examples before each question.
    """

    horizon = 48

    def __init__(
        self,
        path: Data = EXAMPLE_PATH,
        tokenizer: TokenizerName = TEACHERS["sums"],
        *,
        few_shot: int = 0,
        **options: Any,
    ) -> None:
        self.plain = "{}\n" if few_shot else "{}"
        super().__init__(tokenizer, path, few_shot=few_shot, **options)

    @staticmethod
    def read_row(where: str, row: dict[str, Any]) -> Example:
        """A row as an example.

        Raises:
            ValueError: for columns of another form, or an empty prompt.
        """
        if isinstance(row.get("messages"), list):
            return _read_messages(where, row["messages"])
        if isinstance(row.get("turns"), list) and row["turns"]:
            row = {"prompt": row["turns"][0]}
        key = next((k for k in QUESTION_KEYS if isinstance(row.get(k), str)), None)
        if key is None:
            raise ValueError(f"path: {where}: the columns are {columns_of(row)}; expected {ACCEPTED}")
        if not row[key].strip():
            raise ValueError(f"path: {where}: {key} is empty; expected text")
        instances = row.get("instances")
        if isinstance(instances, list) and instances and isinstance(instances[0], dict):
            row = row | {k: v for k, v in instances[0].items() if k in ("input", "output")}
        more = _text(where, row, ("input",))
        question = f"{row[key]}\n\n{more}" if more else row[key]
        return Example(question, _text(where, row, SOLUTION_KEYS) or None)


def _text(where: str, row: dict[str, Any], keys: Sequence[str]) -> str | None:
    """The first text in these columns, None if all are empty. Raises ValueError if they have other values only."""
    columns = {k: row[k] for k in keys if row.get(k) is not None}
    text = next((value for value in columns.values() if isinstance(value, str)), None)
    if columns and text is None:
        raise ValueError(f"path: {where}: the columns {columns_of(columns)}; expected text")
    return text


def _read_messages(where: str, messages: list[Any]) -> Example:
    turns: list[tuple[str, str]] = [
        (m["role"], m["content"])
        for m in messages
        if isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
    ]
    if len(turns) < len(messages):
        raise ValueError(f"path: {where}: messages; expected a role ({', '.join(ROLES)}) and content each")
    solution = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise ValueError(f"path: {where}: messages end without a text of the user; expected one before the assistant's")
    return Example(turns[-1][1], solution or None, before=tuple(turns[:-1]))
