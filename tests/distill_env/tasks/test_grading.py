"""Grading: right values are right however they are written, and no completion can crash, hang or execute anything."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_env.tasks.grading import grade as grading
from distill_env.tasks.grading.grade import LONGEST_COMPLETION, Verdict, Verifier, final_answer, grade, number

WORKER = Path(grading.__file__).with_name("worker.py")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{1} and then $\boxed{\frac{1}{2}}$, done", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"first \boxed{3}, then \boxed{4", "3"),  # braces that do not close are no box
        ("2 + 2 = 4\n#### 1,234\nNext", "1,234"),
        ("The answer is 5. No: the answer is 3.5. Good.", "3.5"),
        ("**Answer:** $x=5$\nbye", "x=5"),
        ("nothing marked, 7", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_one_that_is_marked(completion: str, answer: str | None) -> None:
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("-1,234.50", Fraction(-2469, 2)),
        ("$1,000,000", 10**6),
        ("\u22127", -7),
        (r"\$18.00", 18),
        (r"50\%", 50),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        ("3/4", Fraction(3, 4)),
        (r"18\text{ dollars}", 18),
        (".5", Fraction(1, 2)),
        ("1/0", None),
        ("1e9", None),
        ("9**9", None),
        ("\u0663", None),  # a digit of another script
        ("", None),
    ],
)
def test_plain_numbers_have_their_value_and_nothing_else_has_one(text: str, value: int | Fraction | None) -> None:
    assert number(text) == value


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_a_number_is_right_in_every_notation(value: int, zeros: int) -> None:
    written = f"{value:,}" + ("." + "0" * zeros if zeros else "")
    for completion in (
        rf"thus \boxed{{{written}}}",
        f"steps\n#### {written}",
        f"The answer is {written}.",
        f"x {written}",
    ):
        assert grade(str(value), completion, symbolic=False) == Verdict(True)
        assert grade(str(value + 1), completion, symbolic=False) == Verdict(False)


def test_equal_values_have_one_vote() -> None:
    """However they are written; right formulas vote as the reference, wrong ones as they are spelt."""

    def vote(answer: str, reference: str = "18", symbolic: bool = False) -> str | None:
        return grade(reference, rf"so \boxed{{{answer}}}", symbolic).value

    assert vote("18") == vote("18.0") == vote(r"\$18") == vote("x = 18") == vote("18 dollars") == "18"
    assert vote("1,200") == vote("1200.00 dollars") == vote("x = 1200") == "1200"
    assert vote("0.5") == vote(r"\frac{1}{2}") == vote(r"\frac{2}{4}", "3") == "1/2"
    assert vote("") is None
    assert grade("18", "nothing here", symbolic=False).value is None
    assert vote("y + 1", "x + 1", symbolic=True) == vote("y+1", "x + 1", symbolic=True) == "y+1"
    assert vote("1 + x", "x + 1", symbolic=True) == vote("x+1", "x + 1", symbolic=True) == "x+1"


def test_what_counts_in_words() -> None:
    assert grade("18", r"\boxed{x = 18}", False).correct
    assert grade("18", "#### 18 dollars", False).correct
    assert grade("18", "She has 3 of them, 18 in all", False).correct
    assert not grade("18", "She has 3 of them, 18", False, ended=False).correct  # cut off: 180 was meant, maybe
    assert grade("18", r"\boxed{18} and", False, ended=False).correct
    assert not grade("8", r"\boxed{2^{8}}", False).correct
    assert not grade("2", r"\boxed{\frac{1}{2}}", False).correct
    assert grade("25", "it is 25m2", False).correct  # the 2 is no number of its own


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    pytest.importorskip("math_verify", reason="needs math-verify, extra tasks")
    return grading.verifier()


@pytest.mark.parametrize(
    ("reference", "answer", "same"),
    [
        (r"\frac{1}{2}", r"0.5", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}2)", True),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        (r"2+\sqrt3", r"\frac{1}{2-\sqrt3}", True),
        ("[1, 2)", "[1, 2)", True),
        ("[1, 2)", "(1, 2)", False),
        (r"\text{Evelyn}", r"\text{Evelyn}", True),
        ("x^2", "x^3", False),
        (r"\sqrt{2}", "1.41", False),
    ],
)
def test_expressions_are_compared_by_value(verifier: Verifier, reference: str, answer: str, same: bool) -> None:
    assert grade(reference, rf"so \boxed{{{answer}}}", symbolic=True) == Verdict(same)


def boxed(text: str) -> str:
    return rf"\boxed{{{text}}}"


HOSTILE = {
    "a tower": r"\boxed{9^{9^{9^{9}}}}",
    "a factorial": r"\boxed{1000000000!}",
    "a million braces": r"\boxed{" + "{" * 10**6 + "}" * 10**6 + "}",
    "some hundred braces": r"\boxed{" + "{" * 200 + "1" + "}" * 200 + "}",
    "a million boxes": r"\boxed{" * 10**6,
    "code": r"\boxed{__import__('os').system('touch X')}",
    "code in a number": r"\boxed{1.__class__.__base__.__subclasses__()[0]('touch X')}",
    "code in text": r"\boxed{\text{open('X', 'w')}}",
    "code as a name": r"\boxed{\operatorname{exec}(open('X','w'))}",
    "code, marked": "#### __import__('os').system('touch X')",
    "code, said": "The answer is eval(\"open('X','w').write('1')\").",
    "null bytes": "\\boxed{1\0\0}",
    "surrogates": "\\boxed{\ud800\udfff}",
    "lines that are none": "\\boxed{1\n2\r\u2028{}}",
    "a hundred thousand digits": r"\boxed{" + "1" * 10**5 + "}",
    "four hundred digits": r"\boxed{" + "1" * 400 + "x}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 15 + "x" + "}" * 16,
    "nested roots": r"\boxed{" + r"\sqrt{" * 60 + "x" + "}" * 61,
    "digits of another script": "\\boxed{\u0663\u0664}",
    "a sum": r"\boxed{\sum_{k=1}^{10^{9}} k}",
    "dollars": "$" * 10**5,
    "answers": "answer is " * 10**5,
    "hashes": "#" * 10**5,
    "fractions in numerators": boxed(r"\frac{" * 2000 + "1" + "}{2}" * 2000),
    "fractions not closed": boxed(r"\frac{1}{" * 50),
    "ten to the ten to the ten": boxed("10^{10^{10}}"),
    "a huge exponent": boxed("2^{99999999999999}"),
    "a huge float of digits": boxed("1." + "0" * 450 + "e99"),
    "a factorial of factorials": boxed("9!!!!!!!"),
    "a power of a sum": boxed("(a+b+c+d+e+f)^{999}"),
    "braces that do not match": r"\boxed{{{{1}}",
    "only closing braces": boxed("}}}}1"),
    "a million characters": boxed("1+" * 500_000),
    "a million backslashes": "\\" * 10**6,
    "a million signs": boxed("-" * 10**6 + "1"),
    "a lambda": boxed("(lambda: open('X', 'w'))()"),
    "a macro that calls itself": boxed(r"\def\a{\a\a}\a"),
    "a macro that writes": boxed(r"\write18{touch X}"),
    "a macro that reads": boxed(r"\input{/etc/passwd}"),
    "right to left": boxed("\u202e24\u202c"),
    "full-width digits": boxed("\uff14\uff12"),
    "digits above the line": boxed("4\u00b2"),
    "a zero-width space": boxed("4\u200b3"),
    "a thousand accents": boxed("4" + "\u0301" * 1000),
    "infinity": boxed(r"\infty"),
    "not a number": boxed("nan"),
    "a division by zero": boxed(r"\frac{1}{0}"),
    "a zero to the zero": boxed("0^{0^{0}} / 0"),
    "nothing": "",
    "spaces": " \n\t" * 1000,
    "an empty box": boxed(""),
}
# each takes the verifier's limit of time, as the tower, the factorials and the exponents of the first table do
LATE = {
    "fractions, shallow": boxed(r"\frac{" * 18 + "x" + "}{2}" * 18),
    "fractions in both": boxed(r"\frac{\frac{\frac{1}{x}}{\frac{x}{y}}}{\frac{\frac{y}{1}}{\frac{2}{z}}}"),
    "ten to the ten, by caret": boxed("10^10^10"),
    "a huge float": boxed("1e999999"),
    "a huge binomial": boxed(r"\binom{999999999}{499999999}"),
    "a huge sum": boxed(r"\sum_{n=1}^{99999999} n^n"),
    "a huge product": boxed(r"\prod_{n=1}^{99999999} n"),
    "an integral of no form": boxed(r"\int_0^1 e^{x^x} \sin(x^x) dx"),
    "a matrix not closed": boxed(r"\begin{pmatrix} 1 & 2 \\"),
    "a set of many": boxed(r"\{" + ",".join(map(str, range(100))) + r"\}"),
    "left without right": boxed(r"\left(" * 19 + "1"),
}


@pytest.fixture(scope="module")
def impatient() -> Iterator[Verifier]:
    pytest.importorskip("math_verify", reason="needs math-verify, extra tasks")
    verifier = Verifier(seconds=0.5)
    yield verifier
    verifier.close()


@pytest.mark.parametrize("case", [*HOSTILE, *(pytest.param(case, marks=pytest.mark.slow) for case in LATE)])
def test_no_completion_raises_hangs_or_executes(
    case: str, impatient: Verifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong, whether there is a number to be right or not; within the limits, of which a tower takes all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grading, "verifier", lambda: impatient)
    for symbolic in (True, False):
        assert not grade("42", (HOSTILE | LATE)[case], symbolic).correct
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_that_is_ended_is_undecided_and_the_next_one_is_answered(verifier: Verifier) -> None:
    """Whether it computes for too long, does nothing for too long, or the process is killed from outside."""
    verifier.seconds, patient = 0.3, verifier.seconds
    verifier.close()
    assert verifier.same("3", r"9^{9^{9^{9}}}") is None
    verifier.seconds = patient
    assert verifier.same("x+1", "1+x") is True
    assert verifier._child is not None
    os.kill(verifier._child.pid, signal.SIGSTOP)
    verifier.seconds = 0.1
    assert verifier.same("x+1", "1+x") is None
    verifier.seconds = patient
    assert verifier.same("x+1", "1+x") is True
    verifier._child.kill()
    verifier._child.wait()  # so that the question itself meets a closed pipe
    assert verifier.same("x+1", "1+x") is None
    assert verifier.same("x+1", "1+x") is True


REFUSED = (
    "eval('1 + 1')",
    "exec('x = 1')",
    "compile('1', 'f', 'eval')",
    "open('X', 'w')",
    "os.open('X', os.O_CREAT)",
    "os.system('touch X')",
    "os.fork()",
    "os.execv(sys.executable, [sys.executable])",
    "subprocess.run(['touch', 'X'])",
    "socket.socket()",
    "os.remove('there')",
    "os.mkdir('X')",
)


def test_the_guarded_process_refuses_to_do_more_than_compare(tmp_path: Path) -> None:
    """Were a completion to reach Python after all."""
    (tmp_path / "there").touch()
    script = tmp_path / "script.py"
    attempts = "".join(f"try:\n    {code}\nexcept PermissionError: print('refused')\n" for code in REFUSED)
    load = f"import os, runpy, socket, subprocess, sys\nrunpy.run_path({str(WORKER)!r})['guard']()\n"
    script.write_text(load + attempts)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["refused"] * len(REFUSED), done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["script.py", "there"]


def test_numbers_alone_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Verifier:
        raise AssertionError

    monkeypatch.setattr(grading, "verifier", refuse)
    for completion in (r"\boxed{\sqrt{4}}", r"\boxed{4 + x}", "#### four", "\\boxed{4}", "4"):
        grade("4", completion, symbolic=False)
    assert grade(r"\frac{x}{2}", r"\boxed{ \frac{x}{2} }", symbolic=True).correct  # equal as it stands
    assert grade("0.5", r"\boxed{\frac{1}{2}}", symbolic=True).correct


def test_only_the_end_of_a_long_completion_is_read() -> None:
    assert not grade("4", r"\boxed{4}" + " " * LONGEST_COMPLETION, symbolic=False).correct
    assert grade("4", " " * LONGEST_COMPLETION + r"\boxed{4}", symbolic=False).correct


@pytest.mark.slow
def test_every_answer_of_math_500_equals_itself_and_is_found_in_its_solution(real_data: Path) -> None:
    """And math-verify, which compares them here, holds no neighbouring pair for equal but a value and an equation."""
    rows = [json.loads(line) for line in (real_data / "math500/test.jsonl").read_text().splitlines()]
    verifier = grading.verifier()
    assert all(verifier.same(r["answer"], r["answer"]) for r in rows)
    assert all(grade(r["answer"], r["solution"], symbolic=True).correct for r in rows)
    pairs = [(a["answer"], b["answer"]) for a, b in itertools.pairwise(rows) if a["answer"] != b["answer"]]
    assert [p for p in pairs if grade(p[0], rf"\boxed{{{p[1]}}}", symbolic=True).correct] == [("5", "x=5")]
