r"""Whether two answers are the same: numbers as fractions, texts as words, lists, sets, tuples and intervals by parts.

What remains, such as `\sqrt{2}/2` and `1/\sqrt2`, is left to a given function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fractions import Fraction

from distill_env.tasks.grading.normalize import clean, number, read, unwrapped
from distill_env.tasks.grading.structure import based, depths, named, parts, ratio, time

Decide = Callable[[str, str], bool | None]  # LaTeX and LaTeX -> equal; None if it reached a limit
DEEPEST_ANSWER = 20  # open brackets; a deeper one counts as wrong, since parsing it takes long
MOST_FORMULAS = 8  # in a list without an order, each of which is compared with each

_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])|\u2248")
_RELATION = re.compile(r"[<>]|\\[lg]e(?![a-z])")
_TEXT = re.compile(r"\([A-Z]\)|[A-Za-z]{3,}(?:[ '-][A-Za-z]+)*|[A-Za-z]{2}(?:[ '-][A-Za-z]+)+")
_WRAPPED_TEXT = re.compile(r"\\(?:text\w*|mathrm|mbox|mathbf) ?\{(?! *[ei] *\})[^{}\\]*\}[ .]*")
_CHOICE = re.compile(r"(?:option |choice )?(?:\(([A-Z])\)|([A-Z])(?=[.:)]|$))", re.IGNORECASE)
_REASON = re.compile(r"[.,;:(]|\b(?:because|since|as)\b")
_ARTICLE = re.compile(r"\b(?:an?|the)\b|[^a-z0-9]+")
_UNIT = re.compile(
    r"(?<=[\d}) ])(?: ?(?:square|cubic|sq|cu))? ?(?:units?|[ckm]?m|inch(?:es)?|feet|foot|ft|yards?|miles?"
    r"|(?:centi|kilo)?met(?:er|re)s?|degrees?|radians?|dollars?|cents?|hours?|minutes?|seconds?|days?|years?|percent|%)"
    r"(?: ?\^ ?\{?[23]\}?)?[ .]*$"
)
_FUNCTIONS = r"pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan|infty|alpha|beta|theta|max|min|gcd|lcm"
_BARE_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_PROSE = re.compile(
    rf"(?<![\\A-Za-z{{])(?!(?:{_FUNCTIONS}|and)(?![A-Za-z]))(?=[A-Za-z]*[aeiou])[A-Za-z]{{3,}}(?![A-Za-z}}])"
)


def same(reference: str, answer: str, decide: Decide | None) -> bool | None:
    """Whether an answer is the reference.

    Args:
        reference: a number, text or LaTeX.
        answer: what the completion gives, without the sentence around it.
        decide: whether two formulas are equal, None if it reached a limit; without it they are not.
    """
    expected, given = read(reference), read(answer, loose=True)
    if expected and given:
        return _same_number(*expected, *given)
    sides = [side for side in _APPROXIMATELY.split(answer) if side.strip()]
    if sides not in ([], [answer]):  # either will do
        return _any(same(reference, side, decide) for side in sides)
    a, b = clean(reference), clean(answer)
    a, b = _trimmed(a), _trimmed(b if expected and "\\" not in b else _without_prose(b, a))
    if _bare(a) == _bare(b):
        return bool(_bare(a))
    if "\\ldots" in a + b:  # which math-verify drops
        return False
    notation = _same_notation(a, b, expected or given)
    if notation is not None:
        return notation
    if _WRAPPED_TEXT.fullmatch(reference.strip()) or _TEXT.fullmatch(a):
        return _same_text(a, b)
    if bool(_RELATION.search(a)) == bool(_RELATION.search(b)):
        (name, value), (other, other_value) = named(a), named(b)
        if (name and (name == other or "=" not in b)) or (other and "=" not in a):
            return same(value, other_value, decide)
        (kind, xs), (other_kind, ys) = parts(a), parts(b)
        if len(xs) == 1 < len(ys) and not other_kind:  # 1/2 or 0.5
            return _all(same(a, y, decide) for y in ys)
        if len(xs) == len(ys) > 1 or (len(xs) != len(ys) and "u" not in (kind, other_kind)):
            return _same_parts(kind, xs, other_kind, ys, decide)
    if decide is None or max(depths(b), default=0) > DEEPEST_ANSWER:
        return False
    return decide(_formula(a), _formula(b))


def _same_number(x: Fraction, x_per_cent: bool, y: Fraction, y_per_cent: bool) -> bool:
    """28 % is 28 and 0.28; 0.333333 is 1/3, since it has six digits."""
    if x_per_cent != y_per_cent and (x == 100 * y if x_per_cent else y == 100 * x):
        return True
    return x == y or _rounded(x, y) or _rounded(y, x)


def _rounded(x: Fraction, decimal: Fraction) -> bool:
    """Whether the second is the first, which has no end, with six digits or more, at least four of them decimals."""
    digits = next((k for k in range(4, 40) if (decimal * 10**k).denominator == 1), None)
    if digits is None or 10**400 % x.denominator == 0:
        return False
    return abs(decimal * 10**digits) >= 10**5 and abs(x - decimal) * 10**digits < 1


def _same_notation(a: str, b: str, plain: tuple[Fraction, bool] | None) -> bool | None:
    """The verdict on numbers in another base, times of day and ratios; None if they are something else.

    Args:
        a, b: reference and answer.
        plain: the value of the one of them that is a plain number.
    """
    if based(a) is not None or based(b) is not None:
        return based(a) == based(b) or a.partition("_")[0] == b
    x, y = time(a), time(b)
    if x and y:
        return x[0] == y[0] and (x[1] == y[1] or "" in (x[1], y[1]))
    if (x or y) and plain:  # 7:00 p.m. is 7
        return (x or y or (0,))[0] == plain[0] * 60 % 720
    if ratio(a) and ratio(b):
        return ratio(a) == ratio(b)
    return None


def _same_text(a: str, b: str) -> bool:
    choice = re.fullmatch(r"\(?([A-Z])\)?", a)
    if choice:
        found = _CHOICE.match(b)
        alone = len(set(re.findall(r"\([A-Z]\)", b))) < 2
        return found is not None and alone and (found[1] or found[2]).upper() == choice[1]
    return _words(a) in (_words(b), _words(_REASON.split(b, maxsplit=1)[0]))


def _words(text: str) -> str:
    return _ARTICLE.sub(" ", text.lower()).strip()


def _same_parts(kind: str, xs: list[str], other: str, ys: list[str], decide: Decide | None) -> bool | None:
    if len(xs) != len(ys) or (kind != other and {kind, other} not in ({"", "{}"}, {"", "()"}, {"", "[]"})):
        return False
    ordered = not {kind, other} <= {"", "{}", "u"}
    names, other_names = ({name for name, _ in map(named, items) if name} for items in (xs, ys))
    if bool(names) != bool(other_names):  # x = 1, y = 2 is (1, 2)
        xs, ys = ([value for _, value in map(named, items)] for items in (xs, ys))
        ordered = ordered or len(names | other_names) > 1
    if ordered:
        return _all(same(x, y, decide) for x, y in zip(xs, ys, strict=True))
    if decide and sum(number(y) is None for y in ys) > MOST_FORMULAS:
        return decide(_formula(", ".join(xs)), _formula(", ".join(ys)))
    rest = list(ys)
    for x in xs:
        for y in rest:
            equal = same(x, y, decide)
            if equal is None:
                return None
            if equal:
                rest.remove(y)
                break
    return not rest


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    return next((verdict for verdict in verdicts if not verdict), True)


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    found = list(verdicts)
    return True in found or (None if None in found else False)


def _trimmed(text: str) -> str:
    return unwrapped(text.strip(" .,;:"))


def _bare(text: str) -> str:
    return re.sub(r"\s", "", text)


def _without_prose(text: str, reference: str) -> str:
    """A formula without the words before and after it, unless the reference has words, too."""
    if _PROSE.search(reference) or re.search(r"\bnot\b", text):
        return text
    before, *after = _PROSE.split(text, maxsplit=1)
    return before if before.strip() or not after else (_PROSE.sub("", text) or text)


def _formula(text: str) -> str:
    """As LaTeX, with nothing that belongs to the sentence."""
    text = _UNIT.sub("", text).strip(" .,;:") or text
    text = re.sub(r"\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", _BARE_FUNCTION.sub(r"\\\1", text))
    text = re.sub(r"(\d+) ?\u00b0", r"(\1\\pi/180)" if _TRIGONOMETRIC.search(text) else r"\1", text)
    return re.sub(r"\+ ?-", "-", text).replace("%", r"\%")
