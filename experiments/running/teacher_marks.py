"""Completions as text: the teacher's tokens stand between ⟦ and ⟧, and a terminal with colours also shows them red."""

from collections.abc import Sequence

from rich.text import Text

from distill_env.rendering import split_by_writer
from distill_env.tasks.base import Prompt, Task


def mark_teacher(task: Task, prompt: Prompt, tokens: Sequence[int], rewritten: Sequence[bool]) -> Text:
    """The prompt (dim), a space, and the completion with the teacher's tokens between marks and in red."""
    text = Text.assemble((prompt.text, "dim"), " ")
    for piece, by_teacher in split_by_writer(task, tokens, rewritten):
        text.append(f"⟦{piece}⟧" if by_teacher else piece, "red" if by_teacher else "")
    return text
