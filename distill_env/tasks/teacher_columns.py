"""What a row of data says of its teacher: which one it is, and what it reads in place of the student's prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_env.tasks.conversations import read_conversation
from distill_env.tasks.sources import is_filled

TEACHER_COLUMNS = ("teacher", "teacher_prompt")


def read_teacher_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `teacher` and `teacher_prompt` of an `Example`, if the row has columns of these names.

    `teacher_prompt` is a text, which the teacher reads in place of the question, or a list of messages in place of the
    whole conversation.

    Raises:
        ValueError: without the row's place, for other types, or messages that do not end with the user's.
    """
    found: dict[str, Any] = {name: row[name] for name in TEACHER_COLUMNS if is_filled(row.get(name))}
    for name, value in found.items():
        if not isinstance(value, str) and (name == "teacher" or not isinstance(value, list)):
            expected = "the name of a teacher" if name == "teacher" else "text or a list of messages"
            raise ValueError(f"{name} ({type(value).__name__}); expected {expected}")
    if isinstance(found.get("teacher_prompt"), list):
        try:
            messages = read_conversation({"messages": found["teacher_prompt"]}).messages
        except ValueError as error:
            raise ValueError(f"teacher_prompt: {error}") from None
        if messages[-1].role != "user":
            raise ValueError("teacher_prompt ends with the assistant; expected a last message of the user")
        found["teacher_prompt"] = tuple((m.role, m.content) for m in messages)
    return found
