"""The one number that a sentence gives as its answer, such as 90 in "90 pages in 3 days"."""

from __future__ import annotations

import re

from distill_env.tasks.grading.normalize import LETTERS, QUANTITY, QUANTITY_IN_TEXT, UNIT, plain, read, value_of

_FILLER = re.compile(
    r"(?:\s|[:~]|\\approx|(?:about|approximately|around|roughly|exactly|only|just|now|simply|thus|therefore|indeed|that|"
    r"equals?|equal to|a total of|at least|at most)\b)*",
    re.IGNORECASE,
)
_BEGINS = re.compile(rf"(?:{_FILLER.pattern})(?:[A-Za-z]\w? ?= ?)?[-+$({{]*[\d.]", re.IGNORECASE)
_FORMULA = re.compile(rf" ?(?!a\b)(?!{LETTERS}(?![A-Za-z]))[A-Za-z](?![A-Za-z])|[A-Za-z(^_!{{]| ?\\(?!approx)")
_OPERATION = re.compile(
    r"\s*(?:[-+*/^=<>]|:\d|(?:times|plus|minus|multiplied|divided|more|less|fewer|of|out|percent|to|mod)\b)"
)
_VALUE = r"= ?[-+$]*[\d./]+"
_EQUALITIES = re.compile(
    rf"{_VALUE}[^=\d]{{0,12}}?(?:[,;]|\band\b|\bor\b)[a-z ]{{0,5}} [A-Za-z]{{1,6}}(?:_\{{?\w+\}}?)? ?{_VALUE}[^=\d]*$"
)
_EITHER = re.compile(r"\d[^.\d]{0,30}\bor [-+$]?\d|\bbetween [-+$]?\d|^[^A-Za-z]*\d to [-+$]?\d")
_UNITS = r"(?>[ -]?(?!and\b|or\b)[A-Za-z\u00b0%/.^\d{}]+){0,4}?"
_ALTERNATIVE = re.compile(rf"\s*[,;&]\s*\$?[-+]?[\d.]|{_UNITS},? ?(?:\band|\bor|&) [-+]?\$?\d")
_COMPOUND = re.compile(r" ?(?:feet|foot|ft|hours?|hrs?|h|minutes?|min|dollars?|pounds?|lbs?|weeks?|days?|years?),? \d")
_REASON = re.compile(r",? (?:because|since)\b.*| \([^()]*=[^()]*\)", re.DOTALL)
_RESULT = re.compile(
    r"\bround|\b(?:so|thus|therefore|namely|that is|i\.e\.|total of|totaling|making(?: it)?),? [-+$]*\d"
)
_COMPUTATION = re.compile(r"[\\^*+_]|(?<![A-Za-z])/|/(?![A-Za-z])")
_WORD = re.compile(r"[A-Za-z]{2}")
_PERIOD = r"(?:second|minute|hour|day|night|week|month|year|decade)s?"
_DURING = re.compile(rf"(?: [A-Za-z'-]+){{0,3}} (?:in|over|during|per|every) [\d.,]+ {_PERIOD}[ .!]*")


def leading_number(text: str) -> str | None:
    """The number of an answer that is more than a number; None if it is to be computed or there are several.

    It is the right side of the last equality with a number as one side, else the number with which the answer begins,
    else the last one.
    """
    text = plain(text).replace(" equals ", " = ")
    if _BEGINS.match(text):
        text = _REASON.sub("", text)
    if read(text, loose=True):
        return text
    if _EQUALITIES.search(text):
        return None
    for side in reversed(text.split("=")) if "=" in text and "\\ne" not in text else ():
        if read(side, loose=True):
            return side.strip()
    text = text.rpartition("=")[2].strip()
    begin = _FILLER.match(text)
    assert begin is not None  # it may be empty
    number = QUANTITY.match(text, begin.end())
    if _EITHER.search(text) or (number and _ALTERNATIVE.match(text, number.end())):
        values = {value_of(n) for n in QUANTITY_IN_TEXT.finditer(text)}
        return last_number(text) if len(values) == 1 else None
    if number:
        rest = text[number.end() :]
        if (_FORMULA.match(rest) and not UNIT.match(rest)) or _COMPOUND.match(rest):
            return None
        if not _OPERATION.match(rest) and not _RESULT.search(rest):
            return number[0]
    words = QUANTITY_IN_TEXT.sub("", text)
    return last_number(text) if _WORD.search(words) and not _COMPUTATION.search(words) else None


def last_number(text: str) -> str | None:
    """The last number of a sentence, but not the period at its end that follows the number of something else."""
    if read(text):
        return text.strip()
    text = plain(text)
    numbers = [n for n in QUANTITY_IN_TEXT.finditer(text) if not text.endswith("not ", 0, n.start())]
    if len(numbers) > 1 and _DURING.fullmatch(text, numbers[-2].end()):
        numbers.pop()
    return numbers[-1][0] if numbers else None
