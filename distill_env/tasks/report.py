"""What became of the rows of a task's data: how many were read, which were left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from distill_env.tasks.base import Place, Split

NAMED = 5  # places that a message or a table names


@dataclass
class DataReport:
    """The rows that a task read, and what it left out."""

    rows: int = 0  # that were read, those that cannot be used included
    prompts: Counter[Split] = field(default_factory=Counter)  # used; a row may be in several splits if there are few
    references: int = 0  # different prompts with a reference completion
    bad: list[tuple[Place, str]] = field(default_factory=list)  # rows that cannot be used, and why
    long: list[Place] = field(default_factory=list)  # rows of prompts above `max_prompt_tokens`
    usual_length: int = 0  # tokens that nine of ten prompts do not exceed, the long ones included
    long_for_teacher: list[Place] = field(default_factory=list)  # of others above `max_teacher_prompt_tokens`
    joined: int = 0  # prompts of several messages that are joined as plain text, without a chat template
    unread: Counter[str] = field(default_factory=Counter)  # columns that nothing reads, and how many rows have them
    files: list[str] = field(default_factory=list)  # files and splits that are not read

    def raise_bad(self, skip: bool) -> None:
        """Raise ValueError, in one line with the first places, if rows cannot be used and are not to be skipped."""
        if not self.bad or skip:
            return
        (place, reason), *rest = sorted(self.bad)
        if len(self.bad) == self.rows:
            raise ValueError(f"path: {place}: {reason}; no row of {self.rows:,} can be used")
        others = f" ({len(rest)} more: {places(other for other, _ in rest)})" if rest else ""
        raise ValueError(
            f"path: {place}: {reason}{others}; correct the data, or leave such rows out with --skip-bad-rows "
            "(skip_bad_rows=True)"
        )

    def raise_empty(self, split: Split) -> None:
        """Raise ValueError for a split without a row that can be used."""
        why = f": {self.bad[0][0]}: {self.bad[0][1]}" if self.bad else ""
        raise ValueError(f"path: no row of the {split} split can be used{why}")

    def reasons(self) -> list[tuple[str, list[Place]]]:
        """Why rows were left out, the most frequent reason first, and where. Reasons that differ in numbers are one."""
        found: dict[str, tuple[str, list[Place]]] = {}
        for place, reason in self.bad:
            key = "".join("0" if c.isdigit() else c for c in reason)
            found.setdefault(key, (reason, []))[1].append(place)
        return sorted(found.values(), key=lambda item: -len(item[1]))


def places(found: Iterable[Place]) -> str:
    """The first of these places, the name of a file once: `a.jsonl, line 3, line 7; b.jsonl, line 1 and 12 more`."""
    distinct = list(dict.fromkeys(found))
    text, source = "", None
    for place in distinct[:NAMED]:
        text += f", {place.unit} {place.number}" if place.source == source else f"{'; ' * bool(text)}{place}"
        source = place.source
    return text + (f" and {len(distinct) - NAMED} more" if len(distinct) > NAMED else "")
