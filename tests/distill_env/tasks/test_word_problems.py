"""Word problems: every solution of the grammar is right, in every order, and nothing else is."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from distill_env.tasks.base import SPLITS, Grade, Prompt
from distill_env.tasks.registry import make_task
from distill_env.tasks.word_grammar import Event, tell_story
from distill_env.tasks.word_problems import (
    BEYOND,
    EQUATION,
    WITHIN,
    Equation,
    WordProblemsTask,
    is_solution,
    stories_of,
)
from tests.helpers.byte_tokenizer import save_byte_tokenizer


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> WordProblemsTask:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    made = make_task("word_problems", tokenizer=str(folder))
    assert isinstance(made, WordProblemsTask)
    return made


def test_the_splits_are_disjoint_and_every_kind_is_there(task: WordProblemsTask) -> None:
    texts = {split: {p.text for p in task.prompts(split)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not texts[one] & texts[other]
    for split in SPLITS:
        kinds = BEYOND if split == "ood" else WITHIN
        assert {p.difficulty for p in task.prompts(split)} == {operations for operations, _, _ in kinds}
    assert [s.text for s in stories_of("test")] == [p.text for p in task.prompts("test")]


def test_new_problems_for_training_are_of_every_kind_and_not_held_out(task: WordProblemsTask) -> None:
    drawn = task.draw(np.random.default_rng(0), 400)
    held_out = {p.text for split in SPLITS[1:] for p in task.prompts(split)}
    assert not held_out & {p.text for p in drawn}
    shares = np.bincount([p.difficulty for p in drawn])[1:] / len(drawn)
    assert shares.tolist() == [np.mean([n == kind[0] for kind in WITHIN + BEYOND]) for n in range(1, 7)]
    for prompt in drawn[:20]:
        assert prompt.ids[:10] == tuple(task.tokenizer("Question: ")["input_ids"])
        assert prompt.reference_completion is not None
        assert prompt.reference_completion[-1] == task.eos_token_id


def test_every_reference_is_right_and_another_answer_is_not(task: WordProblemsTask) -> None:
    """Also that the story says all numbers of its events, and that what is left is never negative."""
    for split in ("test", "ood"):
        for prompt in task.prompts(split):
            assert prompt.reference_completion is not None
            grade = task.grade(prompt, prompt.reference_completion)
            assert grade.correct
            assert grade.chain_correct
            text = task.decode(prompt.reference_completion)
            steps = EQUATION.findall(text)
            assert len(steps) == prompt.difficulty
            answer = int(str(prompt.final_answer))
            assert answer > 0
            assert not graded(
                task, prompt, text.replace(f"The answer is {answer}.", f"The answer is {answer + 1}.")
            ).correct


def graded(task: WordProblemsTask, prompt: Prompt, text: str, ended: bool = True) -> Grade:
    ids = task.tokenizer(text)["input_ids"]
    return task.grade(prompt, [*ids, task.eos_token_id] if ended else ids)


def test_what_is_right_and_what_is_not(task: WordProblemsTask) -> None:
    prompt = next(p for p in task.prompts("test") if p.difficulty == 3)
    assert prompt.reference_completion is not None
    text = task.decode(prompt.reference_completion)
    first, *rest = text.split("\n")
    right = graded(task, prompt, text)
    assert right.way
    assert not graded(task, prompt, text, ended=False).correct  # cut off
    assert graded(task, prompt, text.replace("Now", "So now")).way == right.way  # words do not matter
    without = graded(task, prompt, "\n".join(rest))
    assert (without.correct, without.chain_correct) == (True, False)  # a step is missing
    assert not graded(task, prompt, "\n".join([first, first, *rest])).chain_correct  # a number is used twice
    assert not graded(task, prompt, f"{first} = 3\n" + "\n".join(rest)).chain_correct  # not an equation
    assert not graded(task, prompt, text + " Or 7.").correct


STORY = (Event(1, (4, 5)), Event(-1, (6,)), Event(1, (3,)), Event(-1, (2, 4)))  # 20 - 6 + 3 - 8


def equations(text: str) -> list[Equation]:
    return [Equation(int(a), sign, int(b), int(c)) for a, sign, b, c in EQUATION.findall(text)]


@pytest.mark.parametrize(
    ("steps", "right"),
    [
        ("4 * 5 = 20, 20 - 6 = 14, 14 + 3 = 17, 2 * 4 = 8, 17 - 8 = 9", True),
        ("4 * 2 = 8, 5 * 4 = 20, 20 + 3 = 23, 6 + 8 = 14, 23 - 14 = 9", True),  # gains, losses, then both
        ("4 * 5 = 20, 3 + 20 = 23, 23 - 6 = 17, 4 * 2 = 8, 17 - 8 = 9", True),
        ("4 * 5 = 20, 2 * 4 = 8, 6 - 3 = 3, 3 + 8 = 11, 20 - 11 = 9", True),  # net losses
        ("4 * 5 = 20, 20 - 6 = 14, 14 + 3 = 17, 17 - 8 = 9", False),  # where does 8 come from?
        ("4 * 5 = 20, 20 - 6 = 15, 14 + 3 = 17, 2 * 4 = 8, 17 - 8 = 9", False),
        ("4 * 5 = 20, 20 + 3 = 23, 2 * 4 = 8, 23 - 8 = 15", False),  # 6 is left out
        ("4 * 5 = 20, 2 * 4 = 8, 20 + 6 = 26, 26 + 3 = 29, 29 - 8 = 21", False),  # what goes is not added
        ("4 * 4 = 16, 5 * 2 = 10, 16 + 3 = 19, 19 - 10 = 9", False),
    ],
)
def test_orders_that_the_story_allows(steps: str, right: bool) -> None:
    assert is_solution(equations(steps), STORY) == right


def test_equal_numbers_may_be_any_of_them() -> None:
    """6 comes and 6 goes: which of them a step means is settled by what follows."""
    events = (Event(1, (9,)), Event(1, (6,)), Event(-1, (6,)))
    assert is_solution(equations("9 - 6 = 3, 3 + 6 = 9"), events)
    assert is_solution(equations("9 + 6 = 15, 15 - 6 = 9"), events)
    assert is_solution(equations("6 - 6 = 0, 9 + 0 = 9"), events)
    assert not is_solution(equations("6 + 6 = 12, 9 + 12 = 21"), events)


@pytest.mark.parametrize("phrasing", ["plain", "new"])
@pytest.mark.parametrize("operations", range(1, 7))
def test_a_story_has_the_operations_that_were_asked_for(operations: int, phrasing: str) -> None:
    stories = [tell_story(np.random.default_rng([operations, i]), operations, phrasing) for i in range(50)]  # type: ignore[arg-type]
    for story in stories:
        assert story.operations == operations
        assert story.answer > 0
        assert all(str(number) in story.text for event in story.events for number in event.factors)
        assert is_solution(equations(story.solution), story.events)
    assert len({s.text for s in stories}) == 50


def test_a_path_is_refused(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"^path:"):
        make_task("word_problems", tokenizer=str(tmp_path), path="data.jsonl")
