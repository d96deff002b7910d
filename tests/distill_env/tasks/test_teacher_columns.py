"""What data and flags give to the teacher alone: its prompt is worded as the student's, before the same completion."""

from __future__ import annotations

from typing import Any

import pytest

from distill_env.models.toy import toy_tokenizer
from distill_env.tasks.instruct import InstructTask
from distill_env.tasks.math_word import MathTask
from distill_env.tasks.word_problems import WordProblemsTask

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}9{% endif %}{{ m['content'] }}+{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def tokenizer(chat: bool = True) -> Any:
    made = toy_tokenizer("sums")
    made.chat_template = TEMPLATE if chat else None
    return made


def text(task: Any, ids: tuple[int, ...]) -> str:
    return str(task.decode(ids)).replace(" ", "")


def prompt_of(row: dict[str, Any], chat: bool = True, **options: Any) -> tuple[str, str, Any]:
    """What student and teacher read as text, and the prompt."""
    task = InstructTask([row], tokenizer(chat), **options)
    (prompt,) = task.prompts("train")
    return text(task, prompt.ids), text(task, prompt.ids_for_teacher), prompt


@pytest.mark.parametrize("chat", [True, False])
def test_a_text_stands_in_place_of_the_question(chat: bool) -> None:
    student, teacher, prompt = prompt_of({"prompt": "1+2", "teacher_prompt": "1+2;3", "completion": "13"}, chat)
    assert (student, teacher) == (("1+2+=", "1+2;3+=") if chat else ("1+2", "1+2;3"))
    assert prompt.text == "1+2"
    assert prompt.reference_completion == prompt_of({"prompt": "1+2", "completion": "13"}, chat)[2].reference_completion


def test_earlier_messages_stay_and_a_list_replaces_all() -> None:
    said = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    assert prompt_of({"messages": said, "teacher_prompt": "4"})[:2] == ("1+2+3+=", "1+2+4+=")
    other = [{"role": "system", "content": "5"}, {"role": "user", "content": "6"}]
    assert prompt_of({"messages": said, "teacher_prompt": other})[:2] == ("1+2+3+=", "95+6+=")


def test_a_column_of_the_same_prompt_is_no_column() -> None:
    with_column = prompt_of({"prompt": "1+2", "teacher_prompt": "1+2"})[2]
    without = prompt_of({"prompt": "1+2"})[2]
    assert with_column.ids_for_teacher == without.ids_for_teacher == without.ids


def test_a_template_shows_what_the_data_know_and_a_column_comes_first() -> None:
    rows = [{"prompt": "1", "completion": "2"}, {"prompt": "3", "completion": "4", "teacher_prompt": "5"}]
    task = InstructTask(rows, tokenizer(), teacher_prompt="{prompt};{solution};{prompt}")
    assert [text(task, p.ids) for p in task.prompts("train")] == ["1+=", "3+="]
    assert [text(task, p.ids_for_teacher) for p in task.prompts("train")] == ["1;2;1+=", "5+="]
    (own,) = task.make_prompts(["7"])  # of which nobody knows a solution
    assert own.ids_for_teacher == own.ids


def test_the_teacher_may_see_more_solved_examples() -> None:
    """Those of the task, before the same question, and never the question itself."""
    rows = [{"prompt": str(i), "completion": str(i + 1)} for i in range(5)]
    task = InstructTask(rows, tokenizer(), teacher_few_shot=2)
    for prompt in task.prompts("train"):
        question = prompt.text
        shown = text(task, prompt.ids_for_teacher).split("+")
        assert text(task, prompt.ids) == f"{question}+="
        assert shown[-2:] == [question, "="]
        assert len(shown) == 2 * 2 + 2
        assert question not in shown[:4:2]
    plain = WordProblemsTask(tokenizer(False), teacher_few_shot=1)
    assert all(len(p.ids_for_teacher) > len(p.ids) for p in plain.prompts("test"))


def test_the_name_of_the_teacher_is_read_and_neither_column_is_called_unread() -> None:
    row = {"question": "1", "answer": "2", "teacher": "a", "teacher_prompt": "3", "other": "4"}
    for kind in (InstructTask, MathTask):
        task = kind(path=[row], tokenizer=tokenizer())
        assert [p.teacher for p in task.prompts("train")] == ["a"]
        assert set(task.report.unread) == {"other"}


def test_prompts_that_are_too_long_for_the_teacher_are_left_out() -> None:
    rows = [{"prompt": "1", "teacher_prompt": "2" * n} for n in (3, 30)]
    task = InstructTask(rows, tokenizer(), max_teacher_prompt_tokens=20)
    assert len(task.prompts("train")) == 1
    assert [place.number for place in task.report.long_for_teacher] == [2]
    with pytest.raises(ValueError, match="max_teacher_prompt_tokens: 2"):
        InstructTask(rows, tokenizer(), max_teacher_prompt_tokens=2)


@pytest.mark.parametrize(
    ("name", "row", "options"),
    [
        ("teacher_prompt", {"prompt": "1", "teacher_prompt": 5}, {}),
        ("teacher_prompt", {"prompt": "1", "teacher_prompt": [{"role": "assistant", "content": "1"}]}, {}),
        ("teacher", {"prompt": "1", "teacher": ["a"]}, {}),
        ("teacher_prompt", {"prompt": "1"}, {"teacher_prompt": "{prompt}{solution}"}),
        ("teacher_prompt", {"prompt": "1"}, {"teacher_prompt": "no placeholder"}),
        ("teacher_few_shot", {"prompt": "1", "completion": "2"}, {"teacher_few_shot": 1}),
    ],
)
def test_what_cannot_be_read_is_named(name: str, row: dict[str, Any], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name) as error:
        InstructTask([row], tokenizer(), **options)
    assert "\n" not in str(error.value)
