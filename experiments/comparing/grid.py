"""Many runs from one command: contenders x seeds x environments x warm starts, over the cores, each run a folder.

A finished run is not run again, an interrupted one goes on, a failed one is reported and leaves its log. All runs of a
folder share their warm starts.
"""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from agents.atomic_io import write_text
from experiments.comparing.pool import FanOut, for_each
from experiments.running.build import make_agent, make_env, make_student
from experiments.running.config_file import flag_values, load_config
from experiments.running.flags import parse
from experiments.running.tracking import read_json

WARM = {"none": 0.0, "weak": 1 / 3, "strong": 2 / 3}  # share of the teacher's correct chains at which a warm start ends
NOT_COMPARED = {"name", "out", "resume", "threads"}  # flags that do not make another run


@dataclass(frozen=True)
class Contender:
    """A method with flags, under the name by which results call it."""

    label: str
    agent: str
    flags: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> Contender:
        """`gated`, or `LABEL=AGENT --flag value ...`."""
        label, _, rest = text.partition("=")
        agent, *flags = (rest or label).split() or [""]
        if not agent or not label.strip():
            raise ValueError(f"agents: {text!r}; accepted: an agent, or LABEL=AGENT --flag value ...")
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
        """The run's folder: what is run, whatever a study calls it, so that studies share runs."""
        slug = re.sub(r"[^A-Za-z0-9_.]+", "-", " ".join([self.contender.agent, *self.contender.flags]))
        return f"{self.env}-{self.warm}-{slug}-s{self.seed}"

    def arguments(self, out: Path, flags: Sequence[str]) -> list[str]:
        """The command line of `run.py`; the contender's own flags come last and win."""
        where = ["--agent", self.contender.agent, "--env", self.env, "--seed", str(self.seed)]
        where += ["--warm-start", str(WARM[self.warm]), "--out", str(out), "--name", self.name, "--threads", "1"]
        return [*where, *flags, *self.contender.flags]


def check_jobs(jobs: Sequence[Job], out: Path, flags: Sequence[str]) -> None:
    """Refuse, before anything is run, flags that `run.py` would refuse, names given twice, and other flags than those
    with which a run of the same name was begun.

    Raises:
        ValueError: in one line.
    """
    names: dict[str, Job] = {}
    labels_of: dict[tuple[str, str, str, int], Job] = {}
    for job in jobs:
        if job.warm not in WARM:
            raise ValueError(f"warm: {job.warm!r} is unknown; accepted: {', '.join(WARM)}")
        if job.name in names:
            labels = f"{names[job.name].contender.label!r} and {job.contender.label!r}"
            raise ValueError(f"agents: {labels} are the same run of seed {job.seed}; leave one out")
        names[job.name] = job
        if labels_of.setdefault((job.contender.label, job.env, job.warm, job.seed), job) != job:
            raise ValueError(f"agents: two contenders of the name {job.contender.label!r}; give one another LABEL=")
        try:
            wanted = flag_values(parse(job.arguments(out, flags)))
        except ValueError as error:
            raise ValueError(f"{job.contender.label}: {error}") from None
        except SystemExit:  # tyro has printed what is wrong
            raise ValueError(f"{job.contender.label}: its flags are refused, see above") from None
        if (out / job.name / "config.json").exists():
            found = flag_values(load_config(out / job.name))
            differing = [k for k in wanted if k not in NOT_COMPARED and wanted[k] != found.get(k)]
            if differing:
                raise ValueError(
                    f"out: {str(out / job.name)!r} was run with another {differing[0]}; take another --out or delete it"
                )


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    flags: Sequence[str],
    workers: int,
    console: Console,
    each: Callable[[], None],
    fan_out: FanOut = "local",
) -> list[Job]:
    """Run what is not finished, warm starts first. `each` is called after every finished run.

    Returns:
        the jobs that failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    where: dict[str, Any] = {"out": out.resolve(), "flags": tuple(flags)}  # a worker may stand in another folder
    todo = [job for job in jobs if not is_finished(out / job.name)]
    warm = list({(j.env, j.warm, j.seed): j for j in todo if WARM[j.warm] > 0}.values())
    console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished; {len(warm)} warm starts to look after")
    for_each(partial(prepare_warm_start, **where), warm, workers, fan_out, console, lambda *_: None)
    console.print(
        f"{len(todo)} runs to go, {workers} at a time, each with one torch thread; {forecast(todo, out, flags)}"
    )
    started = time.time()
    failed: list[Job] = []

    def tell(job: Job, done: int, error: str | None) -> None:
        minutes = (time.time() - started) / 60
        rest = minutes / done * (len(todo) - done)
        what = f"{job.contender.label}, {job.env}, {job.warm}, seed {job.seed}"
        if error:
            failed.append(job)
            console.print(f"[red]failed[/] {what}: {escape(error)}; see {out / job.name}.log", highlight=False)
        console.print(f"{done} of {len(todo)} after {minutes:.1f} min, {rest:.0f} min to go: {what}", highlight=False)
        each()

    for_each(partial(run_one, **where), todo, workers, fan_out, console, tell)
    return failed


def prepare_warm_start(job: Job, out: Path, flags: Sequence[str]) -> None:
    """The warm start that the job's run shares with others, on disk."""
    import torch

    from experiments.running.warm_start import warm_start

    torch.set_num_threads(1)
    config = parse(job.arguments(out, flags))
    with (out / f"{job.name}.log").open("w") as log:
        warm_start(config, Console(file=log, width=120))


