"""Signs in the metrics that a training goes wrong, and what to try against each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.atomic_io import write_text
from agents.base import Metrics
from experiments.running.metric_display import metric

RECENT = 10  # iterations per mean, so that one odd batch raises no alarm
MANY = 20  # iterations in a row with nearly all positions hard, which a start does not explain
NEAR_HORIZON = 0.95  # share of the horizon
LONGER = 1.2  # times the length in the first tenth
LOOPS = 0.3  # share of completions that are loops, above that of the first tenth
ENTROPY_SHARE = 0.1  # of the entropy in the first tenth
ENTROPY_FLOOR = 0.01  # nats per token
NEARLY_ALL = 0.98  # share of positions
FELL_TO = 0.5  # of what the student could before the training
STANDARD_ERRORS = 3.0  # that a fall has to exceed


@dataclass(frozen=True)
class Alarm:
    """What is wrong and what to try."""

    kind: str
    seen: str
    advice: str
    fatal: bool = False  # the training has to end

    def __str__(self) -> str:
        return f"{self.kind}: {self.seen}" + (f". Try: {self.advice}" if self.advice else "")


def alarms(
    history: Sequence[Metrics],
    horizon: int,
    *,
    gated: bool = True,
    own_metrics: bool = True,
    before: Mapping[str, float | None] | None = None,
    validated: int = 100,
) -> list[Alarm]:
    """The alarms after the last of these iterations.

    Args:
        history: metrics of all iterations so far; a missing metric raises no alarm.
        horizon: of a completion, tokens.
        gated: whether a gate decides what the teacher writes or how the loss is weighted. Without one, hard positions
            are no alarm.
        own_metrics: whether the agent is one of the project's. The metrics of others may mean something else, so only
            the validation can raise an alarm.
        before: the evaluation before the training.
        validated: completions of a validation.
    """
    raised: list[Alarm] = []
    if not history:
        return raised
    last = history[-1]
    raised += _fallen(history, before or {}, validated)
    if not own_metrics:
        return raised
    for key in ("train/loss", "train/grad_norm"):
        if not math.isfinite(last.get(key, 0.0)):
            advice = "a lower --learning-rate, a lower --max-grad-norm, or --loss-clip"
            raised.append(Alarm("not finite", f"{key} is {last[key]}", advice, fatal=True))
            break
    first, now = _first_and_recent(history, "rollout/length")
    if now >= NEAR_HORIZON * horizon and now > LONGER * first:
        seen = f"completions have {now:.1f} of at most {horizon} tokens; at first they had {first:.1f}"
        advice = "a lower --learning-rate, a longer warm start, or --agent sft first, to learn the end token again"
        raised.append(Alarm("exploding length", seen, advice))
    first, now = _first_and_recent(history, "rollout/loops")
    if now > first + LOOPS:
        seen = f"{now:.0%} of the completions loop; at first {first:.0%} did"
        tau = "a lower --tau (the teacher breaks a loop), " if gated else ""
        advice = f"a lower --learning-rate, {tau}or --agent gated, whose teacher breaks loops"
        raised.append(Alarm("repetition", seen, advice))
    first, now = _first_and_recent(history, "train/entropy")
    if now < max(ENTROPY_SHARE * first, ENTROPY_FLOOR):
        seen = f"{now:.3g} nats per token; at first {first:.3g}"
        tau = "a lower --tau, " if gated else ""
        advice = f"a forward KL at more positions ({tau}--agent soft or gkd), or a lower --learning-rate"
        raised.append(Alarm("entropy collapse", seen, advice))
    if gated and len(history) >= MANY:
        for key, name in (("rollout/rewritten_share", "written by the teacher"), ("rollout/hard_share", "hard")):
            least = min(row.get(key, 0.0) for row in history[-MANY:])
            if least >= NEARLY_ALL:
                seen = f"at least {least:.0%} of the positions were {name} in each of the last {MANY} iterations"
                advice = "a higher --tau, a longer warm start, or a student of the teacher's family"
                raised.append(Alarm("teacher rejects everything", seen, advice))
                break
    return raised


def _fallen(history: Sequence[Metrics], before: Mapping[str, float | None], validated: int) -> list[Alarm]:
    """An alarm if the student had lost most of what it could before the training at the latest validation."""
    for key in ("correct_chains", "accuracy"):
        name = f"validation/{key}"
        start, now = before.get(key), next((row[name] for row in reversed(history) if name in row), None)
        if start is None or now is None:
            continue
        error = math.sqrt(start * (1 - start) / validated)
        if now < FELL_TO * start and start - now > STANDARD_ERRORS * error:
            seen = f"{metric(name).label} in validation {now:.1%}, before the training {start:.1%}"
            return [Alarm("student ruined", seen, "a lower --learning-rate")]
        break
    return []


def _first_and_recent(history: Sequence[Metrics], key: str) -> tuple[float, float]:
    """Means over the first tenth and over the last `RECENT` iterations; NaN if these overlap or a value is missing."""
    tenth = max(1, len(history) // 10)
    if len(history) < tenth + RECENT:
        return math.nan, math.nan
    parts = [[row.get(key, math.nan) for row in part] for part in (history[:tenth], history[-RECENT:])]
    first, recent = (sum(part) / len(part) for part in parts)
    return first, recent


class AlarmLog:
    """`alarms.log`: a line for every alarm that begins.

    Args:
        path: of the file.
        history: metrics of the iterations that are done; later lines of the file are dropped.
        horizon: as for `alarms`.
        settings: the other arguments of `alarms`.
    """

    def __init__(self, path: Path, history: Sequence[Metrics], horizon: int, **settings: Any) -> None:
        self.path, self.horizon, self.settings = path, horizon, settings
        self.ringing = alarms(history, horizon, **settings)
        done = len(history)
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines = [line for line in lines if int(line.split()[1].rstrip(":")) <= done]
        if lines != self.lines:
            self._write()

    def update(self, iteration: int, history: Sequence[Metrics]) -> list[Alarm]:
        """The alarms that began in this iteration."""
        before = {alarm.kind for alarm in self.ringing}
        self.ringing = alarms(history, self.horizon, **self.settings)
        new = [alarm for alarm in self.ringing if alarm.kind not in before]
        for alarm in new:
            self.add(iteration, alarm)
        return new

    def add(self, iteration: int, alarm: Alarm) -> None:
        """Write an alarm to the file."""
        self.lines.append(f"iteration {iteration}: {alarm}")
        self._write()

    def _write(self) -> None:
        write_text(self.path, "".join(line + "\n" for line in self.lines))
