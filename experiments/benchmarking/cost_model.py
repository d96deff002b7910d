"""The cost of a gated rollout, from the times of a student step and of a teacher block, and when drafting pays.

    python experiments/benchmarking/cost_model.py

A block of draft length K is K student steps and one teacher pass over K positions: s K + t(K) seconds for the whole
batch. If a position is hard with probability h, a block commits (1 - (1 - h)^K) / h tokens on average, the rewritten
one included. Rows advance independently, and a batch ends with its last row. Draws a figure.
"""

from __future__ import annotations

import heapq
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from numpy.typing import NDArray

from experiments.running.cli import command

# the limits of decoding on a data-centre GPU: an H100 SXM's specification, at a usable share of it
GPU_BANDWIDTH = 3.35e12 * 0.7  # bytes a second from memory
GPU_FLOPS = 989e12 * 0.5  # dense bfloat16 operations a second
GPU_OVERHEAD = 2e-3  # further seconds of a forward pass, for launching kernels
RATES = np.geomspace(0.005, 1, 60)  # hard rates of a curve


def committed_per_block(hard_rate: float, length: int) -> float:
    """The mean number of tokens that a block of K adds to a row: (1 - (1 - h)^K) / h, or K if h is 0."""
    return length if hard_rate == 0 else (1 - (1 - hard_rate) ** length) / hard_rate


