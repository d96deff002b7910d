"""What a run prints at its end: a table of its student before and after, what the training cost, and a verdict."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.comparing.statistics import paired_difference
from experiments.running.config import RunConfig
from experiments.running.metric_display import ON_CALL, evaluation_lines, metric

# metrics of the training in the table, those of a line together
COSTS = (
    ("rewritten_share_first", "rewritten_share_last"),
    ("teacher_tokens_per_student_token",),
    ("teacher_passes",),
    ("teacher_positions",),
    ("drafted", "committed", "wasted"),
    ("student_seconds", "teacher_seconds", "update_seconds", "other_seconds"),
    ("tokens", "tokens_per_second"),
)


def summarise_training(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the training cost and how steady it was, from the metrics of all iterations."""

    def total(key: str) -> float:
        return sum(row.get(key, 0.0) for row in rows)

    def mean(key: str, part: Sequence[Mapping[str, float]]) -> float:
        values = [row[key] for row in part if key in row]
        return sum(values) / len(values) if values else float("nan")

    tenth = max(1, len(rows) // 10)
    own = total("rollout/student_tokens")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    jumps = [abs(b - a) for a, b in itertools.pairwise(losses)]
    teacher = {key: total(f"cost/{key}") for key in ("teacher_tokens", "teacher_positions", "teacher_passes")}
    by_name = {key for row in rows for key in row if re.fullmatch(r"cost/teacher_\w+/.+", key)}
    teacher |= {key.removeprefix("cost/"): total(key) for key in sorted(by_name)}
    cached = {key: total(f"cost/{key}") for key in ("cached_teacher_tokens", "cached_teacher_positions")}
    return {
        "iterations": len(rows),
        "tokens": total("rollout/tokens"),
        "student_tokens": own,
        **({"reference_tokens": read} if (read := total("rollout/reference_tokens")) else {}),
        **teacher,
        **rollout_cost(rows),
        "teacher_tokens_per_student_token": teacher["teacher_tokens"] / own if own else float("nan" if read else "inf"),
        "tokens_per_second": total("rollout/tokens") / total("time/seconds") if rows else float("nan"),
        "rewritten_share_first": mean("rollout/rewritten_share", rows[:tenth]),
        "rewritten_share_last": mean("rollout/rewritten_share", rows[-tenth:]),
        "hard_share_first": mean("rollout/hard_share", rows[:tenth]),
        "hard_share_last": mean("rollout/hard_share", rows[-tenth:]),
        "loss_oscillation": sum(jumps) / len(jumps) if jumps else float("nan"),
        "grad_norm": mean("train/grad_norm", rows),
        "validation_correct_chains": mean("validation/correct_chains", rows[-len(rows) // 3 :]),
        "seconds": total("time/seconds"),
    } | {key: value for key, value in cached.items() if value}


def rollout_cost(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Drafted, committed and wasted tokens, and the seconds of each part; empty for an agent without drafts."""
    if not rows or "cost/drafted" not in rows[0]:
        return {}
    drafted, wasted = (sum(row[f"cost/{key}"] for row in rows) for key in ("drafted", "wasted"))
    parts = ("student_seconds", "teacher_seconds", "update_seconds")
    seconds = {key: sum(row[f"time/{key}"] for row in rows) for key in parts}
    other = sum(row["time/seconds"] for row in rows) - sum(seconds.values())
    return {"drafted": drafted, "committed": drafted - wasted, "wasted": wasted, **seconds, "other_seconds": other}


def report(config: RunConfig, evaluation: dict[str, Any], console: Console) -> None:
    """Print the table and the verdict."""
    before, after, training = evaluation["before"], evaluation["after"], evaluation["training"]
    title = f"{config.agent} on {config.env}, seed {config.agent_options.seed}"
    table = evaluation_table(title, config.evaluation.samples, {"before": before, "after": after})
    for keys in COSTS:
        if keys[0] in training:
            metrics = [metric(key) for key in keys]
            label = "; ".join(m.label for m in metrics)
            table.add_row(label, "", "; ".join(m.text(training[m.key]) for m in metrics))
    for key in training:
        if key.startswith("teacher_") and "/" in key:
            table.add_row(metric(key).label, "", metric(key).text(training[key]))
    console.print(table)
    if on_call := {key: value for key, value in after.items() if key.startswith("on_call/")}:
        table = Table(title="with the teacher on call, test split", title_justify="left")
        table.add_column("")
        table.add_column("after", justify="right")
        for m in ON_CALL:
            if m.key in on_call:
                table.add_row(m.label, m.text(on_call[m.key]))
        console.print(table)
    console.print(verdict(evaluation), highlight=False)
    if line := forward_kl_line(evaluation.get("forward_kl_by_prompt", {})):
        console.print(line, highlight=False)


def evaluation_table(title: object, samples: int, columns: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Evaluations of a student alone, a section a topic, a column each."""
    table = Table(title=str(title), title_justify="left")
    table.add_column("the student alone, test split")
    for name in columns:
        table.add_column(name, justify="right")
    for lines in evaluation_lines(samples, [*columns.values()]).values():
        for line in lines:
            table.add_row(*line)
        table.add_section()
    return table


def forward_kl_line(by_prompt: Mapping[str, Sequence[float | None]]) -> str:
    """The held-out forward KL before and after, with the interval of its change; empty if it is not known.

    Args:
        by_prompt: KL(teacher || student) per token on the teacher's completion of each test prompt, `before` and
            `after`, in the same order.
    """
    known = [[x for x in by_prompt.get(k, ()) if x is not None and math.isfinite(x)] for k in ("before", "after")]
    before, after = known
    if len(before) != len(after) or not after:
        return ""
    first, last = (sum(values) / len(values) for values in known)
    change = paired_difference(after, before).estimate.text("{:+.3f}")
    return (
        f"Forward KL on the teacher's completions of {len(after)} test prompts, nats per token: {first:.3f} before, "
        f"{last:.3f} after, change {change} (95 %, paired by prompt)."
    )


def verdict(evaluation: dict[str, Any]) -> str:
    """What happened, in sentences."""
    before, after, training = evaluation["before"], evaluation["after"], evaluation["training"]
    m = metric(next(k for k in ("correct_chains", "accuracy", "divergence") if k in after))
    first, last = training["rewritten_share_first"], training["rewritten_share_last"]
    if math.isnan(first):
        gate = "The agent does not report how much the teacher wrote."
    elif training.get("reference_tokens"):
        gate = "The training tokens are reference completions of the data; neither model wrote them."
    elif first == last and first in (0, 1):
        gate = f"The teacher wrote {'all' if first else 'none'} of the tokens."
    else:
        gate = f"The teacher wrote {first:.1%} of the tokens in the first tenth of training, {last:.1%} in the last."
    change = f"{m.label[0].upper()}{m.label[1:]}: {m.text(before[m.key])} before, {m.text(after[m.key])} after."
    return f"{gate} {change} This is one seed; comparing methods needs several."
