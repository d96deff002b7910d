"""Train a student with its teacher in the environment, and say what came of it.

    python experiments/run.py --agent gated

Everything of a run lands in runs/<name>/. Ctrl-C, SIGTERM, SIGKILL leave a run that --resume goes on with.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock, Timeout
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from agents.atomic_io import write_folder, write_text
from agents.config import DistillConfig
from agents.distributed import SINGLE_PROCESS, ProcessGroup, TrainingEnded, init_distributed
from agents.methods import METHODS
from distill_env.gate_settings import Gate
from distill_env.models.base import ServerLostError
from experiments.running import completions_file as answers
from experiments.running.alarms import Alarm, AlarmLog
from experiments.running.build import agent_loader, make_agent, make_env, make_student, plugin
from experiments.running.cli import exit_code
from experiments.running.config import SMALL_TASKS, RunConfig
from experiments.running.config_file import to_dict
from experiments.running.flags import parse
from experiments.running.model_card import model_card, push
from experiments.running.signals import signals_raise, signals_wait
from experiments.running.summary import report, summarise_training
from experiments.running.tracking import (
    Tracker,
    check_track,
    draw_curves,
    finite,
    progress_bar,
    read_json,
    read_metrics,
    write_json,
)

if TYPE_CHECKING:
    from agents.base import Agent, Metrics
    from agents.teacher_cache import TeacherCache
    from distill_env.env import DistillVectorEnv
    from distill_env.models.base import TrainableModel

LIMITS = {
    "student_tokens": "rollout/student_tokens",
    "teacher_positions": "cost/teacher_positions",
    "teacher_tokens": "cost/teacher_tokens",
}
EVALUATION_ROWS = 512
EVALUATION_SEED = 1_000_003  # no training seed


def main(args: Sequence[str] | None = None) -> int:
    """Parse, run, and turn the user's mistakes into one line each. Returns the exit code."""

    def work() -> None:
        config = parse(args, description=__doc__)
        if ":" in config.agent:
            plugin(config.agent)  # before anything is made
        processes = init_distributed()
        if processes.rank:
            follow(config, processes)
            return
        with signals_raise():
            run(config, Console(), processes)

    try:
        return exit_code(work)
    except KeyboardInterrupt as stop:
        return getattr(stop, "exit_code", 130)


def follow(config: RunConfig, processes: ProcessGroup) -> None:
    """What every process but the first does: its part of each batch, and nothing on disk."""
    import torch

    from agents.checkpoint import load_checkpoint

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the first ends the training in order
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    try:
        name = processes.broadcast("")  # an automatic name is the first one's to choose
        processes.continue_or_stop()  # the first has saved a checkpoint
        agent, _, _ = load_checkpoint(config.out / name / "checkpoints", agent_loader(config, processes))
        env = make_env(config, "train", training_rows(config, processes), purpose="train")
        agent.join_group(processes)
        agent.cache = teacher_cache(config, Console(quiet=True))
        agent.learn(env, sys.maxsize)
    except TrainingEnded:
        return


def training_rows(config: RunConfig, processes: ProcessGroup) -> int:
    """Rows of the training environment: at most this process's part of a batch."""
    if processes.world_size == 1:
        return config.rollout.rows or config.agent_options.batch_size
    part = len(range(config.agent_options.batch_size)[processes.local_slice(config.agent_options.batch_size)])
    return max(1, min(config.rollout.rows or part, part))


def teacher_cache(config: RunConfig, console: Console) -> TeacherCache | None:
    from agents.teacher_cache import TeacherCache

    if not config.teacher.cache:
        return None
    return TeacherCache(
        config.teacher.cache, lambda text: console.print(f"[bold yellow]warning[/] {escape(text)}", soft_wrap=True)
    )


def run(config: RunConfig, console: Console, processes: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any]:
    """The whole job, of the first process if there are several. Returns what is in `evaluation.json`."""
    try:
        processes.broadcast(config.name)
        return run_first(config, console, processes)
    finally:
        processes.continue_or_stop(False)


