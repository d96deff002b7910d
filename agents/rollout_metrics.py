"""What a rollout showed and cost, as metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from agents.base import Metrics
from agents.metrics import repeated_share
from agents.rollout import Rollout
from distill_env.teacher_scorer import TeacherUsage

CACHED = ("teacher_passes", "teacher_positions", "teacher_tokens")  # what an answer read from disk once cost


def rollout_sums(rollout: Rollout) -> dict[str, float]:
    """What a rollout showed and cost, as numbers that add up over the processes that share a batch."""
    cost, mask = rollout.cost, rollout.mask
    tokens, written = float(mask.sum()), float(rollout.rewritten.sum())
    return {
        "processes": 1.0,
        "answers": float(len(rollout.prompts)),
        "reward": float(rollout.rewards.sum()),
        "grade": float(rollout.grades.sum()),
        "loops": float((repeated_share(rollout.tokens) > 0.5).sum()),
        "rollout/tokens": tokens,
        "rollout/student_tokens": tokens - written,
        "cost/drafted": float(cost.drafted),
        "cost/wasted": float(cost.wasted),
        "cost/teacher_passes": float(cost.teacher_passes),
        "cost/teacher_positions": float(cost.teacher_positions),
        "cost/teacher_tokens": float(cost.teacher_tokens),
        "time/student_seconds": cost.student_seconds,
        "time/teacher_seconds": cost.teacher_seconds,
        "time/rollout_seconds": cost.seconds,
    } | {f"cost/cached_{name}": float(getattr(rollout.cached_cost, name, 0)) for name in CACHED}


def rollout_metrics(sums: dict[str, float]) -> Metrics:
    """From the sums of a batch: costs as they are, seconds a process, and means."""
    answers, tokens, own = sums["answers"], sums["rollout/tokens"], sums["rollout/student_tokens"]
    means = {
        "rollout/reward": sums["reward"] / answers,
        "rollout/grade": sums["grade"] / answers,
        "rollout/length": tokens / answers,
        "rollout/loops": sums["loops"] / answers,
        "rollout/rewritten_share": (tokens - own) / tokens,
        "rollout/teacher_tokens_per_student_token": (tokens - own) / max(own, 1.0),
    }
    seconds = {key: sums[key] / sums["processes"] for key in sums if key.startswith("time/")}
    kept = {key: sums[key] for key in sums if "/" in key and (sums[key] or "cached" not in key)}
    return means | kept | seconds


@contextmanager
def count_usage(env: Any) -> Iterator[TeacherUsage]:
    """Count the passes, positions and tokens of the teacher inside the block.

    Args:
        env: a `DistillVectorEnv`, wrapped or not.

    Yields:
        The counts, set at the end of the block.
    """
    core, usage = env.unwrapped, TeacherUsage()
    before = replace(core.teacher_usage)
    yield usage
    for name, count in vars(core.teacher_usage).items():
        setattr(usage, name, count - getattr(before, name))
