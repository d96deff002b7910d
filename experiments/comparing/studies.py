"""The studies of `ablate.py` as data: which methods, at which settings."""

from __future__ import annotations

from agents.methods import METHODS
from experiments.comparing.grid import Contender

# (who writes the prefix, which loss is minimised at its states): the agent and its flags. The control is a prefix in
# which the teacher rewrites as many steps, but random ones. The gated loss is weighted by the hard gate on D_t, whoever
# wrote the prefix.
CELLS = {
    ("student", "reverse"): "rkl",
    ("student", "gated"): "gate_only",
    ("student", "forward"): "rkl --loss forward",
    ("gated", "reverse"): "rewrite_only",
    ("gated", "gated"): "gated",
    ("gated", "forward"): "gated --loss forward",
    ("random", "reverse"): "random_rewrite --loss reverse",
    ("random", "gated"): "random_rewrite --weighting hard",
}

CELL_LABELS = {(prefix, loss): f"{prefix} prefix, {loss}" for prefix, loss in CELLS}

# the flag that each method needs a value for, the three values tried on development seeds, and the best of them, from
# docs/results/tuning.md
TUNED: dict[str, tuple[str, tuple[float, float, float], float]] = {
    "gated": ("--tau", (0.25, 0.5, 1.0), 1.0),
    "soft": ("--tau", (0.25, 0.5, 1.0), 1.0),
    "rewrite_only": ("--tau", (0.25, 0.5, 1.0), 0.25),
    "gate_only": ("--tau", (0.25, 0.5, 1.0), 1.0),
    "budget": ("--budget", (0.05, 0.1, 0.2), 0.05),
    "cumulative": ("--tau", (0.5, 1.0, 2.0), 0.5),
    "step_sum": ("--tau", (0.25, 0.5, 1.0), 0.5),
    "skd": ("--tau", (2.0, 4.0, 6.0), 2.0),
    "adaswitch": ("--tau", (2.0, 3.0, 6.0), 2.0),
    "eopd": ("--tau", (0.4, 0.8, 1.2), 1.2),
    "minillm": ("--teacher-rate", (0.1, 0.2, 0.4), 0.2),
    "gkd": ("--teacher-rate", (0.25, 0.5, 0.75), 0.5),
    "dagger": ("--teacher-rate-anneal", (25, 50, 75), 75),
}
UNTUNED = ("skew_fkl", "skew_rkl", "akl", "todi", "negative")


def values(label: str, flag: str, *settings: object, agent: str = "gated") -> list[Contender]:
    """One flag at several values."""
    return [Contender(f"{label} {setting}", agent, (flag, str(setting))) for setting in settings]


def rivals() -> list[Contender]:
    """The published methods, the new gates and the controls, each at its best value."""
    contenders = []
    for name, (flag, _, best) in TUNED.items():
        method, field = METHODS[name], flag.removeprefix("--").replace("-", "_")
        default = getattr(method.gate if field == "tau" else method, field, None)
        contenders.append(Contender(name, name, () if best == default else (flag, str(best))))
    return contenders + [Contender(name, name) for name in UNTUNED]


def studies() -> dict[str, list[Contender]]:
    """Every study by name. Each contains the default setting of `gated`."""
    default = Contender("gated", "gated")
    return {
        "two_by_two": [Contender.read(f"{CELL_LABELS[cell]}={method}") for cell, method in CELLS.items()],
        "tuning": [c for name, (flag, tried, _) in TUNED.items() for c in values(name, flag, *tried, agent=name)],
        "rivals": rivals(),
        "tau": values("tau", "--tau", 0.05, 0.1, 0.25, 0.5, 1.0, 2.0),
        "alpha": [default, *values("alpha", "--alpha", 1, 4, 16, 64, agent="soft")],
        "gate": [
            default,
            Contender("soft", "soft"),
            *values("step", "--step-reduction", "mean", "max", "sum"),
            Contender("teacher entropy", "gated", ("--score", "teacher_entropy")),
            Contender("forward KL", "gated", ("--score", "forward_kl")),
            Contender("budget", "budget"),
            Contender("cumulative", "cumulative"),
        ],
        "equal_cost": [
            Contender("token by token", "budget"),
            *(Contender(f"step {how}", f"step_{how}", ("--budget", "0.1")) for how in ("mean", "max", "sum")),
            Contender("cumulative", "cumulative", ("--budget", "0.1")),
        ],
        "draw": values("rewrite", "--rewrite", "sample", "nucleus", "argmax"),
        "truncation": [default, *values("top-k", "--top-k", 2, 4, 8), *values("top-p", "--top-p", 0.9, 0.99)],
        "score": [
            default,
            *values("score clip", "--score-clip", 1.0, 2.0),
            *values("loss clip", "--loss-clip", 1.0, 3.0),
            *values("smoothing", "--smoothing", 0.5, 0.9),
        ],
        "span": values("span", "--rewrite-span", "token", "step"),
    }
