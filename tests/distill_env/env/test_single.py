"""The single form on a table, in plain numbers, against the batch of one row, which goes by arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distill_env.env import DistillEnv, DistillVectorEnv
from distill_env.models.tabular import markov
from distill_env.table_row import TableRow
from distill_env.tasks.categorical import CategoricalTask
from tests.helpers.environments import REWRITE, V, arguments_of, assert_equal

SETTINGS: list[dict[str, Any]] = [
    {},
    {"rewrite": "argmax"},
    {"rewrite": "nucleus", "rewrite_top_p": 0.6},
    {"rewrite_span": "step"},
    {"log_prob_floor": -1.5},
    {"reveal_teacher": False, "rewrite_cost": 0, "task_reward": 3},
    {"observation": "one_hot"},
]


def pair(**kwargs: Any) -> tuple[DistillEnv, DistillVectorEnv]:
    """The two forms of one environment."""
    arguments = arguments_of("ragged table", **kwargs)
    single = DistillEnv(**arguments)
    assert TableRow.serves(single.batch)
    return single, DistillVectorEnv(1, **arguments, autoreset_mode="Disabled")


def as_arrays(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the single form returned, with arrays instead of numbers."""
    *values, info = result
    return (*map(np.asarray, values), {key: np.asarray(value) for key, value in info.items()})


def first_row(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the batch returned, without masks."""
    *arrays, info = result
    row = {key: value[0] for key, value in info.items() if not key.startswith("_")}
    return as_arrays((*(array[0] for array in arrays), row))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_both_forms_are_the_same_to_the_last_bit(settings: dict[str, Any]) -> None:
    """Whatever is asked of the single form in between, which then goes on by arrays and returns to numbers."""
    single, batch = pair(**settings)
    rng = np.random.default_rng(0)
    assert_equal(as_arrays(single.reset(seed=7)), first_row(batch.reset(seed=7)))
    lengths = []
    for step in range(400):
        action = int(rng.integers(-1, REWRITE + 1)) if rng.random() < 0.7 else REWRITE
        ours, theirs = single.step(action), batch.step(np.array([action]))
        assert_equal(as_arrays(ours), first_row(theirs))
        for (*places, log_probs), (*expected, other) in zip(
            single.batch.executed_log_probs(), batch.executed_log_probs(), strict=True
        ):
            assert_equal(tuple(places), tuple(expected))
            assert torch.equal(log_probs, other)
        if step % 7 == 0 and not ours[2]:
            draft = torch.tensor([[1, 2]])
            assert torch.equal(single.lookahead(draft[0]), batch.lookahead(draft)[0])
        if ours[2]:
            lengths.append(int(batch.completions.lengths[0]))
            options = {"prompts": [(1, 2)]} if step % 5 == 0 else None
            single.lookahead(torch.tensor([1]))  # the teacher has read the completion that has ended
            assert_equal(as_arrays(single.reset(options=options)), first_row(batch.reset(options=options)))
            assert torch.equal(single.lookahead(torch.tensor([1, 2])), batch.lookahead(torch.tensor([[1, 2]]))[0])
    assert len(set(lengths)) > 3
    np.testing.assert_array_equal(single.batch.completions.rewards, batch.completions.rewards)


def test_an_episode_is_told_from_another_with_the_same_key() -> None:
    """Of another prompt, and of other tokens that were written by arrays."""
    single, batch = pair()
    for prompt, arrays in (((0,), False), ((1, 2), False), ((0,), True), ((1, 2), True), ((0,), False)):
        options = {"prompts": [prompt], "episode_keys": np.array([5], np.uint64)}
        single.reset(options=options)
        batch.reset(options=options)
        for action in (prompt[-1] + 1, REWRITE):
            single.step(np.array(action) if arrays else action)
            batch.step(np.array([action]))
        assert_equal(as_arrays(single.step(2)), first_row(batch.step(np.array([2]))))
    single.reset()
    key = {"episode_keys": single.batch.completions.keys.copy(), "prompts": [(3, 0, 1)]}
    single.reset(options=key)
    batch.reset(options=key)
    assert_equal(as_arrays(single.step(1)), first_row(batch.step(np.array([1]))))


def test_the_teachers_work_is_counted_alike() -> None:
    single, batch = pair()
    single.reset(seed=0)
    batch.reset(seed=0)
    for action in (REWRITE, 1, REWRITE, 5):
        single.step(action)
        batch.step(np.array([action]))
    assert single.batch.teacher_usage == batch.teacher_usage


def test_a_table_that_is_trained_is_read_anew() -> None:
    teacher = markov(V)
    env = DistillEnv(task=CategoricalTask(V), teacher=teacher)
    env.reset(seed=0, options={"prompts": [(0,)]})
    first = env.step(1)[1]
    with torch.no_grad():
        teacher.table[1, 1] += 3.0
    env.reset(options={"prompts": [(0,)]})
    second = env.step(1)[1]
    assert second == pytest.approx(teacher.log_table()[1, 1].item())
    assert second > first + 0.1


@pytest.mark.parametrize("action", [3, np.int64(3), np.int32(3), np.array(3), np.uint8(3)])
def test_any_integer_is_an_action(action: Any) -> None:
    env, other = pair()[0], pair()[0]
    env.reset(seed=0)
    other.reset(seed=0)
    assert_equal(env.step(action), other.step(3))


@pytest.mark.parametrize("action", [3.0, True, "a", None, V + 1, -2, np.float32(1)])
def test_anything_else_is_refused(action: Any) -> None:
    env = pair()[0]
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"^actions: "):
        env.step(action)


def test_other_teachers_and_chunks_go_by_arrays() -> None:
    assert not TableRow.serves(DistillVectorEnv(1, **arguments_of("language model")))
    assert not TableRow.serves(DistillVectorEnv(1, **arguments_of("table"), chunk=2))
