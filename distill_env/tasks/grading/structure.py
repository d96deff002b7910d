r"""The parts of an answer that is more than a number: names, lists, sets, tuples, intervals, unions, ratios, times."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

from distill_env.tasks.grading.normalize import number

_NAME = re.compile(r"([^-+*/^<>=\d,][^-+*/<>=,]*?|\([\w, ]+\)) ?(?:(?<![<>!])=(?!=)|\\in(?![A-Za-z])) ?(.+)", re.DOTALL)
_SEPARATOR = re.compile(r"[,;]|(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])|&(?!.*\\end)")
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_BRACKETS = re.compile(r"(\\\{|[(\[{])(.*?)(\\\}|[)\]}])", re.DOTALL)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)", re.ASCII)
_BASED = re.compile(r"(\d[\dA-F]*)_(?:\{ ?(\d+) ?\}|(\d+))", re.ASCII)
_TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))? ?([ap])\.? ?m\b\.?|(\d{1,2}):([0-5]\d)", re.ASCII | re.IGNORECASE)


def depths(text: str) -> list[int]:
    """The number of open brackets after each character."""
    return list(itertools.accumulate((c in "{([") - (c in "})]") for c in text))


def named(text: str) -> tuple[str, str]:
    r"""The name and the value of x = 5, f(x) = 5, x \in A, or (x, y) = (1, 2); no name if it is another equation."""
    match = _NAME.fullmatch(text)
    if match is None or "=" in match[2]:
        return "", text
    return re.sub(r"\s", "", match[1]), match[2]


def parts(text: str) -> tuple[str, list[str]]:
    """The brackets of a set, tuple or interval, "u" for a union, or "" for a list; and the parts, at least one."""
    union = _split(text, _UNION)
    if len(union) > 1:
        return "u", union
    match = _BRACKETS.fullmatch(text)
    if match and min(depths(match[2]), default=0) >= 0:
        brackets = (match[1] + match[3]).replace("\\", "")
        # (100,200) is a pair, (1,000, 2,000) one with thousands
        thousands = re.search(r";|\D,|,\D", match[2]) is not None
        inside = _both_signs(_split(match[2], _SEPARATOR, thousands))
        if len(inside) > 1 or brackets in ("()", "{}"):
            return brackets if len(inside) > 1 else "", inside
    return "", _both_signs(_split(text, _SEPARATOR, thousands=True))


def _split(text: str, separator: re.Pattern[str], thousands: bool = False) -> list[str]:
    """The parts between separators outside brackets; commas between thousands are none."""
    open_brackets = depths(text)
    kept = [m.span() for m in _THOUSANDS.finditer(text)] if thousands else []
    found, begin = [], 0
    for match in separator.finditer(text):
        if open_brackets[match.start()] == 0 and not any(b <= match.start() < e for b, e in kept):
            found.append(text[begin : match.start()])
            begin = match.end()
    return [part.strip(" .") for part in (*found, text[begin:]) if part.strip(" .")] or [text]


def _both_signs(items: list[str]) -> list[str]:
    """A part with a plus-minus sign as two parts."""
    signs = {True: ("+", "-"), False: (r"\pm",)}
    return [item.replace(r"\pm", sign) for item in items for sign in signs[item.count(r"\pm") == 1]]


def ratio(text: str) -> list[Fraction] | None:
    """The parts of 1:2:3 as multiples of the last one."""
    values = [number(part) for part in text.split(":")]
    last = values[-1]
    if len(values) < 2 or not last or None in values:
        return None
    return [value / last for value in values if value is not None]


def based(text: str) -> int | None:
    """The value of a number in another base, as 1011_2."""
    match = _BASED.fullmatch(text)
    base = int(match[2] or match[3]) if match else 0
    if match is None or not (2 <= base <= 16 and all(int(digit, 16) < base for digit in match[1])):
        return None
    return int(match[1], base)


def time(text: str) -> tuple[int, str] | None:
    """The minutes of a time of day since noon or midnight, and "a" or "p", or "" if the half of the day is not said."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    hours, minutes = int(match[1] or match[4]), int(match[2] or match[5] or 0)
    return hours % 12 * 60 + minutes, (match[3] or "p" * (hours > 12)).lower()
