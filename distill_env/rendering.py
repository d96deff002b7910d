"""Completions as text or as a picture, with the tokens of the teacher marked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_env.tasks.base import Prompt, Task

END = "\u25a0"  # a black square for the end token, which has no text of its own
HALF_CHARACTER = "\ufffd"
TOKENS_SHOWN = 24  # of a completion, in a picture: the last ones
RED, GREY, DIM = "#c8102e", "#222222", "#888888"


def split_by_writer(task: Task, tokens: Sequence[int], rewritten: Sequence[bool]) -> list[tuple[str, bool]]:
    """The text of a completion in stretches of one writer each, and whether the teacher wrote the stretch."""
    runs = [(len(list(run)), by_teacher) for by_teacher, run in itertools.groupby(rewritten)]
    pieces = split_text(task, tokens, [length for length, _ in runs])
    return [(piece, by_teacher) for piece, (_, by_teacher) in zip(pieces, runs, strict=True)]


def split_text(task: Task, tokens: Sequence[int], lengths: Sequence[int]) -> list[str]:
    """The text of a completion in pieces of these numbers of tokens.

    A piece is what its tokens add to the text before them: a token alone may be half a character, or lose its space.
    """
    pieces, shown = [], 0
    for end in itertools.accumulate(lengths):
        text = task.decode(tokens[:end])
        if end < len(tokens):
            text = text.rstrip(HALF_CHARACTER)  # the next piece shows all of it
        pieces.append(text[shown:] + (END if tokens[end - 1] == task.eos_token_id else ""))
        shown = max(shown, len(text))
    return pieces


def marked_text(task: Task, tokens: Sequence[int], rewritten: Sequence[bool]) -> str:
    """A completion with the teacher's tokens between ⟦ and ⟧."""
    return "".join(f"⟦{t}⟧" if by_teacher else t for t, by_teacher in split_by_writer(task, tokens, rewritten))


def render_ansi(task: Task, prompt: Prompt, tokens: Sequence[int], rewritten: Sequence[bool]) -> str:
    """The prompt (dim) and the completion with ANSI colours; what the teacher wrote is red, between ⟦ and ⟧."""
    pieces = (f"\x1b[31m⟦{t}⟧\x1b[0m" if red else t for t, red in split_by_writer(task, tokens, rewritten))
    return f"\x1b[2m{prompt.text}\x1b[0m" + "".join(pieces)


def render_rgb(
    task: Task, prompt: Prompt, tokens: Sequence[int], rewritten: Sequence[bool], rewards: Sequence[float]
) -> NDArray[np.uint8]:
    """The prompt, and the last tokens of the completion, each above a bar of what it paid; the teacher's are red.

    Args:
        task: decodes the tokens.
        prompt: its end is shown if it is long.
        tokens: t ids.
        rewritten: bool [t], which of them the teacher wrote.
        rewards: [t], nats, at most 0.

    Returns:
        uint8 [240, 800, 3].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    pieces = split_text(task, tokens, [1] * len(tokens))[-TOKENS_SHOWN:]
    colours = [RED if by_teacher else GREY for by_teacher in rewritten[-TOKENS_SHOWN:]]
    paid = np.array(rewards[-TOKENS_SHOWN:])
    font: dict[str, Any] = {"fontsize": 13, "family": "monospace", "parse_math": False}
    figure.text(0.02, 0.86, _printable(prompt.text)[-90:], color=DIM, **font)
    axes = figure.add_axes((0.1, 0.06, 0.88, 0.58))
    axes.bar(range(len(paid)), paid, color=colours, width=0.7)
    for i, (piece, colour) in enumerate(zip(pieces, colours, strict=True)):
        x = 0.1 + 0.88 * (i + 0.5) / TOKENS_SHOWN  # in the middle above its bar
        figure.text(x, 0.69, _printable(piece)[:4], ha="center", color=colour, **font)
    axes.set(xlim=(-0.5, TOKENS_SHOWN - 0.5), ylim=(min(-1.0, *paid) if len(paid) else -1.0, 0.0), xticks=[])
    axes.set_ylabel("reward, nats", color=DIM)
    axes.tick_params(colors=DIM)
    axes.spines[["right", "bottom"]].set_visible(False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _printable(text: str) -> str:
    """Text in one line, of characters that the font of a picture has."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("monospace")).get_charmap()
    text = text.replace("\n", "\u21b5").replace("\t", "\u2192")
    return "".join(c if ord(c) in known else "\u25a1" for c in text)
