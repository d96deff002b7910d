"""Mathematical problems with a final answer: GSM8K, MATH, AIME, SVAMP, and data with the same columns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from distill_env.models.hub import require
from distill_env.tasks.base import Grade, Prompt, Split
from distill_env.tasks.grading.grade import LONGEST_ANSWER, grade, last_boxed, number
from distill_env.tasks.language import Example, ExampleTask, Reading, Wording
from distill_env.tasks.sources import HubTable, columns_of, is_filled

ACCEPTED = (
    "question and answer (GSM8K), problem with answer or a solution with \\boxed{} (MATH, AIME), "
    "Body, Question and Answer (SVAMP)"
)
COLUMNS = ("body", "question", "problem", "answer", "solution", "equation", "level")
REQUEST = "\n\nReason step by step, and put the final answer into \\boxed{}."


class MathTask(ExampleTask):
    r"""Problems whose final answers are graded by value: see `grading`.

    A row has `question` and `answer`, in which the final answer may follow `####` (GSM8K); or `problem` and `answer`,
    or a `solution` with the final answer in `\boxed{}`, and perhaps a `level` (MATH, AIME); or `Body`, `Question`,
    `Answer` and perhaps `Equation` (SVAMP), in upper or lower case. The difficulty is the level, else the number of
    lines of the solution or of operations of the equation; 0 if there is none of them.

    Without a chat a prompt is `Question: ...\nAnswer:`. Arguments: see `ExampleTask`.

    Raises:
        ValueError: for damaged data, or if a final answer is not a plain number and math-verify is not installed.
    """

    graded = True
    plain, solution, request = "Question: {}\nAnswer:", " {}", REQUEST

    def _set_examples(
        self, examples: Mapping[Split, Sequence[Example]], wording: Wording, skip_bad_rows: bool = False
    ) -> None:
        self.symbolic = any(number(str(e.final_answer)) is None for part in examples.values() for e in part)
        if self.symbolic:
            require("math_verify", "path: grading of answers that are not plain numbers", "tasks")
        super()._set_examples(examples, wording, skip_bad_rows)

    def grade(self, prompt: Prompt, tokens: Sequence[int]) -> Grade:
        """Grade the final answer; steps are not checked.

        `correct`: its value is right; in a completion that was cut off, a final answer counts only if it is marked.
        `final_value`: a number by its value, a formula as it is written; all correct ones are the same.
        """
        if prompt.final_answer is None:
            return Grade(0.0, False, None)
        completion, next_question, _ = self.decode(tokens).partition("\nQuestion:")  # which a plain prompt invites
        ended = bool(next_question) or (len(tokens) > 0 and tokens[-1] == self.eos_token_id)
        verdict = grade(prompt.final_answer, completion, self.symbolic, ended)
        return Grade(float(verdict.correct), verdict.correct, None, None, verdict.undecided, verdict.value)

    @staticmethod
    def read_row(row: dict[str, Any]) -> Reading:
        """A row's problem.

        Raises:
            ValueError: for other columns, an empty problem, or no final answer.
        """
        columns = {str(k).lower(): v for k, v in row.items() if v is not None}
        for key in COLUMNS[:-1]:
            value = columns.get(key, "")
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not isinstance(value, str) and not is_number:
                raise ValueError(f"{key} is {str(value)[:40]!r}; expected text or a number")
        if {"body", "question", "answer"} <= columns.keys():
            example = _read_svamp(columns)
        elif {"question", "answer"} <= columns.keys():
            solution, marked, answer = str(columns["answer"]).rpartition("####")
            lines = [s for s in re.sub(r"<<[^<>]*>>", "", solution).splitlines() if s.strip()]
            example = _example(str(columns["question"]), "\n".join(lines), answer, len(lines) if marked else 0)
        elif "problem" in columns and ("answer" in columns or last_boxed(str(columns.get("solution", "")))):
            solution = str(columns.get("solution", ""))
            answer = str(columns.get("answer", last_boxed(solution)))
            level = re.search(r"\b\d{1,3}\b", str(columns.get("level", "")))
            example = _example(str(columns["problem"]), solution, answer, int(level[0]) if level else 0)
        else:
            raise ValueError(f"the columns are {columns_of(row)}; expected {ACCEPTED}")
        if not example.question.strip() or not example.final_answer:
            missing = "answer" if example.question.strip() else "problem"
            raise ValueError(f"the {missing} is empty; expected text")
        if len(example.final_answer) > LONGEST_ANSWER:
            length = len(example.final_answer)
            raise ValueError(f"an answer of {length} characters; expected at most {LONGEST_ANSWER}")
        return Reading([example], [str(k) for k in row if is_filled(row[k]) and str(k).lower() not in COLUMNS])


class GSM8KTask(MathTask):
    """Grade-school word problems (Cobbe et al. 2021, 2110.14168); SVAMP is out of distribution."""

    hub: ClassVar[HubTable] = {
        "train": ("openai/gsm8k", "main", "train"),
        "test": ("openai/gsm8k", "main", "test"),
        "ood": ("ChilleD/SVAMP", None, "test"),
    }


class CompetitionMathTask(MathTask):
    """Competition problems (Hendrycks et al. 2021, 2103.03874); the test split is MATH-500."""

    hub: ClassVar[HubTable] = {
        "train": ("DigitalLearningGmbH/MATH-lighteval", None, "train"),
        "test": ("HuggingFaceH4/MATH-500", None, "test"),
    }


class AIMETask(MathTask):
    """The American Invitational Mathematics Examination of 2024."""

    hub: ClassVar[HubTable] = {"test": ("HuggingFaceH4/aime_2024", None, "train")}


class SVAMPTask(MathTask):
    """Varied one-step word problems (Patel et al. 2021, 2103.07191)."""

    hub: ClassVar[HubTable] = {"train": ("ChilleD/SVAMP", None, "train"), "test": ("ChilleD/SVAMP", None, "test")}


def _example(question: str, solution: str, answer: str, difficulty: int) -> Example:
    """An example whose solution ends with the final answer in a box, as `REQUEST` asks for it."""
    answer = answer.strip()
    if last_boxed(solution) is None:
        solution = f"{solution}\nThe answer is \\boxed{{{answer}}}.".lstrip()
    return Example(question, solution, answer, difficulty)


def _read_svamp(columns: dict[str, Any]) -> Example:
    body, asked = str(columns["body"]).strip(), str(columns["question"]).strip()
    answer = re.sub(r"\.0$", "", str(columns["answer"]).strip())
    equation = re.sub(r"\.0\b|^\( | \)$", "", str(columns.get("equation", "")).strip())
    question = " ".join(s for s in (body if body.endswith((".", "?", "!")) else f"{body}.", asked) if s != ".")
    solution = f"{equation} = {answer}" if equation else ""
    return _example(question, solution, answer, len(re.findall(r" [-+*/] ", equation)))
