r"""Where the final answer of a completion is: in a box, after a marker, or else at its end.

Markers in order of precedence: `\boxed{}` (with or without braces), `####`, `<answer>`, "the answer is" or "Answer:".
Of each the last one counts, and a marker with nothing behind it counts as absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST_ANSWER = 500  # characters; a longer one counts as wrong (those of MATH-500 have at most 53)
MOST_MARKERS = 16  # the last ones of a kind; earlier ones are not searched

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])(\s*\{)?")
_UNBRACED = re.compile(r"\s*(.*?)(?=\$|\\[)\]]|\n|[.!?](?:\s|$)|$)")
_BETWEEN_BOXES = re.compile(r"(?:\s|[,;.$&]|\\[()\[\],;: ]|\\q?quad|\\text\{|\}|\b(?:and|or)\b)*")
_WORDS = re.compile(r"\\text\w*\{[^{}]*\}|(?<![\\A-Za-z])([A-Za-z]{2})")
_LEADING_NUMBER = re.compile(r"\s*([-+]?\d+(?:[.,]\d+)*)", re.ASCII)
_IS = r"(?:is|are|was|be|equals?)\b"
_MARKER = re.compile(
    r"\bans(?:wers?)?\b[*_]*(?: ?\([^()\n]{0,40}\))?"
    rf"(?: (?:to|of|for) (?:the|this|your|our) [^.:=\n]{{0,80}}?\b{_IS}| (?:\w+ )?{_IS}|(?=[ *_}}]*[:=]))"
    r"[ *_}]*[:=]?[ *_}]*"
    r"|^[ #*_]*(?:the )?(?:final |correct )?answer[ *_]*$",
    re.IGNORECASE | re.MULTILINE,
)
_HEADING = re.compile(r"[A-Za-z]{2}")
_ABBREVIATIONS = r"(?<!\bRs)(?<!\bNo)(?<!\bM[rs])(?<!\bMrs)(?<!\b[DS][rt])(?<!\bsq)"
_SENTENCE_END = re.compile(
    rf"\n|(?<!\\)[!?](?=\s|$)(?!\s*[=+*/<>-])|{_ABBREVIATIONS}\.(?![0-9}},;])(?!\w\.)"  # but not 5! = 120
)
_MATHEMATICS = (("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("$", "$"))
_LINES = re.compile(r"\\(?:begin|end)\{(?:align|gather|split|eqnarray)\w*\*?\}")
_MARKUP = " \n*_$#:"


def final_answer(text: str) -> str | None:
    """The answer that a completion marks, None if it marks none."""
    return last_boxed(text) or next(said_answers(text), None)


def without_reasoning(text: str) -> str:
    """What follows the last `</think>`, if anything does."""
    return text.rpartition("</think>")[2].strip() or text


def said_answers(text: str) -> Iterator[str]:
    """What the markers other than boxes mark; the final answer first."""
    begins = [m.end() for m in _MARKER.finditer(text)][-MOST_MARKERS:]
    _, tag, tagged = text.rpartition("<answer>")
    tagged = tagged.partition("</answer>")[0].strip() if tag else ""
    yield from filter(None, (_after_hashes(text), tagged, *(_sentence(text[b:]) for b in reversed(begins))))


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` whose braces close, or of the last `\boxed ...`.

    Boxes between which there is nothing but "and", "or" and punctuation are one answer with several parts.
    """
    boxes: list[str] = []
    begin = 0
    for match in reversed([*_BOX.finditer(text)][-MOST_MARKERS:]):
        content, end = _braced(text, match.end()) if match[1] else _unbraced(text, match.end())
        if not content:
            continue
        if boxes and not _BETWEEN_BOXES.fullmatch(text, end, begin):
            break
        if content not in boxes:
            boxes.insert(0, content)
        begin = match.start()
    return ", ".join(boxes) or None


def last_formula(text: str) -> str | None:
    r"""The last text between `$`, `$$`, `\(` and `\)`, or `\[` and `\]`."""
    found = []
    for opening, closing in _MATHEMATICS:
        end = text.rfind(closing)
        begin = text.rfind(opening, 0, max(end, 0))
        if begin >= 0 and text[begin + len(opening) : end].strip():
            found.append((end, text[begin + len(opening) : end]))
    formula = max(found)[1] if found else ""
    if _LINES.search(formula):
        formula = _LINES.sub("", formula.strip().rpartition(r"\\")[2]).replace("&", "")
    return formula.strip().rstrip(".,") or None


def sentences(text: str) -> Iterator[str]:
    """The ends of the sentences and lines of a text, the last one first."""
    return (s[-LONGEST_ANSWER:] for s in reversed(_SENTENCE_END.split(text)) if s and s.strip())


def _braced(text: str, begin: int) -> tuple[str, int]:
    depth = 1
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin:i].strip(), i + 1
    return "", begin


def _unbraced(text: str, begin: int) -> tuple[str, int]:
    match = _UNBRACED.match(text, begin)
    assert match is not None  # it may be empty
    if any(word[1] for word in _WORDS.finditer(match[1])):  # a box in a sentence, or a sentence about boxes
        number = _LEADING_NUMBER.match(text, begin)
        return (number[1], number.end()) if number else ("", begin)
    return match[1].strip(), match.end()


def _after_hashes(text: str) -> str:
    """The line after the last `####`, unless it is a heading of Markdown, which has words and a text below."""
    _, hashes, rest = text.rpartition("####")
    line, _, below = (s.strip() for s in rest.strip().partition("\n"))
    heading = _HEADING.match(line.strip(_MARKUP)) and below
    return line if hashes and not heading and not _MARKER.search(line) else ""


def _sentence(text: str) -> str:
    """The first sentence or formula of a text without its markup."""
    text = text.lstrip(" \n*_:")
    for opening, closing in _MATHEMATICS[:3]:
        if text.startswith(opening):
            return text[len(opening) :].partition(closing)[0].strip().rstrip(".")
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip(" *_$")
