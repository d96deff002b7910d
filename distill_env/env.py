"""The environment: token generation as a Markov decision process whose environment is the teacher."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from distill_env.checks import check_range, check_values
from distill_env.completion_batch import CompletionBatch
from distill_env.env_arguments import (
    AutoresetName,
    EnvArguments,
    ObservationForm,
    RenderMode,
    RewriteDraw,
    RewriteSpan,
    VectorEnvArguments,
)
from distill_env.models.absent import AbsentTeacher
from distill_env.models.base import TokenModel
from distill_env.models.load import load_model
from distill_env.models.routed import RoutedModel
from distill_env.observations import encode, observation_space
from distill_env.ragged import PAD, Bools, Ints
from distill_env.randomness import Purpose, inverse_cdf, uniform
from distill_env.rendering import render_ansi, render_rgb
from distill_env.rules import is_floored, own_reward, rewrite_distribution
from distill_env.table_row import TableRow
from distill_env.tasks.base import SPLITS, Prompt, Split, Task
from distill_env.tasks.registry import import_name, make_task
from distill_env.teacher_scorer import Foresight, TeacherScorer, TeacherUsage
from distill_env.transfer import fetch, upload

EMPTY_DRAFT = torch.zeros(1, 0, dtype=torch.long)
Arrays = dict[str, NDArray[Any]]
CHUNK_NUMBERS = 2**23  # log-probabilities that are copied at a time, so that a batch's are not in memory twice
IMPORTED = re.compile(r"[\w.]+:[\w.]+")  # package.module:Class
PLAIN_INTEGERS = (int, np.int64, np.int32)
RESET_OPTIONS = ("prompts", "episode_keys", "reset_mask")


class DistillVectorEnv(VectorEnv):
    """A batch of completions, written token by token by an agent. The teacher is the environment.

    ## Description
    The state is a prompt and the completion so far. An action is the next token, or REWRITE, which asks the teacher
    to write the next token. The reward of an own token is its log-probability under the teacher; a rewrite has a
    fixed cost. Tokens are never taken back. The environment does not know the student, so any agent written for
    Gymnasium can use it.

    ## Action Space
    `Discrete(V + 1)`: a token id below V = `vocab_size`, or REWRITE = V = `rewrite_action`.

    With `chunk=K` it is `MultiDiscrete([V + 1] * K)`: up to K actions in one environment step, carried out in order. A
    REWRITE or the end of the completion ends the row's chunk, and the environment ignores the actions after it. A
    chunked `step` also accepts fewer than K columns. With any K it accepts -1 as padding; nothing happens in a row of
    padding alone.

    ## Observation Space
    The ids of the prompt and of the completion so far, padded on the right with -1; T = `max_prompt_length +
    max_new_tokens`. The argument `observation` chooses their form:

    | `observation` | space | |
    | --- | --- | --- |
    | `ids` | `Box(-1, V - 1, (T,), int64)` | for an agent with an embedding |
    | `float` | `Box(-1, V - 1, (T,), float32)` | the same numbers |
    | `one_hot` | `Box(0, 1, (T * V,), float32)` | V zeros and ones for each id, zeros for padding |

    The registered ids of the three small tasks have `one_hot`, which the usual networks and replay buffers take as it
    is. `distill_env.observations` has wrappers that do the same for any environment whose observations are ids.

    ## Rewards
    | action | reward, nats |
    | --- | --- |
    | token a | `max(log p_T(a given s), log_prob_floor)` |
    | REWRITE | `-rewrite_cost`, once for the whole span |
    | the last of a completion | additionally `task_reward` times the grade of the completion |

    The reward of a chunk is the sum; `info["token_rewards"]` has its parts.

    ## Starting State
    A prompt of the split, drawn by the key of the episode. The key follows from the row's seed (`seed + i`) and the
    number of its episode. Where a prompt has `teacher_ids`, the teacher reads these in place of what the observation
    shows: it may know a solution, examples or documents. `reset` takes three options:

    | option | value |
    | --- | --- |
    | `prompts` | a `Prompt` or a sequence of token ids for each row that is reset |
    | `episode_keys` | uint64, the key of each row that is reset |
    | `reset_mask` | bool [n], the rows to reset; all by default |

    ## Episode End
    Terminated when the end token is written, by the agent or the teacher, and when a completion has `max_new_tokens`
    tokens. It is never truncated: the horizon belongs to the task. The observation shows how far it is, the grade is
    paid there, and no state follows whose value an agent could learn. `info["cut_off"]` tells the two ends apart. A
    time limit from outside (`gymnasium.wrappers.TimeLimit`) truncates as everywhere.

    ## Info
    | key | shape | meaning |
    | --- | --- | --- |
    | `teacher_log_probs` | float32 [n, V] | the teacher at the new state (only with `chunk=1`, not at an end) |
    | `tokens` | int64 [n, W] | tokens executed, padded with -1; W is `chunk`, or `max_new_tokens` with span `step` |
    | `rewritten` | bool [n, W] | which of them the teacher wrote |
    | `token_rewards` | float64 [n, W] | the reward's parts, without the task's; 0 at padding |
    | `floored` | int64 [n] | own tokens of this environment step whose reward is `log_prob_floor` |
    | `grade` | float64 [n] | the grade, at the end of a completion of a graded task |
    | `cut_off` | bool [n] | at an end: whether the horizon was reached without the end token |

    Each has its mask under the key with a leading underscore, as in every vector environment of Gymnasium.
    `teacher_log_probs` is privileged information: it is not part of the observation.

    ## Arguments
    Args:
        num_envs: n, the number of rows.
        task: `categorical`, `sums`, `coins`, `instruct`, `gsm8k`, `math`, `aime`, `svamp`, `text`,
            `package.module:Class`, or a `Task`. An environment that is made from names alone has a spec that can be
            written as JSON.
        teacher: a name or path for `load_model`, `package.module:Class`, or a `TokenModel` (not with `gym.make`, which
            copies its arguments). Several by name, as `{"math": ..., "code": ...}`: each reads and writes the
            completions of the prompts that name it. Without one (None) REWRITE is refused, every token pays 0, and
            only `task_reward` is left: the environment in which a student is on its own.
        split: the task's prompts to draw from: train, validation, test or ood.
        task_kwargs: arguments of the task.
        teacher_kwargs: arguments of `load_model` or of the class; with several teachers, of each by its name.
        max_new_tokens: the horizon; the task's default if None.
        rewrite: how the teacher writes: `sample`, `nucleus` (from the smallest set with mass `rewrite_top_p`) or
            `argmax`.
        rewrite_top_p: mass of the nucleus, in (0, 1].
        rewrite_temperature: at which the teacher draws with `sample` and `nucleus`; rewards and `info` are at 1.
        rewrite_span: how much one REWRITE writes: a `token`, or the rest of the reasoning `step` (up to and including a
            token that ends a reasoning step, the end token, or the horizon).
        rewrite_cost: price of a rewrite in nats, at least 0. It is a parameter of its own and unrelated to the
            threshold of any gate.
        log_prob_floor: lowest reward of an own token in nats, below 0.
        task_reward: weight of the grade at the end.
        chunk: K, the largest number of actions in an environment step.
        reveal_teacher: whether `info` has `teacher_log_probs`.
        observation: `ids`, `float` or `one_hot`.
        autoreset_mode: NEXT_STEP, SAME_STEP or DISABLED, as Gymnasium defines them.
        render_mode: None, `ansi` or `rgb_array`.

    Raises:
        ValueError: if an argument is outside its range, if task and teacher have different vocabularies, or if prompts
            and completions do not fit into the teacher's context.

    ## Access for a distillation agent
    An agent that trains on the teacher's full distributions needs more than Gymnasium's interface offers, and needs it
    without a second pass of the teacher:

    | name | meaning |
    | --- | --- |
    | `lookahead(tokens)` | the teacher along a draft, in one pass; a `step` along the same draft then needs no pass |
    | `foresee(...)` | what a `step` along a draft reads on the teacher's device, to be fetched with more numbers |
    | `expect(foresight)` | takes that, on the host; a `step` along the draft then waits for nothing |
    | `executed_log_probs()` | the teacher at every state at which the last `step` executed a token |
    | `release()` | frees the distributions that both methods keep in memory |
    | `teacher_usage` | passes, positions and written tokens of the teacher so far |
    | `use_teacher(model)` | takes another teacher, such as the student as it is |
    | `teacher_usage_by_name` | the same of each of several teachers |
    | `teacher_top_k` | how many ids of each distribution are exact, if the teacher is a server; else 0 |
    | `completions` | the `CompletionBatch` of all rows; read only |
    | `without_autoreset()` | a context in which rows that have ended wait for a reset, whatever `autoreset_mode` is |

    No other agent needs any of these. `DistillEnv` has `lookahead` only; its `batch` has them all.

    ## Version History
    * v0: initial version.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012 (as in gymnasium.Env)

    def __init__(
        self,
        num_envs: int = 1,
        task: str | Task = "categorical",
        teacher: str | TokenModel | Mapping[str, str | TokenModel] | None = "markov",
        split: Split = "train",
        task_kwargs: dict[str, Any] | None = None,
        teacher_kwargs: dict[str, Any] | None = None,
        max_new_tokens: int | None = None,
        rewrite: RewriteDraw = "sample",
        rewrite_top_p: float = 0.9,
        rewrite_temperature: float = 1.0,
        rewrite_span: RewriteSpan = "token",
        rewrite_cost: float = 0.5,
        log_prob_floor: float = -100.0,
        task_reward: float = 0.0,
        chunk: int = 1,
        reveal_teacher: bool = True,
        observation: ObservationForm = "ids",
        autoreset_mode: AutoresetMode | AutoresetName = AutoresetMode.NEXT_STEP,
        render_mode: RenderMode | None = None,
    ) -> None:
        self.num_envs, self.split, self.chunk, self.reveal_teacher = num_envs, split, chunk, reveal_teacher
        self.rewrite, self.rewrite_top_p, self.rewrite_span = rewrite, rewrite_top_p, rewrite_span
        self.rewrite_temperature = rewrite_temperature
        self.rewrite_cost, self.log_prob_floor, self.task_reward = rewrite_cost, log_prob_floor, task_reward
        self.observation, self.render_mode = observation, render_mode
        self.task = make_task(task, **(task_kwargs or {})) if isinstance(task, str) else task
        self.max_new_tokens = self.task.max_new_tokens if max_new_tokens is None else max_new_tokens
        check_values(vars(self) | {"autoreset_mode": autoreset_mode}, VectorEnvArguments)
        check_range(self, "num_envs", "chunk", "max_new_tokens", least=1)
        check_range(self, "rewrite_cost", least=0)
        check_range(self, "rewrite_top_p", above=0, most=1)
        check_range(self, "rewrite_temperature", above=0, finite=True)
        check_range(self, "log_prob_floor", below=0, finite=True)
        check_range(self, "task_reward", finite=True)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.prompts = self.task.prompts(split)
        if not self.prompts:
            raise ValueError(f"split: {split!r} has no prompts; expected another split of the task")
        every = self._prompts_of_all_splits()
        self.max_prompt_length = max(len(p.ids) for p in every)
        self.max_teacher_prompt_length = max(len(p.ids_for_teacher) for p in every)
        self.teacher_sees_more = any(p.ids_for_teacher != p.ids for p in every)
        self.vocab_size = self.rewrite_action = self.task.vocab_size
        self._make_spaces()
        self._teacher_source = teacher, teacher_kwargs or {}
        self._teacher_scorer = TeacherScorer(self._load_teacher(), num_envs, self.vocab_size)
        self._teacher_is_behind = False
        self._other_teacher: TokenModel | None = None  # in place of the one that was loaded
        self.completions = CompletionBatch(
            num_envs, self.prompts, self.max_prompt_length, self.max_new_tokens, self.task.eos_token_id
        )
        self._reveals_teacher = chunk == 1 and reveal_teacher and teacher is not None
        self._width = chunk if rewrite_span == "token" else self.max_new_tokens
        self.started = False
        # row, position, column, log p of what the last step executed
        self._trace: Iterable[tuple[NDArray[Any], NDArray[Any], NDArray[Any], Tensor]] = []
        self._foresight: Foresight | None = None

    def use_teacher(self, teacher: TokenModel) -> None:
        """Take another teacher of the same ids from now on; completions that are being written are read again by it.

        A copy of the environment has the teacher with which it was made.
        """
        if self._other_teacher is not teacher:
            self._other_teacher = teacher
            own: Any = teacher.fork() if hasattr(teacher, "fork") else teacher
            scorer = TeacherScorer(own, self.num_envs, self.vocab_size)
            scorer.usage = self.teacher_usage
            self._teacher_scorer, self._teacher_is_behind = scorer, self.started

    def _prompts_of_all_splits(self) -> list[Prompt]:
        return [p for split in SPLITS for p in self.task.prompts(split)]

    def _load_teacher(self) -> TokenModel:
        """The teacher with rows of its own. Raises ValueError if its vocabulary or its context does not fit."""
        source, kwargs = self._teacher_source
        if source is None:
            return AbsentTeacher(self.vocab_size, self.task.eos_token_id)
        prompts = self._prompts_of_all_splits()
        if not isinstance(source, Mapping):
            return self._load_one(source, kwargs, prompts)
        for prompt in prompts:
            self._check_name(prompt)
        read = {name: [p for p in prompts if p.teacher == name] for name in source}
        return RoutedModel({name: self._load_one(source[name], kwargs.get(name, {}), read[name]) for name in source})

    def _load_one(self, source: str | TokenModel, kwargs: dict[str, Any], prompts: Sequence[Prompt]) -> TokenModel:
        """A teacher that will read these prompts."""
        if isinstance(source, str) and IMPORTED.fullmatch(source):
            teacher: TokenModel = import_name("teacher", source)(**kwargs)
        elif isinstance(source, str):
            teacher = load_model(source, **kwargs)
        else:
            teacher = source.fork() if hasattr(source, "fork") else source
        if teacher.vocab_size != self.vocab_size:
            raise ValueError(
                f"teacher: {teacher.vocab_size} token ids; expected {self.vocab_size}, as many as the task"
            )
        prompt = max((len(p.ids_for_teacher) for p in prompts), default=0)
        context = getattr(teacher, "max_length", None)
        if context is not None and prompt + self.max_new_tokens > context:
            room, because = context - prompt, getattr(getattr(teacher, "limit", None), "because", "")
            raise ValueError(
                f"max_new_tokens: {self.max_new_tokens}; expected at most {room}, since the teacher takes rows of "
                f"{context} tokens at most{because}, and its longest prompt has {prompt}"
            )
        if hasattr(teacher, "reserve"):
            teacher.reserve(prompt + self.max_new_tokens + self.chunk)
        return teacher

    def _check_name(self, prompt: Prompt) -> None:
        """Raise ValueError if there are several teachers, and the prompt names none of them."""
        source = self._teacher_source[0]
        if isinstance(source, Mapping) and prompt.teacher not in source:
            named = f"the teacher {prompt.teacher!r}" if prompt.teacher else "no teacher"
            raise ValueError(f"teacher: the prompt {prompt.text[:40]!r} names {named}; expected {', '.join(source)}")

    def _make_spaces(self) -> None:
        v, length = self.vocab_size, self.max_prompt_length + self.max_new_tokens
        self.single_observation_space = observation_space(self.observation, v, length)
        self.single_action_space: gym.Space[Any] = (
            gym.spaces.Discrete(v + 1) if self.chunk == 1 else gym.spaces.MultiDiscrete([v + 1] * self.chunk)
        )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    @property
    def teacher(self) -> TokenModel:
        """The teacher; its rows belong to this environment alone."""
        return self._teacher_scorer.teacher

    @property
    def teacher_top_k(self) -> int:
        """How many ids of each distribution are exact: the likeliest ones, if the teacher is a server; 0 means all."""
        return getattr(self.teacher, "top_k", 0)

    @property
    def teacher_usage_by_name(self) -> dict[str, TeacherUsage]:
        """The same as `teacher_usage` of each of several teachers; empty for one."""
        return self._teacher_scorer.usage_by_name

    @property
    def teacher_usage(self) -> TeacherUsage:
        """What the teacher has computed and written so far."""
        return self._teacher_scorer.usage

    @property
    def _scorer(self) -> TeacherScorer:
        """The teacher beside the completions; if others have written these, it reads them anew."""
        if self._teacher_is_behind:
            self._teacher_is_behind = False
            self._teacher_scorer.start(list(self.completions.prompts), np.arange(self.num_envs))
        return self._teacher_scorer

    def written_by(self, row: TableRow) -> None:
        """The completion was begun or written without the teacher's cache; `row` says what the step executed."""
        self._trace, self._teacher_is_behind = row, True

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin new completions in all rows or in those of `reset_mask`; the class documents the options.

        Raises:
            ValueError: for a seed or an option that cannot be used; then nothing has changed.
        """
        options = options or {}
        if unknown := sorted(options.keys() - RESET_OPTIONS):
            raise ValueError(f"options: {', '.join(unknown)} unknown; expected {', '.join(RESET_OPTIONS)}")
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, np.bool_)))
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(f"reset_mask: {mask.dtype} {mask.shape}; expected bool [{self.num_envs}], not all False")
        if not self.started and not mask.all():
            raise ValueError("reset_mask: some rows were never reset; expected all rows at the first reset")
        rows = np.flatnonzero(mask)
        prompts, keys = options.get("prompts"), options.get("episode_keys")
        for name, values in (("prompts", prompts), ("episode_keys", keys)):
            if values is not None and len(values) != len(rows):
                raise ValueError(f"{name}: {len(values)} given; expected one for each of {len(rows)} rows")
        prompts = None if prompts is None else [self._check_prompt(p) for p in prompts]
        seeds = self._row_seeds(seed)
        super().reset(seed=seed if isinstance(seed, int) else None)
        for row in rows.tolist():
            if seeds[row] is not None:
                self.completions.seed(row, seeds[row])
            elif not self.started:
                self.completions.seed(row, int(self.np_random.integers(2**63)))
        self._begin(rows, prompts, keys)
        return self._observe(self.completions.ids), self._info(mask)

    def step(self, actions: Any) -> tuple[NDArray[Any], NDArray[np.float64], Bools, Bools, dict[str, Any]]:
        """Carry out a chunk of actions, int [n] or [n, k]; the class documents actions, rewards and info.

        Raises:
            ValueError: for actions outside the action space.
            gymnasium.error.ResetNeeded: before the first reset, and with autoreset DISABLED for an action in a row
                whose completion has ended.
        """
        if not self.started:
            raise gym.error.ResetNeeded("step: call reset before step")
        actions = self._check_actions(actions)
        waiting = self.completions.ended.copy()  # completions that ended in an earlier step
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            actions = np.where(waiting[:, None], PAD, actions)
        elif (actions[waiting] != PAD).any():
            rows = np.flatnonzero(waiting).tolist()
            raise gym.error.ResetNeeded(f"actions: rows {rows} have ended; expected a reset, or {PAD} in these rows")
        executed = self._execute(actions)
        ended = self.completions.ended & ~waiting
        terminated, truncated = ended.copy(), np.zeros_like(ended)
        executed |= self._endings(ended)
        rewards = executed["token_rewards"].sum(1)
        if ended.any():
            rewards += self.task_reward * executed["grade"]
            self._scorer.drop(self.completions.ended)
        final = {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP and ended.any():
            final = self._final(ended, executed)
            self._begin(np.flatnonzero(ended))
            waiting, ended = ended, np.zeros_like(ended)  # what was executed in these rows is in final_info
        elif self.autoreset_mode == AutoresetMode.NEXT_STEP and waiting.any():
            self._begin(np.flatnonzero(waiting))
        info = self._info(np.ones(self.num_envs, np.bool_), executed, ~waiting, ended)
        return self._observe(self.completions.ids), rewards, terminated, truncated, final | info

    @contextmanager
    def without_autoreset(self) -> Iterator[None]:
        """Inside this context, rows that have ended wait for a reset, as with autoreset DISABLED."""
        mode, self.autoreset_mode = self.autoreset_mode, AutoresetMode.DISABLED
        try:
            yield
        finally:
            self.autoreset_mode = mode

    def lookahead(self, tokens: Tensor, counts: Ints | None = None) -> Tensor:
        """The teacher along a draft, in one pass; the state of the environment does not change.

        Args:
            tokens: int64 [n, K], drafted tokens from the current state on, ragged with -1; K may be 0.
            counts: int64 [n], how many of each row's tokens count; then `tokens` may lie on any device, they are not
                checked, and what follows them has no meaning.

        Returns:
            log p, [n, K + 1, V]; row j is the state after j drafted tokens. Entries after padding, and rows whose
            completion has ended, have no meaning. Do not write to this tensor: the environment uses it in `step`.

        Raises:
            ValueError: if `tokens` are not such a draft, or there is no teacher.
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if not self.started:
            raise gym.error.ResetNeeded("lookahead: call reset before lookahead")
        if self._teacher_source[0] is None:
            raise ValueError("lookahead: the environment has no teacher")
        if counts is not None:
            return self._score(tokens, counts)
        ids = tokens.numpy()
        inside = ids.dtype.kind == "i" and ((ids >= PAD) & (ids < self.vocab_size)).all()
        if len(ids) != self.num_envs or not inside or ((ids[:, :-1] == PAD) & (ids[:, 1:] != PAD)).any():
            raise ValueError(
                f"tokens: {tuple(ids.shape)} {ids.dtype}; expected integers [{self.num_envs}, K] below "
                f"{self.vocab_size}, padded on the right with {PAD}"
            )
        return self._score(tokens)

    def foresee(self, log_probs: Tensor, tokens: Tensor, rewrite_at: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a `step` along a draft will read from the teacher's device; bring it to the host and to `expect`.

        Args:
            log_probs: what `lookahead` has returned, [n, width, V].
            tokens: the draft, int64 [n, width], on any device.
            rewrite_at: int64 [n], the position of each row's REWRITE, on any device, `width` or more for none; None if
                no row has one.

        Returns:
            the teacher's log-probabilities of the draft, float64 [n, width], and what it writes, int64 [n], without
            meaning in rows without a REWRITE.
        """
        device, width = log_probs.device, log_probs.shape[1]
        tokens = upload(tokens, device).clamp(min=0)
        paid = log_probs.gather(-1, tokens[..., None])[..., 0].double()
        if rewrite_at is None:
            return paid, torch.full((len(tokens),), PAD, device=device)
        at = upload(rewrite_at, device).clamp(max=width - 1)[:, None]  # [n, 1]
        positions = self.completions.lengths[:, None] + np.arange(width)
        draws = upload(uniform(self.completions.keys[:, None], positions, Purpose.TEACHER), device).gather(1, at)
        current = log_probs[torch.arange(len(at), device=device), at[:, 0]]
        return paid, self._draw(current, draws[:, 0])

    def expect(self, foresight: Foresight) -> None:
        """Take what `foresee` has returned, for the next `step`."""
        self._foresight = foresight
        self._scorer.drafted(foresight.tokens)

    def executed_log_probs(self) -> Iterator[tuple[Ints, Ints, Tensor]]:
        """The teacher at every state at which the last `step` executed a token; nothing is computed again.

        Yields:
            rows int64 [m], positions in the completion int64 [m], log p [m, V]; m is small for a large vocabulary.
        """
        size = max(1, CHUNK_NUMBERS // self.vocab_size)
        for row, position, column, log_probs in self._trace:
            flat = log_probs.dim() == 2  # of the teacher's own draws [m, V], of an agent's chunk [n, k, V]
            for begin in range(0, len(row), size):
                part = slice(begin, begin + size)
                at = upload(row[part], log_probs.device), upload(column[part], log_probs.device)
                yield row[part], position[part], log_probs[part] if flat else log_probs[at]

    def release(self) -> None:
        """Free the distributions of the last look-ahead and the last step, which are large for a large vocabulary."""
        self._trace, self._foresight = [], None
        self._scorer.rewind(self.completions.lengths, ~self.completions.ended)

    def render(self) -> tuple[str, ...] | tuple[NDArray[np.uint8], ...] | None:
        """A picture of each row, what the teacher wrote in red: with `ansi` the prompt (dim) and the completion in
        ANSI colours, the teacher's between ⟦ and ⟧; with `rgb_array` both as uint8 [height, width, 3], each token above
        a bar of what it paid."""
        if self.render_mode is None:
            return None
        rows = [(self.completions.prompts[i], *self.completions.completion(i)) for i in range(self.num_envs)]
        if self.render_mode == "ansi":
            return tuple(render_ansi(self.task, *row) for row in rows)
        paid = map(self.completions.token_rewards, range(self.num_envs))
        return tuple(render_rgb(self.task, *row, rewards) for row, rewards in zip(rows, paid, strict=True))

    def close_extras(self, **kwargs: Any) -> None:
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        """All but the teacher's weights and cache, which `__setstate__` loads and computes again."""
        without = ("_teacher_scorer", "_other_teacher", "_trace", "_foresight")
        state = {k: v for k, v in self.__dict__.items() if k not in without}
        return state | {"teacher_usage": (self.teacher_usage, self.teacher_usage_by_name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        usage = state.pop("teacher_usage")
        self.__dict__.update(state)
        self._trace, self._foresight, self._other_teacher = [], None, None
        self._teacher_scorer = TeacherScorer(self._load_teacher(), self.num_envs, self.vocab_size)
        self._teacher_scorer.usage, self._teacher_scorer.usage_by_name = usage
        self._teacher_is_behind = self.started

    def _execute(self, actions: Ints) -> Arrays:
        """Carry out actions [n, k], padded with -1, and report what was executed, [n, W] each."""
        n, k = actions.shape
        lengths = self.completions.lengths
        own, rewrite = self._split_chunk(actions)
        states = (own | rewrite).sum(1)  # of each row, at which an action is executed
        along = np.where(np.arange(k) < (states - 1)[:, None], actions, PAD)
        log_probs = self._along(along, int(states.max()))  # [n, <= k, V]
        width = log_probs.shape[1]
        own, chosen = own[:, :width], actions[:, :width]
        tokens = np.full((n, self._width), PAD, np.int64)
        rewards = np.zeros((n, self._width))
        rewritten = np.zeros((n, self._width), np.bool_)
        rows, columns = np.nonzero(rewrite)
        current = log_probs[upload(rows, log_probs.device), upload(columns, log_probs.device)]
        paid, written = self._paid_and_written(log_probs, own, chosen, rows, columns, current)
        tokens[:, :width] = np.where(own, chosen, PAD)
        rewards[:, :width] = np.where(own, own_reward(paid, self.log_prob_floor), 0.0)
        floored = (own & is_floored(paid, self.log_prob_floor)).sum(1)
        by_agent, column = np.nonzero(own)
        self._trace = [(by_agent, lengths[by_agent] + column, column, log_probs)]
        if len(rows):
            self._teacher_wrote(rows, lengths[rows] + columns, current)
            tokens[rows, columns] = written
            rewritten[rows, columns] = True
            rewards[rows, columns] = -self.rewrite_cost
        self._commit(tokens[:, :width], states, rewritten, rewards)
        if self.rewrite_span == "step":
            self._finish_reasoning_step(rows, columns, tokens, rewritten)
        if self._reveals_teacher:
            self._score(EMPTY_DRAFT.expand(n, 0))
        return {"tokens": tokens, "rewritten": rewritten, "token_rewards": rewards, "floored": floored}

    def _split_chunk(self, actions: Ints) -> tuple[Bools, Bools]:
        """Which of the actions [n, k] are executed as own tokens, and which, at most one a row, as rewrites."""
        token = (actions >= 0) & (actions < self.vocab_size)
        room = np.where(self.completions.ended, 0, self.max_new_tokens - self.completions.lengths)
        reached = np.arange(actions.shape[1]) < room[:, None]
        if actions.shape[1] > 1:
            continues = token & (actions != self.task.eos_token_id)
            reached[:, 1:] &= np.logical_and.accumulate(continues[:, :-1], 1)
        return reached & token, reached & (actions == self.rewrite_action)

    def _along(self, tokens: Ints, states: int) -> Tensor:
        """log p at the first `states` states along own tokens, from the last look-ahead where it has them."""
        if states == 0:
            return self._scorer.log_probs[:, None][:, :0]
        needed = tokens[:, : states - 1]
        log_probs = self._scorer.cached(needed)
        if log_probs is None:
            log_probs = self._score(torch.from_numpy(np.ascontiguousarray(needed)))
        return log_probs[:, :states]

    def _paid_and_written(
        self, log_probs: Tensor, own: Bools, chosen: Ints, rows: Ints, columns: Ints, current: Tensor
    ) -> tuple[NDArray[np.float64], Ints]:
        """log p of the agent's tokens [n, k], without meaning where they are not `own`, and the teacher's tokens [m] at
        these rows and columns, where it says `current` [m, V]; as foreseen, or with one wait."""
        foresight, self._foresight = self._foresight, None
        width = own.shape[1]
        if foresight is not None and foresight.tokens.shape[1] >= width:
            as_drafted = (foresight.tokens[:, :width] == chosen)[own].all()
            if as_drafted and (foresight.rewrite_at[rows] == columns).all():
                return foresight.log_probs[:, :width], foresight.written[rows]
        index = upload(np.where(own, chosen, 0), log_probs.device)[..., None]
        keys, positions = self.completions.keys[rows], self.completions.lengths[rows] + columns
        paid, written = fetch(
            log_probs.gather(-1, index)[..., 0].double(),
            self._draw(current, uniform(keys, positions, Purpose.TEACHER)),
        )
        return paid.numpy(), written.numpy()

    def _score(self, draft: Tensor, counts: Ints | None = None) -> Tensor:
        """log p along a draft [n, K] after the committed tokens, [n, K + 1, V]."""
        live, lengths = ~self.completions.ended, self.completions.lengths
        if draft.shape[1] == 0 and not (live & (self._scorer.cached_lengths != lengths)).any():
            return self._scorer.log_probs[:, None]
        self._foresight = None
        self._scorer.rewind(lengths, live)
        counts = (draft.numpy() >= 0).sum(1) if counts is None else counts
        return self._scorer.score(self.completions.tokens_from(self._scorer.cached_lengths), draft, counts, live)

    def _commit(self, tokens: Ints, counts: Ints, rewritten: Bools, rewards: NDArray[np.float64]) -> None:
        """Append the first `counts[i]` of row i's tokens [n, k]; the teacher forgets the rest of its draft."""
        if counts.any():
            self._scorer.commit(tokens, counts, self.completions.lengths, ~self.completions.ended)
            self.completions.append(tokens, counts, rewritten, rewards)

    def _draw(self, log_probs: Tensor, uniforms: NDArray[np.float64] | Tensor) -> Tensor:
        """Tokens as the teacher writes them, from its log-probabilities [m, V] and uniform numbers [m]."""
        if len(log_probs) == 0:
            return torch.zeros(0, dtype=torch.long)
        settings = (self.rewrite, self.rewrite_top_p, self.teacher_top_k)
        log_probs = rewrite_distribution(log_probs, *settings, temperature=self.rewrite_temperature)
        return inverse_cdf(log_probs, uniforms)

    def _teacher_wrote(self, rows: Ints, positions: Ints, log_probs: Tensor) -> None:
        """The teacher has written a token in `rows`, at these positions of their completions, from [m, V]."""
        self._teacher_scorer.count_written(rows)
        self._trace = [*self._trace, (rows, positions, np.zeros_like(rows), log_probs)]

    def _finish_reasoning_step(self, rows: Ints, columns: Ints, tokens: Ints, rewritten: Bools) -> None:
        """The teacher writes the rest of the reasoning step in `rows`, after its tokens in `columns`; the result goes
        into `tokens` and `rewritten`, [n, W]."""
        stops = [*self.task.step_end_ids, self.task.eos_token_id]
        while True:
            unfinished = ~np.isin(tokens[rows, columns], stops) & ~self.completions.ended[rows]
            rows, columns = rows[unfinished], columns[unfinished] + 1
            if len(rows) == 0:
                return
            scored = self._score(EMPTY_DRAFT.expand(self.num_envs, 0))
            current, positions = scored[upload(rows, scored.device), 0], self.completions.lengths[rows]
            draws = uniform(self.completions.keys[rows], positions, Purpose.TEACHER)
            self._teacher_wrote(rows, positions, current)
            tokens[rows, columns] = self._draw(current, draws).cpu().numpy()
            rewritten[rows, columns] = True
            block, counts = np.full((self.num_envs, 1), PAD), np.zeros(self.num_envs, np.int64)
            block[rows, 0], counts[rows] = tokens[rows, columns], 1
            self._commit(block, counts, np.ones_like(block, np.bool_), np.zeros(block.shape))

    def _begin(
        self, rows: Ints, prompts: Sequence[Prompt] | None = None, keys: NDArray[np.uint64] | None = None
    ) -> None:
        """Start the next episode of `rows`."""
        self._foresight = None
        self.completions.begin(rows, prompts, keys)
        self._scorer.start(list(self.completions.prompts[rows]), rows)
        self.started = True

    def grade(self, row: int) -> float:
        """The grade of a row's completion."""
        tokens, _ = self.completions.completion(row)
        return self.task.grade(self.completions.prompts[row], tokens).score

    def _endings(self, ended: Bools) -> Arrays:
        """What `info` has of completions that have ended."""
        grades = np.zeros(self.num_envs)
        if self.task.graded:
            for row in np.flatnonzero(ended).tolist():
                grades[row] = self.grade(row)
        return {"grade": grades, "cut_off": ended & (self.completions.last_tokens() != self.task.eos_token_id)}

    def _observe(self, ids: Ints) -> NDArray[Any]:
        """Observations of these prompts and completions, in new arrays."""
        return encode(ids, self.observation, self.vocab_size)

    def _final(self, ended: Bools, executed: Arrays) -> dict[str, Any]:
        """SAME_STEP: what `info` has of the completions that have ended."""
        final_obs = np.full(self.num_envs, None, object)
        rows = np.flatnonzero(ended)
        for row, observation in zip(rows.tolist(), self._observe(self.completions.ids[rows]), strict=True):
            final_obs[row] = observation
        final = {"final_obs": final_obs, "final_info": self._info(ended, executed, ended, ended)}
        return final | {f"_{key}": ended.copy() for key in final}

    def _info(
        self,
        rows: Bools,
        executed: Arrays | None = None,
        acted: Bools | None = None,
        ended: Bools | None = None,
    ) -> dict[str, Any]:
        """Gymnasium's dict of arrays, each with its mask; a key without any value is absent. `rows` show the teacher,
        rows that `acted` what was executed, and those that `ended` their grade."""
        masks: dict[str, Bools | None] = dict.fromkeys(executed or {}, acted)
        values = dict(executed or {})
        masks["grade"] = ended if self.task.graded else None
        masks["cut_off"] = ended
        if self._reveals_teacher:
            values["teacher_log_probs"] = self._scorer.log_probs.float().cpu().numpy()
            masks["teacher_log_probs"] = rows & ~self.completions.ended
        info: dict[str, Any] = {}
        for key, array in values.items():
            mask = masks[key]
            if mask is not None and mask.any():
                shape = (-1, *(1,) * (array.ndim - 1))
                info[key] = array.copy() if mask.all() else np.where(mask.reshape(shape), array, array.dtype.type(0))
                info[f"_{key}"] = mask.copy()
        return info

    def _row_seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[Any]:
        """The seed of each row, or None."""
        if isinstance(seed, int):
            seed = [seed + i for i in range(self.num_envs)]
        seeds = [None] * self.num_envs if seed is None else seed
        if len(seeds) != self.num_envs or any(s is not None and not 0 <= s < 2**64 for s in seeds):
            raise ValueError(f"seed: {seed!r:.60}; expected an integer from 0 to 2**64 - 1, or {self.num_envs} of them")
        return seeds

    def _check_actions(self, actions: Any) -> Ints:
        actions = np.asarray(actions)
        actions = actions[:, None] if self.chunk == 1 and actions.ndim == 1 else actions
        if actions.ndim != 2 or len(actions) != self.num_envs or not 1 <= actions.shape[1] <= self.chunk:
            raise ValueError(f"actions: shape {actions.shape}; expected ({self.num_envs}, k), k from 1 to {self.chunk}")
        if actions.dtype.kind not in "iu":
            raise ValueError(f"actions: {actions.dtype}; expected integers")
        if actions.min() < PAD or actions.max() > self.rewrite_action:
            raise ValueError(f"actions: {actions.min()} to {actions.max()}; expected {PAD} to {self.rewrite_action}")
        if self._teacher_source[0] is None and (actions == self.rewrite_action).any():
            raise ValueError(f"actions: REWRITE ({self.rewrite_action}) without a teacher; expected tokens below it")
        return actions.astype(np.int64)

    def _check_prompt(self, prompt: Any) -> Prompt:
        if not isinstance(prompt, Prompt):
            try:
                ids = tuple(operator.index(t) for t in prompt)
            except TypeError:
                raise ValueError(f"prompts: {type(prompt).__name__}; expected Prompt or token ids") from None
            prompt = Prompt(ids, self.task.decode(ids))
        self._check_name(prompt)
        for ids, most in (
            (prompt.ids, self.max_prompt_length),
            (prompt.ids_for_teacher, max(self.max_prompt_length, self.max_teacher_prompt_length)),
        ):
            if len(ids) > most:
                raise ValueError(f"prompts: {len(ids)} tokens in one; expected at most {most}")
            if any(not 0 <= t < self.vocab_size for t in ids):
                raise ValueError(f"prompts: {ids!r:.60}; expected ids from 0 to {self.vocab_size - 1}")
        return prompt


class DistillEnv(gym.Env[NDArray[Any], Any]):
    """One row of a `DistillVectorEnv`, whose docstring is the manual of both.

    The arguments are the same but for `num_envs` and `autoreset_mode`. `info` has the row's values without masks, as
    arrays and numbers of numpy, and `options` of `reset` are lists and arrays of one element. Under a teacher that is a
    table it is stepped in plain numbers (`TableRow`), by the same rules.

    Attributes:
        batch: the `DistillVectorEnv` of one row.
        vocab_size: V.
        rewrite_action: the action REWRITE, V.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012 (as in gymnasium.Env)

    def __init__(self, **arguments: Unpack[EnvArguments]) -> None:
        self.batch = DistillVectorEnv(num_envs=1, autoreset_mode=AutoresetMode.DISABLED, **arguments)
        self.render_mode = self.batch.render_mode
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space
        self.vocab_size, self.rewrite_action = self.batch.vocab_size, self.batch.rewrite_action
        self._row = TableRow(self.batch) if TableRow.serves(self.batch) else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        if self._row is not None and seed is None and not options and self.batch.started:
            info = self._row.reset()
            return self._observation(), info
        super().reset(seed=seed)
        observation, info = self.batch.reset(seed=seed, options=options)
        return observation[0], _first_row(info)

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        if self._row is not None and self._is_plain(action):
            reward, terminated, info = self._row.step(int(action))
            return self._observation(), reward, terminated, False, info
        observation, rewards, terminations, truncations, info = self.batch.step(np.asarray(action)[None])
        return observation[0], float(rewards[0]), bool(terminations[0]), bool(truncations[0]), _first_row(info)

    def _is_plain(self, action: Any) -> bool:
        """Whether this is an action for a completion that has not ended; all else is the batch's to check."""
        return (
            type(action) in PLAIN_INTEGERS
            and 0 <= action <= self.rewrite_action
            and not self.batch.completions.ended[0]
        )

    def _observation(self) -> NDArray[Any]:
        return encode(self.batch.completions.ids[0], self.batch.observation, self.vocab_size)

    def lookahead(self, tokens: Tensor) -> Tensor:
        """The teacher along a draft: int64 [K] -> [K + 1, V]; the state does not change."""
        return self.batch.lookahead(tokens[None])[0]

    def render(self) -> str | NDArray[np.uint8] | None:
        pictures = self.batch.render()
        return pictures[0] if pictures else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_row": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._row = TableRow(self.batch) if TableRow.serves(self.batch) else None


def _first_row(info: dict[str, Any]) -> dict[str, Any]:
    """Values of a batch of one, without masks; each has a dtype, as TorchRL requires."""
    row = {key: value[0] for key, value in info.items() if not key.startswith("_")}
    return {k: np.array(v) if isinstance(v, np.bool_) else v for k, v in row.items()}