def run_first(config: RunConfig, console: Console, processes: ProcessGroup) -> dict[str, Any]:
    import torch

    from agents.checkpoint import checkpoints

    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    check_track(config.logging.track)
    folder = config.out / config.name
    refuse_taken(config, folder)
    cache = teacher_cache(config, console)
    if processes.world_size > 1 and not isinstance(config.agent_options, DistillConfig):
        raise ValueError(
            f"agent: {config.agent!r} with {processes.world_size} processes; accepted: {', '.join(METHODS)}"
        )
    if processes.mesh is not None and (config.env == "categorical" or config.student.lora_rank):
        told = f"env: {config.env}" if config.env == "categorical" else f"lora_rank: {config.student.lora_rank}"
        raise ValueError(f"{told} with --use_fsdp; accepted: a student that is a language model, all of it trained")
    begun = bool(checkpoints(folder / "checkpoints"))
    student: TrainableModel | None = None
    if config.env == "lm" and not begun:
        from experiments.running.preflight import checked

        env, student = checked(config, console, training_rows(config, processes), processes.shards)
    else:
        env = make_env(config, "train", training_rows(config, processes), purpose="train")
        student = None if begun else make_student(config, env)
    dropped = getattr(env.task, "dropped", 0)
    if dropped:
        console.print(f"{dropped:,} prompts have more than {config.data.max_prompt_tokens} tokens and are left out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out: {str(folder)!r} cannot be made ({error.strerror}); accepted: a folder that can be written to"
        ) from None
    try:
        with FileLock(folder / ".lock", blocking=False):
            refuse_taken(config, folder)
            return run_alone(config, student, env, folder, console, processes, cache)
    except Timeout:
        raise ValueError(
            f"name: {str(folder)!r} is in use by another process; wait for it to end, or take another --name"
        ) from None
    except KeyboardInterrupt:
        saved = checkpoints(folder / "checkpoints")
        at = f"at the checkpoint of iteration {iteration_of(saved[0])}" if saved else "before the first checkpoint"
        console.print(f"stopped {at}; --resume --name {config.name} {'goes on' if saved else 'starts over'}")
        raise


def refuse_taken(config: RunConfig, folder: Path) -> None:
    if not config.resume and (folder / "config.json").exists():
        raise ValueError(f"name: {str(folder)!r} exists; --resume goes on with it, another --name starts another")


def run_alone(
    config: RunConfig,
    student: TrainableModel | None,
    env: DistillVectorEnv,
    folder: Path,
    console: Console,
    processes: ProcessGroup,
    cache: TeacherCache | None,
) -> dict[str, Any]:
    """The same by the only process that writes into the folder. The last file that it writes is `evaluation.json`."""
    started = time.perf_counter()
    write_json(folder / "config.json", to_dict(config))
    if student is None:
        agent, evaluation = go_on(config, folder, console, processes)
    else:
        if config.resume:
            console.print(f"{folder} has no checkpoint yet: it starts over")
        agent, evaluation = begin(config, student, env, folder, console)
    if isinstance(config.agent_options, DistillConfig):
        distiller = cast(Any, agent)
        distiller.cache = cache
        processes.continue_or_stop()
        distiller.join_group(processes)
    alarms = train(config, agent, env, folder, console)
    # the small tasks' answers are many and short, and evaluate.py --answers writes them again
    keep = folder / answers.FILE if config.env == "lm" else None
    evaluation["after"] = evaluate_all(config, agent, console, "after training", keep)
    evaluation["training"] = summarise_training(read_metrics(folder))
    evaluation["seconds"] += time.perf_counter() - started
    save_student(config, agent, env, evaluation, folder)
    draw_curves(folder, f"{config.agent} on {config.env}, seed {config.agent_options.seed}")
    report(config, evaluation, console)
    if isinstance(config.agent_options, DistillConfig):
        show_samples(config, agent, folder, console)
    write_json(folder / "evaluation.json", finite(evaluation))
    for line in alarms:
        console.print(f"[bold yellow]alarm[/] {escape(line)}", highlight=False)
    console.print(f"\n{folder}/: metrics.csv, curves.png, evaluation.json, samples.txt, student/, checkpoints/")
    if config.logging.push_to_hub:
        console.print(f"pushed to {push(folder / 'student', config.logging.push_to_hub)}")
    return evaluation


