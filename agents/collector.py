"""Rollouts by draft and verify: the student drafts, one look-ahead scores the draft, the gate decides.

Each row commits its draft up to its first hard position, lets the teacher write that position, and continues from
there; the rest of the draft is rewound. The result equals the token-by-token gated rollout for every draft length and
every batch, because every draw is a function of (episode, position, purpose).

A gate that reads the student alone needs no look-ahead: a draft ends where it is hard, and only there the teacher is
called. What the update reads of the teacher comes with these calls, and at the end of a completion.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.draft_length import DraftLength
from agents.rollout import Rollout, RolloutCost
from agents.rollout_metrics import count_usage
from agents.teacher_buffer import TeacherBuffer
from distill_env.divergence import project, support
from distill_env.env import DistillVectorEnv
from distill_env.gate import DraftBlock, GateState, apply_gate, student_score
from distill_env.gate_settings import Gate
from distill_env.models.base import TokenModel
from distill_env.ragged import PAD, slice_rows
from distill_env.randomness import Purpose, inverse_cdf, uniform
from distill_env.tasks.base import Prompt

IntArray = NDArray[np.int64]


def collect(
    env: Any,
    student: TokenModel,
    prompts: Sequence[Prompt],
    keys: NDArray[np.uint64],
    gate: Gate,
    draft_length: DraftLength | int = 1,
    top_k: int = 0,
    top_p: float = 1.0,
    keep_teacher: bool = True,
) -> Rollout:
    """Write one completion for each prompt, the gate deciding who writes each token.

    Args:
        env: a `DistillVectorEnv`, wrapped or not. Rows that finish take the next prompt, whatever its autoreset.
        student: the model that drafts.
        prompts: N prompts, at least as many as the environment has rows.
        keys: uint64 [N], the episodes' keys: all randomness of episode i follows from keys[i].
        gate: the teacher writes where it rewrites.
        draft_length: K, or a `DraftLength` that adapts it; at most the environment's `chunk`.
        top_k, top_p: truncation of the divergences and of the teacher's distributions in the result.
        keep_teacher: keep the teacher's log-probabilities for the update. Without, and with a gate that reads no model,
            only `step` is used, so that any wrapper that hides `info` will do.

    Raises:
        ValueError: for an environment, a gate or a truncation that do not go together.
        FloatingPointError: if a model returns NaN.
    """
    return Collector(env, student, prompts, keys, gate, draft_length, top_k, top_p, keep_teacher).run()


def check_top_k(core: DistillVectorEnv, top_k: int, reads_teacher: bool) -> None:
    """Raise ValueError if divergences would be taken over ids whose probabilities the teacher does not return."""
    available = core.teacher_top_k
    if reads_teacher and available and not 0 < top_k <= available:
        raise ValueError(f"top_k: {top_k}; expected 1 to {available}, the number of ids that the teacher returns")


@dataclass
class _Draft:
    """A block of drafted tokens: n rows of at most K tokens."""

    tokens: IntArray  # [n, K], padded with -1
    log_prob: Tensor  # float64 [n, K], log q of the tokens
    student: Tensor | None  # log q at each position [n, K, V], for a gate that reads the models
    states: IntArray  # [n], positions to score: one per drafted token, plus one where a rewrite is known beforehand
    first: IntArray  # [n], the first position to rewrite that is known without the teacher; K if none
    gate_uniforms: Tensor  # float64 [n, K]
    episode_uniforms: Tensor  # float64 [n]
    student_score: Tensor | None = None  # float64 [n, K], for a gate with a screen


class Collector:
    """One rollout; arguments as for `collect`."""

    def __init__(
        self,
        env: Any,
        student: TokenModel,
        prompts: Sequence[Prompt],
        keys: NDArray[np.uint64],
        gate: Gate,
        draft_length: DraftLength | int,
        top_k: int,
        top_p: float,
        keep_teacher: bool,
    ) -> None:
        core = env.unwrapped
        assert isinstance(core, DistillVectorEnv)
        if len(prompts) < env.num_envs:
            raise ValueError(f"prompts: {len(prompts)} for {env.num_envs} rows; expected at least one per row")
        if student.vocab_size != core.vocab_size:
            raise ValueError(f"student: {student.vocab_size} token ids, the environment has {core.vocab_size}")
        if gate.reads_tokens and (top_k or top_p < 1):
            raise ValueError(f"score: {gate.score!r} with top_k or top_p; it needs the teacher's whole distribution")
        check_top_k(core, top_k, gate.reads_teacher or keep_teacher)
        self.env, self.core, self.student, self.prompts, self.keys = env, core, student, list(prompts), keys
        self.gate, self.draft_length = gate, draft_length
        self.top_k, self.top_p, self.keep_teacher = top_k, top_p, keep_teacher
        self.alone = gate.needs_scores and not gate.reads_teacher  # whether the gate reads the student alone
        self.reads_teacher = gate.reads_teacher or (keep_teacher and not self.alone)
        self.step_ends = torch.tensor(sorted(core.task.step_end_ids))
        self.horizon = core.max_new_tokens

        total, n = len(self.prompts), env.num_envs
        self.tokens = np.full((total, self.horizon), PAD, np.int64)
        self.rewritten = np.zeros((total, self.horizon), np.bool_)
        self.rewards = np.zeros((total, self.horizon))
        self.token_log_prob = torch.zeros(total, self.horizon, dtype=torch.float64)
        self.score = torch.full((total, self.horizon), torch.nan, dtype=torch.float64)
        self.grades = np.zeros(total)
        self.buffer = TeacherBuffer(total * self.horizon)

        self.episode = np.arange(n)  # the episode of each row
        self.next_episode = n
        self.active = np.ones(n, np.bool_)
        self.lengths = np.zeros(n, np.int64)  # committed tokens of the completion
        self.student_lengths = np.zeros(n, np.int64)  # of those, the ones that the student has read
        self.gate_state = GateState.start(n)
        self.cost = RolloutCost()
        self.current: Tensor  # log q after the tokens that the student has read, [n, V]
        self.predicted: Tensor | None = None  # D_t there as the student's hand-over head predicts it, [n]
        self.held = np.full((n, core.chunk), PAD, np.int64)  # drafted without the teacher, and not executed yet
        self.held_log_prob = torch.zeros(n, core.chunk, dtype=torch.float64)
        self.seen = np.zeros(n, np.int64)  # positions that the calls have had the teacher process, prompts included
        self.seconds_per_step = 0.0  # of the student in the last block

    def run(self) -> Rollout:
        """Write all completions."""
        started = time.perf_counter()
        with count_usage(self.core) as usage, self.core.without_autoreset():
            self._start(np.flatnonzero(self.active))
            while self.active.any():
                self._block()
        self.cost.teacher_passes, self.cost.teacher_positions, self.cost.teacher_tokens = astuple(usage)
        self.cost.scored += self.cost.teacher_tokens
        self.cost.seconds = time.perf_counter() - started
        self.core.release()
        longest = int((self.tokens >= 0).sum(1).max())
        teacher, ids = self.buffer.pop() if self.keep_teacher else (None, None)
        return Rollout(
            prompts=self.prompts,
            tokens=torch.from_numpy(self.tokens[:, :longest]),
            rewritten=torch.from_numpy(self.rewritten[:, :longest]),
            rewards=torch.from_numpy(self.rewards[:, :longest]),
            token_log_prob=self.token_log_prob[:, :longest],
            score=self.score[:, :longest],
            grades=torch.from_numpy(self.grades),
            teacher=teacher,
            support=ids,
            step_end_ids=tuple(self.step_ends.tolist()),
            cost=self.cost,
        )

    def _start(self, rows: NDArray[np.intp]) -> None:
        """Begin the episodes of `rows` in the environment and in the student."""
        prompts = [self.prompts[e] for e in self.episode[rows]]
        mask = np.zeros(len(self.active), np.bool_)
        mask[rows] = True
        clock = time.perf_counter()
        self.env.reset(options={"prompts": prompts, "episode_keys": self.keys[self.episode[rows]], "reset_mask": mask})
        self.cost.teacher_seconds += time.perf_counter() - clock
        if not self.gate.always:
            clock = time.perf_counter()
            everyone = len(rows) == len(mask)
            log_probs = self.student.start([p.ids for p in prompts], None if everyone else rows.tolist())
            self.cost.student_seconds += time.perf_counter() - clock
            index = torch.from_numpy(rows).to(log_probs.device)
            self.current = log_probs if everyone else self.current.index_copy(0, index, log_probs)
            predicted = self._predicted()
            if predicted is not None:
                self.predicted = predicted if self.predicted is None else self.predicted.index_copy(0, index, predicted)
        self.lengths[rows] = self.student_lengths[rows] = self.seen[rows] = 0
        self.gate_state = self.gate_state.put(torch.from_numpy(rows), GateState.start(len(rows)))

    def _block(self) -> None:
        """Draft, verify, execute, and tell the draft length what that showed."""
        started, drafting_before = time.perf_counter(), self.cost.student_seconds
        writing, handed_over = int(self.active.sum()), self.gate_state.handed_over.numpy() > 0
        draft = self._draft_until_called() if self.alone else self._draft()
        teacher, width = self._look_ahead(draft)
        first = draft.first if draft.student is None else self._first_hard(draft, teacher)
        self._count_calls(draft, first, handed_over)
        by_end_token, ended = self._execute(draft, first)
        if isinstance(self.draft_length, DraftLength):
            scored = np.minimum(first + 1, draft.states)[~handed_over]
            cut_short = ((first < draft.states) | by_end_token)[~handed_over]
            drafting = self.cost.student_seconds - drafting_before
            rest = time.perf_counter() - started - drafting
            counts = int(cut_short.sum()), int(scored.sum())
            self.draft_length.observe(writing, *counts, self.seconds_per_step, width, rest)
        self._finish(np.flatnonzero(ended & self.active))

    def _draft(self) -> _Draft:
        """Let the student draft a block, as far as it is known that its tokens can be accepted."""
        n = len(self.active)
        if isinstance(self.draft_length, int):
            length = self.draft_length
        elif self.gate.needs_scores:
            length = self.draft_length.choose(int(self.active.sum()))
        else:  # decisions are known beforehand, so no draft goes beyond a rewrite
            length = self.core.chunk
        room = np.where(self.active, self.horizon - self.lengths, 0)
        length = max(1, min(length, self.core.chunk, int(room.max())))
        keys = self.keys[self.episode]
        positions = self.lengths[:, None] + np.arange(length)
        gate_uniforms = torch.from_numpy(uniform(keys[:, None], positions, Purpose.GATE))
        episode_uniforms = torch.from_numpy(uniform(keys, 0, Purpose.GATE_EPISODE))
        known = np.full(n, length)
        if not self.gate.needs_scores:
            no_tokens = torch.full((n, length), PAD)
            block = DraftBlock(
                no_tokens, torch.zeros_like(no_tokens, dtype=torch.bool), gate_uniforms, episode_uniforms
            )
            decision, _ = apply_gate(self.gate, None, None, block, self.gate_state)
            known = np.where(decision.rewrite.any(1), decision.rewrite.int().argmax(1), length)
        known[self.gate_state.handed_over.numpy() > 0] = 0

        tokens, log_prob, student, own_score = self._draw(np.minimum(room, known), length, keys)
        drafted = (tokens >= 0).sum(1)
        ended = (tokens == self.core.task.eos_token_id).any(1)
        states = np.where(self.active, drafted + ((known < room) & (drafted == known) & ~ended), 0)
        states = np.minimum(states, length)
        first = np.where(known < states, known, length)
        return _Draft(tokens, log_prob, student, states, first, gate_uniforms, episode_uniforms, own_score)

    def _predicted(self) -> Tensor | None:
        """What the student's hand-over head says of the states that it has read last, if the gate asks."""
        return getattr(self.student, "predicted", None) if self.gate.student_score == "predicted_divergence" else None

    def _read_committed(self, drafting: NDArray[np.bool_]) -> None:
        """The student reads the committed tokens that it has not written itself, in rows that draft on."""
        unread = np.where(drafting, self.lengths - self.student_lengths, 0)
        if not (unread > 0).any():
            return
        unread = np.maximum(unread, 0)  # it has read ahead what it holds
        committed, stop = self.tokens[self.episode], self.student_lengths + unread
        after = self.student.extend(torch.from_numpy(slice_rows(committed, self.student_lengths, stop)))
        last = torch.from_numpy(np.maximum(unread - 1, 0)).to(after.device)
        rows, new = torch.arange(len(unread), device=after.device), torch.from_numpy(unread > 0).to(after.device)
        self.current = torch.where(new[:, None], after[rows, last], self.current)
        predicted = self._predicted()
        if predicted is not None and self.predicted is not None:
            self.predicted = torch.where(new, predicted[rows, last], self.predicted)
        self.student_lengths = stop

    def _read_drafted(self, tokens: IntArray) -> None:
        """The student reads a token in each row [n], -1 for none."""
        self.current = self.student.extend(torch.from_numpy(tokens)[:, None])[:, 0]
        predicted = self._predicted()
        self.predicted = None if predicted is None else predicted[:, 0]
        self.student_lengths = self.student_lengths + (tokens >= 0)

    def _read_student(self) -> Tensor | None:
        """What the gate reads of the student alone in its present states, float64 [n, 1]."""
        predicted = None if self.predicted is None else self.predicted[:, None]
        return student_score(self.gate, self.current[:, None], predicted)

    def _draft_until_called(self) -> _Draft:
        """Let the student draft without the teacher: each row until its gate calls the teacher or it cannot go on.

        After as many tokens as the draft length says, rows that wait are served as soon as there is one. The others
        hold what they have drafted, and go on in the next block.
        """
        clock, keys, eos = time.perf_counter(), self.keys[self.episode], self.core.task.eos_token_id
        chosen = self.draft_length
        length = chosen if isinstance(chosen, int) else chosen.choose(int(self.active.sum()))
        limit = np.where(self.active, np.minimum(self.horizon - self.lengths, self.core.chunk), 0)
        episode_uniforms = torch.from_numpy(uniform(keys, 0, Purpose.GATE_EPISODE))
        called = self.active & (self.gate_state.handed_over.numpy() > 0)
        drafting = self.active & ~called
        self._read_committed(drafting)
        steps = 0
        while drafting.any():
            count = (self.held >= 0).sum(1)
            position = self.lengths + count
            hard = self._call(drafting, count, keys, episode_uniforms)
            called, drafting = called | hard, drafting & ~hard
            if drafting.any():
                drawn = inverse_cdf(self.current, uniform(keys, position, Purpose.STUDENT))
                picked = self.current.gather(1, drawn[:, None])[:, 0].double().cpu()
                tokens, rows = np.where(drafting, drawn.cpu().numpy(), PAD), np.flatnonzero(drafting)
                self.held[rows, count[rows]] = tokens[rows]
                self.held_log_prob[rows, count[rows]] = picked[rows]
                if bool(picked[rows].isnan().any()):
                    raise FloatingPointError("student: its log-probabilities are NaN; lower the learning rate")
                self.cost.drafted += len(rows)
                steps += 1
                drafting = drafting & (tokens != eos) & (count + 1 < limit)
            if drafting.any():
                self._read_drafted(np.where(drafting, tokens, PAD))
            if steps >= length and (self.active & ~drafting).any():
                break
        seconds = time.perf_counter() - clock
        self.seconds_per_step = seconds / max(steps, 1)
        self.cost.student_seconds += seconds
        waiting = self.active & ~drafting
        tokens, log_prob = np.where(waiting[:, None], self.held, PAD), self.held_log_prob.clone()
        self.held[waiting] = PAD
        drafted = (tokens >= 0).sum(1)
        first = np.where(called, drafted, self.core.chunk)
        uniforms = torch.zeros(tokens.shape, dtype=torch.float64)
        return _Draft(tokens, log_prob, None, drafted + called, first, uniforms, episode_uniforms)

    def _call(
        self, drafting: NDArray[np.bool_], held: IntArray, keys: NDArray[np.uint64], episode_uniforms: Tensor
    ) -> NDArray[np.bool_]:
        """Whether the gate calls the teacher in the present state of each row, bool [n]; its score and its memory are
        recorded. `held` counts the tokens that a row holds."""
        n, position = len(held), self.lengths + held
        before = np.where(held > 0, self.held[np.arange(n), held - 1], self.tokens[self.episode, self.lengths - 1])
        previous = torch.from_numpy(np.where(position > 0, before, PAD))
        start = torch.isin(previous, self.step_ends) | (previous == PAD)
        uniforms = torch.from_numpy(uniform(keys, position, Purpose.GATE))[:, None]
        tokens = torch.full((n, 1), PAD)
        block = DraftBlock(tokens, start[:, None], uniforms, episode_uniforms, self._read_student())
        decision, after = apply_gate(self.gate, self.current[:, None], None, block, self.gate_state)
        rows = torch.from_numpy(np.flatnonzero(drafting))
        self.gate_state = self.gate_state.put(rows, after.at(rows, torch.zeros_like(rows)))
        self.score[torch.from_numpy(self.episode)[rows], torch.from_numpy(position)[rows]] = decision.score[rows, 0]
        return decision.rewrite[:, 0].numpy() & drafting

    def _draw(
        self, limit: IntArray, length: int, keys: NDArray[np.uint64]
    ) -> tuple[IntArray, Tensor, Tensor | None, Tensor | None]:
        """The student draws up to `limit[i]` tokens in row i.

        Returns:
            `tokens`, `log_prob`, `student` and `student_score` of a `_Draft`.
        """
        n = len(self.active)
        tokens = np.full((n, length), PAD, np.int64)
        log_prob = torch.zeros(n, length, dtype=torch.float64)
        if not (limit > 0).any():
            return tokens, log_prob, None, None
        clock = time.perf_counter()
        drafting = limit > 0
        self._read_committed(drafting)
        visited, picked, scores = [], [], []
        for k in range(length):
            drawn = inverse_cdf(self.current, uniform(keys, self.lengths + k, Purpose.STUDENT))
            visited += [self.current] * self.gate.needs_scores
            scores += [self._read_student()] * bool(self.gate.screen)
            picked.append(self.current.gather(1, drawn[:, None])[:, 0])
            tokens[:, k] = np.where(drafting, drawn.cpu().numpy(), PAD)
            drafting = drafting & (tokens[:, k] != self.core.task.eos_token_id) & (k + 1 < limit)
            if k + 1 == length or not drafting.any():
                break
            self._read_drafted(np.where(drafting, tokens[:, k], PAD))
        log_prob[:, : len(picked)] = torch.stack(picked, 1).double().cpu()
        if bool(log_prob[torch.from_numpy(tokens >= 0)].isnan().any()):
            raise FloatingPointError("student: its log-probabilities are NaN; lower the learning rate")
        seconds = time.perf_counter() - clock
        self.seconds_per_step = seconds / (k + 1)
        self.cost.student_seconds += seconds
        self.cost.drafted += int((tokens >= 0).sum())
        visited += visited[-1:] * (length - len(visited))
        scores += scores[-1:] * (length - len(scores))
        own_score = torch.cat(scores, 1) if scores else None  # type: ignore[arg-type]
        return tokens, log_prob, torch.stack(visited, 1) if visited else None, own_score

    def _look_ahead(self, draft: _Draft) -> tuple[Tensor | None, int]:
        """The teacher's log-probabilities along the draft [n, width, V], if anything reads them, and the width."""
        width = int(draft.states.max())
        if not self.reads_teacher:
            return None, width
        clock = time.perf_counter()
        along = np.where(np.arange(1, width) < draft.states[:, None], draft.tokens[:, : width - 1], PAD)
        log_probs = self.env.unwrapped.lookahead(torch.from_numpy(along))
        if bool(log_probs[:, 0, 0].cpu()[torch.from_numpy(self.active)].isnan().any()):  # a softmax is NaN as a whole
            raise FloatingPointError("teacher: its log-probabilities are NaN; check its weights and dtype")
        self.cost.teacher_seconds += time.perf_counter() - clock
        return log_probs, width

    def _first_hard(self, draft: _Draft, teacher: Tensor | None) -> IntArray:
        """The first position of each row that the gate rewrites (K if none); its scores and memory are recorded."""
        assert draft.student is not None
        assert teacher is not None
        width = teacher.shape[1]
        tokens, states = torch.from_numpy(draft.tokens[:, :width]), torch.from_numpy(draft.states)
        ids = support(teacher, self.top_k, self.top_p)
        own_score = None if draft.student_score is None else draft.student_score[:, :width]
        starts = self._step_start(tokens)
        block = DraftBlock(tokens, starts, draft.gate_uniforms[:, :width], draft.episode_uniforms, own_score)
        device = draft.student.device
        student = project(draft.student[:, :width], None if ids is None else ids.to(device))
        decision, after = apply_gate(self.gate, student, project(teacher, ids).to(device), block, self.gate_state)
        exists = torch.arange(width) < states[:, None]
        rewrite = decision.rewrite & exists
        first = torch.where(rewrite.any(1), rewrite.int().argmax(1), draft.tokens.shape[1])
        last = torch.minimum(first, states - 1)  # the last position that counts, -1 in idle rows
        rows, columns = torch.nonzero(torch.arange(width) <= last[:, None], as_tuple=True)
        place = torch.from_numpy(self.lengths)[rows] + columns
        self.score[torch.from_numpy(self.episode)[rows], place] = decision.score[rows, columns]
        busy = torch.nonzero(last >= 0)[:, 0]
        self.gate_state = self.gate_state.put(busy, after.at(busy, last[busy]))
        return first.numpy()

    def _step_start(self, drafted: Tensor) -> Tensor:
        """Whether a reasoning step begins at each position of a draft: at position 0, or after a step's end."""
        before = torch.full((len(drafted),), PAD)
        rows = np.flatnonzero(self.lengths > 0)
        before[torch.from_numpy(rows)] = torch.from_numpy(self.tokens[self.episode[rows], self.lengths[rows] - 1])
        previous = torch.cat([before[:, None], drafted[:, :-1]], 1)
        start = torch.isin(previous, self.step_ends)
        start[:, 0] |= before == PAD
        return start

    def _count_calls(self, draft: _Draft, first: IntArray, handed_over: NDArray[np.bool_]) -> None:
        """Count what the gate asks of the teacher in a block: that it verifies drafts, or that it writes."""
        width, written = draft.tokens.shape[1], first < draft.states
        asked = written[:, None] & (np.arange(width) == first[:, None])  # where its distribution is read, [n, K]
        if self.gate.reads_teacher and draft.student is not None:
            verified = np.arange(width) < draft.states[:, None]
            if draft.student_score is not None:
                verified &= draft.student_score.cpu().numpy() >= self.gate.screen_tau
            asked |= verified
        rows = np.flatnonzero(asked.any(1))
        last = width - 1 - asked[rows, ::-1].argmax(1)  # the last position that is read
        prompts = np.array([len(self.prompts[e].ids_for_teacher) for e in self.episode[rows]], np.int64)
        before = prompts + self.lengths[rows]  # tokens before the block
        goes_on = handed_over[rows] | (self.gate.always & (self.lengths[rows] > 0))
        self.cost.calls += int((~goes_on).sum())
        self.cost.scored += int(asked.sum() - written.sum())  # what it writes is added at the end
        self.cost.processed += int((before + last - self.seen[rows]).sum())
        self.cost.reprocessed += int(np.where(goes_on, 1, before + last).sum())
        self.seen[rows] = before + np.minimum(last, first[rows])  # a rejected token is processed in vain

    def _execute(self, draft: _Draft, first: IntArray) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Step the environment along the drafts, up to and including the first rewrite of each row.

        Returns:
            Whether each row's completion has ended in its end token, and whether it has ended at all, bool [n] each.
        """
        length = draft.tokens.shape[1]
        accepted = np.minimum(first, (draft.tokens >= 0).sum(1))
        actions = np.where(np.arange(length) < accepted[:, None], draft.tokens, PAD)
        rows = np.flatnonzero(first < draft.states)
        actions[rows, first[rows]] = self.core.rewrite_action
        used = max(1, int((actions != PAD).sum(1).max()))
        clock = time.perf_counter()
        _, reward, terminated, truncated, info = self.env.step(actions[:, :used])
        self.cost.teacher_seconds += time.perf_counter() - clock
        self._commit(actions[:, :used], accepted, draft.log_prob, reward, info)
        done = terminated | truncated
        last = self.tokens[self.episode, self.lengths - 1]
        return done & (last == self.core.task.eos_token_id), done

    def _commit(
        self,
        actions: IntArray,
        accepted: IntArray,
        log_prob: Tensor,
        reward: NDArray[np.float64],
        info: dict[str, Any],
    ) -> None:
        """Record what the environment executed, and rewind the student to the committed tokens."""
        executed = actions  # with info hidden only the student's tokens can have been executed
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
            graded = np.flatnonzero(info["_grade"])
            self.grades[self.episode[graded]] = info["grade"][graded]
        rows, columns = np.nonzero(np.arange(actions.shape[1]) < accepted[:, None])
        self.token_log_prob[self.episode[rows], self.lengths[rows] + columns] = log_prob[rows, columns]
        self.cost.accepted += int(accepted.sum())
        if self.keep_teacher:
            for rows, place, log_probs in self.core.executed_log_probs():
                ids = support(log_probs, self.top_k, self.top_p)
                self.buffer.append(self.episode[rows], place, project(log_probs, ids), ids)
        keep = np.minimum(self.student_lengths, self.lengths + accepted + (self.held >= 0).sum(1))
        if (keep != self.student_lengths).any():
            self.student.rewind(torch.from_numpy(keep))
            self.student_lengths = keep
        self.lengths = self.lengths + count

    def _finish(self, rows: NDArray[np.intp]) -> None:
        """Rows whose completions have ended take the next prompt, or become idle."""
        if len(rows) == 0:
            return
        waiting = min(len(rows), len(self.prompts) - self.next_episode)
        refill, idle = rows[:waiting], rows[waiting:]
        if len(idle):
            self.active[idle] = False
            if not self.gate.always:
                self.student.rewind(torch.from_numpy(np.where(self.active, self.student_lengths, -1)))
        if len(refill):
            self.episode[refill] = np.arange(self.next_episode, self.next_episode + waiting)
            self.next_episode += waiting
            self._start(refill)
