"""The results of a benchmark as Markdown: a section for each part, most of them a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from experiments.benchmarking.timing import median_and_range
from experiments.running.metric_display import cell


def benchmark_report(results: dict[str, Any]) -> str:
    """A page of what was measured."""
    sections = [
        f"# Benchmark: {results['pair']}",
        "The speed and memory of rollouts and updates, as `experiments/benchmark.py` measured them: "
        f"{results['threads']} threads, {results['machine']}, medians (minimum-maximum) of alternating repetitions.",
        *(section(results[part]) for part, section in SECTIONS.items() if part in results),
    ]
    return "\n\n".join(sections) + "\n"


def table(head: str, rows: Iterable[str]) -> str:
    """Lines of cells with bars between them; the head first."""
    return "\n".join([head, "| ---" + " | ---:" * (head.count("|") - 2) + " |", *rows])


def rollout_tables(batches: list[dict[str, Any]]) -> str:
    return "\n\n".join(map(rollout_table, batches))


def rollout_table(batch: dict[str, Any]) -> str:
    """Gated rollouts at several hard rates, against an ungated one, the cost model, and fixed draft lengths."""
    ungated, refilled, rows = median(batch["ungated"]), batch["refilled"], []
    blocks = zip(batch["block_widths"], batch["block_seconds"], strict=True)
    for row in batch["gated"]:
        adaptive, fixed = median(row["adaptive"]), {k: median(v) for k, v in row["fixed"].items()}
        best = min(fixed, key=lambda k: fixed[k])
        rows.append(
            f"| {row['hard_rate']:.1%} | {row['chosen_length']} | {median_and_range(row['adaptive'])} "
            f"| {adaptive / ungated:.2f} | {over_model(adaptive, row)} | {adaptive / fixed[best]:.2f} (K = {best}) "
            f"| {', '.join(f'{k}: {v:.3g}' for k, v in fixed.items())} "
            f"| {row['passes']} of {row['passes_one_by_one']} |"
        )
    head = (
        "| hard | adaptive K | seconds | over ungated | over the cost model: by rate, by completion, by position "
        "| over best fixed K | seconds with fixed K | passes |"
    )
    seconds = median(refilled["seconds"])
    return f"""\
## Rollouts: {batch["rows"]} rows, {batch["tokens"]} tokens

Ungated, one teacher pass at the end: {median_and_range(batch["ungated"])}. \
`generate`: {median_and_range(batch["generate"])}. \
Both models read the prompts in {batch["prompt_seconds"]:.3g} s. \
A student step takes {1e3 * batch["student_step"]:.1f} ms. \
A teacher block takes, by its number of positions: {", ".join(f"{n}: {1e3 * s:.1f}" for n, s in blocks)} ms.

{table(head, rows)}

With refilling, {refilled["answers"]} completions through {batch["rows"]} rows at {refilled["hard_rate"]:.1%} hard: \
{median_and_range(refilled["seconds"])}, ungated {median_and_range(refilled["ungated"])}: \
{seconds / median(refilled["ungated"]):.2f} times. Over the cost model: {over_model(seconds, refilled)}."""


def over_model(seconds: float, row: dict[str, Any]) -> str:
    """Seconds over those of the cost model, which knows the mean hard rate, that of each completion, or each hard
    position."""
    return ", ".join(f"{seconds / row[key]:.2f}" for key in ("model", "model_by_answer", "replayed"))


def iteration_table(part: dict[str, Any]) -> str:
    seconds = part["seconds"]
    floor = median(seconds["floor"]) if "floor" in seconds else math.nan
    rows = [f"| {k} | {median_and_range(v)} | {cell('{:.2f}', median(v) / floor)} |" for k, v in seconds.items()]
    title = f"## One iteration: {part['rows']} completions of {part['tokens']} tokens"
    return f"{title}\n\n{table('| | seconds | over the floor |', rows)}"


def peer_table(peers: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for name, runs in peers.items():
        seconds = median_and_range([s for run in runs for s in run["seconds"]])
        rate = median(run["tokens"] / sum(run["seconds"]) for run in runs)
        rows.append(f"| {name} | {seconds} | {rate:.1f} | {median(run['peak_mib'] for run in runs):,.0f} |")
    return f"## Against TRL\n\n{table('| | seconds per iteration | tokens per second | peak memory, MiB |', rows)}"


def precision_table(parts: list[dict[str, Any]]) -> str:
    rows = [
        f"| {part['dtype']} | {part['parted']} of {part['answers']} "
        f"| {part['parted'] / part['tokens']:.2%} of {part['tokens']:,} "
        f"| {part['mean_total_variation']:.2g}, {part['largest_total_variation']:.2g} |"
        for part in parts
    ]
    head = "| | completions that differ | of tokens | total variation: mean, largest |"
    return f"## Rounding: K = 8 against K = 1\n\n{table(head, rows)}"


def memory_table(parts: list[dict[str, Any]]) -> str:
    rows = [f"| {p['rows']} | {p['tokens']} | {p['chunk']} | {p['update_mib']:,.0f} |" for p in parts]
    head = "| rows | tokens | chunk, positions | above the model, MiB |"
    return f"## Memory of one update, four completions per pass\n\n{table(head, rows)}"


def environment_table(parts: list[dict[str, Any]]) -> str:
    rows = [f"| {part['rows']} | {part['toy']:,.0f} | {part['cartpole']:,.0f} |" for part in parts]
    share = (
        f"The environment takes {parts[0]['ppo_share']:.1%} of the time of PPO on the categorical table with 64 rows."
    )
    return f"## The environment alone\n\n{table('| rows | toy steps/s | CartPole-v1 steps/s |', rows)}\n\n{share}"


SECTIONS: dict[str, Callable[[Any], str]] = {
    "rollout": rollout_tables,
    "iteration": iteration_table,
    "peers": peer_table,
    "precision": precision_table,
    "memory": memory_table,
    "environment": environment_table,
}
