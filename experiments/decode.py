"""Let a run's student write with its teacher on call: the teacher writes the hard steps, D_t >= tau, and no others.

python experiments/decode.py runs/gated-sums-s0 --tau 0.5
python experiments/decode.py runs/gated-lm-s0 --tau 0.5 2 --prompt "What is a mean?"
python experiments/decode.py --curve runs/gated-sums-s0 runs/rkl-sums-s0 --out runs/curve
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if not __package__:  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from agents.methods import GATED, Method
from distill_env.tasks.base import Split
from experiments.answering.assisted import Decoded, Row, curve_row, decode, short_labels, write_curve
from experiments.reporting.results import measure
from experiments.reporting.viewer import load_student, spread
from experiments.running.build import make_env, task_arguments
from experiments.running.cli import exit_code, read_flags
from experiments.running.config import DRAFT_LENGTH, RunConfig
from experiments.running.config_file import flag_values, load_config
from experiments.running.lifecycle import EVALUATION_ROWS
from experiments.running.teacher_marks import mark_teacher
from experiments.running.tracking import progress_bar

if TYPE_CHECKING:
    from distill_env.env import DistillVectorEnv
    from distill_env.models.base import TrainableModel
    from distill_env.tasks.base import Prompt
    from distill_env.tasks.language import LanguageTask

GRID = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
ROWS = {"lm": 16}  # answers at a time
FEW = 8
SAME = (
    *("env", "teacher", "task", "task_path", "few_shot", "chat", "max_prompt_tokens", "max_new_tokens"),
    *("rewrite", "rewrite_span", "rewrite_top_p"),
)


@dataclass(frozen=True)
class Config:
    """Let students write with their teacher on call."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs: one, or with --curve any number on one task; those that differ by seed are one contender."""
    tau: tuple[float, ...] = ()
    """Thresholds, nats: 0 is the teacher alone, inf the student alone. By default the run's; with --curve a grid, to
    which both ends are added."""
    curve: bool = False
    """Write what the answers are worth against the share of teacher tokens, over tau: curve.csv, .png, .md."""
    out: Path = Path("runs/curve")
    """Folder of the curve."""
    split: Split = "test"
    """Whose prompts."""
    prompts: int | None = None
    """How many of them, spread over the split: 8 by default, with --curve as many as the run's evaluation has."""
    samples: int = 1
    """Answers to each."""
    prompt: tuple[str, ...] = ()
    """Prompts of your own instead, put to the model as the run's task puts its questions (--env lm)."""
    rewrite: Literal["sample", "argmax", "nucleus"] | None = None
    """How the teacher writes; as in the run if not given."""
    gate: Literal["divergence", "run"] = "divergence"
    """What is held against tau: D_t as is, or what the run's method reads (its score, smoothing, reasoning steps)."""
    draft_length: int | None = None
    """Tokens of a draft, which change the cost and not the answers; 0 adapts them."""


def main(args: Sequence[str] | None = None) -> int:
    """Decode, or say in one line why not. Returns the exit code."""

    def work() -> None:
        config = read_flags(Config, args, __doc__)
        check(config)
        (draw_curve if config.curve else show)(config, Console())

    return exit_code(work)


def check(config: Config) -> None:
    """Raises ValueError for flags that do not go together."""
    if config.samples < 1 or (config.prompts is not None and config.prompts < 1):
        raise ValueError(f"samples, prompts: {config.samples}, {config.prompts}; accepted: at least 1 each")
    if not config.curve and len(config.runs) != 1:
        raise ValueError(f"runs: {len(config.runs)} folders; accepted: one, or with --curve any number")
    if config.curve and (not config.runs or config.prompt):
        raise ValueError("curve: needs folders of runs, and takes no --prompt")
    if config.prompt and load_config(config.runs[0]).env != "lm":
        raise ValueError("prompt: of your own; accepted: a run of --env lm")


def show(config: Config, console: Console) -> None:
    """Every answer with what was handed over, then what all of them cost and are worth."""
    run, student, method = open_run(config, config.runs[0])
    env, prompts = open_task(config, run, FEW)
    own_tau = method.gate.tau if config.gate == "run" or method.gate.score == GATED.gate.score else GATED.gate.tau
    table = Table(title=f"{config.runs[0]}, 95 % intervals over {len(prompts)} prompts", title_justify="left")
    for name in ("tau, nats", "tokens", "by the teacher"):
        table.add_column(name, justify="right")
    keys: list[str] = []
    for tau in config.tau or (own_tau,):
        decoded = write(config, run, env, student, method, prompts, tau)
        console.print(f"\ntau {tau:g}: the teacher wrote what is marked ⟦so⟧", highlight=False)
        for line in lines(env, decoded):
            console.print(line, soft_wrap=True, highlight=False)
        if not keys:
            keys = [k for k in ("accuracy", "correct_chains") if decoded.grade(k) is not None]
            for key in keys:
                table.add_column(f"{key.replace('_', ' ')}, %", justify="right", no_wrap=True)
        estimates = [(measure(key), decoded.grade(key)) for key in keys]
        cells = [f"{m.number(e.value)} {m.interval(e)}".rstrip() for m, e in estimates if e is not None]
        total = int(decoded.rollout.mask.sum())
        table.add_row(f"{tau:g}", f"{total:,}", f"{decoded.share:.1%}", *map(escape, cells))
    console.print()
    console.print(table)