def run_one(job: Job, out: Path, flags: Sequence[str]) -> None:
    """A run, or the rest of an interrupted one; what it says goes to a log beside its folder."""
    from experiments.running.lifecycle import run

    resumed = (out / job.name / "config.json").exists()
    arguments = ["--resume", "--out", str(out), "--name", job.name] if resumed else job.arguments(out, flags)
    with (out / f"{job.name}.log").open("a") as log:
        run(parse(arguments), Console(file=log, width=120))


def forecast(jobs: Sequence[Job], out: Path, flags: Sequence[str]) -> str:
    """How long these runs will take, by the finished ones of the folder, or by a few iterations of the first."""
    paths = [path for path in out.glob("*/evaluation.json") if is_finished(path.parent)]
    if not jobs:
        return "nothing to wait for"
    if paths:
        mean = sum(read_json(path, {"seconds": int | float})["seconds"] for path in paths) / len(paths)
        told = f"{len(paths)} finished ones took"
    elif ":" in jobs[0].contender.agent:
        return "how long somebody else's agent takes is known after its first run"
    else:
        mean = probe(jobs[0], out, flags)
        told = f"by three iterations of {jobs[0].contender.label} they take, evaluations aside,"
    return f"{told} {mean:.0f} s each, so these need {mean * len(jobs) / 60:.0f} core minutes"


def probe(job: Job, out: Path, flags: Sequence[str]) -> float:
    """Seconds that all iterations of a run would take, from three on a fresh student. Leaves nothing behind."""
    config = parse(job.arguments(out, flags))
    env = make_env(config, "train", config.rollout.rows or config.agent_options.batch_size, purpose="train")
    agent = make_agent(config, make_student(config, env), env)
    agent.learn(env, 1)  # what is done once
    started = time.perf_counter()
    agent.learn(env, 3)
    return (time.perf_counter() - started) / 3 * config.training.iterations


def is_finished(folder: Path) -> bool:
    path = folder / "evaluation.json"
    return path.exists() and "after" in read_json(path)


Row = dict[str, Any]


def load_results(jobs: Iterable[Job], out: Path) -> list[Row]:
    """One row a finished run: what it was, and all that was measured."""
    rows = []
    for job in jobs:
        folder = out / job.name
        if is_finished(folder):
            evaluation = read_json(
                folder / "evaluation.json", {"before": dict, "after": dict, "training": dict, "seconds": int | float}
            )
            what = {"study": job.study, "env": job.env, "warm": job.warm, "label": job.contender.label}
            before = {f"before/{k}": v for k, v in evaluation["before"].items()}
            seconds = {"seconds": evaluation["seconds"]}
            rows.append(
                {**what, "seed": job.seed, "run": job.name, **evaluation["after"], **evaluation["training"]}
                | seconds
                | before
            )
    return rows


def write_results(rows: Sequence[Row], path: Path) -> None:
    """`results.csv`, the union of what is there already and these rows, by run and study."""
    merged = {(row["study"], row["run"]): row for row in [*read_results(path), *rows]}
    columns = list(dict.fromkeys(key for row in merged.values() for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(merged.values())
    write_text(path, text.getvalue())


def read_results(path: Path) -> list[Row]:
    """The rows of `results.csv`, numbers as numbers; empty cells are left out. Raises ValueError if it is damaged."""
    if not path.exists():
        return []
    texts = {"study", "env", "warm", "label", "run"}
    try:
        with path.open(newline="") as file:
            return [
                {k: v if k in texts else int(v) if k == "seed" else float(v) for k, v in row.items() if v}
                for row in csv.DictReader(file, strict=True)
            ]
    except (ValueError, TypeError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"runs: {str(path)!r} is damaged ({reason}); delete it: the same comparison makes it again"
        ) from None


def split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and the flags of `run.py` after it."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def run_grid(
    jobs: Sequence[Job], out: Path, flags: Sequence[str], workers: int, console: Console, fan_out: FanOut = "local"
) -> list[Row]:
    """Check, run, and keep `results.csv` up to date as runs finish. Returns the rows of these jobs.

    Raises:
        ValueError: if the flags are wrong or nothing finished.
    """
    path = out / "results.csv"
    check_jobs(jobs, out, flags)
    read_results(path)  # a damaged one is told before anything is run
    failed = run_jobs(jobs, out, flags, workers, console, lambda: write_results(load_results(jobs, out), path), fan_out)
    rows = load_results(jobs, out)
    if not rows:
        raise ValueError(f"out: no run in {str(out)!r} has finished; the logs beside the runs say why")
    write_results(rows, path)
    if failed:
        console.print(f"[red]{len(failed)} of {len(jobs)} runs failed[/]; the same command tries them again")
    return rows
