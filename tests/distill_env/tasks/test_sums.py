"""Sums: every correct order is graded as correct and nothing else is; no test problem is trained on."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from distill_env.env import DistillVectorEnv
from distill_env.ragged import PAD
from distill_env.tasks.base import SPLITS, Grade, Prompt
from distill_env.tasks.by_length import number_of_orders
from distill_env.tasks.sums import EOS, SumsTask

encode_completion = SumsTask.encode_completion


def sums_prompt(*digits: int) -> Prompt:
    return Prompt(SumsTask.encode_problem(SumsTask.problem(digits)), "+".join(map(str, digits)) + "=")


def grade(prompt: Prompt, text: str, end: bool = True) -> Grade:
    """Of Sums, without the final value, which is not about being right."""
    result = SumsTask().grade(prompt, ["0123456789+=;".index(c) for c in text] + [EOS] * end)
    return dataclasses.replace(result, final_value=None)


def test_every_right_way_is_right_and_there_are_so_many() -> None:
    """n! / prod(m_i!) orders; `7+2+9=` may be answered `77;29;98`."""
    task = SumsTask()
    assert task.decode(sums_prompt(7, 2, 9).ids) == "7+2+9="
    assert task.decode(encode_completion([7, 2, 9])) == "77;29;98"
    assert grade(sums_prompt(7, 2, 9), "99;76;28") == Grade(1.0, True, True, "972")
    ways = set()
    for order in set(itertools.permutations([3, 3, 1, 3])):
        result = task.grade(sums_prompt(3, 3, 1, 3), encode_completion(order))
        assert result.chain_correct
        ways.add(result.way)
    assert len(ways) == task.number_of_ways(sums_prompt(3, 3, 1, 3)) == number_of_orders([3, 3, 1, 3]) == 4


@pytest.mark.parametrize(
    ("text", "end", "correct", "why"),
    [
        ("77;28;98", True, True, "a wrong total on the way"),
        ("77;29;97", True, False, "a wrong total at the end"),
        ("77;29", True, False, "a missing digit"),
        ("77;29;98;", True, False, "a step too many"),
        ("77;29;29;98", True, True, "a duplicate digit"),
        ("77;79;98", True, True, "one digit twice, another not at all"),
        ("77;29;98", False, False, "no end"),
        ("77;29;98+", True, False, "something after it"),
        ("77;29+98", True, True, "a wrong separator"),
        ("88", False, False, "the value twice, but no end"),
        ("", True, False, "nothing"),
        ("", False, False, "nothing at all"),
        ("8", True, True, "the value alone"),
    ],
)
def test_wrong_answers_are_wrong(text: str, end: bool, correct: bool, why: str) -> None:
    """`correct` asks for the final value only, the score for the whole chain."""
    assert grade(sums_prompt(7, 2, 9), text, end) == Grade(0.0, correct, False, None), why


def test_each_digit_is_added_as_often_as_it_stands() -> None:
    task, prompt = SumsTask(), sums_prompt(3, 3, 1)
    assert task.grade(prompt, encode_completion([3, 1, 3])).chain_correct
    for order in ([3, 1, 1], [3, 1], [3, 3, 1, 1]):
        assert not task.grade(prompt, encode_completion(order)).chain_correct


def test_no_permutation_of_a_problem_is_in_two_splits() -> None:
    """Out of distribution are longer problems, whose multisets are none that the teacher was trained on either."""
    task = SumsTask(prompts_per_length=60)
    seen: dict[tuple[int, ...], str] = {}
    for split in SPLITS:
        prompts = task.prompts(split)
        assert prompts == task.prompts(split)
        assert len(set(prompts)) == len(prompts)
        for prompt in prompts:
            multiset = tuple(sorted(t for t in prompt.ids if t < 10))
            assert seen.setdefault(multiset, split) == split
            assert task.split_of(task.problem(multiset)) == ("test" if split == "ood" else split)
            assert prompt.difficulty == len(multiset)
            assert prompt.reference_completion is not None
            assert task.grade(prompt, prompt.reference_completion).chain_correct
    assert {p.difficulty for p in task.prompts("ood")} == {6, 7}
    everything = [set(task.problems_of(3, split)) for split in ("train", "validation", "test")]
    assert sum(map(len, everything)) == len(set.union(*everything)) == 220
    for digits, _ in everything[0] | everything[2]:
        assert len({task.split_of(task.problem(order)) for order in itertools.permutations(digits)}) == 1


def test_the_shipped_teacher_writes_right_chains_through_the_environment() -> None:
    """At least 98 % at temperature 1 on held-out problems of every number of digits."""
    n = 300
    task = SumsTask()
    for prompts in (task.prompts("test"), task.prompts("ood")):
        for length in sorted({p.difficulty for p in prompts}):
            chosen = [p for p in prompts if p.difficulty == length]
            chosen = [chosen[i % len(chosen)] for i in range(n)]
            env = DistillVectorEnv(n, "sums", "sums", split="test", autoreset_mode="Disabled", reveal_teacher=False)
            env.reset(seed=length, options={"prompts": chosen})
            grades = np.zeros(n)
            while not env.completions.ended.all():
                info = env.step(np.where(env.completions.ended, PAD, env.rewrite_action))[4]
                if "grade" in info:
                    grades[info["_grade"]] = info["grade"][info["_grade"]]
            assert grades.mean() >= 0.98, f"{length} digits: {grades.mean():.3f}"
