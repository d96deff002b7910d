"""Assisted decoding: a run's student writes, and its teacher writes the tokens at hard positions, as in training.

A gate says what is hard: by D_t, for which the teacher verifies every draft, or from the student alone. With tau = inf
the student writes alone, with tau = 0 the teacher does. All random draws belong to a completion's number and a
position, so that completions at different tau are equal up to the first token of another writer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
from rich.table import Column, Table
from rich.text import Text

from agents.assisted import assisted_gate, tau_for_share
from agents.methods import GATED
from agents.prompts import OwnPrompts, evenly_spaced
from agents.rollout import completions_of
from distill_env.checks import check_range
from distill_env.gate_settings import NEVER, Gate
from distill_env.tasks.base import Split
from distill_env.tasks.registry import make_task
from experiments.answering.gates import SCREEN_SHARE, Reading, check_names, named_gate, read_alone, with_screen
from experiments.answering.prices import Prices, Usage
from experiments.comparing.statistics import Estimate, proportion
from experiments.reporting.viewer import load_student
from experiments.running.build import make_env, task_arguments
from experiments.running.config import DRAFT_LENGTH, RunConfig, kind_of
from experiments.running.config_file import load_config
from experiments.running.evaluating import EVALUATION_ROWS, EVALUATION_SEED
from experiments.running.metric_display import metric
from experiments.running.teacher_marks import mark_teacher

if TYPE_CHECKING:
    from agents.draft_length import DraftLength
    from agents.rollout import Rollout
    from distill_env.env import DistillVectorEnv
    from distill_env.models.base import TokenModel
    from distill_env.tasks.base import Grade, Prompt, Task

MOST_TRIALS = 6  # thresholds that are tried for a budget
LEAST_VALIDATION = 100  # prompts of a small task, by which thresholds are set
BUDGET = 0.1  # of a score whose unit is not that of the run's tau
LM_ROWS = 16  # completions of a language model at a time
GRADES = ("accuracy", "correct_chains")


@dataclass(frozen=True)
class DecodeConfig:
    """Generate with a run's student while its teacher writes the tokens at hard positions."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folder of a run; with --curve, folders of any number of runs on one task."""
    score: tuple[str, ...] = ("divergence",)
    """Score of the gate: divergence (D_t), for which the teacher verifies every draft; student_entropy,
    least_confidence, margin or predicted_divergence, with which the student calls it by itself; any other of run.py;
    run, the run's own gate; or random. SCORE/first, /mean, /max or /sum reads it over the reasoning step. SCORE@SCREEN
    has two stages: the teacher is asked only where the screen, a score of the student alone, is high. With --curve any
    number of scores."""
    tau: tuple[float, ...] = ()
    """Thresholds in the unit of the score; 0 is the teacher alone, inf the student alone. The default is the run's tau
    for divergence and run, and else a budget of 0.1. With --curve it is a grid, and both ends are always included."""
    budget: tuple[float, ...] = ()
    """Instead of tau: shares of the tokens that the teacher may write. The threshold is measured on the validation
    prompts, and so is the accuracy to expect. With --curve the thresholds are those that these shares of the student's
    own positions reach."""
    screen_share: float = SCREEN_SHARE
    """Share of the student's own positions in validation at which the screen of two stages lets the teacher be asked.
    """
    curve: Path | None = None
    """Folder for curve.csv, curve.png and curve.md: the quality of the completions against the share of teacher tokens
    and against the price, for every score and threshold. Runs that differ only by seed are averaged."""
    picture: Path | None = None
    """File for a picture of one completion, with the score of each position and tau. Of the decoded completions, the
    one that shows both writers best is drawn."""
    split: Split = "test"
    """Split of the prompts."""
    prompts: int | None = None
    """Number of prompts, evenly spaced in the split. The default is 8; with --curve it is that of the run's evaluation.
    """
    samples: int = 1
    """Completions per prompt."""
    prompt: tuple[str, ...] = ()
    """Prompts of your own, formatted like the questions of the run's task (--env lm)."""
    rewrite: Literal["sample", "argmax", "nucleus"] | None = None
    """How the teacher chooses a token; by default as in the run."""
    price_processed: float = 1.0
    """Price of a position that the teacher processes; all prices in one unit of your choice."""
    price_cached: float = 0.1
    """Price of a position that the teacher finds in its prefix cache in a later call."""
    price_written: float = 4.0
    """Price of a token that the teacher writes."""
    price_call: float = 0.0
    """Price of a call of the teacher."""
    price_student: float = 0.1
    """Price of a position that the student processes."""
    draft_length: int | None = None
    """Tokens per draft; 0 adapts the length. It changes the speed, but not the completions."""

    def check(self) -> None:
        """Raises ValueError for flags that exclude one another."""
        check_range(self, "samples", "prompts", least=1)
        check_range(self, *(f"price_{part}" for part in vars(Prices())), least=0, finite=True)
        check_range(self, "screen_share", above=0, most=1)
        check_names(self.score)
        if any(not 0 < budget < 1 for budget in self.budget):
            raise ValueError(f"budget: {self.budget}; expected shares of the tokens, above 0 and below 1")
        if self.budget and self.tau:
            raise ValueError(f"budget: {self.budget} with tau {self.tau}; expected one of the two")
        if len(self.score) != 1 and self.curve is None:
            raise ValueError(f"score: {len(self.score)} scores; expected one, or with --curve at least one")
        if not self.runs or (self.curve is None and len(self.runs) > 1):
            raise ValueError(f"runs: {len(self.runs)} folders; expected one, or with --curve at least one")
        if self.curve is not None and (self.prompt or self.picture):
            raise ValueError("curve: given with --prompt or --picture; expected one of the three")
        if self.prompt and load_config(self.runs[0]).env != "lm":
            raise ValueError("prompt: given for a run without language models; expected a run of --env lm")

    @property
    def prices(self) -> Prices:
        return Prices(**{part: getattr(self, f"price_{part}") for part in vars(Prices())})


