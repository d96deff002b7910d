"""Completions as text: the teacher's tokens stand between ⟦ and ⟧, and a terminal with colours also shows them red."""

import sys
from collections.abc import Sequence

from rich.text import Text

from distill_env.rendering import split_by_writer
from distill_env.tasks.base import Prompt, Task


def mark_teacher(
    task: Task, prompt: Prompt, tokens: Sequence[int], rewritten: Sequence[bool], prompt_shown: int = sys.maxsize
) -> Text:
    """The prompt (dim), a space, and the completion with the teacher's tokens between marks and in red.

    Args:
        task: decodes the tokens.
        prompt: its last `prompt_shown` characters are shown.
        tokens: of the completion.
        rewritten: which of them the teacher wrote.
        prompt_shown: a number of characters.
    """
    text = Text.assemble((prompt.text[-prompt_shown:], "dim"), " ")
    for piece, by_teacher in split_by_writer(task, tokens, rewritten):
        text.append(f"⟦{piece}⟧" if by_teacher else piece, "red" if by_teacher else "")
    return text
