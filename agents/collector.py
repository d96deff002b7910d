"""Rollouts by draft and verify: the student drafts, one look-ahead scores the draft, the gate decides.

Each row commits its draft up to its first hard position, lets the teacher write that position, and continues from
there; the rest of the draft is rewound. The result equals the token-by-token gated rollout for every draft length and
every batch, because every draw is a function of (episode, position, purpose).

A gate that reads the student alone needs no look-ahead: a draft ends where it is hard, and only there the teacher is
called. What the update reads of the teacher comes with these calls, and at the end of a completion.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from agents.draft_length import DraftLength
from agents.rollout import Rollout, RolloutCost
from agents.rollout_metrics import count_usage
from agents.teacher_buffer import TeacherBuffer
from distill_env.divergence import project, support
from distill_env.env import DistillVectorEnv
from distill_env.gate import DraftBlock, GateState, apply_gate, student_score, truncated_inputs
from distill_env.gate_settings import Gate
from distill_env.models.base import TokenModel, extend
from distill_env.ragged import PAD, slice_rows
from distill_env.randomness import Purpose, inverse_cdf, uniform
from distill_env.tasks.base import Prompt
from distill_env.teacher_scorer import Foresight
from distill_env.transfer import Mark, fetch, on_host, upload

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
    buffer_bytes: float = math.inf,
    temperature: float = 1.0,
) -> Rollout:
    """Write one completion for each prompt, the gate deciding who writes each token.

    Args:
        env: a `DistillVectorEnv`, wrapped or not. Rows that finish take the next prompt, whatever its autoreset.
        student: the model that drafts.
        prompts: N prompts, at least as many as the environment has rows.
        keys: uint64 [N], the episodes' keys: all randomness of episode i follows from keys[i].
        gate: the teacher writes where it rewrites.
        draft_length: K, or a `DraftLength` that adapts it; at most the environment's `chunk`.
        top_k, top_p: truncation of the teacher's distributions in the result. The gate reads them whole, unless the
            teacher returns only its likeliest ids.
        keep_teacher: keep the teacher's log-probabilities for the update. Without, and with a gate that reads no model,
            only `step` is used, so that any wrapper that hides `info` will do.
        buffer_bytes: of these that may stay on a GPU; beyond them the result lies in main memory.
        temperature: of the student's draws; everything else is at 1.

    Raises:
        ValueError: for an environment, a gate or a truncation that do not go together.
        FloatingPointError: if a model returns NaN.
    """
    settings = (gate, draft_length, top_k, top_p, keep_teacher, buffer_bytes, temperature)
    return Collector(env, student, prompts, keys, *settings).run()


def check_top_k(core: DistillVectorEnv, top_k: int, reads_teacher: bool) -> None:
    """Raise ValueError if divergences would be taken over ids whose probabilities the teacher does not return."""
    available = core.teacher_top_k
    if reads_teacher and available and not 0 < top_k <= available:
        raise ValueError(f"top_k: {top_k}; expected 1 to {available}, the number of ids that the teacher returns")


@dataclass
class _Draft:
    """A block of drafted tokens: n rows of at most K tokens, on the student's device or brought from there."""

    tokens: Tensor  # int64 [n, K], padded with -1
    log_prob: Tensor  # [n, K], log q of the tokens
    student: Tensor | None  # log q at each position [n, K, V], for a gate that reads the models
    states: Tensor  # int64 [n], positions to score: one per drafted token, one more where a rewrite is known beforehand
    most_states: IntArray  # [n], as many, or more: end tokens that lie on a device are not known here
    first: Tensor  # int64 [n], the first position to rewrite that is known without the teacher; K if none
    gate_uniforms: Tensor  # float64 [n, K]
    episode_uniforms: Tensor  # float64 [n]
    student_score: Tensor | None = None  # float64 [n, K], for a gate with a screen
    seconds: float = 0.0  # of the student


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
        buffer_bytes: float,
        temperature: float = 1.0,
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
        self.top_k, self.top_p, self.keep_teacher, self.temperature = top_k, top_p, keep_teacher, temperature
        self.alone = gate.needs_scores and not gate.reads_teacher  # whether the gate reads the student alone
        self.reads_teacher = gate.reads_teacher or (keep_teacher and not self.alone)
        self.step_ends = torch.tensor(sorted(core.task.step_end_ids))
        self.starts_step = torch.zeros(core.vocab_size + 1, dtype=torch.bool)  # after each token, and after none (-1)
        self.starts_step[[*core.task.step_end_ids, PAD]] = True
        self.device = torch.device("cpu")  # of the student's drafts and the gate
        self.horizon = core.max_new_tokens

        total, n = len(self.prompts), env.num_envs
        self.tokens = np.full((total, self.horizon), PAD, np.int64)
        self.rewritten = np.zeros((total, self.horizon), np.bool_)
        self.rewards = np.zeros((total, self.horizon))
        self.token_log_prob = torch.zeros(total, self.horizon, dtype=torch.float64)
        self.score = torch.full((total, self.horizon), torch.nan, dtype=torch.float64)
        self.grades = np.zeros(total)
        self.buffer = TeacherBuffer(total * self.horizon, buffer_bytes)
        if hasattr(student, "reserve"):
            student.reserve(core.max_prompt_length + self.horizon + core.chunk)

        self.episode = np.arange(n)  # the episode of each row
        self.next_episode = n
        self.active = np.ones(n, np.bool_)
        self.lengths = np.zeros(n, np.int64)  # committed tokens of the completion
        self.student_lengths = np.zeros(n, np.int64)  # of those, the ones that the student has read
        self.gate_state = GateState.start(n)
        self.handed_over = np.zeros(n, np.bool_)  # rows of which the teacher writes the rest
        self.cost = RolloutCost()
        self.spans: list[tuple[str, Mark, Mark]] = []  # which cost, from where, to where
        self.current: Tensor  # log q after the tokens that the student has read, [n, V]
        self.predicted: Tensor | None = None  # D_t there as the student's hand-over head predicts it, [n]
        self.held = np.full((n, core.chunk), PAD, np.int64)  # drafted without the teacher, and not executed yet
        self.held_log_prob = torch.zeros(n, core.chunk, dtype=torch.float64)
        self.seen = np.zeros(n, np.int64)  # positions that the calls have had the teacher process, prompts included
        self.steps = 0  # of the student in the last block

    def run(self) -> Rollout:
        """Write all completions."""
        started = time.perf_counter()
        with count_usage(self.core) as usage, self.core.without_autoreset():
            self._start(np.flatnonzero(self.active))
            while self.active.any():
                self._block()
        self.cost.teacher_passes, self.cost.teacher_positions, self.cost.teacher_tokens = astuple(usage)
        self.cost.scored += self.cost.teacher_tokens
        self._add_seconds()
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
            divergence=self.score[:, :longest] if self._scores_are_divergences else None,
            grades=torch.from_numpy(self.grades),
            teacher=teacher,
            support=ids,
            step_end_ids=tuple(self.step_ends.tolist()),
            cost=self.cost,
        )

    @property
    def _scores_are_divergences(self) -> bool:
        """Whether the score of every position is D_t over the whole vocabulary."""
        gate = self.gate
        plain = gate.score == "divergence" and gate.needs_scores and not (gate.has_memory or gate.screen)
        everywhere = self.core.rewrite_span == "token" and math.isinf(gate.score_clip)
        return plain and everywhere and not self.core.teacher_top_k

    def _start(self, rows: NDArray[np.intp]) -> None:
        """Begin the episodes of `rows` in the environment and in the student."""
        prompts = [self.prompts[e] for e in self.episode[rows]]
        mask = np.zeros(len(self.active), np.bool_)
        mask[rows] = True
        options = {"prompts": prompts, "episode_keys": self.keys[self.episode[rows]], "reset_mask": mask}
        with self._timed("teacher_seconds"):
            self.env.reset(options=options)
        if not self.gate.always:
            everyone = len(rows) == len(mask)
            with self._timed("student_seconds"):
                log_probs = self.student.start([p.ids for p in prompts], None if everyone else rows.tolist())
            if not self.alone and self.device != log_probs.device:
                self.device = log_probs.device
                self.gate_state = GateState.start(len(mask), self.device)
                self.starts_step = upload(self.starts_step, self.device)
            index = upload(rows, log_probs.device)
            self.current = log_probs if everyone else self.current.index_copy(0, index, log_probs)
            predicted = self._predicted()
            if predicted is not None:
                self.predicted = predicted if self.predicted is None else self.predicted.index_copy(0, index, predicted)
        self.lengths[rows] = self.student_lengths[rows] = self.seen[rows] = 0
        self.gate_state = self.gate_state.put(upload(rows, self.device), GateState.start(len(rows), self.device))
        self.handed_over[rows] = False

    @contextmanager
    def _timed(self, who: str) -> Iterator[None]:
        """Add the seconds of the block to that cost, once they are known."""
        begin = Mark(self.device)
        yield
        self.spans.append((who, begin, Mark(self.device)))

    def _add_seconds(self) -> dict[str, float]:
        """Add what was timed since the last call to the costs. Returns the last seconds of each."""
        last = {}
        for who, begin, end in self.spans:
            last[who] = end - begin
            setattr(self.cost, who, getattr(self.cost, who) + last[who])
        self.spans = []
        return last

    def _block(self) -> None:
        """Draft, verify, execute, and tell the draft length what that showed."""
        started = time.perf_counter()
        writing, handed_over = int(self.active.sum()), self.handed_over.copy()
        draft = self._draft_until_called() if self.alone else self._draft()
        teacher, width = self._look_ahead(draft)
        draft, first = self._judge(draft, teacher)
        self._count_calls(draft, first, handed_over)
        by_end_token, ended = self._execute(draft, first)
        if isinstance(self.draft_length, DraftLength):
            states = draft.states.numpy()
            scored = np.minimum(first + 1, states)[~handed_over]
            cut_short = ((first < states) | by_end_token)[~handed_over]
            rest = time.perf_counter() - started - draft.seconds
            counts = int(cut_short.sum()), int(scored.sum())
            self.draft_length.observe(writing, *counts, draft.seconds / max(self.steps, 1), width, rest)
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
        known = np.full(n, length)  # the first position to rewrite, if no end token comes before
        if not self.gate.needs_scores:
            no_tokens = torch.full((n, length), PAD)
            block = DraftBlock(
                no_tokens, torch.zeros_like(no_tokens, dtype=torch.bool), gate_uniforms, episode_uniforms
            )
            decision, _ = apply_gate(self.gate, None, None, block, GateState.start(n))
            known = np.where(decision.rewrite.any(1), decision.rewrite.int().argmax(1), length)
        known[self.handed_over] = 0

        limit = np.minimum(room, known)
        tokens, log_prob, student, own_score = self._draw(limit, length, keys)
        drafted = (tokens >= 0).sum(1)
        ended = (tokens == self.core.task.eos_token_id).any(1)
        rewritten = upload(self.active & (known < room) & (known < length), self.device)
        known_there = upload(known, self.device)
        states = drafted + (rewritten & (drafted == known_there) & ~ended)
        first = torch.where(known_there < states, known_there, length)
        most = np.where(self.active, np.minimum(limit + (known < room), length), 0)
        if on_host(self.device):
            most = states.numpy()
        uniforms = upload(gate_uniforms, self.device), upload(episode_uniforms, self.device)
        return _Draft(tokens, log_prob, student, states, most, first, *uniforms, own_score)

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
        last = upload(np.maximum(unread - 1, 0), after.device)
        rows, new = torch.arange(len(unread), device=after.device), upload(unread > 0, after.device)
        self.current = torch.where(new[:, None], after[rows, last], self.current)
        predicted = self._predicted()
        if predicted is not None and self.predicted is not None:
            self.predicted = torch.where(new, predicted[rows, last], self.predicted)
        self.student_lengths = stop

    def _read_drafted(self, tokens: Tensor, drafting: NDArray[np.bool_]) -> None:
        """The student reads a token [n] in each row that drafts on."""
        self.current = extend(self.student, tokens[:, None], drafting.astype(np.int64))[:, 0]
        predicted = self._predicted()
        self.predicted = None if predicted is None else predicted[:, 0]
        self.student_lengths = self.student_lengths + drafting

    def _law(self) -> Tensor:
        """From what the student draws, [n, V]; it need not be normalised."""
        return self.current if self.temperature == 1 else self.current / self.temperature

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
        called = self.active & self.handed_over
        drafting = self.active & ~called
        self._read_committed(drafting)
        steps = 0
        while drafting.any():
            count = (self.held >= 0).sum(1)
            position = self.lengths + count
            hard = self._call(drafting, count, keys, episode_uniforms)
            called, drafting = called | hard, drafting & ~hard
            if drafting.any():
                drawn = inverse_cdf(self._law(), uniform(keys, position, Purpose.STUDENT))
                drawn, picked = fetch(drawn, self.current.gather(1, drawn[:, None])[:, 0].double())
                tokens, rows = np.where(drafting, drawn.numpy(), PAD), np.flatnonzero(drafting)
                self.held[rows, count[rows]] = tokens[rows]
                self.held_log_prob[rows, count[rows]] = picked[rows]
                if bool(picked[rows].isnan().any()):
                    raise FloatingPointError("student: its log-probabilities are NaN; lower the learning rate")
                steps += 1
                drafting = drafting & (tokens != eos) & (count + 1 < limit)
            if drafting.any():
                self._read_drafted(drawn, drafting)
            if steps >= length and (self.active & ~drafting).any():
                break
        self.steps, seconds = steps, time.perf_counter() - clock
        self.cost.student_seconds += seconds
        waiting = self.active & ~drafting
        tokens, log_prob = np.where(waiting[:, None], self.held, PAD), self.held_log_prob.clone()
        self.held[waiting] = PAD
        drafted = (tokens >= 0).sum(1)
        first, states = np.where(called, drafted, self.core.chunk), drafted + called
        uniforms = torch.zeros(tokens.shape, dtype=torch.float64)
        here = torch.from_numpy(tokens), log_prob, None, torch.from_numpy(states), states, torch.from_numpy(first)
        return _Draft(*here, uniforms, episode_uniforms, seconds=seconds)

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
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The student draws up to `limit[i]` tokens in row i.

        On a CPU rows stop at their end token. On another device they draw on, since the host would have to wait for
        each token in order to know; what follows an end token is cut off.

        Returns:
            `tokens`, `log_prob`, `student` and `student_score` of a `_Draft`.
        """
        n, eos = len(self.active), self.core.task.eos_token_id
        drafting, self.steps = limit > 0, 0
        if not drafting.any():
            nothing = torch.full((n, length), PAD, device=self.device)
            return nothing, torch.zeros(n, length, device=self.device), None, None
        with self._timed("student_seconds"):
            self._read_committed(drafting)
            draws = uniform(keys[:, None], self.lengths[:, None] + np.arange(length), Purpose.STUDENT)
            draws_there = upload(draws, self.device)
            drawn: list[Tensor] = []
            picked, visited, scores = [], [], []
            while drafting.any():
                token = inverse_cdf(self._law(), draws_there[:, len(drawn)])
                visited += [self.current] * self.gate.needs_scores
                scores += [self._read_student()] * bool(self.gate.screen)
                picked.append(self.current.gather(1, token[:, None])[:, 0])
                drawn.append(token)
                drafting = drafting & (len(drawn) < limit)
                if on_host(self.device):
                    drafting = drafting & (token.numpy() != eos)
                if drafting.any():
                    self._read_drafted(token, drafting)
        self.steps = len(drawn)
        tokens, log_prob = torch.stack(drawn, 1), torch.stack(picked, 1)  # [n, steps]
        end = tokens == eos
        exists = (end.cumsum(1) == end.long()) & upload(np.arange(self.steps) < limit[:, None], self.device)
        missing = length - self.steps
        tokens = F.pad(torch.where(exists, tokens, PAD), (0, missing), value=PAD)
        visited += visited[-1:] * missing
        scores += scores[-1:] * missing
        own_score = torch.cat(scores, 1) if scores else None  # type: ignore[arg-type]
        return tokens, F.pad(log_prob, (0, missing)), torch.stack(visited, 1) if visited else None, own_score

    def _look_ahead(self, draft: _Draft) -> tuple[Tensor | None, int]:
        """The teacher's log-probabilities along the draft [n, width, V], if anything reads them, and the width."""
        width = int(draft.most_states.max())
        if not self.reads_teacher:
            return None, width
        with self._timed("teacher_seconds"):
            counts = np.maximum(draft.most_states - 1, 0)
            return self.core.lookahead(draft.tokens[:, : width - 1], counts), width

    def _judge(self, draft: _Draft, teacher: Tensor | None) -> tuple[_Draft, IntArray]:
        """The draft on the host, and the first position of each row that is rewritten (K if none).

        Scores and the gate's memory are recorded. All that the host needs of a block comes with one transfer.

        Raises:
            FloatingPointError: if a model returned NaN.
        """
        first, score = draft.first, None
        if draft.student is not None:
            first, score = self._first_hard(draft, teacher)
        parts = {"tokens": draft.tokens, "log_prob": draft.log_prob, "states": draft.states, "first": first}
        if score is not None:
            parts["score"] = score
        if draft.student_score is not None:
            parts["student_score"] = draft.student_score
        if self.gate.hand_over_rest:
            parts["handed_over"] = self.gate_state.handed_over > 0
        if teacher is not None:
            parts["teacher"] = teacher[:, 0, 0]  # a softmax is NaN as a whole
            if not on_host(teacher.device):
                along = draft.tokens[:, : teacher.shape[1]]
                parts["paid"], parts["written"] = self.core.foresee(teacher, along, None if self.gate.never else first)
        here = dict(zip(parts, fetch(*parts.values()), strict=True))
        seconds = self._add_seconds()
        draft = replace(
            draft,
            tokens=here["tokens"],
            log_prob=here["log_prob"],
            student=None,
            states=here["states"],
            student_score=here.get("student_score"),
            seconds=seconds["student_seconds"] if self.steps and not self.alone else draft.seconds,
        )
        if bool(draft.log_prob[draft.tokens >= 0].isnan().any()):
            raise FloatingPointError("student: its log-probabilities are NaN; lower the learning rate")
        if teacher is not None and bool(here["teacher"][torch.from_numpy(self.active)].isnan().any()):
            raise FloatingPointError("teacher: its log-probabilities are NaN; check its weights and dtype")
        self.cost.drafted += int((draft.tokens >= 0).sum())
        if "paid" in here:
            along = here["tokens"][:, : here["paid"].shape[1]]
            self.core.expect(Foresight(*(x.numpy() for x in (along, here["first"], here["paid"], here["written"]))))
        if "handed_over" in here:
            self.handed_over = here["handed_over"].numpy().copy()
        if score is not None:
            last = torch.minimum(here["first"], draft.states - 1)  # the last position that counts, -1 in idle rows
            rows, columns = torch.nonzero(torch.arange(score.shape[1]) <= last[:, None], as_tuple=True)
            place = torch.from_numpy(self.lengths)[rows] + columns
            self.score[torch.from_numpy(self.episode)[rows], place] = here["score"][rows, columns]
        return draft, here["first"].numpy()

    def _first_hard(self, draft: _Draft, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first position of each row that the gate rewrites (K if none), [n], and its scores [n, width]."""
        assert draft.student is not None
        assert teacher is not None
        width, device = teacher.shape[1], self.device
        tokens = draft.tokens[:, :width]
        # the gate reads all that the teacher returns; only what is kept for the update is truncated further
        ids = support(teacher, self.top_k, self.top_p) if self.core.teacher_top_k else None
        own_score = None if draft.student_score is None else draft.student_score[:, :width]
        starts = self._step_start(tokens)
        block = DraftBlock(tokens, starts, draft.gate_uniforms[:, :width], draft.episode_uniforms, own_score)
        student = project(draft.student[:, :width], None if ids is None else upload(ids, device))
        teacher = upload(project(teacher, ids), device)
        if ids is not None:
            student, teacher = truncated_inputs(self.gate, student, teacher)
        decision, after = apply_gate(self.gate, student, teacher, block, self.gate_state)
        rewrite = decision.rewrite & (torch.arange(width, device=device) < draft.states[:, None])
        first = torch.where(rewrite.any(1), rewrite.int().argmax(1), draft.tokens.shape[1])
        if self.gate.has_memory:
            last = torch.minimum(first, draft.states - 1)
            at_last = after.at(torch.arange(len(last), device=device), last.clamp(min=0))
            self.gate_state = self.gate_state.where(last >= 0, at_last)
        return first, decision.score

    def _step_start(self, drafted: Tensor) -> Tensor:
        """Whether a reasoning step begins at each position of a draft: at position 0, or after a step's end."""
        before = np.where(self.lengths > 0, self.tokens[self.episode, self.lengths - 1], PAD)
        previous = torch.cat([upload(before, self.device)[:, None], drafted[:, :-1]], 1)
        return self.starts_step[previous]

    def _count_calls(self, draft: _Draft, first: IntArray, handed_over: NDArray[np.bool_]) -> None:
        """Count what the gate asks of the teacher in a block: that it verifies drafts, or that it writes."""
        width, states = draft.tokens.shape[1], draft.states.numpy()
        written = first < states
        asked = written[:, None] & (np.arange(width) == first[:, None])  # where its distribution is read, [n, K]
        if self.gate.reads_teacher and self.steps:
            verified = np.arange(width) < states[:, None]
            if draft.student_score is not None:
                verified &= draft.student_score.numpy() >= self.gate.screen_tau
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
        tokens = draft.tokens.numpy()
        accepted = np.minimum(first, (tokens >= 0).sum(1))
        actions = np.where(np.arange(tokens.shape[1]) < accepted[:, None], tokens, PAD)
        rows = np.flatnonzero(first < draft.states.numpy())
        actions[rows, first[rows]] = self.core.rewrite_action
        used = max(1, int((actions != PAD).sum(1).max()))
        with self._timed("teacher_seconds"):
            _, reward, terminated, truncated, info = self.env.step(actions[:, :used])
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
        self.token_log_prob[self.episode[rows], self.lengths[rows] + columns] = log_prob[rows, columns].double()
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
