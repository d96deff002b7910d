"""Draw the textbook picture of both KLs: a teacher with two modes, and students that can have only one.

python experiments/making/modes.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.methods import METHODS, Method
from distill_env.divergence import entropy, forward_kl, reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.models.tabular import TabularModel, one_mode, two_modes
from experiments.running.cli import command

VOCABULARY = 41


@dataclass(frozen=True)
class ModesConfig:
    """Draw what each KL, and the gate, makes of a teacher with two modes."""

    out: Path = Path("runs/modes.png")
    """Picture to write."""
    tau: tuple[float, ...] = (0.8, 1.5)
    """Thresholds of the gate, nats: a panel each."""
    iterations: int = 400
    """Iterations of each method."""
    mean: float = 0.3
    """Mean of the initial student, as a share of the axis: on the flank of the larger mode."""
    scale: float = 0.07
    """Scale of the initial student, as a share of the axis."""
    seed: int = 0
    """Seed of the rollouts."""


class Curve(NamedTuple):
    """A method's trained student, and what its training logged."""

    log_probs: torch.Tensor  # [V]
    divergence: list[float]  # D_t, nats, by iteration
    rewritten: list[float]  # share of tokens that the teacher wrote, by iteration


def initial_student(config: ModesConfig) -> TabularModel:
    return one_mode(VOCABULARY, mean=config.mean, scale=config.scale)


def learn(method: Method, config: ModesConfig) -> Curve:
    sizes = {"vocab_size": VOCABULARY}
    task = sizes | {"max_new_tokens": 1, "empty_prompt": True}
    made: dict[str, Any] = {"task_kwargs": task, "teacher_kwargs": sizes, "reveal_teacher": False}
    env = DistillVectorEnv(16, "categorical", "two_modes", autoreset_mode="Disabled", **made)
    student = initial_student(config)
    options = DistillConfig(method=method, batch_size=env.num_envs, optimizer=OptimizerConfig(0.05), seed=config.seed)
    logged: list[dict[str, float]] = []
    DistillAgent(student, options).learn(env, config.iterations, lambda _, metrics: logged.append(dict(metrics)))
    columns = ([row[f"rollout/{key}"] for row in logged] for key in ("divergence", "rewritten_share"))
    return Curve(student.log_table()[0].detach(), *columns)


def main(config: ModesConfig) -> None:
    teacher = two_modes(VOCABULARY).log_table()[0].detach()
    methods = {"forward KL": METHODS["fkl"], "reverse KL": METHODS["rkl"]}
    methods |= {f"gated, \u03c4 = {tau:g}": METHODS["gated"].with_tau(tau) for tau in config.tau}
    curves = {label: learn(method, config) for label, method in methods.items()}
    draw(config, teacher, curves)
    print_table(teacher, curves)
    print(f"wrote {config.out}")


def draw(config: ModesConfig, teacher: torch.Tensor, curves: dict[str, Curve]) -> None:
    """A panel of each method's student before and after, and one of D_t over the iterations."""
    before = initial_student(config).log_table()[0].detach()
    n, x = len(curves), range(VOCABULARY - 1)
    figure = Figure(figsize=(3 * n + 3.6, 2.9), layout="constrained")
    *axes, right = figure.subplots(1, n + 1, width_ratios=[1] * n + [1.25])
    for i, (axis, (label, curve)) in enumerate(zip(axes, curves.items(), strict=True)):
        axis.bar(x, teacher.exp()[:-1], width=1.0, color="0.8", label="teacher")
        axis.plot(x, before.exp()[:-1], color="0.4", linewidth=1, linestyle=":", label="student before")
        axis.plot(x, curve.log_probs.exp()[:-1], color=f"C{i}", linewidth=2, label="after")
        axis.set(xlabel="token", ylim=(0, float(teacher.exp().max()) * 1.9))
        axis.set_title(label, fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    for i, (label, curve) in enumerate(curves.items()):
        style = {"linewidth": 1.5 if i < 2 else 3, "linestyle": "-" if i < 2 else ":"}
        right.plot(curve.divergence, color=f"C{i}", label=label, **style)
    for i, tau in enumerate(config.tau):
        right.axhline(tau, color=f"C{i + 2}", linewidth=0.7)
    right.set(xlabel="iteration", ylim=(0, None))
    right.set_title("$D_t$ = KL(student || teacher), nats", fontsize=10)
    right.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))
    for axis in (*axes, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out, dpi=120)


def print_table(teacher: torch.Tensor, curves: dict[str, Curve]) -> None:
    table = Table("method", "forward KL", "reverse KL (D_t)", "entropy", "rewritten in the first and last iteration")
    for label, curve in curves.items():
        student, rewritten = curve.log_probs, curve.rewritten
        values = (forward_kl(student, teacher), reverse_kl(student, teacher), entropy(student))
        table.add_row(
            label.replace("\u03c4", "tau"),
            *(f"{float(v):.3f}" for v in values),
            f"{rewritten[0]:.0%}, {rewritten[-1]:.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(command(main, ModesConfig, __doc__)())