def begin(
    config: RunConfig, student: TrainableModel, env: DistillVectorEnv, folder: Path, console: Console
) -> tuple[Agent, dict[str, Any]]:
    """The agent before its first iteration, evaluated and saved, and the evaluation."""
    from agents.checkpoint import save_checkpoint

    warm_folder = None
    if config.training.warm_start and env.task.graded and not config.student.model:
        from experiments.running.warm_start import warm_start

        student, warm_folder = warm_start(config, console)
    agent = make_agent(config, student, env)
    evaluation = {"before": evaluate_before(config, agent, warm_folder, console), "seconds": 0.0}
    write_json(folder / "evaluation.json", finite(evaluation))
    save_checkpoint(folder / "checkpoints", 0, agent.save, config.training.keep_checkpoints)
    return agent, evaluation


def go_on(config: RunConfig, folder: Path, console: Console, processes: ProcessGroup) -> tuple[Agent, dict[str, Any]]:
    """The agent of the newest checkpoint that can be read, and what was evaluated before."""
    from agents.checkpoint import delete_old_checkpoints, load_checkpoint, rename_damaged

    agent, path, damaged = load_checkpoint(folder / "checkpoints", agent_loader(config, processes))
    for bad, reason in damaged.items():
        rename_damaged(bad)
        console.print(f"[bold yellow]warning[/] {escape(reason)}: taking the one before", soft_wrap=True)
    delete_old_checkpoints(folder / "checkpoints", config.training.keep_checkpoints)
    console.print(f"resuming {folder} after iteration {iteration_of(path)}")
    return agent, read_json(folder / "evaluation.json", {"before": dict, "seconds": int | float})


def iteration_of(checkpoint: Path) -> int:
    return int(checkpoint.name)


# ---------------------------------------------------------------------- training


