"""The results of a benchmark as Markdown: a section for each part, most of them a table."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from experiments.benchmarking.timing import median_and_range
from experiments.running.tracking import markdown_table


def benchmark_report(results: dict[str, Any]) -> str:
    """A page of what was measured."""
    sections = [
        f"# Benchmark: {results['pair']}",
        f"{results['threads']} threads, {results['machine']}, medians (smallest-largest) of alternating repetitions.",
        *(section(results[part]) for part, section in SECTIONS.items() if part in results),
    ]
    return "\n\n".join(sections) + "\n"


def rollout_section(batches: list[dict[str, Any]]) -> str:
    return "\n\n".join(map(rollout_table, batches))


def rollout_table(batch: dict[str, Any]) -> str:
    """Gated rollouts at several hard rates, against an ungated one, the cost model, and fixed draft lengths."""
    ungated, refilled = median(batch["ungated"]), batch["refilled"]
    blocks = zip(batch["block_widths"], batch["block_seconds"], strict=True)
    model = "over the cost model: by rate, by completion, by position"
    head = [
        "hard",
        "adaptive K",
        "seconds",
        "over ungated",
        model,
        "over best fixed K",
        "seconds with fixed K",
        "passes",
    ]
    table = [head]
    for row in batch["gated"]:
        adaptive, fixed = median(row["adaptive"]), {k: median(v) for k, v in row["fixed"].items()}
        best = min(fixed, key=lambda k: fixed[k])
        table.append(
            [
                f"{row['hard_rate']:.1%}",
                str(row["chosen_length"]),
                median_and_range(row["adaptive"]),
                f"{adaptive / ungated:.2f}",
                over_model(adaptive, row),
                f"{adaptive / fixed[best]:.2f} (K = {best})",
                ", ".join(f"{k}: {v:.3g}" for k, v in fixed.items()),
                f"{row['passes']} of {row['passes_one_by_one']}",
            ]
        )
    seconds = median(refilled["seconds"])
    return f"""\
## Rollouts: {batch["rows"]} rows, {batch["tokens"]} tokens

Ungated, one teacher pass at the end: {median_and_range(batch["ungated"])}. \
`generate`: {median_and_range(batch["generate"])}. \
Both models read the prompts in {batch["prompt_seconds"]:.3g} s. \
A student step takes {1e3 * batch["student_step"]:.1f} ms. \
A teacher block takes, by its number of positions: {", ".join(f"{n}: {1e3 * s:.1f}" for n, s in blocks)} ms.

{markdown_table(table)}

With refilling, {refilled["answers"]} completions through {batch["rows"]} rows at {refilled["hard_rate"]:.1%} hard: \
{median_and_range(refilled["seconds"])}, ungated {median_and_range(refilled["ungated"])}: \
{seconds / median(refilled["ungated"]):.2f} times. Over the cost model: {over_model(seconds, refilled)}."""


def over_model(seconds: float, row: dict[str, Any]) -> str:
    """Seconds over those of the cost model, which knows the mean hard rate, that of each completion, or each hard
    position."""
    return ", ".join(f"{seconds / row[key]:.2f}" for key in ("model", "model_by_answer", "replayed"))


def iteration_table(part: dict[str, Any]) -> str:
    seconds = part["seconds"]
    table = [["", "seconds", "over the floor"]]
    for name, values in seconds.items():
        ratio = f"{median(values) / median(seconds['floor']):.2f}" if "floor" in seconds else ""
        table.append([name, median_and_range(values), ratio])
    return f"## One iteration: {part['rows']} completions of {part['tokens']} tokens\n\n{markdown_table(table)}"


def peer_table(peers: dict[str, list[dict[str, Any]]]) -> str:
    table = [["", "seconds an iteration", "tokens a second", "peak memory, MiB"]]
    for name, runs in peers.items():
        seconds = [s for run in runs for s in run["seconds"]]
        rate = median(run["tokens"] / sum(run["seconds"]) for run in runs)
        memory = median(run["peak_mib"] for run in runs)
        table.append([name, median_and_range(seconds), f"{rate:.1f}", f"{memory:,.0f}"])
    return f"## Against TRL\n\n{markdown_table(table)}"


def precision_table(rows: list[dict[str, Any]]) -> str:
    table = [["", "completions that differ", "of tokens", "total variation: mean, largest"]]
    table += [
        [
            row["dtype"],
            f"{row['parted']} of {row['answers']}",
            f"{row['parted'] / row['tokens']:.2%} of {row['tokens']:,}",
            f"{row['mean_total_variation']:.2g}, {row['largest_total_variation']:.2g}",
        ]
        for row in rows
    ]
    return f"## Rounding: K = 8 against K = 1\n\n{markdown_table(table)}"


def memory_table(rows: list[dict[str, Any]]) -> str:
    table = [["rows", "tokens", "chunk, positions", "above the model, MiB"]]
    table += [[*(str(row[key]) for key in ("rows", "tokens", "chunk")), f"{row['update_mib']:,.0f}"] for row in rows]
    return f"## Memory of one update, four completions a pass\n\n{markdown_table(table)}"


def environment_table(rows: list[dict[str, Any]]) -> str:
    table = [["rows", "toy steps/s", "CartPole-v1 steps/s"]]
    table += [[str(row["rows"]), f"{row['toy']:,.0f}", f"{row['cartpole']:,.0f}"] for row in rows]
    return f"""\
## The environment alone

{markdown_table(table)}

The environment takes {rows[0]["ppo_share"]:.1%} of the time of PPO on the categorical table with 64 rows."""


SECTIONS: dict[str, Callable[[Any], str]] = {
    "rollout": rollout_section,
    "iteration": iteration_table,
    "peers": peer_table,
    "precision": precision_table,
    "memory": memory_table,
    "environment": environment_table,
}