@dataclass(frozen=True)
class AssistedCompletions:
    """The completions of one tau, `samples` to each prompt, one after the other."""

    tau: float
    samples: int
    rollout: Rollout
    grades: list[Grade]  # empty if the task cannot grade
    divergence: float = math.nan
    """The sum of D_t over the student's tokens, nats per token; NaN if nobody asked for it.

    If the teacher rewrites by `sample`, its mean is KL(law of these completions || law of the teacher's) per token, by
    the chain rule: a rewritten token adds 0.
    """

    @property
    def usage(self) -> Usage:
        """What these completions used."""
        return Usage.of(self.rollout)

    @property
    def teacher_share(self) -> float:
        """The share of all tokens that the teacher wrote."""
        return float(self.rollout.rewritten[self.rollout.mask].double().mean())

    def grade(self, key: str) -> Estimate | None:
        """Mean `accuracy` or `correct_chains` with the interval over prompts; None if they are not graded."""
        values = [g.correct if key == "accuracy" else g.chain_correct for g in self.grades]
        if not values or any(v is None for v in values):
            return None
        return proportion(np.array(values, np.float64).reshape(-1, self.samples).mean(1))


def decode(
    env: DistillVectorEnv,
    student: TokenModel,
    prompts: Sequence[Prompt],
    tau: float,
    samples: int = 1,
    gate: Gate | None = None,
    draft_length: DraftLength | int = 1,
    top_k: int = 0,
    top_p: float = 1.0,
) -> AssistedCompletions:
    """Completions of the prompts with the teacher on call.

    Args:
        env: for whole drafts.
        student: who writes.
        prompts: each gets `samples` completions.
        tau: threshold; at 0 the teacher writes every position, at inf it is not asked.
        samples: completions per prompt.
        gate: whose threshold is replaced; by default the hard gate on D_t.
        draft_length, top_k, top_p: as for `collect`.
    """
    from agents.collector import collect
    from distill_env.randomness import episode_keys

    repeated = [p for p in prompts for _ in range(samples)]
    keys = episode_keys(EVALUATION_SEED, np.arange(len(repeated)))
    gate = gate or Gate()
    used = NEVER if tau == math.inf else assisted_gate(tau, gate)
    top_k = top_k or env.teacher_top_k
    rollout = collect(env, student, repeated, keys, used, draft_length, top_k, top_p, keep_teacher=False)
    own, tokens = rollout.mask & ~rollout.rewritten, float(rollout.mask.sum())
    divergence = math.nan
    if tau == 0 or (gate == Gate(tau=gate.tau) and tau < math.inf):  # the scores are D_t
        divergence = float(rollout.score[own].sum()) / tokens
    elif tau == math.inf or not env.task.graded:
        divergence = own_divergence(student, env.teacher, rollout) / tokens
    grades = [env.task.grade(c.prompt, c.tokens) for c in completions_of(rollout)] if env.task.graded else []
    return AssistedCompletions(tau, samples, rollout, grades, divergence)


