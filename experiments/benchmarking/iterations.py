"""Whole iterations of two agents, against the matrix work that they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from distill_env.env import DistillVectorEnv
from experiments.benchmarking.config import BenchmarkConfig
from experiments.benchmarking.rollouts import Rollouts, run_config
from experiments.benchmarking.timing import alternate
from experiments.running.build import make_env, make_student

HARD_RATE = 0.05  # of gated


def measure_iterations(config: BenchmarkConfig) -> dict[str, Any]:
    """One whole iteration of gated (at 5 % hard positions) and of rkl, and the matrix work that rkl needs."""
    rollouts = Rollouts(config, config.batch)
    tau = rollouts.tau_for(HARD_RATE)
    contenders: dict[str, Callable[[], object]] = {}
    for name in ("gated", "rkl"):
        agent, env = make_contender(config, name, tau)
        contenders[name] = partial(agent.learn, env, 1)
    if config.teacher:
        contenders["floor"] = floor(rollouts)
    seconds = alternate(contenders, config.repetitions)
    return {"rows": config.batch, "tokens": rollouts.tokens, "seconds": seconds, "tau": tau}


def make_contender(
    config: BenchmarkConfig, name: str, tau: float, micro_batch: int = 0
) -> tuple[DistillAgent, DistillVectorEnv]:
    """An agent and its environment. The learning rate is too small to change the student and its hard rate."""
    run = run_config(config, config.batch, name)
    env = make_env(run, "train", config.batch, purpose="train")
    options = cast("DistillConfig", run.agent_options)
    options = replace(
        options, method=options.method.with_tau(tau), optimizer=OptimizerConfig(1e-9), micro_batch=micro_batch
    )
    return DistillAgent(make_student(run, env), options), env


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
