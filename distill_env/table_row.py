"""One row under a teacher that is a table, in plain numbers: arrays of one element would be several times slower.

The rules are those of the batch. They are worked out for every action of a state when it is first visited.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_env.models.tabular import TabularModel
from distill_env.ragged import PAD, Ints
from distill_env.randomness import DRAW_BLOCK, Purpose, cumulative_distribution, inverse_cdf_number, uniform_number
from distill_env.rules import is_floored, own_reward, rewrite_distribution


@dataclass(frozen=True)
class TableState:
    """A state of the table: what each action pays, what the teacher writes, and what follows."""

    rewards: list[float]  # [V + 1], REWRITE last
    floored: list[np.int64]  # [V + 1], 1 where the reward is the floor
    cumulative: list[float]  # [V], of what the teacher draws from
    next_state: list[int]  # [V]
    log_probs: Tensor  # [V]
    revealed: NDArray[np.float32]  # [V], the same for `info`


class TableRow:
    """Steps of `env`, which has one row, `chunk=1` and a `TabularModel` as its teacher.

    The completion is the environment's own: whatever reads it (look-ahead, rendering, copies) goes on from there.
    """

    def __init__(self, env: Any) -> None:
        self._env, self._completions = env, env.completions
        self._teacher: Any = env.teacher
        self._rewrite = env.rewrite_action
        self._width = 1 if env.rewrite_span == "token" else env.max_new_tokens
        self._stops = {*env.task.step_end_ids} if self._width > 1 else {*range(env.vocab_size)}
        self._states: dict[int, TableState] = {}
        self._version = -1  # of the weights from which `_states` was worked out
        self._changes = -1  # of the completion by the batch, up to which `_state` and `_key` are right
        self._state, self._key = 0, 0  # after the completion; of its episode
        self._executed: list[tuple[int, TableState]] = []  # position and state of each token of the last step

    @staticmethod
    def serves(env: Any) -> bool:
        """Whether this environment can be stepped so."""
        return env.chunk == 1 and isinstance(env.teacher, TabularModel) and env.vocab_size <= 2 * DRAW_BLOCK

    def reset(self) -> dict[str, Any]:
        """Begin the next episode of the row's seed. Returns `info`."""
        self._completions.begin_next(0)
        self._changes = -1
        self._env.written_by(self)
        return self._revealed(self._here())

    def step(self, action: int) -> tuple[float, bool, dict[str, Any]]:
        """Carry out an action. Returns the reward, whether the completion has ended, and `info`.

        Args:
            action: a token or REWRITE; the completion must not have ended.
        """
        env, state, position = self._env, self._here(), int(self._completions.lengths[0])
        by_teacher, reward, floored = action == self._rewrite, state.rewards[action], state.floored[action]
        self._executed, tokens, paid, ended = [], [], reward, False
        while True:
            token = self._draw(state, position) if by_teacher else action
            self._executed.append((position, state))
            ended = self._completions.append_one(0, token, by_teacher, paid)
            tokens.append(token)
            position, self._state, paid = position + 1, state.next_state[token], 0.0
            if ended:
                break
            state = self._rules(self._state)
            if not by_teacher or token in self._stops:
                break
        env.written_by(self)
        info = self._report(tokens, by_teacher, reward) | {"floored": floored}
        if not ended:
            return reward, False, info | self._revealed(state)
        info["cut_off"] = np.array(token != env.task.eos_token_id)
        if env.task.graded:
            info["grade"] = np.float64(env.grade(0))
            reward += env.task_reward * float(info["grade"])
        return reward, True, info

    def _here(self) -> TableState:
        """The state after the completion, which the batch may have begun or written."""
        completions = self._completions
        if self._changes != completions.changes:
            self._changes, self._key = completions.changes, int(completions.keys[0])
            self._state = self._teacher.walk(completions.prompts[0].ids_for_teacher)
            for token in completions.completion(0)[0]:
                self._state = self._rules(self._state).next_state[token]
        return self._rules(self._state)

    @torch.no_grad()
    def _rules(self, state: int) -> TableState:
        if self._version != self._teacher.table._version:
            self._version, self._log_table = self._teacher.table._version, self._teacher.log_table()
            self._states.clear()
        if state not in self._states:
            env, log_probs = self._env, self._log_table[state]
            own = log_probs.double().numpy()
            drawn = rewrite_distribution(log_probs, env.rewrite, env.rewrite_top_p, temperature=env.rewrite_temperature)
            self._states[state] = TableState(
                [*own_reward(own, env.log_prob_floor).tolist(), -float(env.rewrite_cost)],
                [*is_floored(own, env.log_prob_floor).astype(np.int64), np.int64(0)],
                cumulative_distribution(drawn).tolist(),
                self._teacher.next_state[state].tolist(),
                log_probs,
                log_probs.float().numpy(),
            )
        return self._states[state]

    def _draw(self, state: TableState, position: int) -> int:
        self._env.teacher_usage.tokens += 1
        return inverse_cdf_number(state.cumulative, uniform_number(self._key, position, Purpose.TEACHER))

    def _revealed(self, state: TableState) -> dict[str, Any]:
        usage = self._env.teacher_usage
        usage.passes, usage.positions = usage.passes + 1, usage.positions + 1
        return {"teacher_log_probs": state.revealed.copy()} if self._env.reveal_teacher else {}

    def _report(self, tokens: list[int], by_teacher: bool, reward: float) -> dict[str, Any]:
        padding = self._width - len(tokens)
        return {
            "tokens": np.array(tokens + [PAD] * padding),
            "rewritten": np.array([by_teacher] * len(tokens) + [False] * padding),
            "token_rewards": np.array([reward] + [0.0] * (self._width - 1)),
        }

    def __iter__(self) -> Iterator[tuple[Ints, Ints, Ints, Tensor]]:
        """The teacher at the states of the last step, as `DistillVectorEnv.executed_log_probs` reads them."""
        for position, state in self._executed:
            row = np.zeros(1, np.int64)
            yield row, np.array([position]), row, state.log_probs[None]
