r"""Grading of final answers by value. A completion is data: it is compared, never run.

1. `final_answer` searches the last `LONGEST_COMPLETION` characters of the completion.
2. Two plain numbers are compared as fractions, and equal texts are equal; this decides GSM8K, SVAMP and AIME.
3. Everything else goes to math-verify in a process of its own (`worker.py`), one pair at a time, with limits on
   processor time, wall time and memory. The process reads LaTeX by a grammar, and refuses `eval`, writing files,
   starting processes and connections. If it reaches a limit, the answer counts as wrong and as `undecided`, and the
   next pair gets a new process.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

LONGEST_COMPLETION = 10_000  # characters; only the end of a longer one is read
LONGEST_ANSWER = 500  # characters; a longer one counts as wrong (those of MATH-500 have at most 53)
DEEPEST_ANSWER = 20  # open brackets; a deeper one counts as wrong, since parsing it takes long
SECONDS = 3.0  # processor time for one comparison
MEBIBYTES = 2048  # address space of the process

# Not inside a word, an exponent or another number; ASCII digits only.
NUMBER = r"(?:(?<![\w.)}])[-+])?(?<![A-Za-z0-9^_.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_NUMBER = re.compile(NUMBER, re.ASCII)
_PLAIN = re.compile(r"([-+]?)(?:(\d+)(?:\.(\d*))?|\.(\d+))", re.ASCII)
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{([-+]?\d+)\}\{(\d+)\}|([-+]?\d+)/(\d+)", re.ASCII)
_ANSWER_IS = re.compile(r"answer(?: is|:)(?! *\n)", re.IGNORECASE)
_UNIT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{[^{}]*\}|\\[!,;: ]")


@dataclass(frozen=True)
class Verdict:
    """Whether a final answer is correct, and its value."""

    correct: bool
    undecided: bool = False  # the comparison reached a limit, which counts as wrong
    value: str | None = field(default=None, compare=False)  # normalised; the reference's if it is correct


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox{...}`) whose braces close."""
    for begin in sorted((m.end() for m in re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{", text)), reverse=True)[:16]:
        depth = 1
        for i in range(begin, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[begin:i].strip()
    return None


def final_answer(text: str) -> str | None:
    r"""The answer that a completion marks: the last `\boxed{}`, else the text after the last `####`, else that after
    the last "answer is" or "answer:", up to the end of the sentence."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    ends = [m.end() for m in _ANSWER_IS.finditer(text)]
    if ends:
        sentence = re.split(r"\.(?!\d)|\n", text[ends[-1] :].lstrip(), maxsplit=1)[0]
        return sentence.strip(" *$").strip()
    return None


def number(text: str) -> Fraction | None:
    """The value of a plain number or fraction (with signs for money, per cent and thousands), or None."""
    text = re.sub(r"\\?[$%]|,(?=\d{3})|\s", "", _UNIT.sub("", text)).replace("\u2212", "-").rstrip(".")
    plain, fraction = _PLAIN.fullmatch(text), _FRACTION.fullmatch(text)
    if plain:
        whole, decimals = plain[2] or "0", plain[3] or plain[4] or ""
        value = Fraction(int(whole + decimals), 10 ** len(decimals))
        return -value if plain[1] == "-" else value
    if fraction and int(fraction[3] or fraction[5]):
        if fraction[5]:
            return Fraction(int(fraction[4]), int(fraction[5]))
        return Fraction(int(fraction[2]), int(fraction[3])) * (-1 if fraction[1] == "-" else 1)
    return None


def last_number(text: str) -> str | None:
    """The last number of a text as it is written there, or None."""
    last = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    return last[0] if last and len(last[0]) <= LONGEST_ANSWER else None


def grade(reference: str, completion: str, symbolic: bool, ended: bool = True) -> Verdict:
    """Whether the final answer of a completion has the reference's value.

    Args:
        reference: the final answer in the data, a number or LaTeX.
        completion: any text.
        symbolic: math-verify compares what is not two plain numbers; otherwise only numbers can be correct.
        ended: the completion was not cut off; if it marks no answer, its last number or formula counts.
    """
    completion = completion[-LONGEST_COMPLETION:]
    answer = final_answer(completion)
    expected = number(reference)
    if answer is None and ended:
        answer = last_number(completion) if expected is not None else _last_formula(completion)
    if answer is None or len(answer) > LONGEST_ANSWER:
        return Verdict(False)
    verdict, compared = _compare(reference, expected, answer, symbolic)
    return replace(verdict, value=_normalised(reference if verdict.correct else compared))


def _compare(reference: str, expected: Fraction | None, answer: str, symbolic: bool) -> tuple[Verdict, str]:
    """Whether an answer has the reference's value, and the part of it that was compared."""
    value = number(answer)
    if expected is not None and value is not None:
        return Verdict(expected == value), answer
    if not symbolic:  # `18 dollars`, `x = 18`, but nothing that remains to be computed
        words = _UNIT.sub("", answer.rpartition("=")[2]).replace("\\$", "")
        last = None if re.search(r"[\\^/*+]", words) else last_number(words)
        return Verdict(last is not None and number(last) == expected), last or answer
    if _bare(answer) == _bare(reference):
        return Verdict(True), answer
    if _depth(answer) > DEEPEST_ANSWER:
        return Verdict(False), answer
    same = verifier().same(reference, answer)
    return Verdict(bool(same), undecided=same is None), answer


def _normalised(answer: str) -> str | None:
    """One text for equal numbers, and for formulas that differ in spaces; None for an empty answer."""
    value = number(answer)
    return (_bare(answer) if value is None else str(value)) or None


def _bare(text: str) -> str:
    return re.sub(r"\s|\$|\\left|\\right", "", text)


def _depth(text: str) -> int:
    return max(itertools.accumulate((c in "{([") - (c in "})]") for c in text), default=0)


def _last_formula(text: str) -> str | None:
    parts = text.rsplit("$", 2)
    return parts[1] if len(parts) == 3 else None


def verifier() -> Verifier:
    """The verifier of this process; a forked process gets its own."""
    return _verifier(os.getpid())


@lru_cache
def _verifier(process: int) -> Verifier:
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier


class Verifier:
    """math-verify in a child process, which starts when it is needed and again after it was killed.

    Args:
        seconds: limit on processor time for one comparison; the limit on wall time is three times as long.
        mebibytes: address space of the child.
    """

    def __init__(self, seconds: float = SECONDS, mebibytes: int = MEBIBYTES) -> None:
        self.seconds = seconds
        self.mebibytes = mebibytes
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def same(self, reference: str, answer: str) -> bool | None:
        """Whether two LaTeX expressions are equal; None if the comparison reached a limit of time or memory."""
        with self._lock:
            if self._child is None:
                self._start()
            reply = self._ask(json.dumps({"reference": reference, "answer": answer}), 3 * self.seconds)
            if reply is None:
                self.close()
                return None
            same: bool | None = reply["same"]
            return same

    def _start(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
        self._child = subprocess.Popen(
            [*command, str(self.seconds), str(self.mebibytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._ask(None, 120.0) is None:
            self.close()
            raise RuntimeError(f"grading: {' '.join(command)} does not start; expected math-verify to be installed")

    def _ask(self, line: str | None, seconds: float) -> dict[str, bool | None] | None:
        """Write a line and read the reply; None if the child has died, or took too long and was killed."""
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        clock = threading.Timer(seconds, child.kill)
        clock.start()
        try:
            if line is not None:
                child.stdin.write(line + "\n")
                child.stdin.flush()
            reply = child.stdout.readline()
            return json.loads(reply) if reply else None
        except (BrokenPipeError, json.JSONDecodeError):
            return None
        finally:
            clock.cancel()

    def close(self) -> None:
        """End the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with suppress(BrokenPipeError), child:  # closes the pipes, which may hold a request, and waits
                pass
