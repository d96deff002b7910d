"""What a gated rollout costs, from the times of a student step and of a teacher block, and when drafting pays.

    python experiments/benchmarking/cost_model.py

A block of draft length K is K student steps and one teacher pass over K positions, s K + t(K) seconds for the whole
batch. A step is hard with probability h, so that a block commits (1 - (1 - h)^K) / h tokens on average, the rewrite
among them. Rows advance raggedly, and a batch ends with its last row. Draws docs/images/cost_model.png.
"""

from __future__ import annotations

import heapq
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from numpy.typing import NDArray

from experiments.running.cli import command


def committed_per_block(hard_rate: float, length: int) -> float:
    """The mean number of tokens that a block of K adds to a row: (1 - (1 - h)^K) / h; K without hard steps."""
    return length if hard_rate == 0 else (1 - (1 - hard_rate) ** length) / hard_rate


def blocks(hard: NDArray[np.bool_], lengths: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """The number of blocks in which drafts of K write answers whose hard steps are known.

    A block ends after K tokens, or with a hard step, which the teacher writes.

    Args:
        hard: [N, T], which steps are hard.
        lengths: [N], tokens of each answer.
        length: K.

    Returns:
        int64 [N].
    """
    n, tokens = hard.shape
    at, count = np.zeros(n, np.int64), np.zeros(n, np.int64)
    next_hard = np.where(hard, np.arange(tokens), tokens)
    next_hard = np.minimum.accumulate(next_hard[:, ::-1], 1)[:, ::-1]  # at or after each step
    while (at < lengths).any():
        writing = at < lengths
        first = next_hard[np.arange(n), np.minimum(at, tokens - 1)]
        at = np.where(writing, np.where(first < at + length, first + 1, at + length), at)
        count += writing
    return count


def blocks_in_turn(needed: NDArray[np.int64], rows: int) -> int:
    """The number of blocks until the last of these answers is written, of which each needs so many, by rows that take
    the next one when theirs ends."""
    ends = [0] * rows
    for count in needed.tolist():
        heapq.heapreplace(ends, ends[0] + count)
    return max(ends)


def blocks_per_rollout(
    hard_rate: float | NDArray[np.float64],
    length: int,
    lengths: NDArray[np.int64],
    rows: int,
    draws: int = 400,
    seed: int = 0,
) -> float:
    """The mean number of blocks in which `rows` rows write answers of these lengths [N] in turn, by simulation.

    Every step is hard with probability h, or with that of its answer [N], independently.
    """
    generator = np.random.default_rng(seed)
    rates = np.broadcast_to(hard_rate, lengths.shape)[:, None]
    shape = len(lengths), int(lengths.max())
    counts = (blocks(generator.random(shape) < rates, lengths, length) for _ in range(draws))
    return float(np.mean([blocks_in_turn(needed, rows) for needed in counts]))


def best_length(hard_rate: float, longest: int, student_step: float, teacher_block: Callable[[int], float]) -> int:
    """The draft length that commits the most tokens a second."""
    lengths = range(1, longest + 1)
    return max(lengths, key=lambda k: committed_per_block(hard_rate, k) / (k * student_step + teacher_block(k)))


def speed_up(hard_rate: float, length: int, student_step: float, teacher_block: Callable[[int], float]) -> float:
    """Tokens a second with drafts of K over those of gating token by token."""
    drafted = committed_per_block(hard_rate, length) / (length * student_step + teacher_block(length))
    return drafted * (student_step + teacher_block(1))


def interpolated(widths: Sequence[int], seconds: Sequence[float]) -> Callable[[int], float]:
    """t(K) between measured block widths, by lines."""
    return lambda k: float(np.interp(k, widths, seconds))


@dataclass(frozen=True)
class Accelerator:
    """What bounds decoding on a data-centre GPU; defaults as an H100 SXM is specified, at a usable share of it."""

    bandwidth: float = 3.35e12 * 0.7
    """Bytes a second from memory."""
    flops: float = 989e12 * 0.5
    """Dense bfloat16 operations a second."""
    overhead: float = 2e-3
    """Seconds a forward pass beyond both, for launching kernels."""

    def block(self, parameters: float, rows: int, length: int) -> float:
        """Seconds of a forward pass over `rows x length` positions: the larger of reading weights and computing."""
        memory = 2 * parameters / self.bandwidth
        compute = 2 * parameters * rows * length / self.flops
        return max(memory, compute) + self.overhead


@dataclass(frozen=True)
class Config:
    """Draw the cost model, with the points that the benchmark measured."""

    measured: Path = Path("docs/results/benchmark.json")
    """What `experiments/benchmark.py` wrote."""
    out: Path = Path("docs/images/cost_model.png")
    """Picture to write."""
    student: float = 1.5e9
    """Weights of the student in the prediction."""
    teacher: float = 32e9
    """Weights of the teacher in the prediction."""
    rows: int = 64
    """Answers at a time in the prediction."""


def main(config: Config) -> None:
    for line in draw(config):
        print(line)
    print(f"wrote {config.out}")


def draw(config: Config) -> list[str]:
    """Write the picture; what is predicted, a line for each batch size and hard rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rates = np.geomspace(0.005, 1, 60)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=False)
    if config.measured.exists():
        draw_measured(left, rates, json.loads(config.measured.read_text()))
    else:
        left.set_visible(False)
    gpu, told = Accelerator(), []
    for rows, colour in ((1, "C2"), (config.rows, "C0"), (4 * config.rows, "C1")):
        step = gpu.block(config.student, rows, 1)
        ungated = 64 * step + gpu.block(config.teacher, rows, 64)  # 64 tokens, scored at the end
        best, length = predicted(gpu, config, rates, rows)
        right.plot(
            rates, best, colour, label=f"{rows} answer{'s' * (rows > 1)} at a time (student step {1e3 * step:.1f} ms)"
        )
        for h in (0.01, 0.05, 0.2, 0.5):
            i = int(np.abs(rates - h).argmin())
            block = gpu.block(config.teacher, rows, length[i])
            rate = rows * committed_per_block(h, length[i]) / (length[i] * step + block)
            told.append(
                f"predicted, {rows} answers, h = {h:.0%}: {best[i]:.1f} times at K = {length[i]}, "
                f"{rate:,.0f} tokens a second, ungated {64 * rows / ungated:,.0f}"
            )
    right.set_title(
        f"prediction: {config.teacher / 1e9:g}B teacher, {config.student / 1e9:g}B student, one H100 each", fontsize=10
    )
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlabel("share of hard steps h")
        axis.set_ylabel("speed-up over gating token by token")
        axis.axhline(1, color="0.6", linewidth=0.8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_visible():
            axis.legend(fontsize=8, frameon=False)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out, dpi=130)
    plt.close(figure)
    return told


def predicted(gpu: Accelerator, config: Config, rates: NDArray[np.float64], rows: int) -> tuple[list[float], list[int]]:
    """The speed-up at the best draft length up to 64, and that length, for every hard rate."""
    step = gpu.block(config.student, rows, 1)

    def block(k: int) -> float:
        return gpu.block(config.teacher, rows, k)

    lengths = [best_length(h, 64, step, block) for h in rates]
    return [speed_up(h, k, step, block) for h, k in zip(rates, lengths, strict=True)], lengths


def draw_measured(axis: Any, rates: NDArray[np.float64], measured: dict[str, Any]) -> None:
    """Model curves for the measured block times of each batch size, and the measured speed-ups."""
    for i, batch in enumerate(measured["rollout"]):
        step, block = batch["student_step"], interpolated(batch["block_widths"], batch["block_seconds"])
        lengths = [best_length(h, batch["draft_limit"], step, block) for h in rates]
        curve = [speed_up(h, k, step, block) for h, k in zip(rates, lengths, strict=True)]
        label = f"{batch['rows']} rows, {batch['tokens']} tokens"
        axis.plot(rates, curve, f"C{i}", label=f"model, {label}")
        prompts = batch["prompt_seconds"]  # the same for both, and not in the curve
        points = [
            (p["hard_rate"], (median(p["fixed"]["1"]) - prompts) / (median(p["adaptive"]) - prompts))
            for p in batch["gated"]
        ]
        axis.plot(*zip(*points, strict=True), f"C{i}o", label=f"measured, {label}")
    axis.set_title(f"measured here: {measured['pair']}", fontsize=10)


if __name__ == "__main__":
    sys.exit(command(main, Config, __doc__))
