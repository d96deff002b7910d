"""Reference completions as a rollout. The losses treat them as the teacher's; the counts, as neither model's."""

import math
import time
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from agents.collector import check_top_k
from agents.rollout import Rollout, RolloutCost
from agents.rollout_metrics import count_usage
from agents.teacher_buffer import TeacherBuffer
from distill_env.divergence import project, support
from distill_env.ragged import PAD
from distill_env.tasks.base import Prompt


def read_references(
    env: Any,
    prompts: Sequence[Prompt],
    top_k: int = 0,
    top_p: float = 1.0,
    keep_teacher: bool = True,
    buffer_bytes: float = math.inf,
) -> Rollout:
    """The reference completions of the prompts, cut at the horizon; arguments as for `collect`.

    Raises:
        ValueError: for a prompt without a reference completion.
    """
    core = env.unwrapped
    check_top_k(core, top_k, keep_teacher)
    started = time.perf_counter()
    missing = sum(p.reference_completion is None for p in prompts)
    if missing:
        raise ValueError(f"prompts: {missing} of {len(prompts)} have no reference completion")
    n = len(prompts)
    references = [torch.tensor(p.reference_completion, dtype=torch.long)[: core.max_new_tokens] for p in prompts]
    tokens = pad_sequence(references, batch_first=True, padding_value=PAD)
    mask = tokens >= 0
    cost = RolloutCost()
    buffer = TeacherBuffer(int(mask.sum()), buffer_bytes)
    if keep_teacher:
        with count_usage(core) as usage:
            for begin in range(0, n, core.num_envs):
                # the last batch repeats its last prompt
                rows = np.minimum(np.arange(begin, begin + core.num_envs), n - 1)
                env.reset(options={"prompts": [prompts[r] for r in rows]})
                log_probs = core.lookahead(tokens[rows, :-1])
                for row in range(begin, min(begin + core.num_envs, n)):
                    positions = np.arange(len(references[row]))
                    states = log_probs[row - begin, : len(positions)]
                    ids = support(states, top_k, top_p)
                    buffer.append(np.full_like(positions, row), positions, project(states, ids), ids)
        cost.teacher_passes, cost.teacher_positions, cost.teacher_tokens = astuple(usage)
    cost.seconds = cost.teacher_seconds = time.perf_counter() - started
    teacher, ids = buffer.pop() if keep_teacher else (None, None)
    zeros = torch.zeros(tokens.shape, dtype=torch.float64)
    return Rollout(
        prompts=list(prompts),
        tokens=tokens,
        rewritten=mask,
        rewards=zeros,
        token_log_prob=zeros,
        score=torch.full_like(zeros, torch.nan),
        grades=torch.zeros(n, dtype=torch.float64),
        teacher=teacher,
        support=ids,
        from_data=True,
        step_end_ids=tuple(sorted(core.task.step_end_ids)),
        cost=cost,
    )
