"""Completions as text, with the tokens of the teacher marked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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


def render_ansi(task: Task, prompt: Prompt, tokens: Sequence[int], rewritten: Sequence[bool]) -> str:
    """The prompt (dim) and the completion with ANSI colours; what the teacher wrote is red."""
    pieces = (f"\x1b[31m{t}\x1b[0m" if red else t for t, red in split_by_writer(task, tokens, rewritten))
    return f"\x1b[2m{prompt.text}\x1b[0m" + "".join(pieces)
