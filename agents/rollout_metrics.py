"""Metrics of a rollout: what was written and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from agents.base import Metrics
from agents.metrics import repeated_share
from agents.rollout import Rollout
from distill_env.teacher_scorer import TeacherUsage

TEACHER_COSTS = ("teacher_passes", "teacher_positions", "teacher_tokens")


def rollout_sums(rollout: Rollout) -> dict[str, float]:
    """The numbers behind `rollout_metrics`, as sums, so that the processes that share a batch can add theirs."""
    cost = rollout.cost
    return {
        "processes": 1.0,
        "completions": float(len(rollout.prompts)),
        "reward": float(rollout.rewards.sum()),
        "grade": float(rollout.grades.sum()),
        "loops": float((repeated_share(rollout.tokens) > 0.5).sum()),
        "tokens": float(rollout.mask.sum()),
        "rewritten": 0.0 if rollout.from_data else float(rollout.rewritten.sum()),
        "reference": float(rollout.mask.sum()) if rollout.from_data else 0.0,
        "time/student_seconds": cost.student_seconds,
        "time/teacher_seconds": cost.teacher_seconds,
        "time/rollout_seconds": cost.seconds,
        **{f"cost/{name}": float(getattr(cost, name)) for name in ("drafted", "wasted", *TEACHER_COSTS)},
        **{f"cost/cached_{name}": float(getattr(rollout.cached_cost, name, 0)) for name in TEACHER_COSTS},
    }


def rollout_metrics(sums: dict[str, float]) -> Metrics:
    """Metrics from the sums of a batch: costs as sums, seconds as means over processes, all else as means."""
    completions, tokens = sums["completions"], sums["tokens"]
    means = {
        "rollout/reward": sums["reward"] / completions,
        "rollout/grade": sums["grade"] / completions,
        "rollout/length": tokens / completions,
        "rollout/loops": sums["loops"] / completions,
    }
    seconds = {key: sums[key] / sums["processes"] for key in sums if key.startswith("time/")}
    totals = {key: sums[key] for key in sums if "/" in key and (sums[key] or "cached" not in key)}
    return means | totals | seconds | token_metrics(tokens, sums["rewritten"], sums["reference"])


def token_metrics(tokens: float, rewritten: float, reference: float = 0.0) -> Metrics:
    """Counts and shares of all tokens, of those that the teacher wrote, and of those that are in the data."""
    own = tokens - rewritten - reference
    of_data = {"rollout/reference_tokens": float(reference)} if reference else {}
    return of_data | {
        "rollout/tokens": float(tokens),
        "rollout/student_tokens": float(own),
        "rollout/rewritten_share": float(rewritten / max(tokens, 1)),
        "rollout/teacher_tokens_per_student_token": float(rewritten / max(own, 1)),
    }


def usage_by_teacher(env: Any) -> dict[str, float]:
    """What each of several teachers has computed and written so far, by the key of its metric; empty for one teacher.

    Args:
        env: a `DistillVectorEnv`, wrapped or not.
    """
    return {
        f"cost/teacher_{what}/{name}": float(count)
        for name, usage in env.unwrapped.teacher_usage_by_name.items()
        for what, count in vars(usage).items()
    }


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
