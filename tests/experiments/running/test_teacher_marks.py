"""Completions with the teacher's tokens marked."""

from __future__ import annotations

from typing import Any

from distill_env.rendering import END, split_by_writer
from distill_env.tasks.base import Prompt
from experiments.running.teacher_marks import mark_teacher


class Bytes:
    """Two tokens make one character, as in a byte-level tokenizer."""

    eos_token_id = 9

    def decode(self, tokens: Any) -> str:
        names = {0: b"a", 1: b"\xc3", 2: b"\xa9", 9: b""}
        return b"".join(names[t] for t in tokens).decode("utf-8", "replace")


TASK: Any = Bytes()
TOKENS, REWRITTEN = [0, 1, 2, 0, 9], [False, False, True, True, True]


def test_a_character_of_two_writers_is_shown_once() -> None:
    assert split_by_writer(TASK, TOKENS, REWRITTEN) == [("a", False), ("éa" + END, True)]


def test_marks_do_not_need_colour() -> None:
    text = mark_teacher(TASK, Prompt((), "p"), TOKENS, REWRITTEN)
    assert text.plain == f"p a⟦éa{END}⟧"
    (red,) = [span for span in text.spans if span.style == "red"]
    assert text.plain[red.start : red.end] == f"⟦éa{END}⟧"