def lines(env: DistillVectorEnv, decoded: Decoded) -> list[Text]:
    """Prompt, completion, and how many of its tokens the teacher wrote."""
    rollout, result = decoded.rollout, []
    for i, prompt in enumerate(rollout.prompts):
        mask = rollout.mask[i]
        tokens, rewritten = rollout.tokens[i][mask].tolist(), rollout.rewritten[i][mask].tolist()
        line = mark_teacher(env.task, prompt, tokens, rewritten)
        verdict = f", {'right' if decoded.grades[i].right else 'wrong'}" if decoded.grades else ""
        result.append(line.append(f"   {sum(rewritten)} of {len(tokens)} tokens by the teacher{verdict}", "dim"))
    return result


def draw_curve(config: Config, console: Console) -> None:
    """Decode with every run at every tau, and write the curve. The teacher alone is the same for all and runs once."""
    opened = [load_config(folder) for folder in config.runs]
    for run in opened[1:]:
        for field in SAME:
            if flag_values(run)[field] != flag_values(opened[0])[field] and not (field == "rewrite" and config.rewrite):
                raise ValueError(
                    f"runs: {run.name!r} and {opened[0].name!r} differ in {field}; accepted: runs on one task with one "
                    "teacher"
                )
    seeds = [run.agent_options.seed for run in opened]
    labels = short_labels([run.name for run in opened], seeds)
    taus = sorted({*(config.tau or GRID), math.inf}, reverse=True)
    env, prompts = open_task(config, opened[0], opened[0].evaluation.prompts)
    rows: list[Row] = []
    teacher: Decoded | None = None
    with progress_bar(console) as progress:
        bar = progress.add_task("decoding", total=len(opened) * (len(set(taus) - {0}) + 1))
        for folder, label, seed in zip(config.runs, labels, seeds, strict=True):
            run, student, method = open_run(config, folder)
            for tau in [t for t in taus if t > 0]:
                decoded = write(config, run, env, student, method, prompts, tau)
                rows.append(curve_row(run.name, label, seed, decoded))
                progress.advance(bar)
            teacher = teacher or write(config, run, env, student, method, prompts, 0.0)
            rows.append(curve_row(run.name, label, seed, teacher))
            progress.advance(bar)
    console.print(write_curve(config.out, rows), soft_wrap=True, highlight=False, markup=False)
    console.print(f"\nwrote {config.out}/curve.csv, curve.png, curve.md", soft_wrap=True, highlight=False)


def open_run(config: Config, folder: Path) -> tuple[RunConfig, TrainableModel, Method]:
    run = load_config(folder)
    student, method = load_student(folder, run)
    return with_rewrite(run, config), student, method


def with_rewrite(run: RunConfig, config: Config) -> RunConfig:
    """The run with the way of rewriting that was asked for, if any."""
    rewrite = config.rewrite or run.environment.rewrite
    return replace(run, environment=replace(run.environment, rewrite=rewrite))


def open_task(config: Config, run: RunConfig, count: int) -> tuple[DistillVectorEnv, list[Prompt]]:
    """An environment for whole drafts, and the prompts."""
    run = with_rewrite(run, config)
    own: Any = OwnPrompts(run, config.prompt) if config.prompt else None
    prompts = list(make_env(run, config.split, 1, purpose="decode", task=own).prompts)
    if own is None:
        prompts = spread(prompts, min(config.prompts or count, len(prompts)))
    rows = min(ROWS.get(run.env, EVALUATION_ROWS), len(prompts) * config.samples)
    return make_env(run, config.split, rows, purpose="decode", task=own), prompts


class OwnPrompts:
    """The run's task with the user's prompts in every split; nobody knows their right answers."""

    graded = False

    def __init__(self, run: RunConfig, texts: Sequence[str]) -> None:
        from distill_env.tasks.registry import make_task

        self._task = cast("LanguageTask", make_task(run.data.task, **task_arguments(run)))
        self._prompts = tuple(self._task.ask(texts))

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        return self._prompts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def write(
    config: Config,
    run: RunConfig,
    env: DistillVectorEnv,
    student: TrainableModel,
    method: Method,
    prompts: Sequence[Prompt],
    tau: float,
) -> Decoded:
    from agents.draft_length import DraftLength

    length = DRAFT_LENGTH[run.env] if config.draft_length is None else config.draft_length
    drafts: DraftLength | int = length or DraftLength(env.chunk)
    if config.gate == "divergence":
        return decode(env, student, prompts, tau, config.samples, None, drafts)
    return decode(env, student, prompts, tau, config.samples, method.hard_gate, drafts, method.top_k, method.top_p)


if __name__ == "__main__":
    sys.exit(main())
