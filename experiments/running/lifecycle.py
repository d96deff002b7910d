"""A run from its command line to its last file: started or resumed, trained, evaluated, saved."""

import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from agents.atomic_io import write_folder
from agents.checkpoint import checkpoints, delete_old_checkpoints, load_checkpoint, rename_damaged, save_checkpoint
from agents.distill import AUTO_SHARE
from agents.distributed import SINGLE_PROCESS, ProcessGroup, TrainingEnded, init_distributed
from agents.methods import METHODS, Method
from agents.teacher_cache import TeacherCache
from distill_env.env import DistillVectorEnv
from distill_env.models.base import TrainableModel
from distill_env.models.toy import toy_tokenizer
from experiments.running import completions_file
from experiments.running.build import agent_loader, make_agent, make_env, make_student
from experiments.running.cli import print_warning
from experiments.running.config import SMALL_TASKS, RunConfig
from experiments.running.config_file import load_config, to_dict
from experiments.running.curves import draw_curves
from experiments.running.evaluating import HeldOut, evaluate_all, evaluate_before, show_answers, show_samples
from experiments.running.flags import CHANGEABLE, changes
from experiments.running.loop import TrainingLoop
from experiments.running.model_card import model_card, push
from experiments.running.placement import keep_placement, placement_line
from experiments.running.plugins import wants_student
from experiments.running.preflight import checked_pair
from experiments.running.run_folder import finite, read_json, read_metrics, write_json
from experiments.running.signals import signals, stop
from experiments.running.summary import report, summarise_training
from experiments.running.tracking import check_track
from experiments.running.warm_start import fine_tune, warm_start

NUMBERS = ("metrics.csv", "curves.png", "evaluation.json")
TEXTS = ("answers.txt", "samples.txt", completions_file.FILE)
FILES = (*NUMBERS, *TEXTS, "student", "checkpoints")


def launch(config: RunConfig) -> None:
    """What each process of a run does."""
    processes = init_distributed()
    if processes.rank:
        follow(config, processes)
    else:
        with signals(stop):
            run(config, Console(), processes)
    processes.close()


def follow(config: RunConfig, processes: ProcessGroup) -> None:
    """What every process but the main one does: its part of each batch, and nothing on disk."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the main process ends the training
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    try:
        name = processes.broadcast("")  # the main process chooses an automatic name
        processes.continue_or_stop()  # it has saved a checkpoint
        agent, _, _ = load_checkpoint(config.out / name / "checkpoints", agent_loader(config, processes=processes))
        env = make_env(config, "train", training_rows(config, processes), purpose="train")
        agent.join_group(processes)
        agent.cache = teacher_cache(config, Console(quiet=True))
        agent.learn(env, sys.maxsize)
    except TrainingEnded:
        return


def training_rows(config: RunConfig, processes: ProcessGroup) -> int:
    """Rows of the training environment: at most this process's part of a batch."""
    size = config.agent_options.batch_size
    if processes.world_size == 1:
        return config.rollout.rows or size
    part = len(range(size)[processes.local_slice(size)])
    return max(1, min(config.rollout.rows or part, part))


def teacher_cache(config: RunConfig, console: Console) -> TeacherCache | None:
    return TeacherCache(config.teacher.cache, partial(print_warning, console)) if config.teacher.cache else None


def run(config: RunConfig, console: Console, processes: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any]:
    """The whole run, by the main process. Returns what is in `evaluation.json`."""
    try:
        processes.broadcast(config.name)
        return run_as_main_process(config, console, processes)
    finally:
        processes.continue_or_stop(False)


