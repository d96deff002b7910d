"""Completions that an agent writes without its teacher, and measurements at each of their positions."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agents import metrics as measures
from agents.base import Agent
from agents.hand_over import predict
from distill_env.divergence import entropy, forward_kl, reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.gate import DraftBlock, GateState, raw_score, read_and_decide, student_score
from distill_env.gate_settings import Gate
from distill_env.models.base import TokenModel, TrainableModel, start_teacher
from distill_env.observations import encode
from distill_env.ragged import PAD
from distill_env.randomness import episode_keys
from distill_env.tasks.base import Grade, Prompt
from distill_env.transfer import fetch, upload

BLOCK_NUMBERS = 2**24  # log-probabilities of each model that are in memory at a time


@dataclass
class Completion:
    """A completion and what was measured at each of its positions, in nats."""

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)  # the agent's, of these tokens
    teacher_log_probs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)  # of the agent
    divergences: list[float] = field(default_factory=list)  # D_t = KL(agent || teacher)
    forward_kls: list[float] = field(default_factory=list)  # KL(teacher || agent)
    scores: list[float] = field(default_factory=list)  # of the gate, before it clips or smooths them
    hard: list[bool] = field(default_factory=list)  # whether the gate would be hard
    grade: Grade | None = None
    ended: bool = False  # by the end token
    steps: int = 0  # reasoning steps


def generate(
    agent: Agent | None,
    env: DistillVectorEnv,
    prompts: Sequence[Prompt],
    seed: int,
    teacher_writes: bool = False,
    gate: Gate | None = None,
    progress: Callable[[int], None] | None = None,
    written: Sequence[Sequence[int]] | None = None,
) -> list[Completion]:
    """One completion for each prompt, in batches of the environment's rows, and what both models say along it.

    An agent writes in an environment without a teacher, which refuses REWRITE.

    Args:
        agent: who writes, or who only reads along if the teacher writes; None for the teacher alone.
        env: with the teacher, made with `chunk=1`.
        prompts: N prompts.
        seed: of the draws.
        teacher_writes: every action is REWRITE.
        gate: says which positions are hard, without deciding anything.
        progress: called with the number of completions of each batch.
        written: the tokens of completions [N] that the agent wrote elsewhere; they are only measured.

    Raises:
        ValueError: if the agent writes what is no token.
    """
    completions: list[Completion] = []
    alone = env if teacher_writes else env_without_teacher(env)
    for begin in range(0, len(prompts), env.num_envs):
        chosen = list(prompts[begin : begin + env.num_envs])
        if written is not None:
            tokens = [list(row) for row in written[begin : begin + len(chosen)]]
        else:
            tokens = write(None if teacher_writes else agent, alone, chosen, seed, begin)
        done = [Completion(prompt, row) for prompt, row in zip(chosen, tokens, strict=True)]
        measure(done, agent, env, gate)
        for completion in done:
            completion.ended = completion.tokens[-1:] == [env.task.eos_token_id]
            completion.steps = measures.count_steps(completion.tokens, env.task.step_end_ids, env.task.eos_token_id)
            if env.task.graded:
                completion.grade = env.task.grade(completion.prompt, completion.tokens)
            if gate is not None and completion.scores:
                completion.hard = hard_positions(gate, completion, env.task.step_end_ids)
        completions += done
        if progress is not None:
            progress(len(done))
    return completions


def write_on_call(
    agent: Any, env: DistillVectorEnv, prompts: Sequence[Prompt], seed: int
) -> tuple[list[list[int]], float]:
    """What an agent with `act_on_call` writes with its teacher on call.

    Returns:
        the tokens of one completion for each prompt, and the share of all tokens that the teacher wrote.
    """
    completions: list[list[int]] = []
    rewritten = 0
    for begin in range(0, len(prompts), env.num_envs):
        chosen = prompts[begin : begin + env.num_envs]
        completions += write(agent, env, chosen, seed, begin, agent.act_on_call)
        rewritten += sum(sum(env.completions.completion(row)[1]) for row in range(len(chosen)))
    return completions, rewritten / max(sum(map(len, completions)), 1)


def env_without_teacher(env: DistillVectorEnv) -> DistillVectorEnv:
    """An environment of the same completions without a teacher."""
    shape = {name: getattr(env, name) for name in ("max_new_tokens", "task_reward", "observation")}
    return DistillVectorEnv(env.num_envs, env.task, None, env.split, autoreset_mode="Disabled", **shape)


Act = Callable[[NDArray[Any], dict[str, Any]], NDArray[np.int64]]


def write(
    agent: Agent | None,
    env: DistillVectorEnv,
    prompts: Sequence[Prompt],
    seed: int,
    begin: int = 0,
    act: Act | None = None,
) -> list[list[int]]:
    """The tokens of one completion for each prompt. Who wrote them is in `env.completions`.

    Args:
        agent: who writes; None for the teacher.
        env: with at least as many rows as there are prompts; without a teacher if the agent is to be on its own.
        prompts: N prompts.
        seed: of the draws.
        begin: number of the first completion in its stream.
        act: instead of the agent's `act`.
    """
    rows = [*prompts, *[prompts[-1]] * (env.num_envs - len(prompts))]
    keys = episode_keys(seed, np.arange(begin, begin + env.num_envs))
    if agent is not None and hasattr(agent, "reseed"):
        agent.reseed(seed * 100_003 + begin // env.num_envs)
    act = act or (agent.act if agent is not None else None)
    with env.without_autoreset():
        observation, info = env.reset(options={"prompts": rows, "episode_keys": keys})
        active = np.arange(env.num_envs) < len(prompts)
        while active.any():
            actions = np.asarray(env.rewrite_action if act is None else act(observation, info))
            observation, _, terminated, truncated, info = env.step(np.where(active, actions, PAD))
            active &= ~(terminated | truncated)
    return [env.completions.completion(row)[0] for row in range(len(prompts))]


@torch.no_grad()
def measure(completions: Sequence[Completion], agent: Agent | None, env: DistillVectorEnv, gate: Gate | None) -> None:
    """Read completions with the teacher, and with the agent if it has log-probabilities, and note what they say.

    Neither steps the environment. A student is read in blocks of tokens, as the teacher is; another agent is asked for
    `log_probs` of one observation after the other.
    """
    prompts = [c.prompt.ids for c in completions]
    tokens = pad_sequence([torch.tensor(c.tokens) for c in completions], batch_first=True, padding_value=PAD)  # [n, T]
    width = max(1, BLOCK_NUMBERS // (len(completions) * env.vocab_size))
    own: Iterator[Tensor | None] = repeat(None)
    student: TrainableModel | None = getattr(agent, "student", None)
    if student is not None:
        reader = student.fork()
        own = read_along(reader, reader.start(prompts), tokens, width)
    elif hasattr(agent, "log_probs"):
        own = _ask_along(agent, env, prompts, tokens, width)
    predicted = torch.zeros(tokens.shape)
    if gate is not None and gate.student_score == "predicted_divergence":
        said = predict(student, prompts, tokens, tokens != PAD)
        predicted[tokens != PAD] = math.nan if said is None else said.cpu()
    first = start_teacher(env.teacher, [c.prompt for c in completions])
    theirs = read_along(env.teacher, first, tokens, width)
    parts = zip(theirs, own, tokens.split(width, 1), predicted.split(width, 1), strict=False)
    for teacher, log_q, ids, prediction in parts:
        row, column = (upload(index, teacher.device) for index in (ids != PAD).nonzero(as_tuple=True))
        drawn, p = upload(ids[ids != PAD], teacher.device), teacher[row, column].double()
        measured = {"teacher_log_probs": p.gather(1, drawn[:, None])[:, 0]}
        if log_q is not None:
            q = upload(log_q, teacher.device)[row, column].double()
            measured["log_probs"] = q.gather(1, drawn[:, None])[:, 0]
            measured["entropies"] = entropy(q)
            measured["divergences"] = reverse_kl(q, p).clamp(min=0)
            measured["forward_kls"] = forward_kl(q, p).clamp(min=0)
            if gate is not None:
                ones = torch.ones_like(drawn).double()
                own_score = student_score(gate, q[:, None], upload(prediction[ids != PAD], q.device).to(q)[:, None])
                block = DraftBlock(drawn[:, None], ones[:, None] > 0, ones[:, None], ones, own_score)
                measured["scores"] = raw_score(gate, q[:, None], p[:, None], block)[:, 0]
        counts = (ids != PAD).sum(1).tolist()
        for name, values in zip(measured, fetch(*measured.values()), strict=True):
            for completion, part in zip(completions, values.split(counts), strict=True):
                getattr(completion, name).extend(part.tolist())


def read_along(model: TokenModel, first: Tensor, tokens: Tensor, width: int) -> Iterator[Tensor]:
    """log p at the positions of completions [n, T], `width` at a time: [n, width, V], without meaning at padding.

    Args:
        model: started with the prompts.
        first: what `start` returned, [n, V].
        tokens: int64 [n, T], padded with -1.
        width: T at a time.
    """
    before = first[:, None]
    for block in tokens.split(width, 1):
        after = model.extend(block)
        yield torch.cat([before, after[:, :-1]], 1)
        before = after[:, -1:]


def _ask_along(
    agent: Any, env: DistillVectorEnv, prompts: Sequence[Sequence[int]], tokens: Tensor, width: int
) -> Iterator[Tensor]:
    """The same of an agent's own `log_probs`."""
    ids = np.full((len(prompts), env.max_prompt_length + env.max_new_tokens), PAD)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])
    for block in tokens.split(width, 1):
        seen = []
        for written in block.T.numpy():
            seen.append(torch.from_numpy(agent.log_probs(encode(ids, env.observation, env.vocab_size))))
            ids[np.arange(len(ids)), np.minimum(lengths, ids.shape[1] - 1)] = written
            lengths = lengths + 1
        yield torch.stack(seen, 1)


def hard_positions(gate: Gate, completion: Completion, step_end_ids: frozenset[int]) -> list[bool]:
    """Where the hard gate would be hard along a completion."""
    score = torch.tensor([completion.scores], dtype=torch.float64)
    starts = torch.tensor([[True, *(t in step_end_ids for t in completion.tokens[:-1])]])
    decision, _ = read_and_decide(gate, score, starts, torch.zeros_like(score), GateState.start(1))
    return decision.hard[0].tolist()


def by_prompt(completions: Sequence[Completion]) -> list[list[Completion]]:
    """Completions grouped by prompt, in order."""
    groups: dict[tuple[int, ...], list[Completion]] = defaultdict(list)
    for completion in completions:
        groups[completion.prompt.ids].append(completion)
    return list(groups.values())
