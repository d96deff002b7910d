"""Many runs from one command: contenders x seeds x environments x warm starts, in parallel, each run in a folder.

Finished runs are skipped and interrupted ones resumed. A failed run is reported and leaves its log. All runs of a
folder share their warm starts.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from agents.methods import METHODS
from distill_env.checks import check_range
from experiments.comparing.pool import FanOut, for_each
from experiments.comparing.results_file import Row, read_results, write_results
from experiments.running.config_file import flag_values, load_config
from experiments.running.flags import parse
from experiments.running.run_folder import read_json

WARM = {"none": 0.0, "weak": 1 / 3, "strong": 2 / 3}  # share of the teacher's correct chains at which a warm start ends
SAME_RUN = {"name", "out", "resume", "threads"}  # flags that may differ when a run is resumed


@dataclass(frozen=True)
class GridConfig:
    """Options of all commands that run a grid."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds. Methods with the same seed start from the same student and see the same prompts."""
    envs: tuple[str, ...] = ("sums",)
    """Environments."""
    warm: tuple[str, ...] = ("weak",)
    """Where the warm start ends: weak (a third of the teacher's correct chains), strong (two thirds) or none. Language
    models have none, unless run.py's own flag says so: -- --warm-start sft:150."""
    jobs: int = max(1, os.cpu_count() or 1)
    """Number of runs at the same time, each with one torch thread."""
    stack: int = 1
    """Seeds of a contender that are trained as one computation on Sums and Coins, which is faster. Each run is the same
    as by itself, but for rounding. Runs that cannot be stacked are run one by one."""
    fan_out: FanOut = "local"
    """Where the runs are executed: in local processes (local), or on Ray (ray). Ray uses the cluster at $RAY_ADDRESS,
    whose nodes must all share --out; without it, a local cluster with --jobs workers."""

    def __post_init__(self) -> None:
        check_range(self, "jobs", "stack", least=1)
        if min(self.seeds, default=0) < 0:
            raise ValueError(f"seeds: {min(self.seeds)}; expected at least 0")

    def grid(self, study: str, contenders: Sequence[Contender]) -> list[Job]:
        """All jobs of a study, seed by seed, so that finished runs can be compared at any time."""
        settings = [(env, warm) for env in self.envs for warm in (("none",) if env == "lm" else self.warm)]
        product = itertools.product(self.seeds, settings, contenders)
        return [Job(study, env, warm, contender, seed) for seed, (env, warm), contender in product]


@dataclass(frozen=True)
class Contender:
    """A method with flags, and the name that it has in the results."""

    label: str
    agent: str
    flags: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> Contender:
        """`gated`, or `LABEL=AGENT --flag value ...`."""
        label, _, rest = text.partition("=")
        agent, *flags = (rest or label).split() or [""]
        if not agent or not label.strip():
            raise ValueError(f"agents: {text!r}; expected an agent, or LABEL=AGENT --flag value ...")
        return cls(label.strip(), agent, tuple(flags))


@dataclass(frozen=True)
class Job:
    """One run of a grid."""

    study: str
    env: str
    warm: str
    contender: Contender
    seed: int

    @property
    def name(self) -> str:
        """The run's folder: by what is run and not by the label, so that studies share runs."""
        slug = re.sub(r"[^A-Za-z0-9_.]+", "-", " ".join([self.contender.agent, *self.contender.flags]))
        return f"{self.env}-{self.warm}-{slug}-s{self.seed}"

    @property
    def title(self) -> str:
        return f"{self.contender.label}, {self.env}, {self.warm}, seed {self.seed}"

    def arguments(self, out: Path, flags: Sequence[str]) -> list[str]:
        """The command line of `run.py`; the contender's own flags come last and take precedence."""
        arguments = ["--agent", self.contender.agent, "--env", self.env, "--seed", str(self.seed)]
        arguments += ["--warm-start", str(WARM[self.warm]), "--out", str(out), "--name", self.name, "--threads", "1"]
        return [*arguments, *flags, *self.contender.flags]


