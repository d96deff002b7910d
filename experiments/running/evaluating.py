"""What a run measures of its student: evaluations before and after the training, and sample completions."""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from agents.atomic_io import write_text
from agents.base import Agent
from agents.config import EVALUATION_SEED, PluginConfig
from agents.prompts import evenly_spaced
from distill_env.gate_settings import Gate
from distill_env.tasks.base import Split
from experiments.running import completions_file
from experiments.running.alone import fresh_process
from experiments.running.build import make_env
from experiments.running.cli import progress_bar
from experiments.running.config import RunConfig
from experiments.running.run_folder import finite, read_json, write_json
from experiments.running.teacher_marks import mark_teacher

EVALUATION_ROWS, LM_ROWS = 512, 16  # completions at a time
SPLITS: tuple[tuple[Split, str], ...] = (("test", ""), ("ood", "ood/"))  # and the prefix of their metrics
SAMPLES = 3  # completions that a run shows at its end, with the teacher on call
ANSWERS = 10  # of the student alone
PROMPT_SHOWN = 300  # characters of a prompt, the last ones


@dataclass
class HeldOut:
    """What the teacher wrote to the prompts of the evaluations. It is the same before and after the training."""

    texts: dict[Split, list[list[int]]] = field(default_factory=dict)  # the tokens, by split
    forward_kls: list[float] = field(default_factory=list)  # along those of the test split, in the last evaluation


def gate_of(agent: Any) -> Gate | None:
    """The hard gate of an agent's method, with the current tau; None for an agent without a method."""
    return agent.method.hard_gate if hasattr(agent, "method") else None


def sample_as_configured(config: RunConfig, agent: Any) -> None:
    """Give the agent's draws the temperature and the nucleus of the evaluation.

    Raises:
        ValueError: for an agent of somebody else's that has neither.
    """
    own = config.evaluation
    if hasattr(agent, "actor"):
        agent.actor.temperature, agent.actor.top_p = own.temperature, own.top_p
    elif (own.temperature, own.top_p) != (1, 1):
        raise ValueError(f"eval_temperature, eval_top_p: with {config.agent}; expected 1, since it draws on its own")


def evaluate_before(
    config: RunConfig,
    agent: Agent,
    warm_folder: Path | None,
    console: Console,
    held_out: HeldOut | None = None,
) -> dict[str, float]:
    """The evaluation of the student that a run begins with. Runs that share a warm start share it, but for agents of
    somebody else's, which may be another policy.

    Args:
        config: of the run.
        agent: before its first iteration.
        warm_folder: of the warm start; None without one.
        console: for the progress.
        held_out: is filled, unless the evaluation was shared.
    """
    if warm_folder is None or isinstance(config.agent_options, PluginConfig):
        return evaluate_all(config, agent, console, "before training", held_out=held_out)
    gate = hashlib.sha256(repr(gate_of(agent)).encode()).hexdigest()[:8]
    own = config.evaluation
    settings = f"{own.prompts}-{own.samples}-{own.temperature:g}-{own.top_p:g}-{gate}"
    path = warm_folder.with_name(f"{warm_folder.name}-evaluation-{settings}.json")
    if not path.exists():
        write_json(path, finite(evaluate_all(config, agent, console, "before training")))
    return read_json(path)


