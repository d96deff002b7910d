"""Train a student with its teacher in the environment, and say what came of it.

    python experiments/run.py --agent gated

Everything of a run lands in runs/<name>/. Ctrl-C leaves a run that --resume goes on with.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from agents.config import DistillConfig
from experiments.config import (
    SMALL_TASKS,
    AnyRun,
    agent_class,
    make_agent,
    make_env,
    make_student,
    parse,
    plugin,
    tau_of,
    to_dict,
)
from experiments.tracking import Tracker, cell, draw_curves, finite, progress_bar, read_metrics, table_rows, write_json

if TYPE_CHECKING:
    from agents.base import Agent, Metrics
    from distill_env.env import DistillVectorEnv

LIMITS = {
    "student_tokens": "rollout/student_tokens",
    "teacher_positions": "cost/teacher_positions",
    "teacher_tokens": "cost/teacher_tokens",
}
EVALUATION_ROWS = 512
EVALUATION_SEED = 1_000_003  # no training seed


def main(args: Sequence[str] | None = None) -> int:
    """Parse, run, and turn the user's mistakes into one line each. Returns the exit code."""
    console = Console()
    try:
        config = parse(args, description=__doc__)
        if ":" in config.agent:
            plugin(config.agent)  # before anything is made
        run(config, console)
    except KeyboardInterrupt:
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        Console(stderr=True).print(f"[red]error[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 1
    return 0


def run(config: AnyRun, console: Console) -> dict[str, Any]:
    """The whole job. Returns what is in `evaluation.json`."""
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    started = time.perf_counter()
    folder = config.out / config.name
    if not config.resume and (folder / "config.json").exists():
        raise ValueError(f"name: {str(folder)!r} exists; --resume goes on with it, another --name starts another")
    rows = config.rows or config.options.batch_size
    env = make_env(config, "train", rows, purpose="train")
    if config.resume:
        agent = agent_class(config).load(folder / "checkpoint")
        evaluation = json.loads((folder / "evaluation.json").read_text())
    else:
        student, warm_folder = make_student(config, env), None
        folder.mkdir(parents=True, exist_ok=True)
        if config.warm_start and env.task.graded and not config.student:
            from experiments.warm_start import warm_start

            student, warm_folder = warm_start(config, console)
        agent = make_agent(config, student, env)
        evaluation = {"before": evaluate_before(config, agent, warm_folder, console), "seconds": 0.0}
        write_json(folder / "config.json", to_dict(config))
        write_json(folder / "evaluation.json", finite(evaluation))
        agent.save(folder / "checkpoint")
    done = getattr(agent, "iteration", 0)
    if config.resume:
        console.print(f"resuming {folder} after iteration {done}")
        write_json(folder / "config.json", to_dict(config))

    train(config, agent, env, folder, console)
    evaluation["after"] = evaluate_all(config, agent, console, "after training")
    evaluation["training"] = summarise_training(read_metrics(folder))
    evaluation["seconds"] += time.perf_counter() - started
    write_json(folder / "evaluation.json", finite(evaluation))
    save_student(config, agent, env, folder)
    draw_curves(folder, f"{config.agent} on {config.env}, seed {config.options.seed}")
    report(config, evaluation, folder, console)
    if isinstance(config.options, DistillConfig):
        show_samples(config, agent, folder, console)
    console.print(f"\n{folder}/: metrics.csv, curves.png, evaluation.json, student/, checkpoint/, TensorBoard events")
    return evaluation


# ---------------------------------------------------------------------- training


def train(config: AnyRun, agent: Agent, env: DistillVectorEnv, folder: Path, console: Console) -> None:
    """Learn with a live view, validations and checkpoints; Ctrl-C saves and goes on up."""
    from agents.evaluation import answer_metrics, write_answers

    done = getattr(agent, "iteration", 0)
    tracker = Tracker(folder, resume_at=done)
    validation = make_env(config, "validation", 100 if config.env != "lm" else 8, purpose="evaluate")
    prompts = validation.prompts[:: max(1, len(validation.prompts) // validation.num_envs)][: validation.num_envs]
    progress = progress_bar(console)
    bar = progress.add_task(f"{config.agent} on {config.env}", total=config.iterations, completed=done)
    live: dict[str, float] = {}
    clock, written = time.perf_counter(), env.teacher_use.tokens
    spent = sum(row.get(LIMITS[config.limit_of], 0.0) for row in tracker.rows)

    def callback(iteration: int, metrics: Metrics) -> None:
        nonlocal clock, written, spent
        # what an agent does not tell of itself
        metrics.setdefault("time/seconds", time.perf_counter() - clock)
        metrics.setdefault("cost/teacher_tokens", env.teacher_use.tokens - written)
        clock, written = time.perf_counter(), env.teacher_use.tokens
        spent += metrics.get(LIMITS[config.limit_of], 0.0)
        broke = 0 < config.limit <= spent
        last = iteration >= config.iterations or broke
        if iteration == 1 or iteration % config.validate_every == 0 or last:
            measured = answer_metrics(write_answers(agent, validation, prompts, EVALUATION_SEED), tau_of(config))
            wanted = ("accuracy", "correct_chains", "divergence", "entropy", "hard_share")
            metrics |= {f"validation/{k}": measured[k] for k in wanted if k in measured}
        tracker.log(iteration, metrics)
        live.update(metrics)
        progress.update(bar, completed=iteration)
        view.update(Group(progress, live_line(live)))
        if iteration % config.checkpoint_every == 0 or last:
            agent.save(folder / "checkpoint")
        if broke:
            raise LimitReached

    with Live(progress, console=console, refresh_per_second=4, transient=False) as view:
        try:
            if done < config.iterations and not 0 < config.limit <= spent:
                agent.learn(env, config.iterations - done, callback)
        except LimitReached:
            console.print(f"ended after iteration {getattr(agent, 'iteration', '?')}: {spent:,.0f} {config.limit_of}")
        except KeyboardInterrupt:
            agent.save(folder / "checkpoint")
            at = getattr(agent, "iteration", "?")
            console.print(f"interrupted after iteration {at}; --resume --name {config.name} goes on")
            raise
        finally:
            tracker.close()


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


def summarise_training(rows: list[dict[str, float]]) -> dict[str, float]:
    """What the training cost and how steady it was, from the metrics of all iterations."""

    def total(key: str) -> float:
        return sum(row.get(key, 0.0) for row in rows)

    def mean(key: str, part: list[dict[str, float]]) -> float:
        values = [row[key] for row in part if key in row]
        return sum(values) / len(values) if values else float("nan")

    tenth = max(1, len(rows) // 10)
    own = total("rollout/student_tokens")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    jumps = [abs(b - a) for a, b in itertools.pairwise(losses)]
    return {
        "iterations": len(rows),
        "tokens": total("rollout/tokens"),
        "student_tokens": own,
        "teacher_tokens": total("cost/teacher_tokens"),
        "teacher_positions": total("cost/teacher_positions"),
        "teacher_passes": total("cost/teacher_passes"),
        "teacher_tokens_per_student_token": total("cost/teacher_tokens") / own if own else float("inf"),
        "tokens_per_second": total("rollout/tokens") / total("time/seconds"),
        "rewritten_share_first": mean("rollout/rewritten_share", rows[:tenth]),
        "rewritten_share_last": mean("rollout/rewritten_share", rows[-tenth:]),
        "hard_share_first": mean("rollout/hard_share", rows[:tenth]),
        "hard_share_last": mean("rollout/hard_share", rows[-tenth:]),
        "loss_oscillation": sum(jumps) / len(jumps) if jumps else float("nan"),
        "grad_norm": mean("train/grad_norm", rows),
        "validation_correct_chains": mean("validation/correct_chains", rows[-len(rows) // 3 :]),
        "seconds": total("time/seconds"),
    }


# ---------------------------------------------------------------------- after training


def evaluate_before(config: AnyRun, agent: Agent, warm_folder: Path | None, console: Console) -> dict[str, float]:
    """Of the student that a run begins with; runs that share a warm start share this, too."""
    if warm_folder is None:
        return evaluate_all(config, agent, console, "before training")
    settings = [config.eval_prompts, config.eval_samples, f"{tau_of(config):g}"]
    path = warm_folder.with_name("-".join(map(str, [f"{warm_folder.name}-evaluation", *settings])) + ".json")
    if not path.exists():
        write_json(path, finite(evaluate_all(config, agent, console, "before training")))
    return json.loads(path.read_text())


def evaluate_all(config: AnyRun, agent: Agent, console: Console, when: str) -> dict[str, float]:
    """Metrics on the test split, and under `ood/` on the out-of-distribution one if the task has it."""
    from agents.evaluation import evaluate

    metrics: dict[str, float] = {}
    with progress_bar(console) as progress:
        for split, prefix in (("test", ""), ("ood", "ood/")):
            try:
                prompts = list(make_env(config, split, 1, purpose="evaluate").prompts)  # type: ignore[arg-type]
            except ValueError:
                continue  # a task without such a split
            stride = max(1, -(-len(prompts) // config.eval_prompts))
            prompts = prompts[::stride]
            if config.env == "categorical" and prefix:
                continue  # all its splits are the same
            most = EVALUATION_ROWS if config.env != "lm" else 16
            rows = min(most, len(prompts) * config.eval_samples)
            env = make_env(config, split, rows, purpose="evaluate")  # type: ignore[arg-type]
            bar = progress.add_task(f"evaluating {when}, {split}", total=len(prompts) * (config.eval_samples + 1))
            measured, _ = evaluate(
                agent,
                env,
                prompts,
                config.eval_samples,
                tau_of(config),
                EVALUATION_SEED,
                progress=lambda n, bar=bar: progress.advance(bar, n),  # type: ignore[misc]
            )
            metrics |= {prefix + key: value for key, value in measured.items()}
    return metrics


def save_student(config: AnyRun, agent: Any, env: DistillVectorEnv, folder: Path) -> None:
    """`student/`: weights and tokenizer, for `from_pretrained`."""
    from agents.checkpoint import write_folder

    if not hasattr(agent, "student"):
        return

    def write(path: Path) -> None:
        agent.student.save_pretrained(path)
        if config.env == "lm":
            env.task.tokenizer.save_pretrained(path)  # type: ignore[attr-defined]
        elif config.env in SMALL_TASKS:
            from distill_env.models.small import small_tokenizer

            small_tokenizer(config.env).save_pretrained(path)

    write_folder(folder / "student", write)


def report(config: AnyRun, evaluation: dict[str, Any], folder: Path, console: Console) -> None:
    """The table before/after, what it cost, and a sentence on what the gate did."""
    before, after, training = evaluation["before"], evaluation["after"], evaluation["training"]
    table = Table(title=f"{config.agent} on {config.env}, seed {config.options.seed}", title_justify="left")
    table.add_column("student alone, test split")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for label, cells in table_rows(config.eval_samples, [before, after]):
        table.add_row(label, *cells)
    table.add_section()
    for label, form, keys in (
        (
            "rewritten steps in training, first -> last tenth",
            "{:.1%}",
            ("rewritten_share_first", "rewritten_share_last"),
        ),
        ("teacher tokens per student token", "{:.3f}", ("teacher_tokens_per_student_token",)),
        ("teacher passes, positions scored", "{:,.0f}", ("teacher_passes", "teacher_positions")),
        ("tokens, tokens/s in training", "{:,.0f}", ("tokens", "tokens_per_second")),
    ):
        joint = " -> " if "->" in label else ", "
        table.add_row(label, "", joint.join(cell(form, training[key]) for key in keys))
    console.print(table)
    console.print(verdict(config, evaluation), highlight=False)


def verdict(config: AnyRun, evaluation: dict[str, Any]) -> str:
    """An honest sentence or two on what happened."""
    before, after, training = evaluation["before"], evaluation["after"], evaluation["training"]
    measure = "correct_chains" if "correct_chains" in after else "divergence"
    shown = "{:.1%}" if measure == "correct_chains" else "{:.3f} nats"
    words = "correct chains" if measure == "correct_chains" else "divergence from the teacher on own answers"
    change = f"{words}: {cell(shown, before[measure])} before, {cell(shown, after[measure])} after"
    first, last = training["rewritten_share_first"], training["rewritten_share_last"]
    if first == 0 and last == 0:
        gate = "The teacher wrote nothing; it only scored."
    elif first == 1 and last == 1:
        gate = "The teacher wrote everything."
    elif math.isnan(first):
        gate = "The agent did not say how much the teacher wrote."
    else:
        gate = (
            f"The teacher wrote {first:.1%} of the steps in the first tenth of the training and {last:.1%} in the last."
        )
    entropy = ""
    if all(math.isfinite(values["entropy"] or math.nan) for values in (before, after)):
        moved = after["entropy"] - before["entropy"]
        entropy = f" Entropy {'fell' if moved < 0 else 'rose'} by {abs(moved):.3f} nats a token."
    return f"{gate} {change[0].upper()}{change[1:]}.{entropy} One seed: a difference to another method needs several."


def show_samples(config: AnyRun, agent: Any, folder: Path, console: Console) -> None:
    """Three answers to test prompts written with the teacher on call, rewritten tokens in red, and samples.txt."""
    import numpy as np

    from agents.rollout import collect
    from distill_env.env import colour_answer
    from distill_env.randomness import episode_keys

    env = make_env(config, "test", 3, purpose="train")
    prompts = [env.prompts[i] for i in np.linspace(0, len(env.prompts) - 1, 3).astype(int)]
    method = agent.method  # with the tau in force
    keys = episode_keys(EVALUATION_SEED, np.arange(3))
    rollout = collect(env, agent.student, prompts, keys, method.gate(), 1, method.top_k, method.top_p)
    console.print("\nthree answers with the teacher on call ([red]red[/]: hard steps that it wrote)")
    lines = []
    for prompt, tokens, rewritten, mask in zip(prompts, rollout.tokens, rollout.rewritten, rollout.mask, strict=True):
        coloured = colour_answer(env.task, prompt, tokens[mask].tolist(), rewritten[mask].tolist())
        console.print("  ", Text.from_ansi(coloured))
        lines.append(coloured)
    (folder / "samples.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
