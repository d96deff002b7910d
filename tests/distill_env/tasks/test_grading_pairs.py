r"""Pairs of a reference and a completion whose verdict no reader would doubt, by kind, and rewordings of real answers.

Several kinds are public reports of other graders: of math-verify (small numbers, subscripts, `\mathrm`, lists), of
lm-evaluation-harness (marks, `\boxed` without braces), of reward functions (reasoning, signs, tuples).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from distill_env.tasks.grading.grade import grade
from distill_env.tasks.math_word import MathTask

# What is in a box, or a whole completion if it has more than one word before the answer; then the verdict.
Pairs = list[tuple[str, str, bool]]

NUMBERS: dict[str, Pairs] = {
    "marks": [
        ("64", "Eight rows of eight.\n\nThe answer is:\n\n64", True),
        ("64", "The answer is:\n\\[\n64\n\\]", True),
        ("64", "The answer is:\n\n$$64$$\n\nDone.", True),
        ("64", r"The answer is \(64\).", True),
        ("64", "**Answer**: 64", True),
        ("64", "**Answer:** **64** seats", True),
        ("64", r"\textbf{Answer: } 64", True),
        ("64", "### Final answer\n\n64 seats", True),
        ("64", "Ans = 64", True),
        ("64", "The answer to the second question is 64.", True),
        ("64", "The answer should be 64", True),
        ("64", "The answer is thus $64$.", True),
        ("64", "The answer is 64! I am sure.", True),
        ("64", "The answer is 64. I am confident that this answer is correct.", True),
        ("64", "The answer is 60. Wait, the answer is 64.", True),
        ("60", "The answer is 60. Wait, the answer is 64.", False),
        ("64", "#### Step 2: multiply by 8\n8 * 8 = 64", True),
        ("64", "#### Result\nThe answer is 64.", True),
        ("64", "#### Answer: 64", True),
        ("64", "#### **64**", True),
        ("64", "#### 64 (8 rows of 8)", True),
        ("8", "#### 64 (8 rows of 8)", False),
        ("64", "<think>The answer is 8?</think>\n\n<answer>64</answer>", True),
        ("8", r"<think>\boxed{8}</think> The answer is 64.", False),
    ],
    "boxes": [
        ("4", r"we find $\boxed 4$.", True),
        ("4", r"we find $\boxed4$.", True),
        ("44", r"\boxed{4}, no, it is \boxed 44.", True),
        ("4", r"\boxed{4}, no, it is \boxed 44.", False),
        ("-4", r"$\boxed -4$", True),
        ("4", r"I put it into \boxed{}. The answer is 4.", True),
        ("4", r"I put it into \boxed as you wish. The answer is 4.", True),
        ("4", r"The width is \boxed{3} and therefore the height is \boxed{4}.", True),
        ("4", r"It is \boxed{4}, or \boxed{4.0}.", True),
        ("4", r"\boxed{3}, \boxed{4}", False),
        ("4", r"\boxed{\text{The answer is } 4}", True),
        ("1/2", r"$\boxed\frac12$", True),
        ("2", r"$\boxed\frac12$", False),
    ],
    "thousands": [
        ("12500", r"\boxed{12{,}500}", True),
        ("500", r"\boxed{12{,}500}", False),
        ("12500", r"\boxed{12,\!500}", True),
        ("12500", r"\boxed{12\,500}", True),
        ("12500", r"\boxed{12 500}", True),
        ("12500", r"\boxed{\$12,500.00}", True),
        ("2500000", "The answer is 25,00,000 rupees.", True),
        ("25", "The answer is 25,00,000 rupees.", False),
        ("0", "The answer is 25,00,000 rupees.", False),
    ],
    "words for size": [
        ("7000000", r"\boxed{7\text{ million}}", True),
        ("7", r"\boxed{7\text{ million}}", False),
        ("2500", "The answer is $2.5 thousand.", True),
        ("3000000000", "The answer is 3 billion people", True),
        ("45000", r"\boxed{4.5 \times 10^4}", True),
        ("4.5", r"\boxed{4.5 \times 10^4}", False),
        ("12", "The answer is twelve.", True),
        ("35", "The answer is thirty-five apples", True),
        ("35", "The answer is thirty-six apples", False),
    ],
    "mixed numbers": [
        ("2.75", r"\boxed{2 3/4}", True),
        ("2.75", r"\boxed{2\frac34}", True),
        ("2.75", r"\boxed{2 \tfrac{3}{4} \text{ hours}}", True),
        ("2.75", "The answer is 2\u00be.", True),
        ("-2.75", r"\boxed{-2\frac{3}{4}}", True),
        ("23/4", r"\boxed{2 3/4}", False),
        ("2.75", r"\boxed{23/4}", False),
        ("0.75", r"\boxed{2 3/4}", False),
        ("2", r"\boxed{2 3/4}", False),
        ("2.5", "The answer is 2 and a half hours.", True),
        ("2", "The answer is 2 and a half hours.", False),
    ],
    "fonts": [
        ("46", r"\boxed{\text{46}}", True),
        ("46", r"\boxed{\mathbf{46}}", True),
        ("46", r"\boxed{\textbf{46} \text{ cows}}", True),
        ("46", r"\boxed{{\bf 46}}", True),
        ("46", r"\boxed{\text{46 cows}}", True),
        ("46", "The answer is *46*.", True),
        ("46", 'The answer is "46".', True),
        ("23", r"\boxed{\frac{\text{46}}{\mathrm{2}}}", True),
        ("46", r"\boxed{\frac{\text{46}}{\mathrm{2}}}", False),
    ],
    "units": [
        ("36", r"\boxed{36\text{ cm}^2}", True),
        ("362", r"\boxed{36\text{ cm}^2}", False),
        ("36", r"\boxed{36\,\mathrm{m}^3}", True),
        ("36", r"\boxed{36 ft^2}", True),
        ("36", "The answer is 36 m\u00b2.", True),
        ("36", "The area is 36m2", True),
        ("2", "The area is 36m2", False),
        ("36", r"\boxed{36\,\mathrm{km/h}}", True),
        ("36", r"\boxed{36~\mathrm{m/s^2}}", True),
        ("36", "The answer is 36 miles per hour.", True),
        ("36", r"\boxed{36^{\circ}}", True),
        ("36", "The answer is 36 \u00b0C.", True),
        ("36", r"\boxed{36 \text{ degrees}}", True),
        ("36", r"\boxed{36\%}", True),
        ("0.36", r"\boxed{36\%}", True),
        ("3600", r"\boxed{36\%}", False),
        ("36", "The answer is 36 percent.", True),
        ("36", "The answer is Rs. 36.", True),
        ("36", "The answer is \u20ac36.", True),
        ("4", r"\boxed{4^{\text{th}}}", True),
        ("22", "The answer is the 22nd.", True),
        ("36", r"\boxed{36x}", False),
        ("36", r"\boxed{36\pi}", False),
        ("36", r"\boxed{36\text{ i}}", False),
        ("36", r"\boxed{36!}", False),
    ],
    "signs": [
        ("-27", "The answer is \u221227.", True),
        ("27", "The answer is \u221227.", False),
        ("-27", "The answer is \u201327 points.", True),
        ("-27", "The answer is -$27.", True),
        ("27", "The answer is -$27.", False),
        ("-27", r"\boxed{-\$27}", True),
        ("-27", r"\boxed{\$-27}", True),
        ("-27", "The answer is minus 27.", True),
        ("27", "The answer is negative 27.", False),
        ("-27", "In the end the balance is \u2212$27.", True),
        ("-27", "#### -27", True),
        ("27", "#### +27", True),
        ("27", "The answer is 47 - 20 = 27.", True),
    ],
    "one of several numbers": [
        ("90", "The answer is 90 pages in 3 days.", True),
        ("3", "The answer is 90 pages in 3 days.", False),
        ("90", "So Ann read 90 pages in 3 days.", True),
        ("90", r"\boxed{90 \text{ pages in } 3 \text{ days}}", True),
        ("90", "The answer is 90, since 3 times 30 is 90.", True),
        ("90", "The answer is 90, because 100 - 10 = 90, and 10 remain.", True),
        ("90", "The answer is 90 pages (30 a day).", True),
        ("90", "The answer is 89.6 pages, which is rounded up to 90.", True),
        ("90", "The answer is [90].", True),
        ("90", "The answer is 90 pages, so that 10 remain.", True),
        ("90", "The answer is 30% of 300, which is 90.", True),
        ("90", "The answer is 30 * 3 = 90 pages.", True),
        ("90", r"\boxed{90 = 3 \cdot 30}", True),
        ("90", r"\boxed{\text{Total} = 90}", True),
        ("90", "Ann had 10 and got 80, 90 in all.", True),
        ("90", "The answer is 45 + 45.", False),
        ("9", "The answer is not 9.", False),
    ],
    "several answers": [
        ("9", r"\boxed{6 \text{ or } 9}", False),
        ("6", r"\boxed{6 \text{ or } 9}", False),
        ("69", r"\boxed{6 \text{ or } 9}", False),
        ("9", r"\boxed{6, 9}", False),
        ("9", r"\boxed{6;9}", False),
        ("9", r"\boxed{\{6, 9\}}", False),
        ("9", r"\boxed{(6, 9)}", False),
        ("9", r"\boxed{x = 6 \text{ or } x = 9}", False),
        ("9", r"\boxed{x_1 = 6, x_2 = 9}", False),
        ("9", "The answer is either 6 or 9.", False),
        ("9", "The answer is between 6 and 9.", False),
        ("9", r"\boxed{6 - 9}", False),
        ("6", "The answer is 6 feet 9 inches.", False),
        ("6", "The answer is 6 hours and 9 minutes.", False),
        ("9", r"\boxed{\frac{18}{2} \text{ or } 9}", True),
        ("9", r"\boxed{(9)}", True),
    ],
    "times of day": [
        ("45", "The answer is 8:45 a.m.", False),
        ("8", "The answer is 8:45 a.m.", False),
        ("45", "They arrive at 8:45 p.m.", False),
        ("8", "The answer is 8 p.m.", True),
        ("8", r"\boxed{8:00 \text{ p.m.}}", True),
    ],
}

FORMULAS: dict[str, Pairs] = {
    "marks": [
        (r"\sqrt{30}", r"Hence \[ x = \sqrt{30}. \]", True),
        (r"\sqrt{30}", r"With $a = 5$ the value is \(\sqrt{30}\).", True),
        (r"\sqrt{30}", r"The answer is: $\sqrt{30}$ meters, which is about 5.5.", True),
        (r"\sqrt{30}", "The answer is\n\\[\n\\sqrt{31}\n\\]", False),
        (r"\frac{2}{7}", r"The answer is: \(\frac27\).", True),
        (r"\frac{2}{7}", r"\boxed{3}? No: $\boxed \frac{2}{7}$.", True),
        ("30", r"It is $\frac{1 + \sqrt{5}}{30}$", False),
        ("3", r"It is \( (2 + 1) \)", True),
    ],
    "small differences": [
        (r"\frac{1}{3^{80}}", r"\boxed{\frac{1}{3^{79}}}", False),
        (r"\frac{1}{3^{80}}", r"\boxed{3^{-80}}", True),
        (r"\frac{1}{100!}", r"\boxed{\frac{1}{101!}}", False),
        (r"\frac{3^{500}+1}{3^{501}}", r"\boxed{\frac{1}{3}}", False),
        (r"\frac{x}{5^{40}}", r"\boxed{\frac{x}{5^{41}}}", False),
        (r"10^{-9}\pi", r"\boxed{2 \cdot 10^{-9}\pi}", False),
        (r"\frac{1}{7}", r"\boxed{0.142857}", True),
        (r"\frac{1}{7}", r"\boxed{0.14}", False),
        (r"\sqrt{11}", r"\boxed{3.3166247903554}", True),
        (r"\sqrt{11}", r"\boxed{3.32}", False),
        (r"\sqrt{11}", r"\boxed{\sqrt{11} \approx 3.32}", True),
        (r"\sqrt{11}", r"\boxed{\sqrt{13} \approx 3.6}", False),
        (r"0.1\overline{6}", r"\boxed{\frac{1}{6}}", True),
        ("12", r"\boxed{11.999999}", False),
    ],
    "names of numbers": [
        ("1203_4", r"\boxed{1203_5}", False),
        ("1203_4", r"\boxed{1203_{4}}", True),
        ("1203_4", r"\boxed{1203}", True),
        ("1203_4", r"\boxed{1202_4}", False),
        (r"2 + \frac{1}{\mathrm{e}}", r"\boxed{2 - \frac{1}{\mathrm{e}}}", False),
        (r"2 + \frac{1}{\mathrm{e}}", r"\boxed{2 + e^{-1}}", True),
        ("7", r"\boxed{7\mathrm{i}}", False),
        ("7i", r"\boxed{7\mathrm{i}}", True),
        ("7-i", r"\boxed{7.0 + -1.0i}", True),
        ("7-i", r"\boxed{7+i}", False),
        (r"9\mathrm{e}", r"\boxed{9}", False),
        ("8t", r"\boxed{8}", False),
        ("8", r"\boxed{8t}", False),
        ("6", r"\boxed{6\sqrt(3)}", False),
        (r"6\sqrt{3}", r"\boxed{6\sqrt(3)}", True),
        (r"6\sqrt{3}", r"\boxed{6*sqrt(3)}", True),
        (r"\frac{\pi}{8}", r"\boxed{pi/8}", True),
        (r"e^{5} - 2", r"\boxed{-2 + exp(5)}", True),
        (r"\frac{1}{\sqrt{k}}", r"\boxed{\sqrt{1/k}}", True),
        ("|x|", r"\boxed{x}", False),
        (r"\cos 60^\circ", r"\boxed{\frac12}", True),
    ],
    "several answers": [
        (r"4 \text{ or } 11", r"\boxed{11 \text{ or } 4}", True),
        (r"4 \text{ or } 11", r"\boxed{411}", False),
        (r"4 \text{ or } 11", r"\boxed{4}", False),
        ("4", r"\boxed{4, 11}", False),
        ("4, 9, 11", r"The solutions are $\boxed{4}$, $\boxed{9}$ and $\boxed{11}$.", True),
        ("4, 9, 11", r"\boxed{\{11, 9, 4\}}", True),
        ("4, 9, 11", r"\boxed{4, 9}", False),
        ("4, 9, 11", r"\boxed{4, 9, 12}", False),
        ("4, 9, 11", r"\boxed{x = 4, x = 9, x = 11}", True),
        ("k = 4, 9", r"\boxed{4, 9}", True),
        ("k = 4, 9", r"\boxed{k = 4, 8}", False),
        (r"\pm 15", r"\boxed{-15, 15}", True),
        (r"\pm 15", r"\boxed{15}", False),
        (r"3 \pm \sqrt{6}", r"\boxed{3 - \sqrt{6}, 3 + \sqrt{6}}", True),
        (r"3 \pm \sqrt{6}", r"\boxed{3 + \sqrt{6}}", False),
        ("x = 4, y = 9", r"\boxed{(4, 9)}", True),
        ("x = 4, y = 9", r"\boxed{y = 9, x = 4}", True),
        ("x = 4, y = 9", r"\boxed{x = 9, y = 4}", False),
        (r"2, 4, \ldots, 2n", r"\boxed{2, 4, 8, \ldots, 2^n}", False),
        (r"2, 4, \ldots, 2n", r"\boxed{2, 4, \dots, 2n}", True),
        (r"6, 20, \text{ and } 71", r"\boxed{6, 21, and 71}", False),
    ],
    "tuples, sets and intervals": [
        ("(2, 9)", r"\boxed{(9, 2)}", False),
        ("(2, 9)", r"\boxed{[2, 9]}", False),
        ("(2, 9)", r"\boxed{(2, 9.5)}", False),
        (r"(2, \frac{9}{2})", r"\boxed{\left(2, 4.5\right)}", True),
        ("(100,200)", r"\boxed{(100, 200)}", True),
        ("P = (2, 9)", r"\boxed{P = (2, 8)}", False),
        ("(2, 9]", r"\boxed{(2, 9)}", False),
        (r"\{2, 9\}", r"\boxed{\{9, 2\}}", True),
        (r"\{2, 9\}", r"\boxed{[2, 9]}", False),
        ("(1, 2), (2, 1)", r"\boxed{(2, 1), (1, 2)}", True),
        ("(1, 2), (2, 1)", r"\boxed{(2, 2), (1, 1)}", False),
        (r"(-\infty, 1) \cup (4, \infty)", r"\boxed{(4, \infty) \cup (-\infty, 1)}", True),
        (r"(-\infty, 1) \cup (4, \infty)", r"\boxed{(-\infty, 1] \cup (4, \infty)}", False),
        (r"\{1, 2, 3, 4\}", r"\boxed{\{1, 3\} \cup \{2, 4\}}", True),
        ("[3, 8]", r"\boxed{3 \le x \le 8}", True),
        ("[3, 8]", r"\boxed{3 \le x < 8}", False),
        (r"t \ge \sqrt{5}", r"\boxed{[\sqrt{5}, \infty)}", True),
        (r"x \in [3, 8]", r"\boxed{[3, 8]}", True),
    ],
    "equations": [
        ("x = 12", r"\boxed{12}", True),
        ("x = 12", r"\boxed{y = 12}", False),
        ("y = 4x - 1", r"\boxed{4x - y - 1 = 0}", True),
        ("y = 4x - 1", r"\boxed{4x - y + 1 = 0}", False),
        ("y = 4x - 1", r"\boxed{4x - 1}", True),
        ("2x - y + 5 = 0", r"\boxed{2x + 3y + 5 = 0}", False),
        (r"\frac{x^2}{9} + \frac{y^2}{4} = 1", r"\boxed{4x^2 + 9y^2 = 36}", True),
        (r"\frac{x^2}{9} + \frac{y^2}{4} = 1", r"\boxed{\frac{x^2}{18} + \frac{y^2}{8} = 1}", False),
        ("x^2 + 4 = 0", r"\boxed{x^2 + 5 = 0}", False),
        ("g(x) = 3", r"\boxed{\forall x > 0, g(x) = 3}", False),
    ],
    "ratios and times": [
        ("1:3:9", r"\boxed{2:6:18}", True),
        ("1:3:9", r"\boxed{1:9:3}", False),
        (r"\frac{5}{6}", r"\boxed{5:6}", True),
        ("10:00", r"\boxed{5:00}", False),
        ("8:45 a.m.", r"\boxed{8:45 \text{ AM}}", True),
        ("8:45 a.m.", r"\boxed{8:45 \text{ p.m.}}", False),
        ("1/5", r"\boxed{9:45}", False),
    ],
    "texts": [
        (r"\text{north}", "The answer is north.", True),
        (r"\text{north}", r"\boxed{\text{North}}", True),
        (r"\text{north}", r"\boxed{\text{south}}", False),
        (r"\text{a circle}", r"\boxed{\text{circle}}", True),
        (r"\text{(D)}", r"\boxed{D}", True),
        (r"\text{(D)}", r"The answer is (D).", True),
        (r"\text{(D)}", r"\boxed{\textbf{(D)}\ 17}", True),
        (r"\text{(D)}", r"\boxed{\text{(A)}}", False),
        (r"\text{(D)}", "The answer is option D.", True),
        (r"\text{(D)}", r"\boxed{(D) or (E)}", False),
        (r"\text{(D)}", "The answer is (D). I hope the answer is correct.", True),
    ],
    "units": [
        (r"5\sqrt{3} \text{ cm}", r"\boxed{5\sqrt{3}}", True),
        (r"5\sqrt{3}", r"\boxed{5\sqrt{3}\,\mathrm{cm}}", True),
        (r"22\mbox{ in}^2", r"\boxed{22}", True),
        (r"22\mbox{ in}^2", r"\boxed{222}", False),
        (r"62\%", r"\boxed{62}", True),
        (r"62\%", r"\boxed{0.62}", True),
    ],
}


def pairs(kinds: dict[str, Pairs]) -> list[tuple[str, str, bool]]:
    return [pair for table in kinds.values() for pair in table]


@pytest.mark.parametrize(("reference", "completion", "right"), pairs(NUMBERS))
def test_numbers(reference: str, completion: str, right: bool) -> None:
    """Without math-verify, which the reference does not need."""
    assert grade(reference, completion, symbolic=False).correct == right


@pytest.mark.parametrize(("reference", "completion", "right"), pairs(FORMULAS))
def test_formulas(reference: str, completion: str, right: bool) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify, extra tasks")
    assert grade(reference, completion, symbolic=True).correct == right


def test_numbers_have_the_same_verdict_among_formulas() -> None:
    """Data with some formulas are graded with `symbolic`, their numbers, too; only there 8 * 8 is 64."""
    pytest.importorskip("math_verify", reason="needs math-verify, extra tasks")
    for kind in ("thousands", "mixed numbers", "units", "signs", "several answers", "times of day"):
        for reference, completion, right in NUMBERS[kind]:
            assert grade(reference, completion, symbolic=True).correct == right, (reference, completion)


@pytest.mark.parametrize("solution", [r"Our answer is $\boxed 3$.", r"Not \boxed{7} but $\boxed3$.", r"\fbox{3}"])
def test_a_solution_may_have_a_box_without_braces(solution: str) -> None:
    """As some of the training set of MATH do."""
    assert MathTask.read_row({"problem": "1 + 2?", "solution": solution}).examples[0].final_answer == "3"


WORDINGS = (
    "The answer is: {}.",
    r"so that we have $\boxed{{{}}}$ at the end of step 3.",
    "First 2 + 2 = 4.\n#### {}",
    "Therefore, the final answer is ${}$.",
    r"Hence \[ \boxed{{{}}}. \]",
    "**Answer:** {}",
    "The final answer is:\n\n$${}$$\n\nI checked it in 2 ways.",
    r"The answer is \({}\). This uses all 7 facts.",
)
NUMBER_WORDINGS = (
    "The answer is ${}.",
    r"\boxed{{\${}}}",
    "The answer is {} dollars per week, which is enough for 3 of them.",
    r"\boxed{{{}\text{{ apples}}}}",
    "She had 3 and got some more, so she has {} now.",
)


def check_rewordings(references: list[str], wordings: tuple[str, ...], symbolic: bool) -> None:
    """Every reference is right in all words, and wrong for its neighbour."""
    for reference, other in itertools.pairwise([*references, references[0]]):
        equal = grade(reference, rf"\boxed{{{other}}}", symbolic).correct
        for wording in wordings:
            assert grade(reference, wording.format(reference), symbolic).correct, (reference, wording)
            assert grade(reference, wording.format(other), symbolic).correct == equal, (reference, other, wording)


def with_thousands(number: str) -> str:
    return f"{int(number):,}" if number.lstrip("-").isdigit() else number


def test_an_answer_is_right_in_all_words_and_its_neighbour_in_none() -> None:
    check_rewordings(["18", "-3", "2125", "65,960", "7"], WORDINGS + NUMBER_WORDINGS, symbolic=False)
    pytest.importorskip("math_verify", reason="needs math-verify, extra tasks")
    check_rewordings([r"\frac{2}{9}", "p + q", r"\left( 2, \pi \right)", r"\text{Ann}"], WORDINGS, symbolic=True)


@pytest.mark.slow
def test_every_answer_of_gsm8k_and_math_500_is_right_in_all_words_and_its_neighbour_in_none(real_data: Path) -> None:
    def rows(name: str) -> list[str]:
        return [str(json.loads(s)["answer"]) for s in (real_data / name).read_text().splitlines()]

    numbers = [answer.rpartition("####")[2].strip() for answer in rows("gsm8k/test.jsonl")]
    check_rewordings(numbers, WORDINGS + NUMBER_WORDINGS, symbolic=False)
    check_rewordings([with_thousands(number) for number in numbers], WORDINGS + NUMBER_WORDINGS, symbolic=False)
    check_rewordings(rows("math500/test.jsonl"), WORDINGS, symbolic=True)
