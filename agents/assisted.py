"""Writing with the teacher on call: which positions it takes at a threshold, or at a share of the tokens.

Light to import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from distill_env.gate_settings import ALWAYS, SMALLEST_TAU, Gate

if TYPE_CHECKING:
    from agents.rollout import Rollout
    from distill_env.env import DistillVectorEnv
    from distill_env.models.base import TokenModel
    from distill_env.tasks.base import Prompt

MAX_TAU = sys.float_info.max  # in place of inf, with which a gate would not read the scores
ROUNDS = 3  # rollouts that follow a share


def assisted_gate(tau: float, gate: Gate | None = None) -> Gate:
    """The given gate, by default the hard gate on D_t, with this tau. At tau = 0 every position is hard."""
    return ALWAYS if tau == 0 else replace(gate or Gate(), tau=min(tau, MAX_TAU))


def write_assisted(
    env: DistillVectorEnv,
    student: TokenModel,
    prompts: Sequence[Prompt],
    gate: Gate,
    seed: int,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """One completion of each prompt by draft and verify; see `collector.collect` for the arguments.

    All draws belong to the number of a completion and a position, so that completions with different gates are equal up
    to the first token of another writer.
    """
    from agents.collector import collect
    from agents.draft_length import DraftLength
    from distill_env.randomness import episode_keys

    keys, length = episode_keys(seed, np.arange(len(prompts))), DraftLength(env.chunk)
    return collect(env, student, prompts, keys, gate, length, top_k or env.teacher_top_k, top_p, keep_teacher=False)


def tau_for_share(
    env: DistillVectorEnv,
    student: TokenModel,
    prompts: Sequence[Prompt],
    share: float,
    seed: int,
    gate: Gate | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    rounds: int = ROUNDS,
) -> float:
    """The threshold at which about this share of the tokens is the teacher's, in the unit of the gate's score.

    The quantile of the scores of what the student writes alone, then of what it writes with the teacher at the
    threshold so far: where the teacher takes over, the text that follows is another one.

    Args:
        env, student, top_k, top_p: as for `write_assisted`.
        prompts: on which it is measured, not those that it is used for.
        share: of the tokens, above 0 and below 1.
        seed: of the draws.
        gate: the gate; by default the hard one on D_t.
        rounds: rollouts.
    """
    tau = MAX_TAU
    for _ in range(rounds):
        rollout = write_assisted(env, student, prompts, assisted_gate(tau, gate), seed, top_k, top_p)
        scores = rollout.score[rollout.mask].numpy()
        tau = max(float(np.quantile(scores[~np.isnan(scores)], 1 - share)), SMALLEST_TAU)
    return tau