def check_jobs(jobs: Sequence[Job], out: Path, flags: Sequence[str]) -> None:
    """Check all jobs before any is run.

    Raises:
        ValueError: in one line, for flags that `run.py` would refuse, for two jobs with the same run or label, and for
            a run of that name with other flags.
    """
    runs: dict[str, Job] = {}
    labelled: dict[tuple[str, str, str, int], Job] = {}
    parsed: dict[tuple[str, str, Contender], dict[str, Any]] = {}
    for job in jobs:
        label = job.contender.label
        if job.warm not in WARM:
            raise ValueError(f"warm: {job.warm!r} is unknown; expected {', '.join(WARM)}")
        if (same := runs.setdefault(job.name, job)) is not job:
            labels = f"{same.contender.label!r} and {label!r}"
            raise ValueError(f"agents: {labels} are the same run of seed {job.seed}; expected each run once")
        if labelled.setdefault((label, job.env, job.warm, job.seed), job) is not job:
            raise ValueError(f"agents: {label!r} is the label of two contenders; expected another LABEL= for one")
        kind = (job.env, job.warm, job.contender)
        if kind not in parsed:  # reading flags is slow, and seeds differ in nothing else
            try:
                parsed[kind] = flag_values(parse(job.arguments(out, flags)))
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from None
            except SystemExit:  # tyro has printed what is wrong
                raise ValueError(f"{label}: invalid flags, see above") from None
        values = parsed[kind] | {"seed": job.seed}
        folder = out / job.name
        if (folder / "config.json").exists():
            before = flag_values(load_config(folder))
            differing = [k for k in values if k not in SAME_RUN and values[k] != before.get(k)]
            if differing:
                raise ValueError(
                    f"out: {str(folder)!r} has another {differing[0]}; expected another --out, or delete it"
                )


