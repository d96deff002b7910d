"""Reference completions as a rollout."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from agents.collector import check_top_k
from agents.rollout import Rollout, RolloutCost
from agents.teacher_buffer import TeacherBuffer
from distill_env.divergence import project, support
from distill_env.ragged import PAD
from distill_env.tasks.base import Prompt


def read_references(
    env: Any, prompts: Sequence[Prompt], top_k: int = 0, top_p: float = 1.0, keep_teacher: bool = True
) -> Rollout:
    """The reference answers of the prompts as if the teacher had written them, cut at the horizon.

    Raises:
        ValueError: for a prompt without a reference answer.
    """
    core = env.unwrapped
    check_top_k(core, top_k, keep_teacher)
    started = time.perf_counter()
    missing = sum(p.reference_completion is None for p in prompts)
    if missing:
        raise ValueError(f"writer: data needs a reference answer to each prompt; {missing} of {len(prompts)} have none")
    n = len(prompts)
    answers = [
        np.array(p.reference_completion)[: core.max_new_tokens] for p in prompts if p.reference_completion is not None
    ]
    tokens = np.full((n, max(map(len, answers))), PAD, np.int64)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = answer
    mask = tokens >= 0
    ledger = RolloutCost()
    kept = TeacherBuffer(int(mask.sum()))
    if keep_teacher:
        before = core.teacher_usage.passes, core.teacher_usage.positions
        for begin in range(0, n, core.num_envs):
            rows = np.minimum(np.arange(begin, begin + core.num_envs), n - 1)  # the last batch repeats its last prompt
            env.reset(options={"prompts": [prompts[r] for r in rows]})
            log_probs = core.lookahead(torch.from_numpy(tokens[rows, :-1]))
            for row in range(begin, min(begin + core.num_envs, n)):
                positions = np.arange(len(answers[row]))
                states = log_probs[row - begin, : len(positions)]
                ids = support(states, top_k, top_p)
                kept.append(np.full_like(positions, row), positions, project(states, ids), ids)
        ledger.teacher_passes = core.teacher_usage.passes - before[0]
        ledger.teacher_positions = core.teacher_usage.positions - before[1]
    ledger.seconds = ledger.teacher_seconds = time.perf_counter() - started
    teacher, kept_ids = kept.pop() if keep_teacher else (None, None)
    empty = torch.zeros(tokens.shape, dtype=torch.float64)
    return Rollout(
        list(prompts),
        torch.from_numpy(tokens),
        torch.from_numpy(mask.copy()),
        empty,
        empty,
        torch.full_like(empty, torch.nan),
        torch.zeros(n, dtype=torch.float64),
        teacher,
        kept_ids,
        tuple(sorted(core.task.step_end_ids)),
        ledger,
    )