def run_as_main_process(config: RunConfig, console: Console, processes: ProcessGroup) -> dict[str, Any]:
    """Check and build everything, then take the folder and run."""
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    folder = config.folder
    check_track(config.logging.track)
    check_name(config)
    check_processes(config, processes)
    cache = teacher_cache(config, console)
    if config.env == "lm":
        console.print(placement_line(config), highlight=False, soft_wrap=True)
    started = bool(checkpoints(folder / "checkpoints"))
    student: TrainableModel | None = None
    if config.env == "lm" and not started:
        env, student = checked_pair(config, console, training_rows(config, processes), processes.shards)
    else:
        env = make_env(config, "train", training_rows(config, processes), purpose="train")
        student = None if started else make_student(config, env)
    if config.dry_run:
        if student is None:
            load_checkpoint(folder / "checkpoints", agent_loader(config, processes=processes))
        else:
            make_agent(config, student, env)
        what = "continue from its checkpoint" if started else "start"
        console.print(f"dry run: {folder} can {what}; nothing was written", soft_wrap=True, highlight=False)
        return {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {str(folder)!r} cannot be created ({error.strerror})") from None
    try:
        with FileLock(folder / ".lock", blocking=False):
            check_name(config)
            return run_locked(config, student, env, console, processes, cache)
    except Timeout:
        raise ValueError(f"name: {str(folder)!r} is in use by another process; wait, or change --name") from None
    except KeyboardInterrupt:
        saved = checkpoints(folder / "checkpoints")
        at = f"at the checkpoint of iteration {int(saved[0].name)}" if saved else "before the first checkpoint"
        what = "continues" if saved else "starts again"
        console.print(f"stopped {at}; --resume --name {config.name} {what}", soft_wrap=True)
        raise


def check_name(config: RunConfig) -> None:
    """Raise ValueError if the folder holds another run."""
    if not config.resume and (config.folder / "config.json").exists():
        raise ValueError(f"name: {str(config.folder)!r} exists; --resume continues it, another --name starts another")


def check_processes(config: RunConfig, processes: ProcessGroup) -> None:
    """Raise ValueError if the agent or the student cannot be spread over several processes."""
    if processes.world_size > 1 and config.method is None:
        methods = ", ".join(METHODS)
        raise ValueError(f"agent: {config.agent!r} with {processes.world_size} processes; expected one of {methods}")
    if processes.mesh is not None and (config.env == "categorical" or config.student.lora_rank):
        name = f"env: {config.env}" if config.env == "categorical" else f"lora_rank: {config.student.lora_rank}"
        raise ValueError(f"{name} with --use_fsdp; expected a language model as the student, all of it trained")


def run_locked(
    config: RunConfig,
    student: TrainableModel | None,
    env: DistillVectorEnv,
    console: Console,
    processes: ProcessGroup,
    cache: TeacherCache | None,
) -> dict[str, Any]:
    """Run in a folder that no other process uses. The last file that is written is `evaluation.json`.

    Args:
        config: of the run.
        student: to begin with; None to resume from a checkpoint.
        env: for the training.
        console: for progress and results.
        processes: that take part in the training.
        cache: of the teacher's completions.
    """
    began, folder = time.perf_counter(), config.folder
    if config.resume:
        note_changes(config, console)
    write_json(folder / "config.json", to_dict(config))
    if config.env == "lm":
        keep_placement(config)
    held_out = HeldOut()
    if student is None:
        agent, evaluation = resume(config, console, processes)
    else:
        if config.resume:
            console.print(f"{folder} has no checkpoint yet; the run starts again", soft_wrap=True)
        agent, evaluation = start(config, student, env, console, held_out)
    if config.method is not None:
        agent.cache = cache
        processes.continue_or_stop()
        agent.join_group(processes)
    alarms = TrainingLoop(config, agent, env, console, evaluation["before"]).run()
    return finish(config, agent, env, evaluation, held_out, alarms, began, console)


def finish(
    config: RunConfig,
    agent: Any,
    env: DistillVectorEnv,
    evaluation: dict[str, Any],
    held_out: HeldOut,
    alarms: list[str],
    began: float,
    console: Console,
) -> dict[str, Any]:
    """Evaluate the trained agent, write the last files and report.

    Args:
        config: of the run.
        agent: after its last iteration.
        env: of the training.
        evaluation: before the training; it is completed.
        held_out: what it read of the teacher.
        alarms: lines of the training's alarms.
        began: `time.perf_counter()` from which the seconds of the run are counted.
        console: for results.
    """
    folder = config.folder
    # sums and coins have many short completions, which evaluate.py --completions writes again
    completions = folder / completions_file.FILE if config.env == "lm" else None
    evaluation["after"] = evaluate_all(config, agent, console, "after training", completions, held_out)
    evaluation.setdefault("forward_kl_by_prompt", {})["after"] = held_out.forward_kls
    evaluation["training"] = summarise_training(read_metrics(folder))
    evaluation["seconds"] += time.perf_counter() - began
    save_student(config, agent, env, evaluation)
    draw_curves(folder, f"{config.agent} on {config.env}, seed {config.agent_options.seed}")
    report(config, evaluation, console)
    if completions is not None:
        show_answers(folder, console)
    if config.method is not None:
        show_samples(config, agent, console)
    write_json(folder / "evaluation.json", finite(evaluation))
    for line in alarms:
        console.print(f"[bold yellow]alarm:[/] {escape(line)}", highlight=False)
    files = [name for name in FILES if (folder / name).exists()]
    console.print(f"\nThe run is in {folder}: {', '.join(files)}.", soft_wrap=True)
    if config.logging.push_to_hub:
        console.print(f"The student is at {push(folder / 'student', config.logging.push_to_hub)}.", soft_wrap=True)
    return evaluation


def start(
    config: RunConfig, student: TrainableModel, env: DistillVectorEnv, console: Console, held_out: HeldOut
) -> tuple[Any, dict[str, Any]]:
    """The agent before its first iteration, evaluated and saved, and the evaluation."""
    warm_folder = None
    uses_student = ":" not in config.agent or wants_student(config.agent)
    if config.training.warm_start and uses_student:
        if config.env == "lm":
            fine_tune(config, student, env, console)
        elif env.task.graded and not config.student.model:
            student, warm_folder = warm_start(config, console)
    agent: Any = make_agent(config, student, env)
    if config.method is not None and config.method.gate.tau == "auto":
        with console.status("trial rollouts, which choose tau"):
            agent.choose_tau(env)
        console.print(tau_line(agent.method), soft_wrap=True)
    before = evaluate_before(config, agent, warm_folder, console, held_out)
    evaluation = {"before": before, "seconds": 0.0, "forward_kl_by_prompt": {"before": held_out.forward_kls}}
    write_json(config.folder / "evaluation.json", finite(evaluation))
    save_checkpoint(config.folder / "checkpoints", 0, agent.save, config.training.keep_checkpoints)
    return agent, evaluation


def note_changes(config: RunConfig, console: Console) -> None:
    """Print which settings of the update differ from those before, and add them to `changes.log`."""
    if not (config.folder / "config.json").exists():
        return
    differing = changes(load_config(config.folder), config)
    lines = [f"{name}: {before} before, {now} now" for name, (before, now) in differing.items() if name in CHANGEABLE]
    if lines:
        saved = checkpoints(config.folder / "checkpoints")
        after = f"after iteration {int(saved[0].name) if saved else 0}: "
        with (config.folder / "changes.log").open("a") as file:
            file.writelines(f"{after}{line}\n" for line in lines)
        console.print(*(f"changed {after}{line}" for line in lines), sep="\n", soft_wrap=True, highlight=False)


def tau_line(method: Method) -> str:
    """What tau auto became."""
    share = method.budget or AUTO_SHARE
    return f"tau {method.gate.threshold:.3g}: {share:.0%} of the positions of trial rollouts score that much or more"


def resume(config: RunConfig, console: Console, processes: ProcessGroup) -> tuple[Any, dict[str, Any]]:
    """The agent of the newest checkpoint that can be read, and the evaluation before training."""
    folder = config.folder
    agent, path, damaged = load_checkpoint(folder / "checkpoints", agent_loader(config, processes=processes))
    for bad, reason in damaged.items():
        rename_damaged(bad)
        print_warning(console, f"{reason}; the one before it is used")
    delete_old_checkpoints(folder / "checkpoints", config.training.keep_checkpoints)
    console.print(f"resuming {folder} after iteration {int(path.name)}", soft_wrap=True)
    return agent, read_json(folder / "evaluation.json", {"before": dict, "seconds": int | float})


def save_student(config: RunConfig, agent: Any, env: DistillVectorEnv, evaluation: dict[str, Any]) -> None:
    """Write `student/`: weights and tokenizer for `from_pretrained`, and the model card."""
    if not hasattr(agent, "student"):
        return

    def write(path: Path) -> None:
        getattr(agent.student, "export", agent.student.save_pretrained)(path)
        if config.env == "lm":
            env.task.tokenizer.save_pretrained(path)  # type: ignore[attr-defined]
        elif config.env in SMALL_TASKS:
            toy_tokenizer(config.env).save_pretrained(path)
        (path / "README.md").write_text(model_card(config, evaluation))

    write_folder(config.folder / "student", write)
