r"""LaTeX and prose in one plain spelling, and the numbers in it as fractions.

What is removed leaves a space, so that nothing is joined: `4\text{ or }9` is "4 or 9" and no number.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 500  # characters; a longer text is no number

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u202f", " "),
        **dict.fromkeys("\u22c5\u00b7", r"\cdot "),
        "\u2014": ", ",
        "\u00d7": r"\times ",
        "\u00f7": "/",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u221a": r"\sqrt ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2260": r"\ne ",
        "\u2248": r"\approx ",
        "\u00b1": r"\pm ",
        "\u222a": r"\cup ",
        "\u2208": r"\in ",
        "\u2026": r"\ldots ",
        "\u00bd": " 1/2",
        "\u00bc": " 1/4",
        "\u00be": " 3/4",
        "\u2153": " 1/3",
        "\u2154": " 2/3",
        "\u00b2": "^2",
        "\u00b3": "^3",
    }
)
_WRAPPERS = r"(?:text(?:bf|it|rm|sf|tt|normal)?|emph|math(?:rm|bf|it|sf|tt)|bold|boldsymbol|[mhf]box|boxed|underline)"
_CLEANING = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s*\{\s*,\s*\}\s*(?:\\!)?|,\s*\\!\s*", ","),  # thousands
        (r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))", ","),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?|(?<!\\)\\!", ""),
        (r"\\(?:displaystyle|textstyle|limits|rm|bf|it|q?quad)(?![A-Za-z])|(?<!\\)\\[,;:> ()\[\]]|~", " "),
        (r"\\(?:[dtcs]|nice)(frac|binom)", r"\\\1"),
        (r"\\[lc]?dots[bcm]?(?![A-Za-z])|\.\.\.", r"\\ldots "),
        (r"\\l(?:brace|angle)(?![A-Za-z])", lambda m: r"\{" if "brace" in m[0] else "("),
        (r"\\r(?:brace|angle)(?![A-Za-z])", lambda m: r"\}" if "brace" in m[0] else ")"),
        (r"\\([lgn]e)q(?![A-Za-z])", r"\\\1"),
        (r"\\varnothing", r"\\emptyset"),
        (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])", "\u00b0"),
        (r"(?<=[\w)])\*\*(?=[\d(])(?=[^*]*$)", "^"),  # a power; others are bold type
        (r"\*\*|__|[`\"\u201c\u201d]", " "),
        (r"\\([%$&#_])", r"\1"),
        (r"(?<=[-+])\s*\$\s*(?=[\d.])|(?<![\w.])\$(?=[-+]?\s*[\d.])", ""),
        (r"\$", " "),
        (r"\s+", " "),
    )
)
LETTERS = r"[mgshlLWVJNCFKA]"  # units of one letter
_WRAPPED = re.compile(rf"\\{_WRAPPERS}\s*\{{([^{{}}]*)\}}")
_WRAPPED_UNIT = re.compile(
    rf"(\d|[}})])(?:\s|\\[,;: ])*\\{_WRAPPERS}\s*\{{[\s~]*{LETTERS}(?:/[^{{}}]*)?\s*\}}", re.ASCII
)

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d]|,\d)|\d{1,2}(?:,\d{2})+,\d{3}(?![\d]|,\d)|\d+)"
_SPACED_DIGITS = rf"(?:\d{{1,3}}(?: \d{{3}})+(?!\d)|{_DIGITS})"
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CURRENCY = r"(?:[$\u20ac\u00a3\u00a5\u20b9]|\b(?:US|USD|EUR|GBP|INR|Rs)\b\.? ?\$?)"


def _decimal_pattern(digits: str) -> str:
    return rf"(?:{digits}(?:\.\d+|\.(?!\w))?|\.\d+)"


def _quantity_pattern(sign: str, digits: str) -> str:
    decimal = _decimal_pattern(digits)
    return (
        rf"(?P<sign>{sign})?(?:{_CURRENCY} ?(?P<sign2>[-+])?)?"
        rf"(?:(?P<whole>{digits})(?: and)? (?P<part>\d+) ?/ ?(?P<parts>\d+)"
        rf"|(?P<top>{decimal}) ?/ ?(?P<bottom>{decimal})|(?P<decimal>{decimal}))"
        r"(?: ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?\{? ?(?P<exponent>-?\d{1,3})(?!\d) ?\}?)?"
        rf"(?: ?-?(?P<scale>{'|'.join(_SCALES)})\b)?"
        r"(?P<percent> ?(?:%|per ?cent\b|percentage points?\b))?"
    )


_FLAGS = re.ASCII | re.IGNORECASE
QUANTITY = re.compile(_quantity_pattern("[-+] ?", _SPACED_DIGITS), _FLAGS)
QUANTITY_IN_TEXT = re.compile(
    rf"(?<![A-Za-z0-9^_.\\])(?<!\d:){_quantity_pattern('(?<![)}])[-+]', _DIGITS)}(?!:?\d)", _FLAGS
)
_DECIMAL = _decimal_pattern(_DIGITS)
_SIMPLE_FRACTION = re.compile(
    rf"(?P<sign>[-+] ?)?\\frac ?(?:\{{ ?(?P<top>[-+]?{_DECIMAL}) ?\}}|(?P<t>\d)) ?"
    rf"(?:\{{ ?(?P<bottom>[-+]?{_DECIMAL}) ?\}}|(?P<b>\d))",
    re.ASCII,
)
_REPEATING = re.compile(
    r"(?<!\d)(?P<whole>\d{0,9})\.(?P<decimals>\d{0,9})\\(?:overline|bar) ?\{ ?(?P<repeated>\d{1,9}) ?\}", re.ASCII
)
_BRACKETED = re.compile(r"[({\[]{1,3}([^()\[\]{},;]+)[)}\]]{1,3}")
_MINUS = re.compile(r"(?<![\d)] )\b(?:negative|minus) (?=[\d.])", re.ASCII | re.IGNORECASE)
_AND_A_HALF = re.compile(r"(?<=\d) and (?:a|one)[ -](?:half|quarter)\b", re.ASCII)
_ORDINAL = re.compile(r"(?<=\d) ?\^? ?\{? ?(?:st|nd|rd|th)\b(?: ?\})?", re.ASCII | re.IGNORECASE)

_SYMBOLS = (
    r"cm|mm|km|ft|yd|mi|in|lbs?|oz|kg|mg|m[lL]|hrs?|mins?|secs?|yrs?|mph|k[mp]h|kmph|rpm|[ap]\.? ?m\b\.?|USD|sq|cu"
    r"|[kKMGT][Bb]|[kMG]?Hz|[kM]Wh?"
)
_POWER = r"(?: ?\^ ?\{? ?-?[123] ?\}?|[23](?!\d))"
_NO_UNIT = (
    r"(?!(?:or|and|to|of|times|plus|minus|more|less|fewer|than|over|out|not|mod|pi|sqrt|sin|cos|tan|log|ln|exp)\b)"
)
_WORD = rf"{_NO_UNIT}(?=\w*[aeiouyAEIOUY])[A-Za-z][A-Za-z'-]{{2,}}"


def _tail(symbols: str) -> re.Pattern[str]:
    """What may follow a number without changing its value: a unit, its powers, words, a full stop."""
    symbol, power = rf"(?:{symbols})(?![A-Za-z])", rf"(?:{_POWER})?"
    more = rf"(?> ?(?:/|\\cdot) ?(?>{symbol}|{LETTERS}\b|{_WORD}){power}| (?>{symbol}|{_WORD}|in|is){power}\.?)*+"
    first = rf"(?> ?{symbol}{power}\.?| {_WORD}{power}\.?| ?/ ?(?>{symbol}|{_WORD}))"
    return re.compile(rf"(?: ?\u00b0 ?[CFK]?)?(?:{first}{more})?[ .,;:]*")


UNIT = re.compile(rf" ?(?>(?:{_SYMBOLS}|{LETTERS})(?![A-Za-z])|{_WORD})")
_STRICT_TAIL, _LOOSE_TAIL = _tail(_SYMBOLS), _tail(f"{_SYMBOLS}|{LETTERS}")
_NUMERALS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
)
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")


def clean(text: str) -> str:
    """LaTeX without layout, fonts and money signs; formulas stay LaTeX."""
    text = _WRAPPED_UNIT.sub(r"\1 unit", text.translate(_CHARACTERS))
    for _ in range(3):  # nested
        text = _WRAPPED.sub(r" \1 ", text)
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text.strip()


def plain(text: str) -> str:
    """`clean`, with simple fractions as a/b, ordinal numbers as cardinal ones, and "minus" as a sign."""
    text = _REPEATING.sub(_spell_repeating, clean(text))
    text = _ORDINAL.sub("", _SIMPLE_FRACTION.sub(_spell_fraction, text))
    text = _AND_A_HALF.sub(lambda m: " 1/2" if "half" in m[0] else " 1/4", _MINUS.sub("-", text))
    return re.sub(" +", " ", text).strip()


def _spell_fraction(match: re.Match[str]) -> str:
    top, bottom = match["top"] or match["t"], match["bottom"] or match["b"]
    minus = "-" * (((match["sign"] or "") + top + bottom).count("-") % 2)
    return f" {minus}{top.strip('-+')}/{bottom.strip('-+')} "


def _spell_repeating(match: re.Match[str]) -> str:
    """0.1666... with a line over the 6 is (16 - 1) / 90."""
    whole, decimals, repeated = match["whole"] or "0", match["decimals"], match["repeated"]
    top = int(whole + decimals + repeated) - int(whole + decimals)
    return f"{top}/{int('9' * len(repeated) + '0' * len(decimals))}"


def number(text: str) -> Fraction | None:
    """The value of a plain number or fraction (perhaps with a currency, a unit, per cent, thousands), or None."""
    found = read(text)
    return found and found[0]


def read(text: str, loose: bool = False) -> tuple[Fraction, bool] | None:
    """The value of a number and whether it is in per cent; None for anything else.

    Args:
        loose: units of one letter (25 m) and a remark in parentheses are no part of the value.
    """
    if len(text) > LONGEST:
        return None
    text = unwrapped(plain(text))
    match = QUANTITY.match(text)
    if match is None:
        return _read_words(text)
    tail = text[match.end() :]
    if loose:
        tail = re.sub(r" \([^()]*\)[ .]*$", "", tail)
    return value_of(match) if (_LOOSE_TAIL if loose else _STRICT_TAIL).fullmatch(tail) else None


def unwrapped(text: str) -> str:
    """Without brackets around all of it, unless they are those of a tuple, a set or an interval."""
    match = _BRACKETED.fullmatch(text)
    return match[1].strip() if match else text


def value_of(match: re.Match[str]) -> tuple[Fraction, bool] | None:
    """The value of a match of QUANTITY and whether it is in per cent; None for a division by zero."""
    if match["whole"]:
        part, parts = int(match["part"]), int(match["parts"])
        if not part < parts:
            return None
        value = Fraction(_decimal(match["whole"])) + Fraction(part, parts)
    elif match["top"]:
        bottom = _decimal(match["bottom"])
        if not bottom:
            return None
        value = _decimal(match["top"]) / bottom
    else:
        value = _decimal(match["decimal"])
    if (match["sign"] or match["sign2"] or "").strip() == "-":
        value = -value
    value *= _SCALES[match["scale"].lower()] if match["scale"] else 1
    return value * Fraction(10) ** int(match["exponent"] or 0), bool(match["percent"])


def _decimal(text: str) -> Fraction:
    whole, _, decimals = re.sub("[, ]", "", text).partition(".")
    return Fraction(int(f"{whole}{decimals}"), 10 ** len(decimals))


def _read_words(text: str) -> tuple[Fraction, bool] | None:
    """A number below 100 in words, perhaps with a unit."""
    first, *rest = re.split(r"[ -]", text.lower().rstrip(" ."), maxsplit=2)
    if first in _NUMERALS and _STRICT_TAIL.fullmatch(" ".join(["", *rest])):
        return Fraction(_NUMERALS.index(first)), False
    if first in _TENS:
        unit = _NUMERALS.index(rest[0]) if rest and rest[0] in _NUMERALS[1:10] else 0
        if _STRICT_TAIL.fullmatch(" ".join(["", *rest[bool(unit) :]])):
            return Fraction(10 * _TENS.index(first) + 20 + unit), False
    return None