def evaluate_all(
    config: RunConfig,
    agent: Agent,
    console: Console,
    when: str,
    completions: Path | None = None,
    held_out: HeldOut | None = None,
) -> dict[str, float]:
    """Metrics on the test split and, under `ood/`, on the out-of-distribution split of a task that has one.

    An agent of somebody else's writes in a process of its own, which has nothing of the teacher.

    Args:
        config: of the run.
        agent: to evaluate.
        console: for the progress.
        when: for the label of the progress.
        completions: file for the completions; None for none.
        held_out: of an earlier evaluation, whose texts are read again; is filled.
    """
    from agents.evaluation import evaluate, forward_kl_by_prompt

    sample_as_configured(config, agent)
    metrics: dict[str, float] = {}
    lines: list[dict[str, Any]] = []
    samples = config.evaluation.samples
    held_out = HeldOut() if held_out is None else held_out
    foreign = isinstance(config.agent_options, PluginConfig)
    with progress_bar(console) as progress, fresh_process(config, agent) if foreign else nullcontext() as write_there:
        for split, prefix in SPLITS:
            if config.env == "categorical" and prefix:
                continue  # all its splits are the same
            try:
                prompts = list(make_env(config, split, 1, purpose="evaluate").prompts)
            except ValueError:
                continue  # a task without such a split
            prompts = evenly_spaced(prompts, min(config.evaluation.prompts, len(prompts)))
            rows = min(LM_ROWS if config.env == "lm" else EVALUATION_ROWS, len(prompts) * samples)
            env = make_env(config, split, rows, purpose="evaluate")
            bar = progress.add_task(f"evaluation {when}, {split} split", total=len(prompts) * (samples + 1))
            advance = partial(progress.advance, bar)
            written = None
            if write_there is not None:
                written = write_there(split, [p for p in prompts for _ in range(samples)], rows, EVALUATION_SEED)
            known, gate = held_out.texts.get(split), gate_of(agent)
            measured, own, teachers = evaluate(
                agent, env, prompts, samples, EVALUATION_SEED, gate, advance, written, known
            )
            metrics |= {prefix + key: value for key, value in measured.items()}
            if teachers:
                held_out.texts[split] = [c.tokens for c in teachers]
            if not prefix:
                held_out.forward_kls = forward_kl_by_prompt(teachers)
            if completions is not None:
                lines += completions_file.completion_lines(env.task, split, "student", own)
                lines += completions_file.completion_lines(env.task, split, "teacher", teachers)
                lines += completions_file.reference_lines(env.task, split, prompts)
    if completions is not None:
        completions_file.write_lines(completions, lines)
    return metrics


def show_answers(folder: Path, console: Console) -> None:
    """Print ten completions that the student wrote alone in the final evaluation, and write `answers.txt`."""
    lines = completions_file.read_lines(folder / completions_file.FILE, "run", ("prompt", "completion", "writer"))
    own = [line for line in lines if line["writer"] == "student" and line["split"] == "test" and line["sample"] == 0]
    chosen = own[:: max(1, len(own) // ANSWERS)][:ANSWERS]
    console.print(f"\n{len(chosen)} answers to test prompts, by the student alone:")
    for i, line in enumerate(chosen, 1):
        prompt, completion = line["prompt"].strip()[-PROMPT_SHOWN:], line["completion"].strip()
        console.print(Text.assemble((f"{i}. {prompt}", "dim"), "\n   ", completion or "(empty)"))
    texts = (f"{i}. {line['prompt']}\n\n{line['completion']}\n" for i, line in enumerate(chosen, 1))
    write_text(folder / "answers.txt", "\n".join(texts))


def show_samples(config: RunConfig, agent: Any, console: Console) -> None:
    """Print completions of test prompts in which the teacher writes the hard tokens, and write `samples.txt`."""
    import numpy as np

    from agents.collector import collect
    from distill_env.randomness import episode_keys

    env = make_env(config, "test", SAMPLES, purpose="train")
    prompts = evenly_spaced(env.prompts, SAMPLES)
    method = agent.method  # with the current tau
    keys = episode_keys(EVALUATION_SEED, np.arange(SAMPLES))
    rollout = collect(env, agent.student, prompts, keys, method.hard_gate, 1, method.top_k, method.top_p)
    console.print(f"\n{SAMPLES} completions of test prompts; the teacher wrote what is between ⟦ and ⟧:")
    lines = []
    for prompt, tokens, rewritten, mask in zip(prompts, rollout.tokens, rollout.rewritten, rollout.mask, strict=True):
        line = mark_teacher(env.task, prompt, tokens[mask].tolist(), rewritten[mask].tolist(), PROMPT_SHOWN)
        console.print("  ", line)
        lines.append(line.plain)
    write_text(config.folder / "samples.txt", "\n".join(lines) + "\n")
