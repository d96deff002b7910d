"""The training of a run: validations, checkpoints, alarms, and what the terminal shows meanwhile."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from agents.base import Agent, Metrics
from agents.checkpoint import checkpoints, save_checkpoint
from agents.config import DistillConfig, PluginConfig
from agents.evaluation import completion_metrics, forward_kl_by_prompt
from agents.generation import generate
from agents.metrics import mean
from agents.prompts import evenly_spaced
from agents.rollout_metrics import usage_by_teacher
from distill_env.env import DistillVectorEnv
from distill_env.models.base import ServerLostError
from distill_env.tasks.base import Prompt
from experiments.running.alarms import Alarm, AlarmLog
from experiments.running.build import make_env
from experiments.running.cli import print_warning, progress_bar
from experiments.running.config import RunConfig
from experiments.running.config_file import to_dict
from experiments.running.evaluating import EVALUATION_SEED, PROMPT_SHOWN, gate_of, sample_as_configured
from experiments.running.metric_display import metric
from experiments.running.section import errors_name_flags
from experiments.running.signals import Request, signals
from experiments.running.teacher_marks import mark_teacher
from experiments.running.tracking import Tracker

LIMITS = {
    "tokens": "rollout/tokens",
    "student_tokens": "rollout/student_tokens",
    "teacher_positions": "cost/teacher_positions",
    "teacher_tokens": "cost/teacher_tokens",
}
VALIDATION_ROWS, LM_VALIDATION_ROWS = 100, 8
WRITTEN_SHOWN = 2  # completions of an iteration
VALIDATED = ("accuracy", "correct_chains", "divergence", "forward_kl", "entropy", "hard_share")
SHOWN = (
    *("train/loss", "rollout/divergence", "rollout/truncated_divergence"),
    *("rollout/hard_share", "rollout/truncated_hard_share", "rollout/rewritten_share"),
    *("validation/accuracy", "validation/correct_chains", "validation/forward_kl"),
    *("train/learning_rate", "time/tokens_per_second"),
)


class LimitReached(Exception):
    """The training has used up its limit."""


class TrainingLoop:
    """Trains an agent from checkpoint to checkpoint.

    An agent that begins every call of `learn` with fresh episodes thus does so at the same iterations, whether or not
    the run was interrupted.

    Args:
        config: of the run.
        agent: to train, at the iteration of its checkpoint.
        env: for the training.
        console: for progress and warnings.
        before: the evaluation before the training.
    """

    def __init__(
        self,
        config: RunConfig,
        agent: Agent,
        env: DistillVectorEnv,
        console: Console,
        before: Mapping[str, float | None],
    ) -> None:
        self.config, self.settings, self.env, self.console = config, config.training, env, console
        self.agent: Any = agent
        folder = config.folder
        self.checkpoints = folder / "checkpoints"
        self.done: int = getattr(agent, "iteration", 0)
        self.tracker = Tracker(folder, self.done, config.logging.track, to_dict(config))
        rows = LM_VALIDATION_ROWS if config.env == "lm" else VALIDATION_ROWS
        self.log = AlarmLog(
            folder / "alarms.log",
            self.tracker.rows,
            env.max_new_tokens,
            gated=is_gated(config),
            own_metrics=not isinstance(config.agent_options, PluginConfig),
            before=before,
            validated=rows,
        )
        sample_as_configured(config, agent)
        self.validation = make_env(config, "validation", rows, purpose="evaluate")
        self.teachers: list[list[int]] = []  # the teacher's completions of the validation prompts
        self.spent = sum(used(row, self.settings.limit_of) for row in self.tracker.rows)
        self.clock, self.usage = time.perf_counter(), replace(env.teacher_usage)
        self.usage_by_teacher = usage_by_teacher(env)
        self.progress = progress_bar(console)
        self.bar = self.progress.add_task(
            f"{config.agent} on {config.env}", total=self.settings.iterations, completed=self.done
        )
        self.latest: dict[str, float] = {}
        self.view: Live | None = None  # what the terminal shows during `run`
        self.request = Request()

    def run(self) -> list[str]:
        """Train to the last iteration or to the limit. Returns the lines of the alarms.

        Raises:
            Stopped: by a signal, after a checkpoint.
            FloatingPointError: for a loss or weights that are not finite.
            ServerLostError: if the teacher's server does not answer any more.
        """
        total = self.settings.iterations
        live = Live(self.progress, console=self.console, refresh_per_second=4)
        with signals(self.request.note), live as self.view:
            try:
                while self.done < total and not self.limit_reached:
                    stop = (self.done // self.settings.checkpoint_every + 1) * self.settings.checkpoint_every
                    if not hasattr(self.agent, "iteration"):  # it would count from 1 in every part
                        stop = total
                    self.agent.learn(self.env, min(stop, total) - self.done, self.after_iteration)
                    self.done = min(stop, total)
                    if self.done not in map(int_name, checkpoints(self.checkpoints)):
                        self.save(self.done)  # of an agent that calls no callback
                self.request.obey()
            except LimitReached:
                at = getattr(self.agent, "iteration", "?")
                self.console.print(f"limit reached at iteration {at}: {self.spent:,.0f} {self.settings.limit_of}")
            except FloatingPointError as error:
                raise self.not_finite(error) from None
            except ServerLostError as error:
                self.save_whole_state()
                raise ServerLostError(f"{error}; restart the server, then continue the run with --resume") from None
            finally:
                self.tracker.close()
        if not self.console.is_terminal:
            self.console.print()  # ends the line of the metrics
        return self.log.lines

    @property
    def limit_reached(self) -> bool:
        return 0 < self.settings.limit <= self.spent

    def after_iteration(self, iteration: int, metrics: Metrics) -> None:
        """Log, validate, raise alarms, show, and save."""
        metrics.setdefault("time/seconds", time.perf_counter() - self.clock)
        for name, count in vars(self.env.teacher_usage).items():
            metrics.setdefault(f"cost/teacher_{name}", float(count - getattr(self.usage, name)))
        for key, total in usage_by_teacher(self.env).items():
            metrics.setdefault(key, total - self.usage_by_teacher[key])
        self.clock, self.usage = time.perf_counter(), replace(self.env.teacher_usage)
        self.usage_by_teacher = usage_by_teacher(self.env)
        if self.settings.limit and LIMITS[self.settings.limit_of] not in metrics:
            raise ValueError(f"limit_of: {self.settings.limit_of!r} is not among the metrics that the agent reports")
        self.spent += used(metrics, self.settings.limit_of)
        last = iteration >= self.settings.iterations or self.limit_reached
        validated = iteration == 1 or iteration % self.settings.validate_every == 0 or last
        if validated:
            metrics |= self.validate()
        self.tracker.log(iteration, metrics)
        for alarm in self.log.update(iteration, self.tracker.rows):
            print_warning(self.console, f"iteration {iteration}: {alarm}")
            if alarm.fatal:
                raise FloatingPointError(f"iteration {iteration}: {alarm.seen}")
        self.show(iteration, metrics)
        if validated and self.config.env == "lm":
            self.print_state(iteration)
        if iteration % self.settings.checkpoint_every == 0 or last or self.request.number:
            self.save(iteration)
        self.request.obey()
        if self.limit_reached:
            raise LimitReached

    def validate(self) -> Metrics:
        """Metrics of the student alone on the validation split."""
        env = self.validation
        prompts = evenly_spaced(env.prompts, min(env.num_envs, len(env.prompts)))
        with errors_name_flags({"actions": "agent"}):
            written = generate(self.agent, env, prompts, EVALUATION_SEED, gate=gate_of(self.agent))
        measured = completion_metrics(written)
        if self.config.env == "lm" and hasattr(self.agent, "log_probs"):
            measured["forward_kl"] = self.forward_kl(prompts)
        return {f"validation/{k}": measured[k] for k in VALIDATED if k in measured}

    def forward_kl(self, prompts: Sequence[Prompt]) -> float:
        """KL(teacher || student) on completions that the teacher writes once, nats per token."""
        env, seed = self.validation, EVALUATION_SEED + 1
        if not self.teachers:
            self.teachers = [c.tokens for c in generate(None, env, prompts, seed, teacher_writes=True)]
        held_out = generate(self.agent, env, prompts, seed, written=self.teachers)
        return mean(forward_kl_by_prompt(held_out))

    def show(self, iteration: int, metrics: Metrics) -> None:
        """Update the progress bar, and the latest metrics and alarms below it."""
        if self.view is None:
            return
        self.latest |= metrics
        self.progress.update(self.bar, completed=iteration)
        ringing = [Text(f"{alarm.kind}: {alarm.seen}", style="bold yellow") for alarm in self.log.ringing]
        self.view.update(Group(self.progress, Text(self.latest_line, style="cyan"), *ringing))

    @property
    def latest_line(self) -> str:
        """The latest metrics."""
        shown = [f"{m.label} {m.text(self.latest[m.key])}" for m in map(metric, SHOWN) if m.key in self.latest]
        return " · ".join(shown)

    def print_state(self, iteration: int) -> None:
        """Print the latest metrics and a few completions of this iteration, which the tracker also takes."""
        self.console.print(f"iteration {iteration}: {self.latest_line}", highlight=False, soft_wrap=True)
        if is_from_data(self.config):
            return
        lines = [
            mark_teacher(self.env.task, part.prompt, part.tokens, part.rewritten, PROMPT_SHOWN)
            for part in getattr(self.agent, "written", [])[:WRITTEN_SHOWN]
        ]
        for line in lines:
            self.console.print("  ", line)
        self.tracker.log_text(iteration, "completions", [line.plain for line in lines])

    def save(self, iteration: int) -> None:
        """Save a checkpoint. Raises FloatingPointError, and saves none, if a weight of the student is not finite."""
        student = getattr(self.agent, "student", None)
        if student is not None and not all(bool(p.isfinite().all()) for p in student.parameters()):
            raise FloatingPointError(f"iteration {iteration}: the student has weights that are not finite")
        save_checkpoint(self.checkpoints, iteration, self.agent.save, self.settings.keep_checkpoints)

    def save_whole_state(self) -> None:
        """Save the agent where it stopped in a rollout, unless other processes would have to help."""
        if isinstance(self.config.agent_options, DistillConfig) and self.agent.processes.mesh is None:
            self.save(self.agent.iteration)

    def not_finite(self, error: FloatingPointError) -> FloatingPointError:
        """The error with the last good checkpoint, and an alarm if the agent itself raised it."""
        if not any(alarm.fatal for alarm in self.log.ringing):
            iteration = getattr(self.agent, "iteration", self.done) + 1
            self.log.add(iteration, Alarm("not finite", str(error), "", fatal=True))
        good = checkpoints(self.checkpoints)[0]
        student = good / "agent" / "student"
        hint = f", from which --student {student} begins another run" if student.is_dir() else ""
        return FloatingPointError(f"{error}; the last good checkpoint is {good}{hint}")


def int_name(checkpoint: Path) -> int:
    """The iteration of a checkpoint."""
    return int(checkpoint.name)


def used(metrics: Metrics, limit_of: str) -> float:
    """What an iteration used of a limit. Completions from a cache count, so that a run ends alike with and without."""
    return metrics.get(LIMITS[limit_of], 0.0) + metrics.get(f"cost/cached_{limit_of}", 0.0)


def is_from_data(config: RunConfig) -> bool:
    """Whether the completions that the student learns from are references."""
    return config.method is not None and config.method.teacher_writes == "reference"


def is_gated(config: RunConfig) -> bool:
    """Whether a gate decides what the teacher writes or how the loss is weighted."""
    method = config.method
    return method is None or method.teacher_writes in ("hard", "soft", "matched") or method.weighting_gate is not None