def blocks(hard: NDArray[np.bool_], lengths: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """The number of blocks of draft length K that write completions whose hard positions are given.

    A block ends after K tokens, or with a hard position, which the teacher writes.

    Args:
        hard: [N, T], the hard positions.
        lengths: [N], tokens of each completion.
        length: K.

    Returns:
        int64 [N].
    """
    n, tokens = hard.shape
    at, count = np.zeros(n, np.int64), np.zeros(n, np.int64)
    next_hard = np.where(hard, np.arange(tokens), tokens)
    next_hard = np.minimum.accumulate(next_hard[:, ::-1], 1)[:, ::-1]  # at or after each position
    while (at < lengths).any():
        writing = at < lengths
        first = next_hard[np.arange(n), np.minimum(at, tokens - 1)]
        at = np.where(writing, np.where(first < at + length, first + 1, at + length), at)
        count += writing
    return count


def blocks_in_turn(needed: NDArray[np.int64], rows: int) -> int:
    """The number of blocks until the last completion is written, if a row that ends one begins the next.

    Args:
        needed: [N], blocks of each completion.
        rows: completions written at a time.
    """
    ends = [0] * rows
    for count in needed.tolist():
        heapq.heapreplace(ends, ends[0] + count)
    return max(ends)


def blocks_per_rollout(
    hard_rate: float | NDArray[np.float64], length: int, lengths: NDArray[np.int64], rows: int, draws: int = 400
) -> float:
    """The mean number of blocks in which `rows` rows write completions of these lengths [N] in turn, by simulation.

    Every position is hard independently, with probability h or with that of its completion [N].
    """
    generator = np.random.default_rng(0)
    rates = np.broadcast_to(hard_rate, lengths.shape)[:, None]
    shape = len(lengths), int(lengths.max())
    counts = (blocks(generator.random(shape) < rates, lengths, length) for _ in range(draws))
    return float(np.mean([blocks_in_turn(needed, rows) for needed in counts]))


def best_length(hard_rate: float, longest: int, student_step: float, teacher_block: Callable[[int], float]) -> int:
    """The draft length up to `longest` that commits the most tokens a second."""
    lengths = range(1, longest + 1)
    return max(lengths, key=lambda k: committed_per_block(hard_rate, k) / (k * student_step + teacher_block(k)))


def speed_up(hard_rate: float, length: int, student_step: float, teacher_block: Callable[[int], float]) -> float:
    """Tokens a second with drafts of K over those of gating token by token."""
    drafted = committed_per_block(hard_rate, length) / (length * student_step + teacher_block(length))
    return drafted * (student_step + teacher_block(1))


def interpolated(widths: Sequence[int], seconds: Sequence[float]) -> Callable[[int], float]:
    """t(K), linear between the measured widths."""
    return lambda k: float(np.interp(k, widths, seconds))


def gpu_block(parameters: float, rows: int, length: int) -> float:
    """Seconds of a forward pass over `rows x length` positions on the GPU: the larger of reading the weights and
    computing, in bfloat16."""
    memory = 2 * parameters / GPU_BANDWIDTH
    compute = 2 * parameters * rows * length / GPU_FLOPS
    return max(memory, compute) + GPU_OVERHEAD


@dataclass(frozen=True)
class CostModelConfig:
    """Draw the cost model's prediction for GPUs, and its fit to what the benchmark measured."""

    measured: Path = Path("docs/results/benchmark.json")
    """Results of `experiments/benchmark.py`."""
    out: Path = Path("runs/cost_model.png")
    """Picture to write."""
    student: float = 1.5e9
    """Parameters of the student in the prediction."""
    teacher: float = 32e9
    """Parameters of the teacher in the prediction."""
    rows: int = 64
    """Completions written at a time in the prediction."""


def main(config: CostModelConfig) -> None:
    print("\n".join(draw_cost_model(config)))
    print(f"wrote {config.out}")


def draw_cost_model(config: CostModelConfig) -> list[str]:
    """Write the picture, and return the predictions: a line for each batch size and hard rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    predictions = draw_predicted(right, config)
    if config.measured.exists():
        draw_measured(left, json.loads(config.measured.read_text()))
    else:
        figure.delaxes(left)
    for axis in figure.axes:
        axis.set(xscale="log", xlabel="share of hard positions h", ylabel="speed-up over gating token by token")
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out, dpi=130)
    return predictions


def draw_predicted(axis: Any, config: CostModelConfig) -> list[str]:
    """Curves of three batch sizes on GPUs; the predictions at four hard rates."""
    lines = []
    for rows, colour in ((1, "C2"), (config.rows, "C0"), (4 * config.rows, "C1")):
        step, block = gpu_block(config.student, rows, 1), partial(gpu_block, config.teacher, rows)
        ungated = 64 * step + block(64)  # 64 tokens, scored at the end
        label = f"{rows} completion{'s' * (rows > 1)} at a time (step {1e3 * step:.1f} ms)"
        lengths, best = draw_model(axis, 64, step, block, colour, label)
        for h in (0.01, 0.05, 0.2, 0.5):
            i = int(np.abs(RATES - h).argmin())
            k = lengths[i]
            rate = rows * committed_per_block(h, k) / (k * step + block(k))
            speeds = f"{rate:,.0f} tokens a second; ungated {64 * rows / ungated:,.0f}"
            lines.append(f"{rows} rows, h = {h:.0%}: predicted speed-up {best[i]:.1f} at K = {k}, {speeds}")
    sizes = f"{config.teacher / 1e9:g}B teacher, {config.student / 1e9:g}B student"
    axis.set_title(f"prediction: {sizes}, one H100 each", fontsize=10)
    return lines


def draw_measured(axis: Any, measured: dict[str, Any]) -> None:
    """Model curves for the measured block times of each batch size, and the measured speed-ups."""
    for i, batch in enumerate(measured["rollout"]):
        block, prompts = interpolated(batch["block_widths"], batch["block_seconds"]), batch["prompt_seconds"]
        label = f"{batch['rows']} rows, {batch['tokens']} tokens"
        draw_model(axis, batch["draft_limit"], batch["student_step"], block, f"C{i}", f"model, {label}")
        points = [  # without reading the prompts, which takes both the same time and is not in the model
            (p["hard_rate"], (median(p["fixed"]["1"]) - prompts) / (median(p["adaptive"]) - prompts))
            for p in batch["gated"]
        ]
        axis.plot(*zip(*points, strict=True), f"C{i}o", label=f"measured, {label}")
    axis.set_title(f"measured here: {measured['pair']}", fontsize=10)


def draw_model(
    axis: Any, longest: int, step: float, block: Callable[[int], float], colour: str, label: str
) -> tuple[list[int], list[float]]:
    """A curve of the speed-up at the best draft length; these lengths and speed-ups at all `RATES`."""
    lengths = [best_length(h, longest, step, block) for h in RATES]
    best = [speed_up(h, k, step, block) for h, k in zip(RATES, lengths, strict=True)]
    axis.plot(RATES, best, colour, label=label)
    return lengths, best


if __name__ == "__main__":
    sys.exit(command(main, CostModelConfig, __doc__)())
