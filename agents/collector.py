"""Rollouts by draft and verify: the student drafts, one look-ahead scores it, the gate finds the first hard step.

Each row commits its draft up to its first hard step, lets the teacher write that, and goes on from there; what was not
kept is rewound. The outcome is the token-by-token gated rollout, whatever the length of the drafts and whoever shares
the batch, because every draw is a function of (episode, position, purpose).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.draft_length import DraftLength
from agents.rollout import Rollout, RolloutCost
from agents.teacher_buffer import TeacherBuffer
from distill_env.divergence import project, support
from distill_env.env import DistillVectorEnv
from distill_env.gate import Draft, Gate, GateState, gate
from distill_env.models.base import TokenModel
from distill_env.ragged import PAD, slice_rows
from distill_env.randomness import Purpose, inverse_cdf, uniform
from distill_env.tasks.base import Prompt


def collect(
    env: Any,
    student: TokenModel,
    prompts: Sequence[Prompt],
    keys: NDArray[np.uint64],
    writer: Gate,
    draft_length: DraftLength | int = 1,
    top_k: int = 0,
    top_p: float = 1.0,
    keep_teacher: bool = True,
) -> Rollout:
    """Write one answer to each prompt, the gate deciding who writes each step.

    Args:
        env: a `DistillVectorEnv` with autoreset disabled, wrapped or not. Rows that finish take the next prompt.
        student: the model that drafts.
        prompts: N prompts, at least as many as the environment has rows.
        keys: uint64 [N], the episodes' keys: all randomness of episode i follows from keys[i].
        writer: the gate that decides who writes.
        draft_length: K, or a `DraftLength` that adapts it; at most the environment's `chunk`.
        top_k, top_p: truncation of the divergences and of what is kept of the teacher.
        keep_teacher: keep the teacher's log-probabilities for the update. Without, and with a gate that reads no model,
            only `step` is used: any wrapper that hides `info` will do.
    """
    return Collector(env, student, prompts, keys, writer, draft_length, top_k, top_p, keep_teacher).run()


def check_top_k(core: DistillVectorEnv, top_k: int, reads_teacher: bool) -> None:
    """Raises ValueError if divergences would be read off ids whose probabilities the teacher does not tell."""
    told = core.teacher_top_k
    if reads_teacher and told and not 0 < top_k <= told:
        raise ValueError(f"top_k: {top_k}; accepted: 1 to {told}, the likeliest ids that the teacher's server tells")


class Collector:
    def __init__(
        self,
        env: Any,
        student: TokenModel,
        prompts: Sequence[Prompt],
        keys: NDArray[np.uint64],
        writer: Gate,
        draft_length: DraftLength | int,
        top_k: int,
        top_p: float,
        keep_teacher: bool,
    ) -> None:
        core = env.unwrapped
        assert isinstance(core, DistillVectorEnv)
        if core.metadata["autoreset_mode"].value != "Disabled":
            raise ValueError(f"env: autoreset_mode is {core.autoreset_mode.value}; a rollout needs Disabled")
        if len(prompts) < env.num_envs:
            raise ValueError(f"prompts: {len(prompts)} for an environment of {env.num_envs} rows; at least one each")
        if student.vocab_size != core.vocab_size:
            raise ValueError(f"student: {student.vocab_size} token ids, the environment has {core.vocab_size}")
        if writer.score == "rank" and (top_k or top_p < 1):
            raise ValueError("writer: a rank cannot be read off a truncated distribution; drop top_k and top_p")
        check_top_k(core, top_k, writer.reads_models or keep_teacher)
        self.env, self.core, self.student, self.prompts, self.keys = env, core, student, list(prompts), keys
        self.writer, self.draft_length = writer, draft_length
        self.top_k, self.top_p, self.keep_teacher = top_k, top_p, keep_teacher
        self.reads_teacher = writer.reads_models or keep_teacher
        self.step_ends = torch.tensor(sorted(core.task.step_end_ids))
        self.horizon = core.max_new_tokens

        total, n = len(self.prompts), env.num_envs
        self.tokens = np.full((total, self.horizon), PAD, np.int64)
        self.rewritten = np.zeros((total, self.horizon), np.bool_)
        self.rewards = np.zeros((total, self.horizon))
        self.token_log_prob = torch.zeros(total, self.horizon, dtype=torch.float64)
        self.score = torch.full((total, self.horizon), torch.nan, dtype=torch.float64)
        self.grades = np.zeros(total)
        self.kept = TeacherBuffer(total * self.horizon)

        self.episode = np.arange(n)  # which episode a row writes
        self.next_episode = n
        self.active = np.ones(n, np.bool_)
        self.lengths = np.zeros(n, np.int64)  # committed tokens of the answer
        self.read = np.zeros(n, np.int64)  # of those, the ones the student has read
        self.carry = GateState.start(n)
        self.ledger = RolloutCost()
        self.current: Tensor  # the student's log p at the state that it has read up to, [n, V]

    def run(self) -> Rollout:
        started = time.perf_counter()
        use = self.core.teacher_usage
        before = (use.passes, use.positions, use.tokens)
        self._start(np.flatnonzero(self.active))
        while self.active.any():
            self._block()
        use = self.core.teacher_usage
        self.ledger.teacher_passes = use.passes - before[0]
        self.ledger.teacher_positions = use.positions - before[1]
        self.ledger.teacher_tokens = use.tokens - before[2]
        self.ledger.seconds = time.perf_counter() - started
        self.core.release()
        longest = int((self.tokens >= 0).sum(1).max())
        teacher, ids = self.kept.pop() if self.keep_teacher else (None, None)
        return Rollout(
            self.prompts,
            torch.from_numpy(self.tokens[:, :longest]),
            torch.from_numpy(self.rewritten[:, :longest]),
            torch.from_numpy(self.rewards[:, :longest]),
            self.token_log_prob[:, :longest],
            self.score[:, :longest],
            torch.from_numpy(self.grades),
            teacher,
            ids,
            tuple(self.step_ends.tolist()),
            self.ledger,
        )

    def _start(self, rows: NDArray[np.intp]) -> None:
        """Begin the episodes of `rows` in the environment and in the student."""
        prompts = [self.prompts[e] for e in self.episode[rows]]
        mask = np.zeros(len(self.active), np.bool_)
        mask[rows] = True
        clock = time.perf_counter()
        self.env.reset(options={"prompts": prompts, "episode_keys": self.keys[self.episode[rows]], "reset_mask": mask})
        self.ledger.teacher_seconds += time.perf_counter() - clock
        if not self.writer.always:
            clock = time.perf_counter()
            everyone = len(rows) == len(mask)
            log_probs = self.student.start([p.ids for p in prompts], None if everyone else rows.tolist())
            self.ledger.student_seconds += time.perf_counter() - clock
            index = torch.from_numpy(rows)
            self.current = log_probs if everyone else self.current.index_copy(0, index, log_probs)
        self.lengths[rows] = self.read[rows] = 0
        self.carry = self.carry.put(torch.from_numpy(rows), GateState.start(len(rows)))

    def _block(self) -> None:
        """Draft, look ahead, gate, commit."""
        started, drafting_before = time.perf_counter(), self.ledger.student_seconds
        n, writing = len(self.active), int(self.active.sum())
        if isinstance(self.draft_length, int):
            length = self.draft_length
        elif self.writer.reads_models:
            length = self.draft_length.choose(writing)
        else:  # known beforehand, no draft goes beyond a rewrite
            length = self.core.chunk
        room = np.where(self.active, self.horizon - self.lengths, 0)
        length = max(1, min(length, self.core.chunk, int(room.max())))
        keys = self.keys[self.episode]
        positions = self.lengths[:, None] + np.arange(length)
        # what the gate decides without a model is known before anything is drafted
        known_first = np.full(n, length)
        gate_uniforms = torch.from_numpy(uniform(keys[:, None], positions, Purpose.GATE))
        episode_uniforms = torch.from_numpy(uniform(keys, 0, Purpose.GATE_EPISODE))
        if not self.writer.reads_models:
            nothing = torch.full((n, length), PAD)
            draft = Draft(nothing, torch.zeros(n, length, dtype=torch.bool), gate_uniforms, episode_uniforms)
            decision, _ = gate(self.writer, None, None, draft, self.carry)
            known_first = np.where(decision.rewrite.any(1), decision.rewrite.int().argmax(1), length)
        handed_over = self.carry.handed_over.numpy() > 0
        known_first[handed_over] = 0

        tokens, picked, student = self._draft(np.minimum(room, known_first), length, keys)
        drafted = (tokens >= 0).sum(1)
        ended = (tokens == self.core.task.eos_token_id).any(1)
        # states that exist: one for every drafted token, and the one at which a rewrite is known
        states = np.where(self.active, drafted + ((known_first < room) & (drafted == known_first) & ~ended), 0)
        states = np.minimum(states, length)
        first = np.where(known_first < states, known_first, length)

        clock = time.perf_counter()
        width = int(states.max())
        if self.reads_teacher:
            along = np.where(np.arange(1, width) < states[:, None], tokens[:, : width - 1], PAD)
            log_probs = self.env.unwrapped.lookahead(torch.from_numpy(along))  # [n, width, V]
            if bool(torch.isnan(log_probs[torch.from_numpy(self.active), 0, 0]).any()):  # as a softmax is, all or none
                raise FloatingPointError("teacher: its log-probabilities are not numbers; check its weights and dtype")
        looked = time.perf_counter() - clock
        if student is not None:
            first = self._gate(tokens, states, student, log_probs, gate_uniforms, episode_uniforms)
        own = np.minimum(first, drafted)
        actions = np.where(np.arange(length) < own[:, None], tokens, PAD)
        rows = np.flatnonzero(first < states)
        actions[rows, first[rows]] = self.core.rewrite_action

        clock = time.perf_counter()
        used = max(1, int((actions != PAD).sum(1).max()))
        _, reward, terminated, truncated, info = self.env.step(actions[:, :used])
        self.ledger.teacher_seconds += looked + time.perf_counter() - clock
        self._commit(actions[:, :used], own, picked, reward, info)
        if isinstance(self.draft_length, DraftLength):
            looked_at = np.minimum(first + 1, states)[~handed_over]
            cut_short = ((first < states) | terminated)[~handed_over]
            drafting = self.ledger.student_seconds - drafting_before
            rest = time.perf_counter() - started - drafting
            self.draft_length.observe(writing, int(cut_short.sum()), int(looked_at.sum()), self._pace, width, rest)
        self._finish(np.flatnonzero((terminated | truncated) & self.active))

    def _draft(
        self, limit: NDArray[np.int64], length: int, keys: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], Tensor, Tensor | None]:
        """The student draws up to `limit[i]` tokens in row i.

        Returns:
            tokens int64 [n, K], padded with -1, the student's log q of each [n, K], and for a gate that reads models
            its log q at each of these states [n, K, V]; None if all rows are handed over.
        """
        n = len(self.active)
        tokens = np.full((n, length), PAD, np.int64)
        picked = torch.zeros(n, length, dtype=torch.float64)
        if not (limit > 0).any():
            return tokens, picked, None
        clock = time.perf_counter()
        drafting = limit > 0
        unread = np.where(drafting, self.lengths - self.read, 0)
        if unread.any():
            committed = self.tokens[self.episode]
            block = torch.from_numpy(slice_rows(committed, self.read, self.read + unread))
            after = self.student.extend(block)[torch.arange(n), torch.from_numpy(np.maximum(unread - 1, 0))]
            self.current = torch.where(torch.from_numpy(unread > 0)[:, None], after, self.current)
            self.read = self.read + unread
        visited = []
        for k in range(length):
            if bool(torch.isnan(self.current[torch.from_numpy(drafting), 0]).any()):  # as a softmax is, all or none
                raise FloatingPointError("student: its log-probabilities are not numbers; lower the learning rate")
            drawn = inverse_cdf(self.current, uniform(keys, self.lengths + k, Purpose.STUDENT))
            visited += [self.current] * self.writer.reads_models
            picked[:, k] = self.current.gather(1, drawn[:, None])[:, 0]
            tokens[:, k] = np.where(drafting, drawn.numpy(), PAD)
            drafting = drafting & (tokens[:, k] != self.core.task.eos_token_id) & (k + 1 < limit)
            if k + 1 == length or not drafting.any():
                break
            step = torch.from_numpy(np.where(drafting, tokens[:, k], PAD))
            self.current = self.student.extend(step[:, None])[:, 0]
            self.read = self.read + drafting
        seconds = time.perf_counter() - clock
        self._pace = seconds / (k + 1)
        self.ledger.student_seconds += seconds
        self.ledger.drafted += int((tokens >= 0).sum())
        visited += visited[-1:] * (length - len(visited))
        return tokens, picked, torch.stack(visited, 1) if visited else None

    _pace = 0.0  # seconds a student step took in the last block

    def _gate(
        self,
        tokens: NDArray[np.int64],
        states: NDArray[np.int64],
        student: Tensor,
        teacher: Tensor,
        uniforms: Tensor,
        episode_uniforms: Tensor,
    ) -> NDArray[np.int64]:
        """The first state of each row that is to be rewritten (K if none); scores and the carry are kept."""
        width = teacher.shape[1]
        drafted = torch.from_numpy(tokens[:, :width])
        ids = support(teacher, self.top_k, self.top_p)
        draft = Draft(drafted, self._step_start(drafted), uniforms[:, :width], episode_uniforms)
        decision, carry = gate(self.writer, project(student[:, :width], ids), project(teacher, ids), draft, self.carry)
        exists = torch.arange(width) < torch.from_numpy(states)[:, None]
        rewrite = decision.rewrite & exists
        first = torch.where(rewrite.any(1), rewrite.int().argmax(1), tokens.shape[1])
        last = torch.minimum(first, torch.from_numpy(states) - 1)  # the last state that counts, -1 in idle rows
        rows, columns = torch.nonzero(torch.arange(width) <= last[:, None], as_tuple=True)
        place = torch.from_numpy(self.lengths)[rows] + columns
        self.score[torch.from_numpy(self.episode)[rows], place] = decision.score[rows, columns]
        busy = torch.nonzero(last >= 0)[:, 0]
        self.carry = self.carry.put(busy, carry.at(busy, last[busy]))
        return first.numpy()

    def _step_start(self, drafted: Tensor) -> Tensor:
        """Whether a reasoning step begins at each state of a draft: at the answer's start, or after a step's end."""
        before = torch.full((len(drafted),), PAD)
        rows = np.flatnonzero(self.lengths > 0)
        before[torch.from_numpy(rows)] = torch.from_numpy(self.tokens[self.episode[rows], self.lengths[rows] - 1])
        previous = torch.cat([before[:, None], drafted[:, :-1]], 1)
        start = torch.isin(previous, self.step_ends)
        start[:, 0] |= before == PAD
        return start

    def _commit(
        self,
        actions: NDArray[np.int64],
        own: NDArray[np.int64],
        picked: Tensor,
        reward: NDArray[np.float64],
        info: dict[str, Any],
    ) -> None:
        """Write down what the environment executed, and rewind the student to what stands."""
        executed = actions  # with info hidden only own tokens can have been executed
        if "tokens" in info:
            executed = np.where(info["_tokens"][:, None], info["tokens"], PAD)
        rows, columns = np.nonzero(executed >= 0)
        place = self.lengths[rows] + columns
        episode = self.episode[rows]
        self.tokens[episode, place] = executed[rows, columns]
        self.rewritten[episode, place] = info["rewritten"][rows, columns] if "rewritten" in info else False
        parts = info["token_rewards"] if "token_rewards" in info else reward[:, None]
        self.rewards[episode, place] = parts[rows, columns]
        count = (executed >= 0).sum(1)
        last = np.flatnonzero(count)
        # the task's reward, paid at the end, goes to the last token
        self.rewards[self.episode[last], (self.lengths + count)[last] - 1] += (reward - parts.sum(1))[last]
        if "grade" in info:
            ended = np.flatnonzero(info["_grade"])
            self.grades[self.episode[ended]] = info["grade"][ended]
        rows, columns = np.nonzero(np.arange(actions.shape[1]) < own[:, None])
        self.token_log_prob[self.episode[rows], self.lengths[rows] + columns] = picked[rows, columns]
        self.ledger.committed += int(own.sum())
        if self.keep_teacher:
            for rows, place, log_probs in self.core.executed_log_probs():
                ids = support(log_probs, self.top_k, self.top_p)
                self.kept.append(self.episode[rows], place, project(log_probs, ids), ids)
        kept = np.minimum(self.read, self.lengths + own)
        if (kept != self.read).any():
            self.student.rewind(torch.from_numpy(kept))
            self.read = kept
        self.lengths = self.lengths + count

    def _finish(self, rows: NDArray[np.intp]) -> None:
        """Rows whose answers have ended take the next prompt, or leave."""
        if len(rows) == 0:
            return
        waiting = min(len(rows), len(self.prompts) - self.next_episode)
        refill, leave = rows[:waiting], rows[waiting:]
        if len(leave):
            self.active[leave] = False
            if not self.writer.always:
                self.student.rewind(torch.from_numpy(np.where(self.active, self.read, -1)))
        if len(refill):
            self.episode[refill] = np.arange(self.next_episode, self.next_episode + waiting)
            self.next_episode += waiting
            self._start(refill)
