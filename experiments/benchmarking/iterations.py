"""Whole iterations against the matrix work that they need; memory and peers, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from agents.distill import DistillAgent
from experiments.benchmarking.config import BenchmarkConfig
from experiments.benchmarking.rollouts import Rollouts, run_config
from experiments.benchmarking.timing import alternate
from experiments.running.build import make_env, make_student


def measure_iterations(config: BenchmarkConfig) -> dict[str, Any]:
    """One whole iteration of gated (at 5 % hard positions) and of rkl, and the matrix work that rkl needs."""
    rollouts = Rollouts(config, config.batch)
    tau = rollouts.tau_for(0.05)
    contenders: dict[str, Callable[[], None]] = {}
    for name in ("gated", "rkl"):
        run = run_config(config, config.batch, name)
        options = run.agent_options
        env = make_env(run, "train", config.batch, purpose="train")
        agent = DistillAgent(make_student(run, env), with_tau(options, tau))
        contenders[name] = lambda agent=agent, env=env: agent.learn(env, 1)  # type: ignore[misc]
    if config.teacher:
        contenders["floor"] = floor(rollouts)
    seconds = alternate(contenders, config.repetitions)
    return {"rows": config.batch, "tokens": rollouts.tokens, "seconds": seconds, "tau": tau}


def with_tau(options: Any, tau: float) -> Any:
    """The options with another tau, and a learning rate so small that the student and the hard rate stay the same."""
    optimizer = replace(options.optimizer, learning_rate=1e-9)
    return replace(options, method=options.method.with_tau(tau), optimizer=optimizer)


def floor(rollouts: Rollouts) -> Callable[[], None]:
    """The bare matrix work of an rkl iteration: read the prompts, decode with a cache, one pass of the teacher, one of
    the student and back. Rows of similar lengths share a pass, as in the models, which saves padding."""
    from transformers import DynamicCache

    lengths = torch.tensor([len(p.ids) for p in rollouts.prompts[: rollouts.rows]])
    rows, width, tokens = rollouts.rows, int(lengths.max()), rollouts.tokens
    ids = torch.randint(0, rollouts.env.vocab_size, (rows, width + tokens))
    student: Any = rollouts.student
    teacher: Any = rollouts.env.teacher
    bodies = [m.model.base_model for m in (student, teacher)]
    heads = [m.logits for m in (student, teacher)]
    groups = student.groups_of_like_length(lengths)
    with torch.no_grad():
        cache = DynamicCache(config=student.model.config)
        bodies[0](input_ids=ids[:, :width], use_cache=True, **{student.cache_argument: cache})

    def read(i: int, more: int) -> list[torch.Tensor]:
        """Logits of the student (0) or teacher (1) from the prompts' last tokens to `more` tokens later, by group."""
        logits = []
        for group in groups:
            longest = int(lengths[group].max())
            hidden = bodies[i](input_ids=ids[group, : longest + more], use_cache=False).last_hidden_state
            logits.append(heads[i](hidden[:, longest - 1 :]))
        return logits

    def contender() -> None:
        with torch.no_grad():
            read(0, 0)
            for t in range(tokens - 1):
                one = bodies[0](input_ids=ids[:, t : t + 1], use_cache=True, **{student.cache_argument: cache})
                heads[0](one.last_hidden_state)
            cache.crop(1 - tokens)
            read(1, tokens - 1)
        for logits in read(0, tokens - 1):
            logits.backward(torch.ones_like(logits))
        student.model.zero_grad()

    return contender


def child(config: BenchmarkConfig, name: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """One measurement in a process of its own, whose peak memory is that of the measurement.

    Args:
        config: models, data and threads.
        name: the contender.
        arguments: further flags of `peers`.
        environment: further environment variables.
    """
    command = [sys.executable, "-m", "experiments.benchmarking.peers", name, "--teacher", config.teacher]
    command += ["--student", config.student, "--task-path", config.task_path]
    command += ["--threads", str(torch.get_num_threads()), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise ValueError(f"peers: {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_peers(config: BenchmarkConfig) -> dict[str, list[dict[str, Any]]]:
    """Iterations of our agents, also with micro-batches of two completions, and of TRL's trainers, alternating."""
    small = ("--micro-batch", 2)
    contenders: dict[str, tuple[object, ...]] = {
        "gated": ("gated",),
        "rkl": ("rkl",),
        "gated, micro-batch 2": ("gated", *small),
        "rkl, micro-batch 2": ("rkl", *small),
        "DistillationTrainer": ("DistillationTrainer",),
        "GKDTrainer": ("GKDTrainer",),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(config.repetitions):
        for label, (name, *more) in contenders.items():
            size = ("--rows", config.batch, "--new-tokens", config.new_tokens, "--steps", 2)
            results[label].append(child(config, str(name), *size, *more))
    return results


def measure_memory(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Peak memory of one update, above that of the loaded model, by batch, length and chunk.

    Two variables make glibc return every large block to the system at once: otherwise unused blocks are counted, too.
    """
    sizes = [(4, 64, 64), (8, 64, 64), (16, 64, 64), (32, 64, 64), (8, 32, 64), (16, 64, 128), (16, 64, 256)]
    threshold = str(2**20)
    given_back = {"MALLOC_MMAP_THRESHOLD_": threshold, "MALLOC_TRIM_THRESHOLD_": threshold}
    return [
        child(config, "update", "--rows", rows, "--new-tokens", tokens, "--chunk", chunk, **given_back)
        for rows, tokens, chunk in sizes
    ]