def own_divergence(student: TokenModel, teacher: TokenModel, rollout: Rollout) -> float:
    """The sum of D_t over the tokens that the student wrote, nats; both models read the completions once more."""
    from agents.generation import BLOCK_NUMBERS, read_along
    from distill_env.divergence import project, reverse_kl, support
    from distill_env.models.base import start_teacher

    total, top_k = 0.0, getattr(teacher, "top_k", 0)
    width = max(1, BLOCK_NUMBERS // (LM_ROWS * student.vocab_size))
    for begin in range(0, len(rollout.prompts), LM_ROWS):
        rows = slice(begin, begin + LM_ROWS)
        tokens, prompts = rollout.tokens[rows], rollout.prompts[rows]
        own = ((tokens >= 0) & ~rollout.rewritten[rows]).split(width, 1)
        log_q = read_along(student, student.start([p.ids for p in prompts]), tokens, width)
        log_p = read_along(teacher, start_teacher(teacher, prompts), tokens, width)
        for q, p, mask in zip(log_q, log_p, own, strict=True):
            kept = support(p, top_k, 1.0)
            divergence = reverse_kl(project(q.to(p.device), kept), project(p, kept)).clamp(min=0)
            total += float(divergence.cpu()[mask].double().sum())
    return total


class AssistedRun:
    """A run's student and method, and its configuration with the flags of the command.

    Raises:
        ValueError: if the folder holds no run, or no student.
    """

    def __init__(self, folder: Path, config: DecodeConfig) -> None:
        self.config, self.run = config, read_run(folder, config)
        self.student, self.method = load_student(folder, self.run)

    def gate(self, name: str, env: DistillVectorEnv, prompts: Sequence[Prompt]) -> Gate:
        """The gate of that name; the threshold of a screen is measured on these prompts."""
        if name == "run":
            return self.method.hard_gate
        gate = named_gate(name)
        self._check_head(gate)
        return with_screen(gate, self.config.screen_share, lambda gates: self.read(env, prompts, gates))

    def _check_head(self, gate: Gate) -> None:
        """Raises ValueError if the gate reads a hand-over head, and the student has none."""
        head = getattr(self.student, "hand_over", None)
        if "predicted_divergence" in (gate.score, gate.screen) and head is None:
            raise ValueError(
                f"score: predicted_divergence, but the student of {self.run.name!r} has no hand-over head; train it "
                "with --hand-over-width 64, or take another score"
            )

    def default_tau(self, name: str) -> float | None:
        """The tau that the run was trained with, if it has the unit of this score."""
        own = self.method.gate
        if name == "run":
            return None if own.tau == "auto" else own.tau  # it is a number once the run has begun
        if name != "divergence":
            return None
        return own.threshold if own.score == "divergence" and own.tau != "auto" else GATED.gate.threshold

    def read(self, env: DistillVectorEnv, prompts: Sequence[Prompt], gates: dict[str, Gate]) -> Reading:
        """What these gates read along completions that the student writes alone."""
        return read_alone(env, self.student, prompts, gates, EVALUATION_SEED)

    def decode(
        self, env: DistillVectorEnv, prompts: Sequence[Prompt], tau: float, gate: Gate, name: str
    ) -> AssistedCompletions:
        """The completions at this tau."""
        from agents.draft_length import DraftLength

        length = DRAFT_LENGTH[kind_of(self.run.env)] if self.config.draft_length is None else self.config.draft_length
        draft: DraftLength | int = length or DraftLength(env.chunk)
        return decode(env, self.student, prompts, tau, self.config.samples, gate, draft, *self.limits(name))

    def limits(self, name: str) -> tuple[int, float]:
        """The truncation of divergences, top_k and top_p, that belongs to a gate."""
        return (self.method.top_k, self.method.top_p) if name == "run" else (0, 1.0)

    def meet_budget(
        self, env: DistillVectorEnv, prompts: Sequence[Prompt], budget: float, gate: Gate, name: str
    ) -> AssistedCompletions:
        """The completions of these validation prompts at the threshold at which the teacher writes about that share of
        their tokens.

        Raises:
            ValueError: if there is no such threshold.
        """
        from distill_env.gate import follow_quantile

        tau = tau_for_share(env, self.student, prompts, budget, EVALUATION_SEED, gate, *self.limits(name))
        trials: list[AssistedCompletions] = []
        while len(trials) < MOST_TRIALS:
            trials.append(self.decode(env, prompts, tau, gate, name))
            share = trials[-1].teacher_share
            if abs(share - budget) <= budget / 10:
                break
            tau = follow_quantile(tau, share, budget)
        nearest = min(trials, key=lambda trial: abs(trial.teacher_share - budget))
        if abs(nearest.teacher_share - budget) > budget / 2:
            raise ValueError(
                f"budget: {budget:g}; the nearest that a threshold comes to it on the validation prompts is "
                f"{nearest.teacher_share:.1%} of the tokens; expected about that, or another score"
            )
        return nearest


def read_run(folder: Path, config: DecodeConfig) -> RunConfig:
    """The configuration of a run, with the command's --rewrite if it is given."""
    run = load_config(folder)
    rewrite = config.rewrite or run.environment.rewrite
    return replace(run, environment=replace(run.environment, rewrite=rewrite))


def open_validation(config: DecodeConfig, run: RunConfig, count: int) -> tuple[DistillVectorEnv, list[Prompt]]:
    """The same for the validation prompts of the run, by which thresholds are set."""
    count = count if run.env == "lm" else max(count, LEAST_VALIDATION)
    return open_task(replace(config, split="validation", prompt=(), prompts=None), run, count)


def open_task(config: DecodeConfig, run: RunConfig, count: int) -> tuple[DistillVectorEnv, list[Prompt]]:
    """An environment for whole drafts, and the prompts: the user's own, --prompts or `count` of the split."""
    task: Any = None
    if config.prompt:
        task = make_task(run.data.task, **task_arguments(run))
        task = OwnPrompts(task, task.make_prompts(config.prompt))
    prompts = list(make_env(run, config.split, 1, purpose="decode", task=task).prompts)
    if not config.prompt:
        prompts = evenly_spaced(prompts, min(config.prompts or count, len(prompts)))
    rows = min(LM_ROWS if run.env == "lm" else EVALUATION_ROWS, len(prompts) * config.samples)
    return make_env(run, config.split, rows, purpose="decode", task=task), prompts


def completion_lines(task: Task, completions: AssistedCompletions) -> list[Text]:
    """Each prompt and completion with the teacher's tokens marked and counted."""
    lines = []
    for part, grade in zip_longest(completions_of(completions.rollout), completions.grades):
        line = mark_teacher(task, part.prompt, part.tokens, part.rewritten)
        verdict = f", {'right' if grade.right else 'wrong'}" if grade else ""
        line.append(f"   {sum(part.rewritten)} of {len(part.tokens)} tokens by the teacher{verdict}", "dim")
        lines.append(line)
    return lines


def summary_table(title: str, decoded: Sequence[AssistedCompletions], prices: Prices, unit: str = "nats") -> Table:
    """A column per tau: the teacher's share of the tokens, what else is asked of it, the price, and the grades."""
    table = Table(Column(f"tau, {unit}" if unit else "tau", no_wrap=True), title=title, title_justify="left")
    for completions in decoded:
        table.add_column(f"{completions.tau:g}", justify="right")
    table.add_row("tokens", *(f"{int(c.rollout.mask.sum()):,}" for c in decoded))
    table.add_row("tokens by the teacher", *(f"{c.teacher_share:.1%}" for c in decoded))
    for title, part in (
        ("calls of the teacher", "calls"),
        ("positions that it scored", "scored"),
        ("positions that it processed", "processed"),
        ("... without a prefix cache", "reprocessed"),
    ):
        table.add_row(title, *(f"{getattr(c.usage, part):,}" for c in decoded))
    table.add_row("price per completion", *(f"{c.usage.price(prices) / len(c.rollout.prompts):.1f}" for c in decoded))
    for m in map(metric, GRADES):
        estimates = [e for c in decoded if (e := c.grade(m.key))]
        if estimates:
            table.add_row(m.title, *(Text(e.shown_as(m)) for e in estimates))
    return table
