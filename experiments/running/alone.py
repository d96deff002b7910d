"""Completions of an agent in a process of its own, which has nothing of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agents.base import Agent
from agents.generation import write
from distill_env.tasks.base import Prompt, Split
from experiments.running.build import agent_loader, make_env
from experiments.running.config import RunConfig
from experiments.running.config_file import default_config, from_dict, to_dict

Writer = Callable[[Split, Sequence[Prompt], int, int], list[list[int]]]
"""(split, prompts, rows, seed) -> the tokens of a completion for each prompt."""


@contextmanager
def fresh_process(config: RunConfig, agent: Agent) -> Iterator[Writer]:
    """A process that loads the agent as it was saved, and writes in an environment without a teacher.

    Yields:
        a function that writes completions there. It raises ValueError if the agent cannot write alone.
    """
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as process:
        path = Path(folder) / "agent"
        agent.save(path)

        def write_there(split: Split, prompts: Sequence[Prompt], rows: int, seed: int) -> list[list[int]]:
            return process.submit(_write, to_dict(config), path, split, prompts, rows, seed).result()

        yield write_there


def _write(
    values: dict[str, Any], path: Path, split: Split, prompts: Sequence[Prompt], rows: int, seed: int
) -> list[list[int]]:
    config = from_dict(default_config(values["agent"], values["env"]), values)
    env = make_env(config, split, rows, purpose="evaluate", with_teacher=False)
    completions = []
    try:
        agent = agent_loader(config)(path)
        for begin in range(0, len(prompts), rows):
            completions += write(agent, env, prompts[begin : begin + rows], seed, begin)
    except Exception as error:  # somebody else's code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"agent: {config.agent!r} does not write alone ({reason}); expected `load` and `act` that need no teacher, "
            "and no REWRITE"
        ) from None
    return completions
