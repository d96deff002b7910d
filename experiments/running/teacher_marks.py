"""Completions as text: the teacher's tokens stand between ⟦ and ⟧, and a terminal with colours also shows them red."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from distill_env.tasks.base import Prompt, Task

END = "\u25a0"  # a black square for the end token, which has no text of its own


def split_by_writer(task: Task, tokens: Sequence[int], rewritten: Sequence[bool]) -> list[tuple[str, bool]]:
    """The text of a completion in stretches of one writer each, and whether the teacher wrote the stretch.

    A stretch is what its tokens add to the text before them: a token alone may be half a character, or lose its space.
    """
    stretches, shown, end = [], 0, 0
    for by_teacher, run in itertools.groupby(rewritten):
        end += len(list(run))
        text = task.decode(tokens[:end])
        if end < len(tokens):
            text = text.rstrip("\ufffd")  # half a character: the next stretch shows all of it
        piece = text[shown:] + (END if tokens[end - 1] == task.eos_token_id else "")
        stretches.append((piece, by_teacher))
        shown = max(shown, len(text))
    return stretches


def mark_teacher(task: Task, prompt: Prompt, tokens: Sequence[int], rewritten: Sequence[bool]) -> Text:
    """The prompt (dim), a space, and the completion with the teacher's tokens between marks and in red."""
    text = Text.assemble((prompt.text, "dim"), " ")
    for piece, by_teacher in split_by_writer(task, tokens, rewritten):
        text.append(f"⟦{piece}⟧" if by_teacher else piece, "red" if by_teacher else "")
    return text
