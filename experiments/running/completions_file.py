"""`completions.jsonl`: the completions of an evaluation, a line each.

    {"split": "test", "writer": "student", "sample": 0, "prompt": "...", "completion": "...", "tokens": 12,
     "ended": true, "difficulty": 3, "grade": {"score": 1.0, "correct": true, "chain_correct": null, "way": null,
     "undecided": false, "final_value": "18"}}

`writer` is student, teacher, or reference (what the task's data say, ungraded); `grade` is null if the task has none.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agents.atomic_io import write_text

if TYPE_CHECKING:
    from agents.generation import Completion
    from distill_env.tasks.base import Prompt, Task

Writer = Literal["student", "teacher", "reference"]
FILE = "completions.jsonl"


def completion_lines(
    task: Task, split: str, writer: Writer, completions: Sequence[Completion]
) -> Iterator[dict[str, Any]]:
    """Answers as lines; `sample` counts those to the same prompt."""
    seen: Counter[tuple[int, ...]] = Counter()
    for completion in completions:
        prompt = completion.prompt
        line = _line(task, split, writer, prompt, completion.tokens, completion.ended)
        grade = None if completion.grade is None else dataclasses.asdict(completion.grade)
        yield line | {"sample": seen[prompt.ids], "grade": grade}
        seen[prompt.ids] += 1


def reference_lines(task: Task, split: str, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    """The reference answers of the prompts that have one."""
    for prompt in prompts:
        if prompt.reference_completion is not None:
            ended = prompt.reference_completion[-1:] == (task.eos_token_id,)
            yield _line(task, split, "reference", prompt, prompt.reference_completion, ended)


def _line(task: Task, split: str, writer: Writer, prompt: Prompt, tokens: Sequence[int], ended: bool) -> dict[str, Any]:
    return {
        "split": split,
        "writer": writer,
        "sample": 0,
        "prompt": prompt.text,
        "completion": task.decode(tokens),
        "tokens": len(tokens),
        "ended": ended,
        "difficulty": prompt.difficulty,
        "grade": None,
    }


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """A JSON object a line, in a file that is the old one or the new one at any moment."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path, flag: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file; empty lines are skipped.

    Args:
        path: the file.
        flag: by which it was given, for the error.
        needed: fields that each must have, of text.

    Raises:
        ValueError: in one line, for a file that is not there, not text, or not of such objects.
    """
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"{flag}: {str(path)!r} cannot be read ({reason}); expected a JSONL file") from None
    lines = []
    for i, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{flag}: {path}, line {i} is not JSON; expected one object per line") from None
        missing = [k for k in needed if not isinstance(line, dict) or not isinstance(line.get(k), str)]
        if missing:
            raise ValueError(f"{flag}: {path}, line {i} has no text {missing[0]!r}; expected {', '.join(needed)}")
        lines.append(line)
    return lines
