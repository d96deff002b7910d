"""Runs of one method that differ in their seeds alone, as one computation.

Each run keeps an agent of its own, with its weights, its optimiser, its prompts and its random numbers. What they share
are the calls: one rollout writes the completions of all, one pass of the stacked students reads them. So the result of
each run is that of the run alone, to rounding.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agents.base import Metrics
from agents.distill import DistillAgent
from agents.distributed import SINGLE_PROCESS
from agents.prompts import PromptStream
from agents.rollout import Rollout, RolloutCost
from distill_env.models.stacked import StackedLM, can_be_stacked
from distill_env.ragged import PAD


def can_learn_together(agents: Sequence[DistillAgent]) -> bool:
    """Whether an `AgentStack` can take these agents: equal but for seed and weights, with a gate that follows no batch.

    Their students are small models of one shape on the CPU; see `can_be_stacked`.
    """
    first = agents[0]
    alike = {(dataclasses.replace(a.config, seed=0), a.iteration, a.method) for a in agents}
    return (
        len(alike) == 1
        and first.method.gate.tau != "auto"
        and first.method.budget == 0
        and first.method.teacher_writes != "matched"
        and first.method.gate.student_score != "predicted_divergence"
        and first.config.micro_batch == 0
        and first.config.refresh_teacher == 0
        and all(a.cache is None and a.processes is SINGLE_PROCESS for a in agents)
        and can_be_stacked([a.student for a in agents])
    )


class AgentStack:
    """S agents that write and learn together.

    Args:
        agents: equal but for their seeds and weights; see `can_learn_together`. They learn in place.

    Raises:
        ValueError: for agents that cannot learn together.
    """

    def __init__(self, agents: Sequence[DistillAgent]) -> None:
        if not can_learn_together(agents):
            raise ValueError(
                "agents: they differ in more than seed and weights, or follow a budget or a matched share; expected "
                "runs of one method from seed to seed, with small students on the CPU and without micro-batches"
            )
        self.agents = list(agents)
        students: list[Any] = [agent.student for agent in agents]
        self.student = StackedLM(students)

    def learn(
        self, env: Any, iterations: int, callback: Callable[[int, list[Metrics]], None] | None = None
    ) -> AgentStack:
        """Train all agents for that many more iterations.

        Args:
            env: a `DistillVectorEnv` of S times `batch_size` rows, wrapped or not.
            iterations: number of optimiser steps of each agent.
            callback: called after every iteration with its number and the metrics of each agent.

        Raises:
            FloatingPointError: for a loss or a gradient that is not finite; that student is not changed.
        """
        self.agents[0].check(env)
        streams = [agent.prompt_stream(env) for agent in self.agents]
        for _ in range(iterations):
            metrics = self._iterate(env, streams)
            if callback is not None:
                callback(self.agents[0].iteration, metrics)
        return self

    def _iterate(self, env: Any, streams: Sequence[PromptStream]) -> list[Metrics]:
        started = time.perf_counter()
        rollouts = self.rollouts(env, streams)
        update_started = time.perf_counter()
        updates = self.update(rollouts)
        ended = time.perf_counter()
        s = len(self.agents)
        times = (ended - started) / s, (ended - update_started) / s
        parts = zip(self.agents, rollouts, updates, strict=True)
        return [agent.conclude(rollout, metrics, *times) for agent, rollout, metrics in parts]

    def rollouts(self, env: Any, streams: Sequence[PromptStream]) -> list[Rollout]:
        """The completions of each agent in this iteration, all written in one rollout."""
        batches = [agent.next_batch(stream) for agent, stream in zip(self.agents, streams, strict=True)]
        prompts, keys = [p for batch, _ in batches for p in batch], np.concatenate([keys for _, keys in batches])
        first = self.agents[0]
        with _student_of(first, self.student):
            together = first.write_completions(env, prompts, keys)
        return split_rollout(together, len(self.agents))

    def update(self, rollouts: Sequence[Rollout]) -> list[Metrics]:
        """One step of each agent's optimiser on its own loss. Returns the metrics of the updates.

        Raises:
            FloatingPointError: for a loss or a gradient that is not finite.
        """
        width = max(r.tokens.shape[1] for r in rollouts)
        tokens = torch.cat([F.pad(r.tokens, (0, width - r.tokens.shape[1]), value=PAD) for r in rollouts])
        features = self.student.features([p.ids for r in rollouts for p in r.prompts], tokens, tokens >= 0)
        leaf = features.detach().requires_grad_()
        totals = []
        for agent, rollout, part in zip(
            self.agents, rollouts, leaf.split([int(r.mask.sum()) for r in rollouts]), strict=True
        ):
            with _student_of(agent, _Read(part, agent.student)):
                totals.append(agent.backward(rollout))
        features.backward(leaf.grad)
        self.student.distribute_gradients()
        metrics = []
        for agent, rollout, total in zip(self.agents, rollouts, totals, strict=True):
            metrics.append(agent.follow(rollout, total | agent.descend(total)))
        return metrics


class _Read:
    """A student that has read its agent's completions, in place of the student itself in `backward`."""

    def __init__(self, features: Tensor, student: Any) -> None:
        self._features, self.head, self.vocab_size = features, student.head, student.vocab_size

    def features(self, *_: Any) -> Tensor:
        return self._features


@contextmanager
def _student_of(agent: DistillAgent, student: Any) -> Iterator[None]:
    """Inside the block the agent has another student."""
    own, agent.student = agent.student, student
    try:
        yield
    finally:
        agent.student = own


def split_rollout(rollout: Rollout, parts: int) -> list[Rollout]:
    """The rollouts of equally many completions each, in their order.

    Teacher tokens are counted; passes, positions, drafted tokens and seconds are shared in proportion to the tokens.
    """
    size = len(rollout.prompts) // parts
    total = float(rollout.mask.sum())
    split, stop = [], 0
    for i in range(parts):
        rows = slice(i * size, (i + 1) * size)
        mask = rollout.mask[rows]
        columns = slice(int(mask.sum(1).max()))
        start, stop = stop, stop + int(mask.sum())
        share = (stop - start) / total
        cost = RolloutCost(**{name: value * share for name, value in vars(rollout.cost).items()})
        cost.teacher_tokens = int(rollout.rewritten[rows].sum())
        by_row = ("tokens", "rewritten", "rewards", "token_log_prob", "score")
        split.append(
            dataclasses.replace(
                rollout,
                prompts=rollout.prompts[rows],
                **{name: getattr(rollout, name)[rows, columns] for name in by_row},
                grades=rollout.grades[rows],
                divergence=None if rollout.divergence is None else rollout.divergence[rows, columns],
                teacher=None if rollout.teacher is None else rollout.teacher[start:stop],
                support=None if rollout.support is None else rollout.support[start:stop],
                cost=cost,
            )
        )
    return split
