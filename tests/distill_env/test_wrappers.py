"""Wrappers that hand implausible tokens over to the teacher."""

from __future__ import annotations

from collections import Counter
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv

from distill_env.env import DistillEnv, DistillVectorEnv
from distill_env.ragged import PAD
from distill_env.wrappers import RewriteImplausible, SingleRewriteImplausible
from tests.helpers.environments import MODES, arguments_of, assert_equal, one_state_env, random_actions


@pytest.mark.parametrize(
    ("limits", "rewritten"),
    [
        ({"top_k": 1}, [False, True, True, True, True]),
        ({"top_k": 2}, [False, False, True, True, True]),
        ({"top_k": 3}, [False, False, False, True, True]),
        ({"min_log_prob": np.log(0.1)}, [False, False, False, True, True]),
        ({"top_k": 2, "min_log_prob": np.log(0.4)}, [False, True, True, True, True]),
        ({}, [False, False, False, False, True]),
    ],
)
def test_what_the_teacher_finds_implausible_is_handed_over(limits: dict[str, Any], rewritten: list[bool]) -> None:
    """Tokens outside its `top_k` or below `min_log_prob`; a REWRITE stays one."""
    env = RewriteImplausible(one_state_env([0.45, 0.3, 0.2, 0.05], 5, rewrite_cost=0.6), **limits)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.arange(5))
    assert info["rewritten"][:, 0].tolist() == rewritten
    paid = np.append(np.log([0.45, 0.3, 0.2, 0.05]), -0.6)
    np.testing.assert_allclose(reward, np.where(rewritten, -0.6, paid))


def test_padding_is_not_handed_over() -> None:
    """Though the first token, whose place it takes in a look-up, would be."""
    env = RewriteImplausible(one_state_env([0.05, 0.45, 0.3, 0.2], 2), top_k=1)
    env.reset(seed=0)
    info = env.step(np.array([PAD, 1]))[4]
    assert info["tokens"].tolist() == [[PAD], [1]]
    assert not info["rewritten"].any()


@pytest.mark.parametrize("mode", MODES)
def test_the_gated_batch_equals_gated_single_environments(mode: str) -> None:
    """It looks at the teacher where the tokens will be written: across ends, resets and masked resets."""
    arguments = arguments_of("ragged table")
    batch = RewriteImplausible(DistillVectorEnv(4, **arguments, autoreset_mode=mode), top_k=2)
    singles = SyncVectorEnv(
        [lambda: SingleRewriteImplausible(DistillEnv(**arguments), top_k=2)] * 4, autoreset_mode=mode
    )
    rng = np.random.default_rng(0)
    assert_equal(batch.reset(seed=0), singles.reset(seed=0))
    written = Counter[bool]()
    for _ in range(40):
        actions = random_actions(batch.unwrapped, rng, 4, rewrites=0.0)  # type: ignore[arg-type]
        ours, theirs = batch.step(actions), singles.step(actions)
        assert_equal(ours, theirs)
        done = ours[2] | ours[3]
        for info in (ours[4], ours[4].get("final_info", {})):
            written.update(info.get("rewritten", np.zeros((0, 1)))[info.get("_rewritten", [])][:, 0].tolist())
        if mode == "Disabled" and done.any():
            mask = {"reset_mask": done}
            assert_equal(batch.reset(options=mask), singles.reset(options=dict(mask)))
    assert 0.5 < written[True] / written.total() < 0.85  # two of six tokens stand


def test_a_gate_needs_to_see_the_teacher() -> None:
    for hides in ({"chunk": 2}, {"reveal_teacher": False}):
        env = RewriteImplausible(DistillVectorEnv(2, **arguments_of("table"), **hides), top_k=2)
        with pytest.raises(ValueError, match=r"^env: "):
            env.reset()
    with pytest.raises(ValueError, match=r"^top_k: "):
        RewriteImplausible(DistillVectorEnv(2, **arguments_of("table")), top_k=-1)
    with pytest.raises(gym.error.ResetNeeded):
        RewriteImplausible(DistillVectorEnv(2, **arguments_of("table")), top_k=1).step(np.array([0, 1]))
    wrapped = SingleRewriteImplausible(gym.make("Distill/Categorical-v0"), top_k=2)
    assert wrapped.spec is not None
    assert isinstance(gym.make(EnvSpec.from_json(wrapped.spec.to_json())), SingleRewriteImplausible)