def train(config: RunConfig, agent: Agent, env: DistillVectorEnv, folder: Path, console: Console) -> list[str]:
    """Learn with a live view, validations, checkpoints and alarms, whose lines it returns.

    An agent learns from checkpoint to checkpoint, so that one that begins every call of `learn` with fresh episodes
    does so at the same places whether or not it was interrupted there.
    """
    from agents.checkpoint import checkpoints, save_checkpoint
    from agents.evaluation import completion_metrics
    from agents.generation import generate

    root = folder / "checkpoints"
    done = getattr(agent, "iteration", 0)
    tracker = Tracker(folder, done, config.logging.track, to_dict(config))
    log = AlarmLog(folder / "alarms.log", tracker.rows, env.max_new_tokens, gated=is_gated(config))
    validation = make_env(config, "validation", 100 if config.env != "lm" else 8, purpose="evaluate")
    prompts = validation.prompts[:: max(1, len(validation.prompts) // validation.num_envs)][: validation.num_envs]
    progress = progress_bar(console)
    bar = progress.add_task(f"{config.agent} on {config.env}", total=config.training.iterations, completed=done)
    live: dict[str, float] = {}
    clock, written = time.perf_counter(), env.teacher_usage.tokens
    spent = sum(used(row, config.training.limit_of) for row in tracker.rows)

    def callback(iteration: int, metrics: Metrics) -> None:
        nonlocal clock, written, spent
        # what an agent does not tell of itself
        metrics.setdefault("time/seconds", time.perf_counter() - clock)
        metrics.setdefault("cost/teacher_tokens", env.teacher_usage.tokens - written)
        clock, written = time.perf_counter(), env.teacher_usage.tokens
        spent += used(metrics, config.training.limit_of)
        broke = 0 < config.training.limit <= spent
        last = iteration >= config.training.iterations or broke
        if iteration == 1 or iteration % config.training.validate_every == 0 or last:
            measured = completion_metrics(generate(agent, validation, prompts, EVALUATION_SEED, gate=gate_of(agent)))
            wanted = ("accuracy", "correct_chains", "divergence", "entropy", "hard_share")
            metrics |= {f"validation/{k}": measured[k] for k in wanted if k in measured}
        tracker.log(iteration, metrics)
        for alarm in log.update(iteration, tracker.rows):
            console.print(f"[bold yellow]warning[/] iteration {iteration}: {escape(str(alarm))}", highlight=False)
            if alarm.fatal:
                raise FloatingPointError(f"iteration {iteration}: {alarm.seen}")
        live.update(metrics)
        progress.update(bar, completed=iteration)
        ringing = [Text(f"{alarm.kind}: {alarm.seen}", style="bold yellow") for alarm in log.ringing]
        view.update(Group(progress, live_line(live), *ringing))
        if iteration % config.training.checkpoint_every == 0 or last or request.number:
            refuse_damaged(agent, iteration)
            save_checkpoint(root, iteration, agent.save, config.training.keep_checkpoints)
        request.obey()
        if broke:
            raise LimitReached

    with signals_wait() as request, Live(progress, console=console, refresh_per_second=4, transient=False) as view:
        try:
            while done < config.training.iterations and not 0 < config.training.limit <= spent:
                stop = (done // config.training.checkpoint_every + 1) * config.training.checkpoint_every
                if not hasattr(agent, "iteration"):  # it would count from 1 in every part
                    stop = config.training.iterations
                agent.learn(env, min(stop, config.training.iterations) - done, callback)
                done = min(stop, config.training.iterations)
            request.obey()
        except LimitReached:
            console.print(
                f"ended after iteration {getattr(agent, 'iteration', '?')}: {spent:,.0f} {config.training.limit_of}"
            )
        except FloatingPointError as error:
            if not any(alarm.fatal for alarm in log.ringing):  # the agent itself stopped
                log.add(getattr(agent, "iteration", done) + 1, Alarm("not a number", str(error), "", fatal=True))
            good = checkpoints(root)[0]
            raise FloatingPointError(
                f"{error}; the last good checkpoint is {good}: --student {good}/agent/student begins another run there"
            ) from None
        except ServerLostError as error:
            # whose state is whole until an update, unless the others would have to help
            if isinstance(config.agent_options, DistillConfig) and agent.processes.mesh is None:  # type: ignore[attr-defined]
                save_checkpoint(root, agent.iteration, agent.save, config.training.keep_checkpoints)  # type: ignore[attr-defined]
            raise ServerLostError(f"{error}; start it again, then the run with --resume") from None
        finally:
            tracker.close()
    return log.lines


def used(metrics: Metrics, limit_of: str) -> float:
    """What an iteration used of a limit, answers read from a cache included: with and without it a run ends alike."""
    return metrics.get(LIMITS[limit_of], 0.0) + metrics.get(f"cost/cached_{limit_of}", 0.0)


def gate_of(agent: Any) -> Gate | None:
    """The hard gate of an agent's method, with the current tau; None for an agent without a method."""
    return agent.method.hard_gate if hasattr(agent, "method") else None


def is_gated(config: RunConfig) -> bool:
    """Whether how much the teacher writes or weighs is left to what it thinks of the student's steps."""
    if not isinstance(config.agent_options, DistillConfig):
        return True
    method = config.agent_options.method
    return method.teacher_writes in ("hard", "soft", "matched") or method.weighting_gate is not None


def refuse_damaged(agent: Any, iteration: int) -> None:
    """No checkpoint is made of a student whose weights are not all numbers.

    Raises:
        FloatingPointError: if so.
    """
    if hasattr(agent, "student") and not all(bool(p.isfinite().all()) for p in agent.student.parameters()):
        raise FloatingPointError(f"iteration {iteration}: weights of the student are not numbers")


class LimitReached(Exception):
    """The training has used what it may."""


def live_line(metrics: dict[str, float]) -> Text:
    """The latest of what matters while one waits."""
    names = {
        "train/loss": ("loss", "{:.4f}"),
        "rollout/divergence": ("D_t", "{:.3f}"),
        "rollout/hard_share": ("hard", "{:.1%}"),
        "rollout/rewritten_share": ("rewritten", "{:.1%}"),
        "validation/accuracy": ("accuracy", "{:.1%}"),
        "validation/correct_chains": ("correct chains", "{:.1%}"),
        "time/tokens_per_second": ("tokens/s", "{:,.0f}"),
    }
    shown = [f"{label} {form.format(metrics[k])}" for k, (label, form) in names.items() if k in metrics]
    return Text(" · ".join(shown), style="cyan")


# ---------------------------------------------------------------------- after training


def evaluate_before(config: RunConfig, agent: Agent, warm_folder: Path | None, console: Console) -> dict[str, float]:
    """Of the student that a run begins with; runs that share a warm start share this, too."""
    if warm_folder is None:
        return evaluate_all(config, agent, console, "before training")
    gate = hashlib.sha256(repr(gate_of(agent)).encode()).hexdigest()[:8]
    settings = [config.evaluation.prompts, config.evaluation.samples, gate]
    path = warm_folder.with_name("-".join(map(str, [f"{warm_folder.name}-evaluation", *settings])) + ".json")
    if not path.exists():
        write_json(path, finite(evaluate_all(config, agent, console, "before training")))
    return read_json(path)


def evaluate_all(
    config: RunConfig, agent: Agent, console: Console, when: str, keep: Path | None = None
) -> dict[str, float]:
    """Metrics on the test split, and under `ood/` on the out-of-distribution one if the task has it; the answers go
    into the file `keep`."""
    from agents.evaluation import evaluate

    metrics: dict[str, float] = {}
    lines: list[dict[str, Any]] = []
    with progress_bar(console) as progress:
        for split, prefix in (("test", ""), ("ood", "ood/")):
            try:
                prompts = list(make_env(config, split, 1, purpose="evaluate").prompts)  # type: ignore[arg-type]
            except ValueError:
                continue  # a task without such a split
            stride = max(1, -(-len(prompts) // config.evaluation.prompts))
            prompts = prompts[::stride]
            if config.env == "categorical" and prefix:
                continue  # all its splits are the same
            most = EVALUATION_ROWS if config.env != "lm" else 16
            rows = min(most, len(prompts) * config.evaluation.samples)
            env = make_env(config, split, rows, purpose="evaluate")  # type: ignore[arg-type]
            bar = progress.add_task(f"evaluating {when}, {split}", total=len(prompts) * (config.evaluation.samples + 1))
            measured, own, teachers = evaluate(
                agent,
                env,
                prompts,
                config.evaluation.samples,
                EVALUATION_SEED,
                gate_of(agent),
                progress=lambda n, bar=bar: progress.advance(bar, n),  # type: ignore[misc]
            )
            metrics |= {prefix + key: value for key, value in measured.items()}
            if keep is not None:
                lines += answers.answer_lines(env.task, split, "student", own)
                lines += answers.answer_lines(env.task, split, "teacher", teachers)
                lines += answers.reference_lines(env.task, split, prompts)
    if keep is not None:
        answers.write_lines(keep, lines)
    return metrics


def save_student(
    config: RunConfig, agent: Any, env: DistillVectorEnv, evaluation: dict[str, Any], folder: Path
) -> None:
    """`student/`: weights and tokenizer, for `from_pretrained`, and the model card."""
    if not hasattr(agent, "student"):
        return

    def write(path: Path) -> None:
        getattr(agent.student, "export", agent.student.save_pretrained)(path)
        if config.env == "lm":
            env.task.tokenizer.save_pretrained(path)  # type: ignore[attr-defined]
        elif config.env in SMALL_TASKS:
            from distill_env.models.toy import toy_tokenizer

            toy_tokenizer(config.env).save_pretrained(path)
        (path / "README.md").write_text(model_card(config, evaluation))

    write_folder(folder / "student", write)


def show_samples(config: RunConfig, agent: Any, folder: Path, console: Console) -> None:
    """Three answers to test prompts written with the teacher on call, rewritten tokens in red, and samples.txt."""
    import numpy as np

    from agents.collector import collect
    from distill_env.randomness import episode_keys
    from distill_env.rendering import render_ansi

    env = make_env(config, "test", 3, purpose="train")
    prompts = [env.prompts[i] for i in np.linspace(0, len(env.prompts) - 1, 3).astype(int)]
    method = agent.method  # with the tau in force
    keys = episode_keys(EVALUATION_SEED, np.arange(3))
    rollout = collect(env, agent.student, prompts, keys, method.hard_gate, 1, method.top_k, method.top_p)
    console.print("\nthree answers with the teacher on call ([red]red[/]: hard steps that it wrote)")
    lines = []
    for prompt, tokens, rewritten, mask in zip(prompts, rollout.tokens, rollout.rewritten, rollout.mask, strict=True):
        coloured = render_ansi(env.task, prompt, tokens[mask].tolist(), rewritten[mask].tolist())
        console.print("  ", Text.from_ansi(coloured))
        lines.append(coloured)
    write_text(folder / "samples.txt", "\n".join(lines) + "\n")
