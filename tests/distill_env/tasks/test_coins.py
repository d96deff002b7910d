"""Coins: every right way is right, nothing else is, and no test problem is trained on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from distill_env.tasks.coins import EOS, GIVES, SEMICOLON, CoinsTask, correct_ways


def test_correct_ways_are_all_orders_of_coins_that_pay_by_brute_force() -> None:
    for purse, amount in ((2, 5, 7), 9), ((1, 1, 2, 3), 4), ((3, 3, 3), 6), ((1, 2, 3, 4, 5), 9):
        tried = {
            tuple(purse[i] for i in order)
            for size in range(1, len(purse) + 1)
            for order in itertools.permutations(range(len(purse)), size)
        }
        assert set(correct_ways(purse, amount)) == {way for way in tried if sum(way) == amount}


@pytest.mark.parametrize("length", [2, 3, 4])
def test_the_grader_takes_correct_ways_and_nothing_else(length: int) -> None:
    task = CoinsTask(prompts_per_length=20)
    for prompt in task.prompts("test"):
        if prompt.difficulty != length:
            continue
        purse, amount = prompt.ids[: prompt.ids.index(GIVES)], prompt.ids[-1]
        ways = correct_ways(tuple(sorted(purse)), amount)
        assert task.number_of_ways(prompt) == len(ways) > 0
        for way in ways:
            grade = task.grade(prompt, task.encode_completion(way, amount))
            assert grade.correct
            assert grade.chain_correct
            assert grade.way == " ".join(map(str, way))
        for way in itertools.product(range(1, 10), repeat=2):
            if way not in ways and sum(way) <= amount:
                assert not task.grade(prompt, task.encode_completion(way, amount)).correct
        assert prompt.reference_completion is not None
        assert task.grade(prompt, prompt.reference_completion).chain_correct


def test_a_wrong_amount_between_breaks_the_chain_only_and_an_answer_without_an_end_is_wrong() -> None:
    task = CoinsTask()
    prompt = next(p for p in task.prompts("train") if p.difficulty == 4 and len(p.reference_completion or ()) == 12)
    assert prompt.reference_completion is not None
    answer = list(prompt.reference_completion)
    answer[1] += 1
    grade = task.grade(prompt, answer)
    assert (grade.correct, grade.chain_correct, grade.score, grade.way) == (True, False, 0.0, None)
    for broken in (
        prompt.reference_completion[:-1],
        (),
        (EOS,),
        (*prompt.reference_completion[:-1], SEMICOLON),
        (0, 0, EOS),
    ):
        assert not task.grade(prompt, broken).correct


def test_splits_share_no_problem_in_any_order_and_larger_purses_are_out_of_distribution() -> None:
    task = CoinsTask()
    for length in (2, 3, 4, 5):
        parts = [set(task.problems_of(length, split)) for split in ("train", "validation", "test")]
        assert sum(map(len, parts)) == len(list(task.problems(length))) == len(set.union(*parts))
    seen = {(tuple(sorted(p.ids[:-2])), p.ids[-1]) for p in task.prompts("train")}
    for split in ("validation", "test", "ood"):
        prompts = task.prompts(split)  # type: ignore[arg-type]
        assert not seen & {(tuple(sorted(p.ids[:-2])), p.ids[-1]) for p in prompts}
        assert prompts == task.prompts(split)  # type: ignore[arg-type]
    assert {p.difficulty for p in task.prompts("ood")} == {5}


def test_drawn_problems_are_training_problems_with_right_answers() -> None:
    task, rng = CoinsTask(), np.random.default_rng(0)
    train = {problem for length in (2, 3, 4, 5) for problem in task.problems_of(length, "train")}
    for length in (2, 3, 4, 5):
        for _ in range(50):
            problem, answer = task.draw(rng, length)
            purse, amount = problem[: problem.index(GIVES)], problem[-1]
            assert (tuple(sorted(purse)), amount) in train
            way = answer[0::3]
            assert way in correct_ways(tuple(sorted(purse)), amount)
            assert answer == task.encode_completion(way, amount)
    answer = task.encode_completion((7, 2), 9)
    assert task.decode(answer).strip() == "7 2 ; 2 0"
    assert "2 5 7 > 9" + task.decode(answer[:2]) + task.decode(answer[2:]) == "2 5 7 > 9 7 2 ; 2 0"
