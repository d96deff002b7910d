"""The results as Markdown."""

from __future__ import annotations

from typing import Any

from experiments.benchmarking.timing import median, spread


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown tables."""
    out = [
        f"# Benchmark: {results['pair']}",
        "",
        f"{results['threads']} threads, {results['machine']}, medians (smallest-largest) of alternating repetitions.",
    ]
    for part in results.get("rollout", []):
        ungated = median(part["ungated"])
        out += [
            "",
            f"## Rollouts: {part['rows']} rows, {part['tokens']} tokens",
            "",
            f"Ungated, one teacher pass at the end: {spread(part['ungated'])}. `generate`: {spread(part['generate'])}. "
            f"Both models read the prompts in {part['prompt_seconds']:.3g} s; a student step takes "
            f"{1e3 * part['student_step']:.1f} ms, a teacher block of "
            + ", ".join(f"{w}: {1e3 * s:.1f}" for w, s in zip(part["block_widths"], part["block_seconds"], strict=True))
            + " ms.",
            "",
            "| hard | adaptive K | seconds | over ungated | over the cost model, by answer, by step "
            "| over best fixed K | seconds with fixed K | passes |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in part["gated"]:
            adaptive, fixed = median(row["adaptive"]), {k: median(v) for k, v in row["fixed"].items()}
            best = min(fixed, key=lambda k: fixed[k])
            out.append(
                f"| {row['hard_rate']:.1%} | {row['chosen_length']} | {spread(row['adaptive'])} "
                f"| {adaptive / ungated:.2f} | {over_model(adaptive, row)} "
                f"| {adaptive / fixed[best]:.2f} (K = {best}) "
                f"| {', '.join(f'{k}: {v:.3g}' for k, v in fixed.items())} "
                f"| {row['passes']} of {row['passes_one_by_one']} |"
            )
        refilled = part["refilled"]
        seconds = median(refilled["seconds"])
        out += [
            "",
            f"With refilling, {refilled['answers']} answers through {part['rows']} rows at {refilled['hard_rate']:.1%} "
            f"hard: {spread(refilled['seconds'])}, ungated {spread(refilled['ungated'])}: "
            f"{seconds / median(refilled['ungated']):.2f} times. Over the cost model: {over_model(seconds, refilled)}.",
        ]
    if "iteration" in results:
        part = results["iteration"]
        taken = part["seconds"]
        out += ["", f"## One iteration: {part['rows']} answers of {part['tokens']} tokens", ""]
        out += ["| | seconds | over the floor |", "| --- | ---: | ---: |"]
        for name, values in taken.items():
            ratio = f"{median(values) / median(taken['floor']):.2f}" if "floor" in taken else ""
            out.append(f"| {name} | {spread(values)} | {ratio} |")
    if "peers" in results:
        out += ["", "## Against TRL", "", "| | seconds an iteration | tokens a second | peak memory, MiB |"]
        out += ["| --- | ---: | ---: | ---: |"]
        for name, runs in results["peers"].items():
            each = [s for run in runs for s in run["seconds"]]
            rate = median([run["tokens"] / sum(run["seconds"]) for run in runs])
            out.append(f"| {name} | {spread(each)} | {rate:.1f} | {median([run['peak_mib'] for run in runs]):,.0f} |")
    if "precision" in results:
        out += ["", "## Rounding: K = 8 against K = 1", "", "| | answers that part | of tokens | mean, largest TV |"]
        out += ["| --- | ---: | ---: | ---: |"]
        for row in results["precision"]:
            share = f"{row['parted']} of {row['answers']} | {row['parted'] / row['tokens']:.2%} of {row['tokens']:,}"
            apart = f"{row['mean_total_variation']:.2g}, {row['largest_total_variation']:.2g}"
            out.append(f"| {row['dtype']} | {share} | {apart} |")
    if "memory" in results:
        out += [
            "",
            "## Memory of one update, four answers a pass",
            "",
            "| rows | tokens | chunk, positions | above the model, MiB |",
        ]
        out += ["| ---: | ---: | ---: | ---: |"]
        for row in results["memory"]:
            out.append(f"| {row['rows']} | {row['tokens']} | {row['chunk']} | {row['update_mib']:,.0f} |")
    if "environment" in results:
        out += ["", "## The environment alone", "", "| rows | toy steps/s | CartPole-v1 steps/s |"]
        out += ["| ---: | ---: | ---: |"]
        for row in results["environment"]:
            out.append(f"| {row['rows']} | {row['toy']:,.0f} | {row['cartpole']:,.0f} |")
        share = results["environment"][0]["ppo_share"]
        out += ["", f"The environment takes {share:.1%} of the time of PPO on the table with 64 rows."]
    return out


def over_model(seconds: float, row: dict[str, Any]) -> str:
    """Seconds over those of the cost model, which knows the hard rate, that of each answer, or each hard step."""
    return ", ".join(f"{seconds / row[key]:.2f}" for key in ("model", "model_by_answer", "replayed"))
