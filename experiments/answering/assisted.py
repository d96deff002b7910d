"""Assisted decoding: a run's student writes, and its teacher writes the tokens at hard positions, as in training.

With tau = inf the student writes alone, with tau = 0 the teacher does. All random draws belong to a completion's number
and a position, so that completions at different tau are equal up to the first token of another writer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
from rich.table import Column, Table
from rich.text import Text

from agents.assisted import assisted_gate
from agents.methods import GATED
from agents.prompts import evenly_spaced
from distill_env.checks import check_range
from distill_env.gate_settings import Gate
from distill_env.tasks.base import Split
from distill_env.tasks.registry import make_task
from experiments.comparing.statistics import Estimate, proportion
from experiments.reporting.viewer import completions_of, load_student
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

LM_ROWS = 16  # completions of a language model at a time
GRADES = ("accuracy", "correct_chains")


@dataclass(frozen=True)
class DecodeConfig:
    """Generate with a run's student while its teacher writes the tokens at hard positions."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folder of a run; with --curve, folders of any number of runs on one task."""
    tau: tuple[float, ...] = ()
    """Thresholds in nats; 0 is the teacher alone, inf the student alone. The default is the run's tau. With --curve it
    is a grid, and both ends are always included."""
    curve: Path | None = None
    """Folder for curve.csv, curve.png and curve.md: the quality of the completions against the share of teacher tokens,
    at every tau. Runs that differ only by seed are averaged."""
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
    gate: Literal["divergence", "run"] = "divergence"
    """Score that is compared with tau: D_t (divergence), or the score of the run's own gate (run)."""
    draft_length: int | None = None
    """Tokens per draft; 0 adapts the length. It changes the speed, but not the completions."""

    def check(self) -> None:
        """Raises ValueError for flags that exclude one another."""
        check_range(self, "samples", "prompts", least=1)
        if not self.runs or (self.curve is None and len(self.runs) > 1):
            raise ValueError(f"runs: {len(self.runs)} folders; expected one, or with --curve at least one")
        if self.curve is not None and (self.prompt or self.picture):
            raise ValueError("curve: given with --prompt or --picture; expected one of the three")
        if self.prompt and load_config(self.runs[0]).env != "lm":
            raise ValueError("prompt: given for a run without language models; expected a run of --env lm")


@dataclass(frozen=True)
class AssistedCompletions:
    """The completions of one tau, `samples` to each prompt, one after the other."""

    tau: float
    samples: int
    rollout: Rollout
    grades: list[Grade]  # empty if the task cannot grade

    @property
    def teacher_share(self) -> float:
        """The share of all tokens that the teacher wrote."""
        return float(self.rollout.rewritten[self.rollout.mask].double().mean())

    @property
    def divergence(self) -> float:
        """The sum of D_t over the student's tokens, nats per token; NaN if the gate reads another score.

        If the teacher rewrites by `sample`, its mean is KL(law of these completions || law of the teacher's) per token,
        by the chain rule: a rewritten token adds 0.
        """
        own = self.rollout.mask & ~self.rollout.rewritten
        return float(self.rollout.score[own].sum()) / float(self.rollout.mask.sum())

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
    """Completions of the prompts by draft and verify; see `assisted_gate` and `collect` for the arguments."""
    from agents.collector import collect
    from distill_env.randomness import episode_keys

    repeated = [p for p in prompts for _ in range(samples)]
    keys = episode_keys(EVALUATION_SEED, np.arange(len(repeated)))
    used, top_k = assisted_gate(tau, gate), top_k or env.teacher_top_k
    rollout = collect(env, student, repeated, keys, used, draft_length, top_k, top_p, keep_teacher=False)
    grades = [env.task.grade(c.prompt, c.tokens) for c in completions_of(rollout)] if env.task.graded else []
    return AssistedCompletions(tau, samples, rollout, grades)


class AssistedRun:
    """A run's student and method, and its configuration with the flags of the command.

    Raises:
        ValueError: if the folder holds no run, or no student.
    """

    def __init__(self, folder: Path, config: DecodeConfig) -> None:
        self.config, self.run = config, read_run(folder, config)
        self.student, self.method = load_student(folder, self.run)

    @property
    def tau(self) -> float:
        """The tau of the run, or the default if it is not in nats of D_t."""
        own = self.method.gate
        return own.tau if self.config.gate == "run" or own.score == "divergence" else GATED.gate.tau

    def decode(self, env: DistillVectorEnv, prompts: Sequence[Prompt], tau: float) -> AssistedCompletions:
        """The completions at this tau."""
        from agents.draft_length import DraftLength

        length = DRAFT_LENGTH[kind_of(self.run.env)] if self.config.draft_length is None else self.config.draft_length
        draft: DraftLength | int = length or DraftLength(env.chunk)
        method, samples = self.method, self.config.samples
        if self.config.gate == "divergence":
            return decode(env, self.student, prompts, tau, samples, None, draft)
        return decode(env, self.student, prompts, tau, samples, method.hard_gate, draft, method.top_k, method.top_p)


def read_run(folder: Path, config: DecodeConfig) -> RunConfig:
    """The configuration of a run, with the command's --rewrite if it is given."""
    run = load_config(folder)
    rewrite = config.rewrite or run.environment.rewrite
    return replace(run, environment=replace(run.environment, rewrite=rewrite))


def open_task(config: DecodeConfig, run: RunConfig, count: int) -> tuple[DistillVectorEnv, list[Prompt]]:
    """An environment for whole drafts, and the prompts: the user's own, --prompts or `count` of the split."""
    task: Any = None
    if config.prompt:
        task = make_task(run.data.task, **task_arguments(run))
        own = tuple(task.make_prompts(config.prompt))
        task.graded, task.prompts = False, lambda split: own  # nobody knows the right answers
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


def summary_table(title: str, decoded: Sequence[AssistedCompletions]) -> Table:
    """A column per tau: the teacher's share of the tokens, and the grades."""
    table = Table(Column("tau, nats", no_wrap=True), title=title, title_justify="left")
    for completions in decoded:
        table.add_column(f"{completions.tau:g}", justify="right")
    table.add_row("tokens", *(f"{int(c.rollout.mask.sum()):,}" for c in decoded))
    table.add_row("tokens by the teacher", *(f"{c.teacher_share:.1%}" for c in decoded))
    for m in map(metric, GRADES):
        estimates = [e for c in decoded if (e := c.grade(m.key))]
        if estimates:
            table.add_row(m.title, *(Text(e.shown_as(m)) for e in estimates))
    return table
