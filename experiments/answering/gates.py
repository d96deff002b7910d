"""The gates of assisted decoding by name, what they read along a student's own completions, and their thresholds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

import numpy as np

from agents.assisted import MAX_TAU
from distill_env.gate_settings import NEVER, Gate, RandomGate, StepReduction
from distill_env.tasks.base import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from distill_env.env import DistillVectorEnv
    from distill_env.models.base import TrainableModel

RANDOM = "random"
SCREEN_SHARE = 0.2  # of the positions, at which a screen lets the teacher be asked


def named_gate(name: str) -> Gate:
    """The gate of a name: SCORE, SCORE/REDUCTION over a reasoning step, SCORE@SCREEN for two stages, or random.

    Raises:
        ValueError: if there is no such gate.
    """
    if name == RANDOM:
        return RandomGate()
    score, _, screen = name.partition("@")
    score, _, reduction = score.partition("/")
    if reduction and reduction not in get_args(StepReduction):
        expected = ", ".join(get_args(StepReduction))
        raise ValueError(f"score: {name!r} reads {reduction!r} over a step; expected {expected} after the slash")
    return Gate(score, step_reduction=reduction or "none", screen=screen)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Reading:
    """What gates read along completions that the student wrote alone, at each of M positions."""

    divergence: Tensor  # float64 [M], D_t
    scores: dict[str, Tensor]  # float64 [M], by the name of the gate

    def auroc(self, name: str, hard_from: float) -> float:
        """How well a gate finds the positions with D_t >= hard_from; NaN if all or none are."""
        from agents.metrics import auroc

        return auroc(self.scores[name], self.divergence >= hard_from)

    def threshold(self, name: str, share: float) -> float:
        """The threshold that this share of the scores reaches."""
        return float(np.quantile(self.scores[name].numpy(), 1 - share))


def read_alone(
    env: DistillVectorEnv,
    student: TrainableModel,
    prompts: Sequence[Prompt],
    gates: dict[str, Gate],
    seed: int,
) -> Reading:
    """Let the student write a completion of each prompt alone, and read every gate along them.

    A gate reads as if it rewrote nothing; its screen is ignored.
    """
    import torch

    from agents.collector import collect
    from agents.hand_over import predict
    from distill_env.divergence import project, reverse_kl
    from distill_env.gate import DraftBlock, GateState, apply_gate, student_score
    from distill_env.ragged import PAD
    from distill_env.randomness import episode_keys

    divergence: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {name: [] for name in gates}
    for begin in range(0, len(prompts), env.num_envs):
        some = list(prompts[begin : begin + env.num_envs])
        padded = [*some, *[some[-1]] * (env.num_envs - len(some))]
        keys = episode_keys(seed, np.arange(begin, begin + env.num_envs))
        rollout = collect(env, student, padded, keys, NEVER, env.chunk, env.teacher_top_k)
        assert rollout.teacher is not None
        mask, ids = rollout.mask, [p.ids for p in rollout.prompts]
        kept = (torch.arange(len(mask)) < len(some))[:, None] & mask
        with torch.no_grad():
            log_q = student.head(student.features(ids, rollout.tokens, mask))  # [M, V]
        predicted = predict(student, ids, rollout.tokens, mask)
        support = None if rollout.support is None else rollout.support.to(log_q.device)
        q, p = project(log_q, support), rollout.teacher.to(log_q.device)

        def padded_to(values: Tensor, mask: Tensor = mask) -> Tensor:
            """[M, ...] -> [N, T, ...], uniform distributions at padding."""
            out = torch.zeros(*mask.shape, *values.shape[1:], dtype=values.dtype)
            if values.dim() > 1:
                out -= math.log(values.shape[1])
            out[mask] = values.cpu()
            return out

        divergence.append(padded_to(reverse_kl(q, p).clamp(min=0))[kept].double())
        previous = torch.cat([torch.full((len(mask), 1), PAD), rollout.tokens[:, :-1]], 1)
        start = torch.isin(previous, torch.tensor([PAD, *rollout.step_end_ids]))
        unused = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for name, gate in gates.items():
            reader = replace(gate, tau=MAX_TAU, screen="")
            own = student_score(reader, log_q[:, None], None if predicted is None else predicted[:, None])
            own = None if own is None else padded_to(own[:, 0])
            block = DraftBlock(rollout.tokens, start, unused, unused[:, 0], own)
            decision, _ = apply_gate(reader, padded_to(q), padded_to(p), block, GateState.start(len(mask)))
            scores[name].append(decision.score[kept])
    return Reading(torch.cat(divergence), {name: torch.cat(parts) for name, parts in scores.items()})


def with_screen(gate: Gate, share: float, read: Callable[[dict[str, Gate]], Reading]) -> Gate:
    """A gate of two stages with a threshold of its screen that this share of the student's positions reaches."""
    if not gate.screen:
        return gate
    return replace(gate, screen_tau=read({gate.screen: named_gate(gate.screen)}).threshold(gate.screen, share))


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError unless every name is that of a gate, given once."""
    for name in names:
        if name != "run":
            named_gate(name)
    if len(set(names)) < len(names) or any(re.search(r"\s", name) for name in names):
        raise ValueError(f"score: {' '.join(names)}; expected each score once")
