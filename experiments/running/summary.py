"""What a run says at its end: what its training cost, the table before and after, a sentence on what the gate did."""

from __future__ import annotations

import itertools
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.running.config import RunConfig
from experiments.running.tracking import add_metrics, cell


def summarise_training(rows: list[dict[str, float]]) -> dict[str, float]:
    """What the training cost and how steady it was, from the metrics of all iterations."""

    def total(key: str) -> float:
        return sum(row.get(key, 0.0) for row in rows)

    def mean(key: str, part: list[dict[str, float]]) -> float:
        values = [row[key] for row in part if key in row]
        return sum(values) / len(values) if values else float("nan")

    tenth = max(1, len(rows) // 10)
    own = total("rollout/student_tokens")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    jumps = [abs(b - a) for a, b in itertools.pairwise(losses)]
    cached = {key: total(f"cost/{key}") for key in ("cached_teacher_tokens", "cached_teacher_positions")}
    return {
        "iterations": len(rows),
        "tokens": total("rollout/tokens"),
        "student_tokens": own,
        "teacher_tokens": total("cost/teacher_tokens"),
        "teacher_positions": total("cost/teacher_positions"),
        "teacher_passes": total("cost/teacher_passes"),
        **ledger(rows),
        "teacher_tokens_per_student_token": total("cost/teacher_tokens") / own if own else float("inf"),
        "tokens_per_second": total("rollout/tokens") / total("time/seconds"),
        "rewritten_share_first": mean("rollout/rewritten_share", rows[:tenth]),
        "rewritten_share_last": mean("rollout/rewritten_share", rows[-tenth:]),
        "hard_share_first": mean("rollout/hard_share", rows[:tenth]),
        "hard_share_last": mean("rollout/hard_share", rows[-tenth:]),
        "loss_oscillation": sum(jumps) / len(jumps) if jumps else float("nan"),
        "grad_norm": mean("train/grad_norm", rows),
        "validation_correct_chains": mean("validation/correct_chains", rows[-len(rows) // 3 :]),
        "seconds": total("time/seconds"),
    } | {key: value for key, value in cached.items() if value}


def ledger(rows: list[dict[str, float]]) -> dict[str, float]:
    """What became of the tokens that the student drew, and where the seconds went; empty if the agent does not say."""
    if not rows or "cost/drafted" not in rows[0]:
        return {}
    drafted, wasted = (sum(row[f"cost/{key}"] for row in rows) for key in ("drafted", "wasted"))
    parts = ("student_seconds", "teacher_seconds", "update_seconds")
    seconds = {key: sum(row[f"time/{key}"] for row in rows) for key in parts}
    other = sum(row["time/seconds"] for row in rows) - sum(seconds.values())
    return {"drafted": drafted, "committed": drafted - wasted, "wasted": wasted, **seconds, "other_seconds": other}


def report(config: RunConfig, evaluation: dict[str, Any], console: Console) -> None:
    """The table before/after, what it cost, and a sentence on what the gate did."""
    before, after, training = evaluation["before"], evaluation["after"], evaluation["training"]
    table = Table(title=f"{config.agent} on {config.env}, seed {config.agent_options.seed}", title_justify="left")
    table.add_column("student alone, test split")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    add_metrics(table, config.evaluation.samples, [before, after])
    for label, form, keys in (
        (
            "rewritten steps in training, first -> last tenth",
            "{:.1%}",
            ("rewritten_share_first", "rewritten_share_last"),
        ),
        ("teacher tokens per student token", "{:.3f}", ("teacher_tokens_per_student_token",)),
        ("teacher passes, positions scored", "{:,.0f}", ("teacher_passes", "teacher_positions")),
        ("student's tokens drafted, committed, wasted", "{:,.0f}", ("drafted", "committed", "wasted")),
        (
            "seconds: student, teacher, update, other",
            "{:,.1f}",
            ("student_seconds", "teacher_seconds", "update_seconds", "other_seconds"),
        ),
        ("tokens, tokens/s in training", "{:,.0f}", ("tokens", "tokens_per_second")),
    ):
        if keys[0] not in training:
            continue  # an agent that keeps no ledger
        joint = " -> " if "->" in label else ", "
        table.add_row(label, "", joint.join(cell(form, training[key]) for key in keys))
    console.print(table)
    console.print(verdict(config, evaluation), highlight=False)


def verdict(config: RunConfig, evaluation: dict[str, Any]) -> str:
    """An honest sentence or two on what happened."""
    before, after, training = evaluation["before"], evaluation["after"], evaluation["training"]
    measure = next(k for k in ("correct_chains", "accuracy", "divergence") if k in after)
    shown = "{:.3f} nats" if measure == "divergence" else "{:.1%}"
    words = measure.replace("_", " ") if measure != "divergence" else "divergence from the teacher on own answers"
    change = f"{words}: {cell(shown, before[measure])} before, {cell(shown, after[measure])} after"
    first, last = training["rewritten_share_first"], training["rewritten_share_last"]
    if first == 0 and last == 0:
        gate = "The teacher wrote nothing; it only scored."
    elif first == 1 and last == 1:
        gate = "The teacher wrote everything."
    elif math.isnan(first):
        gate = "The agent did not say how much the teacher wrote."
    else:
        gate = (
            f"The teacher wrote {first:.1%} of the steps in the first tenth of the training and {last:.1%} in the last."
        )
    entropy = ""
    if all(math.isfinite(values["entropy"] or math.nan) for values in (before, after)):
        moved = after["entropy"] - before["entropy"]
        entropy = f" Entropy {'fell' if moved < 0 else 'rose'} by {abs(moved):.3f} nats a token."
    return f"{gate} {change[0].upper()}{change[1:]}.{entropy} One seed: a difference to another method needs several."