def stacks(jobs: Iterable[Job], out: Path, size: int) -> list[tuple[Job, ...]]:
    """The jobs in stacks of at most `size` that differ in their seeds alone; an interrupted one is by itself."""
    alike: dict[Any, list[Job]] = {}
    for job in jobs:
        begun = (out / job.name / "config.json").exists()
        alike.setdefault(job if begun else (job.study, job.env, job.warm, job.contender), []).append(job)
    return [tuple(same[i : i + size]) for same in alike.values() for i in range(0, len(same), size)]


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    flags: Sequence[str],
    workers: int,
    console: Console,
    on_finish: Callable[[], None],
    fan_out: FanOut = "local",
    stack: int = 1,
) -> list[Job]:
    """Run what is not finished, warm starts first. `on_finish` is called after every run, or stack of runs.

    Returns:
        the jobs that failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {"out": out.resolve(), "flags": tuple(flags)}  # a worker may have another current folder
    todo = [job for job in jobs if not is_finished(out / job.name)]
    warm = list({(j.env, j.warm, j.seed): j for j in todo if WARM[j.warm] > 0}.values())
    console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished. Checking {len(warm)} warm starts.")
    for_each(partial(prepare_warm_start, **common), warm, workers, fan_out, lambda *_: None, reuse=True)
    console.print(f"{len(todo)} runs to do, {workers} at a time, each with one torch thread.")
    started = time.time()
    failed: list[Job] = []

    reported = 0

    def report(stacked: tuple[Job, ...], _: int, error: str | None) -> None:
        nonlocal reported
        reported += len(stacked)
        minutes = (time.time() - started) / 60
        rest = minutes / reported * (len(todo) - reported)
        for job in stacked:
            if error and not is_finished(out / job.name):
                failed.append(job)
                text = f"[red]failed[/] {job.title}: {escape(error)}; see {out / job.name}.log"
                console.print(text, highlight=False)
        name = stacked[0].title + (f" to {stacked[-1].seed}" if len(stacked) > 1 else "")
        progress = f"{reported} of {len(todo)} after {minutes:.1f} min, {rest:.0f} min left: {name}"
        console.print(progress, highlight=False)
        on_finish()

    own = all(job.contender.agent in METHODS for job in todo)  # agents of others may leave something behind
    for_each(partial(run_stack, **common), stacks(todo, out, stack), workers, fan_out, report, reuse=own)
    return failed


def prepare_warm_start(job: Job, out: Path, flags: Sequence[str]) -> None:
    """Write the warm start that the job shares with others."""
    import torch

    from experiments.running.warm_start import warm_start

    torch.set_num_threads(1)
    config = parse(job.arguments(out, flags))
    with (out / f"{job.name}.log").open("w") as log:
        warm_start(config, Console(file=log, width=120))


def run_stack(jobs: Sequence[Job], out: Path, flags: Sequence[str]) -> None:
    """Run jobs together where that is possible, otherwise one by one; the output of each goes to its log."""
    from experiments.running.together import can_run_together, run_together

    configs = [parse(job.arguments(out, flags)) for job in jobs] if len(jobs) > 1 else []
    if configs and can_run_together(configs):
        with ExitStack() as stack:
            logs = [stack.enter_context((out / f"{job.name}.log").open("a")) for job in jobs]
            consoles = [Console(file=log, width=120) for log in logs]
            try:
                run_together(configs, consoles)
            except FloatingPointError as error:  # of one of them; what is left is run by itself
                for console in consoles:
                    console.print(f"the stack ended: {error}", markup=False)
    errors: list[Exception] = []
    for job in jobs:
        try:
            if not is_finished(out / job.name):
                run_one(job, out, flags)
        except (ValueError, FloatingPointError, OSError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def run_one(job: Job, out: Path, flags: Sequence[str]) -> None:
    """Start or resume a run; its output goes to a log beside its folder."""
    from experiments.running.lifecycle import run

    resumed = (out / job.name / "config.json").exists()
    arguments = ["--resume", "--out", str(out), "--name", job.name] if resumed else job.arguments(out, flags)
    with (out / f"{job.name}.log").open("a") as log:
        run(parse(arguments), Console(file=log, width=120))


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds its last evaluation."""
    path = folder / "evaluation.json"
    return path.exists() and "after" in read_json(path)


def load_results(jobs: Iterable[Job], out: Path) -> list[Row]:
    """A row for each finished job: its settings, the metrics before and after, those of the training."""
    parts = {"before": dict, "after": dict, "training": dict, "seconds": int | float}
    rows = []
    for job in jobs:
        folder = out / job.name
        if is_finished(folder):
            evaluation = read_json(folder / "evaluation.json", parts)
            row: Row = {"study": job.study, "env": job.env, "warm": job.warm, "label": job.contender.label}
            row |= {"seed": job.seed, "run": job.name, **evaluation["after"], **evaluation["training"]}
            row |= {"seconds": evaluation["seconds"]}
            rows.append(row | {f"before/{k}": v for k, v in evaluation["before"].items()})
    return rows


def split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before `--`, and the flags of `run.py` after it."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def run_grid(
    jobs: Sequence[Job],
    out: Path,
    flags: Sequence[str],
    workers: int,
    console: Console,
    fan_out: FanOut = "local",
    stack: int = 1,
) -> list[Row]:
    """Check, run, and update `results.csv` whenever a run finishes. Returns the rows of these jobs.

    Raises:
        ValueError: if the flags are wrong or nothing finished.
    """
    path = out / "results.csv"
    check_jobs(jobs, out, flags)
    read_results(path)  # raises for a damaged file before anything is run

    def write() -> None:
        write_results(load_results(jobs, out), path)

    failed = run_jobs(jobs, out, flags, workers, console, write, fan_out, stack)
    rows = load_results(jobs, out)
    if not rows:
        raise ValueError(f"out: no run in {str(out)!r} has finished; see the logs beside the runs")
    write_results(rows, path)
    if failed:
        console.print(f"[red]{len(failed)} of {len(jobs)} runs failed[/]; the same command tries them again")
    return rows
