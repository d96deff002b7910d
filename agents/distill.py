"""The policy-gradient agent: it writes with its teacher, and descends the gated dual KL.

    repeat
        write completions: each token by the student, or by the teacher where the gate is hard    (rollout)
        D_t = KL(student || teacher), lambda_t from the gate                                       (score, gate)
        loss = mean over positions of lambda_t RKL_t + (1 - lambda_t) FKL_t
               + log q(a_t) times the cost-to-go, if gamma > 0                                     (policy gradient)
        one step of the optimiser
        tau follows the share of hard positions, if there is a budget

Every published method is a row of `agents/methods.py`: another writer, another loss, another weighting.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.assisted import ROUNDS, tau_for_share
from agents.atomic_io import write_folder
from agents.base import Callback, Metrics
from agents.checkpoint import damage_as_value_error, load_state, save_state
from agents.collector import collect
from agents.config import DistillConfig, from_dict
from agents.distributed import SINGLE_PROCESS, ProcessGroup
from agents.draft_length import DraftLength
from agents.hand_over import HandOverTrainer, target
from agents.losses import (
    cost_to_go,
    exact_loss,
    imitation_loss,
    importance_weight,
    leave_one_out_baseline,
    length_normalized,
    policy_gradient_loss,
)
from agents.metrics import HIGH_DIVERGENCE
from agents.optimizer import MasterAdamW, learning_rate
from agents.past_student import PastStudent
from agents.prompts import PromptStream
from agents.references import read_references
from agents.rollout import Parts, Rollout, completions_of
from agents.rollout_metrics import rollout_metrics, rollout_sums, usage_by_teacher
from agents.student_actor import StudentActor
from agents.teacher_cache import TeacherCache
from distill_env.divergence import entropy, finite, project, reverse_kl
from distill_env.gate import (
    DraftBlock,
    GateDecision,
    GateState,
    decide,
    follow_quantile,
    raw_score,
    read_and_decide,
    student_score,
    truncated_inputs,
)
from distill_env.gate_settings import Gate
from distill_env.models.base import TrainableModel, ids_of
from distill_env.models.load import build_model
from distill_env.ragged import PAD
from distill_env.randomness import episode_keys
from distill_env.tasks.base import Prompt
from distill_env.transfer import fetch, upload

SHOWN = 3  # completions of an iteration that callbacks may show
AUTO_SHARE = 0.1  # of the positions are hard with tau auto and no budget


class DistillAgent:
    """A student that learns in the environment by one of the methods.

    Args:
        student: the model to train, in place.
        config: the method and how the student is updated.
        cache: stores the teacher's completions for other runs; only for methods whose completions do not depend on the
            student. It changes no result.
    """

    def __init__(self, student: TrainableModel, config: DistillConfig, cache: TeacherCache | None = None) -> None:
        self.student = student
        self.config = config
        self.cache = cache
        self.processes = SINGLE_PROCESS  # the processes that share every batch
        self.method = config.method  # its tau is the current one
        self.optimizer = MasterAdamW(student.parameters(), config.optimizer)
        self.hand_over = HandOverTrainer.of(student, config.hand_over_width, config.seed)
        self.iteration = 0
        self.mean_length = 0.0  # of completions, over past iterations; 0 before the first
        self.written: list[Parts] = []  # the first completions of the last iteration, for callbacks to show
        self.past: PastStudent | None = None  # the student as its own teacher, if the teacher is refreshed
        self._draft_length: DraftLength | None = None
        self.actor = StudentActor(student, config.seed)

    def join_group(self, processes: ProcessGroup) -> None:
        """Share every batch, and a sharded student, with other processes; all of them call this."""
        self.processes = processes
        tensors, groups = self.optimizer.tensors()
        if processes.shard(self.student):
            self.optimizer = MasterAdamW(self.student.parameters(), self.config.optimizer)
            self.optimizer.restore(tensors, groups)
        processes.unshard(self.student)

    def learn(self, env: Any, iterations: int, callback: Callback | None = None) -> DistillAgent:
        """Train for that many more iterations.

        Args:
            env: a `DistillVectorEnv` with at most `batch_size` rows, wrapped or not.
            iterations: number of optimiser steps.
            callback: called after every iteration.
        """
        core = env.unwrapped
        self.check(env)
        self._refresh_teacher(core)
        self.choose_tau(env)
        stream = self.prompt_stream(env)
        for _ in range(iterations):
            self.processes.continue_or_stop(gather=self._gather)
            started = time.perf_counter()
            self._refresh_teacher(core)
            before = usage_by_teacher(core)
            rollout = self.rollout(env, stream)
            by_teacher = {key: count - before[key] for key, count in usage_by_teacher(core).items()}
            update_started = time.perf_counter()
            metrics = self.update(rollout)
            ended = time.perf_counter()
            metrics = self.conclude(rollout, metrics, ended - started, ended - update_started)
            metrics |= self.processes.all_reduce_sum(by_teacher)
            del rollout  # so that the teacher's distributions take no memory during the next one
            if callback is not None:
                callback(self.iteration, metrics)
        return self

    def conclude(self, rollout: Rollout, metrics: Metrics, seconds: float, update_seconds: float) -> Metrics:
        """Count the iteration. Returns the metrics of its update with those of its rollout and its times."""
        self.iteration += 1
        metrics |= rollout_metrics(self.processes.all_reduce_sum(rollout_sums(rollout)))
        self.written = [*itertools.islice(completions_of(rollout), SHOWN)]
        metrics["time/update_seconds"] = update_seconds
        metrics["time/seconds"] = seconds
        metrics["time/tokens_per_second"] = metrics["rollout/tokens"] / seconds
        return metrics

    def reconfigure(self, config: DistillConfig) -> None:
        """Continue with another learning rate, its schedule, or another batch size; the method stays."""
        self.config = dataclasses.replace(config, method=self.config.method)

    def choose_tau(self, env: Any) -> None:
        """Replace tau auto by a number, so that the budget, or a tenth of the positions without one, is hard.

        It is measured in trial rollouts on the first batch's prompts: see `tau_for_share`. With a number nothing is
        done.
        """
        method, core = self.method, env.unwrapped
        if method.gate.tau != "auto":
            return
        prompts = PromptStream(core.prompts, self.config.seed).take(0, max(self.config.batch_size, core.num_envs))
        usual = (core, self.student, prompts, method.budget or AUTO_SHARE, self.config.seed, method.hard_gate)
        rounds = ROUNDS if method.gate_writes else 1  # without rewrites the text does not depend on tau
        self.method = method.with_tau(tau_for_share(*usual, method.top_k, method.top_p, rounds))

    def _refresh_teacher(self, core: Any) -> None:
        """Let the student as it is, or as it was up to N - 1 iterations ago, be the teacher of the environment."""
        every = self.config.refresh_teacher
        if not every:
            return
        if self.past is None:
            self.past = PastStudent(self.student)
        elif self.iteration % every == 0:
            self.past.refresh()
        core.use_teacher(self.past.model)

    def check(self, env: Any) -> None:
        """Raise ValueError for an environment, or a number of processes, that the method does not go with."""
        core = env.unwrapped
        setting = (core.rewrite, core.rewrite_temperature, core.rewrite_span, core.task_reward)
        if self.method.importance_weights and setting != ("sample", 1, "token", 0):
            raise ValueError(
                f"importance_weights: with rewrite, rewrite_temperature, rewrite_span, task_reward = {setting}; "
                "expected sample, 1, token, 0, so that each token is a draw from the mixture and its reward is log p"
            )
        if self.method.estimator == "sampled" and core.rewrite_temperature != 1:
            raise ValueError(
                f"rewrite_temperature: {core.rewrite_temperature} with estimator sampled, which needs the teacher's "
                "draws from its own distribution; expected 1, or estimator exact"
            )
        config, count = self.config, self.processes.world_size
        if config.refresh_teacher and (count > 1 or self.cache is not None):
            with_what = f"{count} processes" if count > 1 else "a cache of the teacher's completions"
            raise ValueError(f"refresh_teacher: {config.refresh_teacher} with {with_what}; expected 0")
        if count > config.batch_size:
            raise ValueError(
                f"batch_size: {config.batch_size} for {count} processes; expected at least one completion each"
            )
        if count > 1 and (
            self.method.gamma > 0 or self.method.estimator == "sampled" or self.method.importance_weights
        ):
            raise ValueError(
                f"gamma, estimator, importance_weights: with {count} processes; expected 0, exact and none: their "
                "baseline compares all completions of a batch"
            )

    def rollout(self, env: Any, stream: PromptStream) -> Rollout:
        """Write the completions of this iteration: the first N started, not the first N finished."""
        prompts, keys = self.next_batch(stream)
        if self.cache is None:
            return self.write_completions(env, prompts, keys)
        return self.cache.rollout(env, self.method, prompts, keys, lambda: self.write_completions(env, prompts, keys))

    def prompt_stream(self, env: Any) -> PromptStream:
        """The prompts of all iterations in that environment."""
        return PromptStream(env.unwrapped.prompts, self.config.seed, self.config.samples_per_prompt)

    def next_batch(self, stream: PromptStream) -> tuple[list[Prompt], NDArray[np.uint64]]:
        """This process's prompts of the iteration, and the keys of their episodes."""
        size = self.config.batch_size
        episodes = np.arange(self.iteration * size, (self.iteration + 1) * size)[self.processes.local_slice(size)]
        return stream.take(int(episodes[0]), len(episodes)), episode_keys(self.config.seed, episodes)

    def write_completions(self, env: Any, prompts: list[Prompt], keys: NDArray[np.uint64]) -> Rollout:
        """A completion of each prompt, written as the method says."""
        method = self.method
        limits = (method.top_k, method.top_p, method.needs_teacher, self.config.teacher_buffer_gib * 2**30)
        if method.teacher_writes == "reference":
            return read_references(env, prompts, *limits)
        length: DraftLength | int = self.config.draft_length
        if length == 0:
            self._draft_length = length = self._draft_length or DraftLength(env.unwrapped.chunk)
        matched_rate = 0.0
        if method.teacher_writes == "matched":  # as often as the gate would rewrite in this batch
            settings = (method.hard_gate, length, *limits[:2], False)
            trial = collect(env, self.student, prompts, keys, *settings, temperature=method.temperature)
            by_step = env.unwrapped.rewrite_span == "step" and method.gate.needs_scores
            matched_rate = self._rewritten_share(trial, trial.mask & ~trial.score.isnan() if by_step else trial.mask)
        gate = method.teacher_gate(matched_rate, self.iteration)
        return collect(env, self.student, prompts, keys, gate, length, *limits, temperature=method.temperature)

    def _rewritten_share(self, rollout: Rollout, positions: Tensor) -> float:
        """The share of the positions, bool [N, T], that the teacher wrote, over all processes."""
        written = {"rewritten": float((rollout.rewritten & positions).sum()), "all": float(positions.sum())}
        return (total := self.processes.all_reduce_sum(written))["rewritten"] / total["all"]

    def update(self, rollout: Rollout) -> Metrics:
        """One step of the optimiser on the mean loss over the tokens of the batch, however it is split."""
        self.optimizer.zero_grad()
        with self.processes.sharded(self.student):
            totals = self.backward(rollout)
            totals |= self.descend(totals)
        return self.follow(rollout, totals)

    def descend(self, totals: Metrics) -> Metrics:
        """One step along the gradient that `backward` has accumulated. Returns its norm and the learning rate.

        Raises:
            FloatingPointError: for a loss or a gradient that is not finite; the student is not changed.
        """
        norm = self.processes.clip_grad_norm(self.optimizer.masters, self.config.optimizer.max_grad_norm)
        if not math.isfinite(totals["train/loss"]) or not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"iteration {self.iteration + 1}: loss {totals['train/loss']}, gradient norm {norm}; the student "
                "was not changed. Lower learning_rate, or set loss_clip"
            )
        rate = learning_rate(self.config.optimizer, self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()  # gradients take no memory during the next rollout
        return {"train/grad_norm": norm, "train/learning_rate": rate}

    def follow(self, rollout: Rollout, totals: Metrics) -> Metrics:
        """What an update changes besides the student: its hand-over head, the mean length, tau. Returns all metrics."""
        if self.hand_over is not None and rollout.teacher is not None:
            totals |= self.hand_over.update(self._hard_from, self.processes)
        self._follow_length(rollout)
        return totals | self._follow_budget(rollout, totals)

    @property
    def _hard_from(self) -> float:
        """D_t from which a position is hard, nats: the gate's tau if it has that unit."""
        gate = self.method.gate
        return gate.threshold if gate.score in ("divergence", "predicted_divergence") else HIGH_DIVERGENCE

    def _follow_length(self, rollout: Rollout) -> None:
        """Average the length of completions, over tens of iterations, for later iterations."""
        if self.method.policy_gradient:
            length = self._token_count(rollout) / self.config.batch_size
            self.mean_length = 0.9 * self.mean_length + 0.1 * length if self.mean_length else length

    def _token_count(self, rollout: Rollout) -> float:
        """The number of tokens, over all processes."""
        return self.processes.all_reduce_sum({"tokens": float(rollout.mask.sum())})["tokens"]

    def _follow_budget(self, rollout: Rollout, totals: Metrics) -> Metrics:
        """Set tau for the next iteration. Returns the tau of this one and by how much its share missed the budget."""
        method = self.method
        if method.budget == 0:
            return {}
        share = (
            self._rewritten_share(rollout, rollout.mask) if method.gate_writes else 1 - totals["train/reverse_weight"]
        )
        tau = method.gate.threshold
        self.method = method.with_tau(follow_quantile(tau, share, method.budget))
        return {"rollout/tau": tau, "rollout/budget_error": share - method.budget}

    def backward(self, rollout: Rollout) -> Metrics:
        """Accumulate the gradient of the mean loss, chunk by chunk over the valid positions.

        A policy gradient is divided by the number of tokens that past iterations lead to expect. The tokens of the
        batch at hand depend on the actions, and dividing by their number would bias the estimate: by 3 to 18 % with
        two completions.
        """
        mask = rollout.mask  # [N, T]
        count = self._token_count(rollout)
        expected = count
        if self.method.policy_gradient and self.mean_length:
            expected = self.processes.all_reduce_sum({"n": float(len(mask))})["n"] * self.mean_length
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
        future, weight = self._long_range(rollout)  # [N, T] each
        sums: dict[str, Tensor] = {}
        if self.method.gate_writes:
            _add(sums, "rollout/hard_share", (rollout.score >= self.method.gate.threshold).double())
        if self.method.truncates and rollout.divergence is not None:
            _add(sums, "rollout/divergence", rollout.divergence[mask])
            _add(sums, "rollout/high_divergence_share", (rollout.divergence[mask] >= HIGH_DIVERGENCE).double())
        micro = self.config.micro_batch or len(rollout.prompts)
        passes = range(0, len(rollout.prompts), micro)
        for begin in passes:
            rows = slice(begin, begin + micro)
            prompts = [p.ids for p in rollout.prompts[rows]]
            features = self.student.features(prompts, rollout.tokens[rows], mask[rows])  # [m, ...]
            leaf = features.detach().requires_grad_(features.requires_grad)
            states = _States(rollout, rows, future, weight, int(offsets[begin]), features.device)
            decisions = self._decide_in_order(rollout, rows, leaf, states)
            for chunk in self._chunks(leaf):
                loss = self._chunk_loss(leaf[chunk], states, chunk, decisions, sums)
                (loss / expected).backward()
                self.optimizer.move_gradients()
            if features.requires_grad and leaf.grad is not None:
                features.backward(leaf.grad)
                self.optimizer.move_gradients()
        for _ in range(self.processes.extra_passes(self.config.batch_size, len(passes), self.config.micro_batch)):
            features = self.student.features([rollout.prompts[0].ids], rollout.tokens[:1], mask[:1])
            (0 * self.student.head(features[:1]).exp().sum()).backward()
            self.optimizer.move_gradients()  # the others' gradients of this process's shards
        self.processes.sum_gradients(self.optimizer.masters)
        totals = dict(zip(sums, torch.stack(fetch(*sums.values())).tolist(), strict=True))
        return {key: value / count for key, value in self.processes.all_reduce_sum(totals).items()}

    def _chunk_loss(
        self,
        features: Tensor,
        states: _States,
        chunk: slice,
        decisions: GateDecision | None,
        sums: dict[str, Tensor],
    ) -> Tensor:
        """The summed loss of some positions; their metrics are added to `sums`."""
        method = self.method
        log_probs = self.student.head(features)  # [m, V]
        token_log_prob = _of_tokens(log_probs, states.tokens[chunk])
        own = ~states.rewritten[chunk]
        loss = torch.zeros_like(token_log_prob)
        student = teacher = log_probs  # the likelihood of reference completions needs no teacher
        reverse_weight = own.double()
        if states.scored:
            teacher, ids = states.teacher(chunk)
            student = project(log_probs, ids)  # [m, S]
            with torch.no_grad():
                divergence = reverse_kl(student, teacher).clamp(min=0)
                if self.hand_over is not None:
                    self.hand_over.add(features, log_probs, divergence)
            gate = self._update_gate
            if decisions is not None:
                decision = GateDecision(*(x[chunk] for x in decisions))
            elif gate is not None:
                own_score = self._student_score(gate, log_probs, features)
                inputs = (student, teacher) if ids is None else truncated_inputs(gate, student, teacher)
                decision = _decide_alone(gate, *inputs, states.tokens[chunk], own_score)
            if method.weighting == "constant":
                reverse_weight = torch.full_like(reverse_weight, method.reverse_weight)
            elif method.weighting_gate is not None:
                reverse_weight = decision.reverse_weight
            if not method.gate_writes:
                _add(sums, "rollout/hard_share", decision.hard.double())
            family = "rollout/truncated_" if method.truncates else "rollout/"
            _add(sums, f"{family}divergence", divergence)
            _add(sums, f"{family}high_divergence_share", (divergence >= HIGH_DIVERGENCE).double())
            if method.truncates and states.known:
                _add(sums, "rollout/truncated_hard_share", (divergence >= method.gate.threshold).double())
            _add(sums, "train/reverse_weight", reverse_weight)
        if method.estimator == "exact":
            annealed = 1 - method.forward_kl_share(self.iteration) * (1 - reverse_weight)
            loss = exact_loss(method, student, teacher, token_log_prob, annealed)
        elif method.loss in ("weighted", "forward", "nll"):
            loss = imitation_loss(token_log_prob, ~own)
        _add(sums, "train/local_loss", loss)
        if method.importance_weights:
            loss = loss * states.weight[chunk].to(loss.dtype)
        if method.gamma > 0 or method.estimator == "sampled":
            loss = loss + policy_gradient_loss(token_log_prob, states.future[chunk], states.weight[chunk])
        if self.hand_over is not None and states.scored and self.config.hand_over_weight:
            prediction = self.hand_over.head(self.hand_over.head.inputs(features, log_probs))
            loss = loss + self.config.hand_over_weight * (prediction - target(divergence)).square().to(loss.dtype)
        _add(sums, "train/loss", loss)
        _add(sums, "train/entropy", entropy(log_probs.detach()))
        return loss.sum()

    def _chunks(self, features: Tensor) -> Iterator[slice]:
        on_gpu = features.device.type != "cpu"
        return _chunks(len(features), self.config.positions_at_a_time(self.student.vocab_size, on_gpu))

    @property
    def _update_gate(self) -> Gate | None:
        """The gate that the update has to apply: it weighs the loss, or says what is hard where the rollout did not."""
        if self.method.weighting_gate is not None:
            return self.method.weighting_gate
        return None if self.method.gate_writes else self.method.hard_gate

    @torch.no_grad()
    def _decide_in_order(self, rollout: Rollout, rows: slice, features: Tensor, states: _States) -> GateDecision | None:
        """Decisions at all m positions of some completions, [m] each; None where each position is read alone.

        Where the rollout read the gate, its scores are taken: positions that it did not read, in a
        step that the teacher writes to its end, take the weight of the position that was rewritten. So they are where
        the teacher's distributions are truncated, which the gate read whole.
        """
        gate = self._update_gate
        if gate is None or not states.scored:
            return None
        if not gate.has_memory and not (self.method.truncates and self.method.reads_in_rollout):
            return None
        mask = rollout.mask[rows]
        if self.method.reads_in_rollout:
            score = rollout.score[rows]
            decision = decide(gate, score, torch.zeros_like(score))
            read = torch.where(score.isnan(), -1, torch.arange(score.shape[1])).cummax(1).values.clamp(min=0)
            decision = decision._replace(reverse_weight=decision.reverse_weight.gather(1, read))
            return GateDecision(*(upload(x[mask], features.device) for x in decision))
        scores = []
        for chunk in self._chunks(features):
            teacher, ids = states.teacher(chunk)
            log_probs = self.student.head(features[chunk])
            block = _alone(states.tokens[chunk], self._student_score(gate, log_probs, features[chunk]))
            student = project(log_probs, ids)
            if ids is not None:
                student, teacher = truncated_inputs(gate, student, teacher)
            scores.append(raw_score(gate, student[:, None], teacher[:, None], block))
        score = torch.zeros(mask.shape, dtype=torch.float64)
        (score[mask],) = fetch(torch.cat(scores)[:, 0])
        previous = torch.cat([torch.full((len(mask), 1), PAD), rollout.tokens[rows][:, :-1]], 1)
        step_start = torch.isin(previous, torch.tensor([PAD, *rollout.step_end_ids]))
        decision, _ = read_and_decide(gate, score, step_start, torch.zeros_like(score), GateState.start(len(mask)))
        return GateDecision(*(upload(x[mask], features.device) for x in decision))

    def _student_score(self, gate: Gate, log_probs: Tensor, features: Tensor) -> Tensor | None:
        """What the gate reads of the student alone at positions [m], from log q [m, V] and features; [m, 1]."""
        predicted = None
        if self.hand_over is not None and gate.student_score == "predicted_divergence":
            predicted = self.hand_over.head.divergence(features, log_probs)[:, None]
        return student_score(gate, log_probs[:, None], predicted)

    def _long_range(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The factors of log q in the policy gradient, [N, T] each: the discounted cost-to-go less a baseline, and a
        weight.

        A token costs minus its reward, plus log q (detached) if it is the student's; the weight is 1 on these and 0 on
        the teacher's. With importance weights every token is a draw from one mixture: each costs log q - log p and has
        its weight.
        """
        method, mask = self.method, rollout.mask
        cost, weight = rollout.token_log_prob - rollout.rewards, (mask & ~rollout.rewritten).double()
        if method.importance_weights:
            log_q, log_p = self._token_log_probs(rollout)
            cost = log_q - log_p
            weight = importance_weight(log_q, log_p, method.teacher_rate) * mask
        future = cost_to_go(cost, method.gamma, include_present=method.estimator == "sampled")
        if method.length_normalize:
            future = length_normalized(future, mask)
        return (future - leave_one_out_baseline(future, mask)) * mask, weight

    @torch.no_grad()
    def _token_log_probs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's log-probabilities of all tokens, float64 [N, T] each."""
        mask, parts = rollout.mask, []
        size = self.config.micro_batch or len(mask)
        for rows in _chunks(len(mask), size):
            prompts = [p.ids for p in rollout.prompts[rows]]
            features = self.student.features(prompts, rollout.tokens[rows], mask[rows])
            tokens = upload(rollout.tokens[rows][mask[rows]], features.device)
            for chunk in self._chunks(features):
                parts.append(_of_tokens(self.student.head(features[chunk]), tokens[chunk]))
        assert rollout.teacher is not None
        tokens = upload(rollout.tokens[mask], rollout.teacher.device)
        log_q, log_p = torch.zeros(2, *mask.shape, dtype=torch.float64)
        q, p = fetch(torch.cat(parts), _of_tokens(rollout.teacher, tokens))
        log_q[mask], log_p[mask] = finite(q).double(), finite(p).double()
        return log_q, log_p

    def reseed(self, seed: int) -> None:
        """After this `act` repeats itself."""
        self.actor.reseed(seed)

    def act(self, observation: NDArray[np.int64], info: dict[str, Any] | None = None) -> NDArray[np.int64]:
        """Sample a token for every row of [n, T]."""
        return self.actor.act(observation)

    def log_probs(self, observation: NDArray[np.int64]) -> NDArray[np.float64]:
        """The log-probabilities that `act` samples from, [n, T] -> [n, V], nats."""
        return self.actor.log_probs(observation).double().cpu().numpy()

    def save(self, path: str | Path) -> None:
        """Write the student, the optimiser and whatever else a resumed run needs to equal an uninterrupted one."""
        write_folder(path, self._write)

    def _write(self, folder: Path) -> None:
        self.student.save_pretrained(folder / "student")
        tensors, groups = self._gather()
        state = {
            "config": dataclasses.asdict(self.config),
            "ids": ids_of(self.student),
            "dtype": next(str(t.dtype)[6:] for t in self.student.state_dict().values() if t.is_floating_point()),
            "iteration": self.iteration,
            "mean_length": self.mean_length,
            "tau": self.method.gate.tau,
            "param_groups": groups,
        }
        save_state(folder, "optimizer", tensors, state)
        if self.hand_over is not None:
            tensors, groups = self.hand_over.tensors()
            save_state(folder, "hand_over", tensors, {"param_groups": groups})
        if self.past is not None:
            save_state(folder, "teacher", self.past.tensors(), {})

    def _gather(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The optimiser's state, whole in the first process."""
        tensors, groups = self.optimizer.tensors()
        return self.processes.gather_full(tensors), groups

    @classmethod
    def load(cls, path: str | Path, processes: ProcessGroup = SINGLE_PROCESS, **options: Any) -> DistillAgent:
        """Read what `save` wrote.

        Args:
            path: the folder.
            processes: the processes that it will join; with a sharded student each keeps its share alone.
            options: say how the student is loaded, as `build_model` takes them.
        """
        folder = Path(path)
        tensors, state = load_state(folder, "optimizer")
        with damage_as_value_error(folder):
            config = from_dict(DistillConfig, state["config"])
            ids = state["ids"]  # the folder's head may have more rows
            student = build_model(folder / "student", **ids, dtype=state.get("dtype", "float32"), **options)
            if student.vocab_size != ids["vocab_size"]:
                raise ValueError(f"its student has {student.vocab_size} ids, not {ids['vocab_size']}")
            processes.shard(student)
            agent = cls(student, config)
            agent.optimizer.restore(tensors, state["param_groups"])
            if agent.hand_over is not None:
                tensors, own = load_state(folder, "hand_over")
                agent.hand_over.restore(tensors, own["param_groups"])
            agent.iteration, agent.mean_length = int(state["iteration"]), float(state["mean_length"])
            agent.method = config.method.with_tau(state["tau"])
            if (folder / "teacher.safetensors").exists():
                agent.past = PastStudent(student)
                agent.past.restore(load_state(folder, "teacher")[0])
        return agent


class _States:
    """The valid positions of some rows of a rollout, flattened row by row, on the student's device."""

    def __init__(
        self, rollout: Rollout, rows: slice, future: Tensor, weight: Tensor, offset: int, device: torch.device
    ) -> None:
        mask = rollout.mask[rows]
        self.tokens = upload(rollout.tokens[rows][mask], device)  # [m]
        self.rewritten = upload(rollout.rewritten[rows][mask], device)
        self.future, self.weight = upload(future[rows][mask], device), upload(weight[rows][mask], device)
        self.scored = rollout.teacher is not None
        self.known = rollout.divergence is not None  # whether D_t over the whole vocabulary is
        self._rollout, self._offset, self._device = rollout, offset, device

    def teacher(self, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """The teacher's log-probabilities at these positions and the ids of their support."""
        assert self._rollout.teacher is not None
        where = slice(self._offset + chunk.start, self._offset + chunk.stop)
        ids = self._rollout.support
        teacher = upload(self._rollout.teacher[where], self._device)
        return teacher, None if ids is None else upload(ids[where], self._device)


def _of_tokens(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [m, V] of the tokens [m]."""
    return log_probs.gather(-1, tokens[:, None])[:, 0]


def _alone(tokens: Tensor, own_score: Tensor | None = None) -> DraftBlock:
    """Positions [m] as drafts of one token, for gates that read each alone; `own_score` [m, 1] is a `student_score`."""
    ones = torch.ones(len(tokens), 1, device=tokens.device)
    return DraftBlock(tokens[:, None], ones.bool(), ones.double(), ones[:, 0].double(), own_score)


def _decide_alone(
    gate: Gate, student: Tensor, teacher: Tensor, tokens: Tensor, own_score: Tensor | None
) -> GateDecision:
    """The decisions [m] of a gate without memory at positions [m], from log-probabilities [m, V]."""
    score = raw_score(gate, student[:, None], teacher[:, None], _alone(tokens, own_score))
    starts, no_draws = torch.ones_like(score, dtype=torch.bool), torch.zeros_like(score)
    decision, _ = read_and_decide(gate, score, starts, no_draws, GateState.start(len(score), score.device))
    return GateDecision(*(x[:, 0] for x in decision))


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _add(sums: dict[str, Tensor], key: str, values: Tensor) -> None:
    """Add to a sum that stays on the device of the values, so that a GPU need not wait."""
    total = values.detach().sum().double()
    sums[key] = sums[key] + total if key in sums else total
