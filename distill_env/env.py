"""The environment: token generation as a Markov decision process whose environment is the teacher."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from distill_env.models.base import TokenModel
from distill_env.models.load import load_model
from distill_env.ragged import PAD, slice_rows
from distill_env.randomness import Purpose, episode_keys, inverse_cdf, uniform
from distill_env.tasks.base import SPLITS, Prompt, Split, Task
from distill_env.tasks.registry import make_task
from distill_env.teacher_scorer import TeacherScorer, TeacherUsage

RewriteDraw = Literal["sample", "nucleus", "argmax"]
RewriteSpan = Literal["token", "step"]


class DistillVectorEnv(VectorEnv):
    """A batch of answers being written, token by token, by an agent whose teacher is the environment.

    ## Description
    The state is a prompt and the tokens written so far. An action is the next token, or REWRITE: "teacher, write this".
    Every own token pays the teacher's log-probability of it; a rewrite has a price. What stands is never undone. The
    environment does not know the student: any agent that speaks Gymnasium can be plugged in.

    ## Action Space
    `Discrete(V + 1)`: a token id below V = `vocab_size`, or `REWRITE = V`.

    Made with `chunk=K` it is `MultiDiscrete([V + 1] * K)`: up to K actions a step, in order. A REWRITE or an end of the
    answer ends the row's chunk; what follows is ignored. Beyond the declared space a chunked `step` accepts fewer than
    K columns. With any K it accepts -1 as padding; a row of padding alone does nothing.

    ## Observation Space
    `Box(-1, V - 1, (T,), int64)`: the ids of the prompt and of the answer so far, padded on the right with -1;
    T = `max_prompt_length + max_new_tokens`.

    ## Rewards
    | action | reward, nats |
    | --- | --- |
    | token a | `max(log p_T(a given s), log_prob_floor)` |
    | REWRITE | `-rewrite_cost`, once for the whole span |
    | the last of an answer | additionally `task_reward` times the grade of the answer |

    A chunk pays the sum; its parts are in `info["token_rewards"]`.

    ## Starting State
    A prompt of the split, drawn by the episode's key, or given: `reset(options={"prompts": [...]})`, a `Prompt` or a
    sequence of ids for each row that is reset. `options={"reset_mask": bool[n]}` resets some rows only.
    `options={"episode_keys": uint64[...]}` sets the keys, one for each row that is reset; otherwise they follow from
    the row's seed (`seed + i`) and the number of its episode.

    ## Episode End
    Terminated when the end token is written, by whomever; truncated when an answer has `max_new_tokens` tokens.

    ## Info
    | key | shape | meaning |
    | --- | --- | --- |
    | `teacher_log_probs` | float32 [n, V] | the teacher at the new state (only with `chunk=1`, not at an end) |
    | `tokens` | int64 [n, W] | what was executed, padded with -1; W is `chunk`, or `max_new_tokens` with span `step` |
    | `rewritten` | bool [n, W] | by the teacher |
    | `token_rewards` | float64 [n, W] | the reward's parts, without the task's; 0 at padding |
    | `floored` | int64 [n] | own tokens of this step whose reward is `log_prob_floor` |
    | `grade` | float64 [n] | at the end of a graded task's answer |

    each with its mask under `_key`, as Gymnasium has it. `teacher_log_probs` is privileged: a policy does not see it.

    ## Arguments
    Args:
        num_envs: n, the number of rows.
        task: `categorical`, `sums`, `instruct`, `gsm8k`, `math`, `aime`, `svamp`, `text`, or a `Task`.
        teacher: a name or path for `load_model`, or a `TokenModel` (not with `gym.make`, which copies its arguments).
        split: which of the task's prompts are drawn: train, validation, test or ood.
        task_kwargs: arguments of the task.
        teacher_kwargs: arguments of `load_model`.
        max_new_tokens: the horizon; the task's default if None.
        rewrite: how the teacher writes: `sample`, `nucleus` (the smallest set with mass `rewrite_top_p`) or `argmax`.
        rewrite_top_p: mass of the nucleus.
        rewrite_span: how much it writes: one `token`, or the rest of the reasoning `step` (up to and including a token
            that ends a step, the end token, or the horizon).
        rewrite_cost: price of a rewrite in nats.
        log_prob_floor: lowest reward of an own token in nats.
        task_reward: weight of the grade at the end.
        chunk: K, the largest number of actions in a step.
        reveal_teacher: whether `info` has `teacher_log_probs`.
        autoreset_mode: NEXT_STEP, SAME_STEP or DISABLED, as Gymnasium defines them.
        render_mode: None or `ansi`.

    ## Looking ahead
    `lookahead(tokens)` tells what the teacher thinks along a draft, in one pass and without changing the state; a
    `step` along the same draft then costs no pass of its own.

    ## Version History
    * v0: initial version.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012 (as in gymnasium.Env)

    def __init__(
        self,
        num_envs: int = 1,
        task: str | Task = "categorical",
        teacher: str | TokenModel = "markov",
        split: Split = "train",
        task_kwargs: dict[str, Any] | None = None,
        teacher_kwargs: dict[str, Any] | None = None,
        max_new_tokens: int | None = None,
        rewrite: RewriteDraw = "sample",
        rewrite_top_p: float = 0.9,
        rewrite_span: RewriteSpan = "token",
        rewrite_cost: float = 1.0,
        log_prob_floor: float = -100.0,
        task_reward: float = 0.0,
        chunk: int = 1,
        reveal_teacher: bool = True,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        self._arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.task = make_task(task, **(task_kwargs or {})) if isinstance(task, str) else task
        vocab_size = self.task.vocab_size
        live_teacher = self._load_teacher()
        if live_teacher.vocab_size != vocab_size:
            raise ValueError(
                f"teacher: {teacher!r} has {live_teacher.vocab_size} token ids, the task has {vocab_size}; "
                "they have to share one vocabulary"
            )
        _check_choice("split", split, SPLITS)
        _check_choice("rewrite", rewrite, ("sample", "nucleus", "argmax"))
        _check_choice("rewrite_span", rewrite_span, ("token", "step"))
        if render_mode is not None:
            _check_choice("render_mode", render_mode, tuple(self.metadata["render_modes"]))
        if not isinstance(autoreset_mode, AutoresetMode):
            _check_choice("autoreset_mode", autoreset_mode, tuple(mode.value for mode in AutoresetMode))
        if not 0 < rewrite_top_p <= 1:
            raise ValueError(f"rewrite_top_p: {rewrite_top_p} is not in (0, 1]")
        if chunk < 1 or num_envs < 1:
            raise ValueError(f"chunk and num_envs: {chunk} and {num_envs}; both have to be at least 1")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {max_new_tokens} is not at least 1")
        if not math.isfinite(task_reward):
            raise ValueError(f"task_reward: {task_reward} is not finite")
        if not rewrite_cost >= 0:
            raise ValueError(f"rewrite_cost: {rewrite_cost} is not a price; accepted: at least 0 nats")
        if not -math.inf < log_prob_floor < 0:
            raise ValueError(f"log_prob_floor: {log_prob_floor} is not below 0, as log-probabilities are, and finite")
        self.num_envs = num_envs
        self.split: Split = split
        self.max_new_tokens = max_new_tokens or self.task.max_new_tokens
        self.rewrite: RewriteDraw = rewrite
        self.rewrite_top_p = rewrite_top_p
        self.rewrite_span: RewriteSpan = rewrite_span
        self.rewrite_cost = float(rewrite_cost)
        self.log_prob_floor = float(log_prob_floor)
        self.task_reward = float(task_reward)
        self.chunk = chunk
        self.reveal_teacher = reveal_teacher
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}

        self.prompts = self.task.prompts(split)
        if not self.prompts:
            raise ValueError(f"split: the task has no prompts in {split!r}")
        every_split = (p for s in ("train", "validation", "test", "ood") for p in self.task.prompts(s))
        self.max_prompt_length = max(len(p.ids) for p in every_split)
        context = getattr(live_teacher, "max_length", None)
        if context is not None and self.max_prompt_length + self.max_new_tokens > context:
            raise ValueError(
                f"max_new_tokens: a prompt of {self.max_prompt_length} tokens and {self.max_new_tokens} new ones do "
                f"not fit into the teacher's context of {context}; shorten the prompts or lower max_new_tokens"
            )
        self.vocab_size = vocab_size
        self.rewrite_action = vocab_size
        length = self.max_prompt_length + self.max_new_tokens
        self.single_observation_space = gym.spaces.Box(PAD, vocab_size - 1, (length,), np.int64)
        self.single_action_space: gym.Space[Any] = (
            gym.spaces.Discrete(vocab_size + 1) if chunk == 1 else gym.spaces.MultiDiscrete([vocab_size + 1] * chunk)
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        n = num_envs
        self._width = chunk if rewrite_span == "token" else self.max_new_tokens
        self._observation = np.full((n, length), PAD, np.int64)
        self._rewritten = np.zeros((n, length), np.bool_)
        self._objects, self._flat = _as_array(self.prompts), _flatten(self.prompts)
        self._prompts = np.full(n, self.prompts[0], object)
        self._prompt_lengths = np.zeros(n, np.int64)
        self._lengths = np.zeros(n, np.int64)  # tokens of the answer
        self._seeds = np.zeros(n, np.uint64)
        self._episodes = np.zeros(n, np.int64)
        self._keys = np.zeros(n, np.uint64)
        self._ended = np.ones(n, np.bool_)
        self._started = False
        self._scorer = TeacherScorer(live_teacher, n, vocab_size)
        self._trace: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any], Tensor]] = []  # row, position, column, log p

    @property
    def teacher(self) -> TokenModel:
        """The teacher; its rows are the environment's own."""
        return self._scorer.teacher

    @property
    def teacher_top_k(self) -> int:
        """How many ids of each distribution the teacher tells; 0: all, as any but a served one does."""
        return getattr(self._scorer.teacher, "top_k", 0)

    @property
    def teacher_usage(self) -> TeacherUsage:
        """What the teacher has been asked for so far."""
        return self._scorer.usage

    def _load_teacher(self) -> TokenModel:
        teacher = self._arguments["teacher"]
        if isinstance(teacher, str):
            return load_model(teacher, **(self._arguments["teacher_kwargs"] or {}))
        return teacher.fork() if hasattr(teacher, "fork") else teacher  # rows of its own

    # ------------------------------------------------------------------ Gymnasium's face

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        options = options or {}
        super().reset(seed=seed if isinstance(seed, int) else None)
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, np.bool_)))
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(f"reset_mask: a bool array of shape ({self.num_envs},) with a true value is expected")
        if not self._started and not mask.all():
            raise ValueError("reset_mask: the first reset has to be of all rows")
        self._seed_rows(seed, mask)
        self._begin(np.flatnonzero(mask), options.get("prompts"), options.get("episode_keys"))
        return self._observation.copy(), self._info(mask)

    def step(
        self, actions: Any
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        if not self._started:
            raise gym.error.ResetNeeded("step: call reset before step")
        actions = self._check_actions(actions)
        begin_anew = np.zeros(self.num_envs, np.bool_)
        if self._ended.any():
            if self.autoreset_mode == AutoresetMode.NEXT_STEP:
                begin_anew = self._ended.copy()
                actions = np.where(begin_anew[:, None], PAD, actions)
            elif (actions[self._ended] != PAD).any():
                raise gym.error.ResetNeeded(
                    f"step: the answers of rows {np.flatnonzero(self._ended).tolist()} have ended; reset them, or give "
                    "them -1"
                )
        acting = ~self._ended
        executed = self._execute(actions)
        ended = acting & self._ended
        terminated = ended & (self._last_tokens() == self.task.eos_token_id)
        truncated = ended & ~terminated
        rewards = executed["token_rewards"].sum(1)
        grades = self._grade(ended)
        if self.task_reward and ended.any():
            rewards = rewards + self.task_reward * grades
        if ended.any():
            self._scorer.drop(self._ended)
        executed["grade"] = grades
        if self.autoreset_mode == AutoresetMode.SAME_STEP and ended.any():
            info = self._end_and_begin(ended, executed)
        else:
            if begin_anew.any():
                self._begin(np.flatnonzero(begin_anew), None, None)
            info = self._info(np.ones(self.num_envs, np.bool_), acting, ended, executed)
        return self._observation.copy(), rewards, terminated, truncated, info

    def lookahead(self, tokens: Tensor) -> Tensor:
        """The teacher along a draft, in one pass; the state of the environment does not change.

        Args:
            tokens: int64 [n, K], drafted tokens from the current state on, ragged with -1; K may be 0.

        Returns:
            log p, [n, K + 1, V]; row j is the state after j drafted tokens. Places after padding, and rows whose answer
            has ended, hold no meaning. The environment keeps this tensor: it is to be read, not written to.
        """
        if not self._started:
            raise gym.error.ResetNeeded("lookahead: call reset before lookahead")
        n, drafted = tokens.shape
        ids = tokens.numpy()
        if (
            n != self.num_envs
            or ids.dtype.kind != "i"
            or (drafted and not PAD <= ids.min() <= ids.max() < self.vocab_size)
            or ((ids[:, :-1] == PAD) & (ids[:, 1:] != PAD)).any()
        ):
            raise ValueError(
                f"tokens: accepted: [{self.num_envs}, K], ids below {self.vocab_size}, padded with {PAD} on the right"
            )
        return self._look(tokens)

    def _look(self, tokens: Tensor) -> Tensor:
        live = ~self._ended
        self._scorer.rewind(self._lengths, live)
        start, stop = self._prompt_lengths + self._scorer.read, self._prompt_lengths + self._lengths
        unread = slice_rows(self._observation, start, stop)  # committed tokens, [n, w]
        return self._scorer.score(unread, tokens, live)

    def executed_log_probs(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Tensor]]:
        """The teacher at every state at which the last `step` executed a token, none of them computed anew.

        Yields:
            rows int64 [m], positions in the answer int64 [m], log p [m, V]; few states of a large vocabulary at a time.
        """
        size = max(1, _PIECE // self.vocab_size)
        for row, position, column, log_probs in self._trace:
            flat = log_probs.dim() == 2  # the teacher's own draws come as [m, V], an agent's chunk as [n, k, V]
            for begin in range(0, len(row), size):
                part = slice(begin, begin + size)
                at = torch.from_numpy(row[part]), torch.from_numpy(column[part])
                yield row[part], position[part], log_probs[part] if flat else log_probs[at]

    def release(self) -> None:
        """Give up the distributions that the last look-ahead and the last step are remembered by, which of a large
        vocabulary are large; nothing else changes."""
        self._trace = []
        self._scorer.rewind(self._lengths, ~self._ended)

    def render(self) -> tuple[str, ...] | None:
        """The answers so far, one text a row; what the teacher wrote is red."""
        if self.render_mode != "ansi":
            return None
        return tuple(self.text(row) for row in range(self.num_envs))

    def text(self, row: int) -> str:
        """Prompt (dim) and answer of a row, with ANSI colours; what the teacher wrote is red."""
        start, end = self._prompt_lengths[row], self._prompt_lengths[row] + self._lengths[row]
        return colour_answer(
            self.task,
            self._prompts[row],
            self._observation[row, start:end].tolist(),
            self._rewritten[row, start:end].tolist(),
        )

    def close_extras(self, **kwargs: Any) -> None:
        self.release()

    # ------------------------------------------------------------------ pickling: by name and state, never by cache

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_scorer", "_trace")}
        return kept | {"teacher_usage": self.teacher_usage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        use = state.pop("teacher_usage")
        self.__dict__.update(state)
        self._trace = []
        self._scorer = TeacherScorer(self._load_teacher(), self.num_envs, self.vocab_size)
        if self._started:
            self._scorer.start([p.ids for p in self._prompts])
        self._scorer.usage = use

    # ------------------------------------------------------------------ the decision process

    def _execute(self, actions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """GateState out actions [n, k] (-1 pads) and say what happened, [n, W] each."""
        n, k = actions.shape
        own = (actions >= 0) & (actions < self.vocab_size)
        # a chunk ends with its first action that is no token, after an end token, or at the horizon
        own = np.logical_and.accumulate(own, 1)
        own[:, 1:] &= np.logical_and.accumulate(actions[:, :-1] != self.task.eos_token_id, 1)
        own &= np.arange(k) < (self.max_new_tokens - self._lengths)[:, None]
        written = own.sum(1)
        at = np.minimum(written, k - 1)
        rewrite = (written < k) & (actions[np.arange(n), at] == self.rewrite_action)
        ends = (written > 0) & (actions[np.arange(n), np.maximum(written - 1, 0)] == self.task.eos_token_id)
        rewrite &= ~ends & (self._lengths + written < self.max_new_tokens) & ~self._ended

        states = written + rewrite  # of each row; what follows its last one, an end above all, need not be looked at
        along = np.where(np.arange(k) < (states - 1)[:, None], actions, PAD)
        log_probs = self._along(along, int(states.max(initial=0)))  # [n, <= k, V]
        width = log_probs.shape[1]
        own, chosen = own[:, :width], actions[:, :width]
        tokens = np.full((n, self._width), PAD, np.int64)
        rewards = np.zeros((n, self._width))
        rewritten = np.zeros((n, self._width), np.bool_)
        paid = log_probs.gather(-1, torch.from_numpy(np.where(own, chosen, 0))[..., None])[..., 0].double().numpy()
        tokens[:, :width] = np.where(own, chosen, PAD)
        rewards[:, :width] = np.where(own, np.maximum(paid, self.log_prob_floor), 0.0)
        floored = (own & (paid <= self.log_prob_floor)).sum(1)
        row, column = np.nonzero(own)
        self._trace = [(row, self._lengths[row] + column, column, log_probs)]
        rows = np.flatnonzero(rewrite)
        at = written[rows]
        if len(rows):
            current = log_probs[torch.from_numpy(rows), torch.from_numpy(at)]
            tokens[rows, at], rewritten[rows, at] = self._teacher_draws(rows, self._lengths[rows] + at, current), True
            rewards[rows, at] -= self.rewrite_cost
        self._append(tokens[:, :width], states, rewritten)
        if self.rewrite_span == "step":
            self._teacher_goes_on(rows, at, tokens, rewritten)
        if self.chunk == 1 and self.reveal_teacher:
            self._look(_NOTHING.expand(n, 0))
        return {"tokens": tokens, "rewritten": rewritten, "token_rewards": rewards, "floored": floored}

    def _along(self, own: NDArray[np.int64], states: int) -> Tensor:
        """log p at the first `states` states along the own tokens of a chunk, from the last look-ahead if it serves."""
        if states == 0:
            return self._scorer.log_probs[:, None][:, :0]
        if states == 1 and not self._behind():
            return self._scorer.log_probs[:, None]
        needed = own[:, : states - 1]
        log_probs = self._scorer.cached(needed)
        if log_probs is None:
            log_probs = self._look(torch.from_numpy(np.ascontiguousarray(needed)))
        return log_probs[:, :states]

    def _behind(self) -> bool:
        """Whether some tokens that stand have not been read by the teacher."""
        return bool(((self._scorer.read != self._lengths) & ~self._ended).any())

    def _append(self, tokens: NDArray[np.int64], counts: NDArray[np.int64], rewritten: NDArray[np.bool_]) -> None:
        """Commit the first `counts[i]` of row i's tokens [n, k]; the teacher forgets what was not committed."""
        rows, columns = np.nonzero(np.arange(tokens.shape[1]) < counts[:, None])
        if len(rows) == 0:
            return
        place = (self._prompt_lengths + self._lengths)[rows] + columns
        self._observation[rows, place] = tokens[rows, columns]
        self._rewritten[rows, place] = rewritten[rows, columns]
        self._scorer.commit(tokens, counts, self._lengths, ~self._ended)
        self._lengths = self._lengths + counts
        at_end = (self._last_tokens() == self.task.eos_token_id) | (self._lengths >= self.max_new_tokens)
        self._ended |= (counts > 0) & at_end

    def _last_tokens(self) -> NDArray[np.int64]:
        return self._observation[np.arange(self.num_envs), self._prompt_lengths + self._lengths - 1]

    def _teacher_draws(
        self, rows: NDArray[np.intp], positions: NDArray[np.int64], current: Tensor
    ) -> NDArray[np.int64]:
        """The teacher writes a token in `rows`, at these positions of their answers, from its log p there [m, V]."""
        self.teacher_usage.tokens += len(rows)
        self._trace.append((rows, positions, np.zeros_like(rows), current))
        return self._draw(current, uniform(self._keys[rows], positions, Purpose.TEACHER))

    def _teacher_goes_on(
        self,
        rows: NDArray[np.intp],
        columns: NDArray[np.int64],
        tokens: NDArray[np.int64],
        rewritten: NDArray[np.bool_],
    ) -> None:
        """In `rows`, whose last tokens are the teacher's and lie in `columns`, it writes the rest of the step."""
        stops = [*self.task.step_end_ids, self.task.eos_token_id]
        while True:
            goes_on = ~np.isin(tokens[rows, columns], stops) & (self._lengths[rows] < self.max_new_tokens)
            rows, columns = rows[goes_on], columns[goes_on] + 1
            if len(rows) == 0:
                return
            current = self._look(_NOTHING.expand(self.num_envs, 0))[torch.from_numpy(rows), 0]
            tokens[rows, columns] = self._teacher_draws(rows, self._lengths[rows], current)
            rewritten[rows, columns] = True
            block, counts = np.full((self.num_envs, 1), PAD), np.zeros(self.num_envs, np.int64)
            block[rows, 0], counts[rows] = tokens[rows, columns], 1
            self._append(block, counts, np.ones_like(block, np.bool_))

    def _draw(self, log_probs: Tensor, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """The teacher's draw from [m, V]: sample, nucleus or argmax; only of ids that it tells."""
        if self.rewrite == "argmax":
            return log_probs.argmax(-1).numpy()
        if self.teacher_top_k:
            told, ids = log_probs.topk(self.teacher_top_k, -1)
            log_probs = torch.full_like(log_probs, -torch.inf).scatter(-1, ids, told)
        if self.rewrite == "nucleus":
            ordered, ids = log_probs.double().sort(-1, descending=True)
            before = ordered.exp().cumsum(-1) - ordered.exp()
            kept = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, ids, before < self.rewrite_top_p)
            log_probs = log_probs.masked_fill(~kept, -torch.inf)
        return inverse_cdf(log_probs, uniforms).numpy()

    # ------------------------------------------------------------------ beginnings and ends

    def _seed_rows(self, seed: int | Sequence[int | None] | None, mask: NDArray[np.bool_]) -> None:
        seeds: Sequence[int | None]
        if seed is None:
            seeds = [None] * self.num_envs
        else:
            seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed: {len(seeds)} seeds for {self.num_envs} rows")
        for row in np.flatnonzero(mask).tolist():
            value = seeds[row]
            if value is None and self._started:
                continue  # the row's stream goes on
            if value is not None and not 0 <= value < 2**64:
                raise ValueError(f"seed: {value}; accepted: 0 to 2**64 - 1")
            self._seeds[row] = int(self.np_random.integers(2**63)) if value is None else value
            self._episodes[row] = 0

    def _begin(self, rows: NDArray[np.intp], prompts: Sequence[Any] | None, keys: NDArray[np.uint64] | None) -> None:
        """Start the next episode of `rows`."""
        for name, given in (("prompts", prompts), ("episode_keys", keys)):
            if given is not None and len(given) != len(rows):
                raise ValueError(f"{name}: {len(given)} for {len(rows)} rows that are reset")
        if keys is None:
            keys = episode_keys(self._seeds[rows], self._episodes[rows])
        if prompts is None:
            index = (uniform(keys, 0, Purpose.PROMPT) * len(self.prompts)).astype(np.int64)
            chosen, (ids, starts, lengths) = self._objects[index], self._flat
            starts, lengths = starts[index], lengths[index]
        else:
            checked = [self._check_prompt(p) for p in prompts]
            chosen, (ids, starts, lengths) = _as_array(checked), _flatten(checked)
        self._keys[rows] = keys
        self._episodes[rows] += 1
        row, column = np.nonzero(np.arange(self.max_prompt_length) < lengths[:, None])
        self._observation[rows] = PAD
        self._observation[rows[row], column] = ids[starts[row] + column]
        self._rewritten[rows] = False
        self._prompts[rows] = chosen
        self._prompt_lengths[rows] = lengths
        self._lengths[rows] = 0
        everyone = len(rows) == self.num_envs
        self._scorer.start([p.ids for p in chosen], None if everyone else rows)
        self._ended[rows] = False
        self._started = True

    def _end_and_begin(self, ended: NDArray[np.bool_], executed: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """SAME_STEP: what ended goes to `final_obs` and `final_info`, and its rows begin anew."""
        final_info = self._info(ended, ended, ended, executed)
        final_obs = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(ended):
            final_obs[row] = self._observation[row].copy()
        self._begin(np.flatnonzero(ended), None, None)
        going_on = self._info(np.ones(self.num_envs, np.bool_), ~ended, np.zeros_like(ended), executed)
        return {
            "final_obs": final_obs,
            "_final_obs": ended.copy(),
            "final_info": final_info,
            "_final_info": ended.copy(),
            **going_on,
        }

    def _grade(self, ended: NDArray[np.bool_]) -> NDArray[np.float64]:
        grades = np.zeros(self.num_envs)
        if self.task.graded:
            for row in np.flatnonzero(ended):
                start = self._prompt_lengths[row]
                answer = self._observation[row, start : start + self._lengths[row]]
                grades[row] = self.task.grade(self._prompts[row], answer.tolist()).score
        return grades

    def _info(
        self,
        present: NDArray[np.bool_],
        acted: NDArray[np.bool_] | None = None,
        ended: NDArray[np.bool_] | None = None,
        executed: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, Any]:
        """Gymnasium's dict of arrays, each with its mask; a key without any value is absent."""
        info: dict[str, Any] = {}

        def put(key: str, values: NDArray[Any], mask: NDArray[np.bool_]) -> None:
            if mask.any():
                shape = (-1, *(1,) * (values.ndim - 1))
                zero = np.zeros((), values.dtype)
                info[key] = values.copy() if mask.all() else np.where(mask.reshape(shape), values, zero)
                info["_" + key] = mask.copy()

        if self.chunk == 1 and self.reveal_teacher:
            put("teacher_log_probs", self._scorer.log_probs.float().numpy(), present & ~self._ended)
        if acted is not None and executed is not None and ended is not None:
            present_and_acted = present & acted
            for key in ("tokens", "rewritten", "token_rewards", "floored"):
                put(key, executed[key], present_and_acted)
            if self.task.graded:
                put("grade", executed["grade"], present & ended)
        return info

    # ------------------------------------------------------------------ checks

    def _check_actions(self, actions: Any) -> NDArray[np.int64]:
        actions = np.asarray(actions)
        actions = actions[:, None] if self.chunk == 1 and actions.ndim == 1 else actions
        if actions.ndim != 2 or len(actions) != self.num_envs or not 1 <= actions.shape[1] <= self.chunk:
            raise ValueError(
                f"actions: shape {actions.shape}; accepted: ({self.num_envs}, k) with 1 <= k <= chunk = {self.chunk}"
            )
        if actions.dtype.kind not in "iu":
            raise ValueError(f"actions: {actions.dtype}; accepted: integers")
        if actions.min() < PAD or actions.max() > self.rewrite_action:
            raise ValueError(f"actions: outside [{PAD}, {self.rewrite_action}]")
        return actions.astype(np.int64)

    def _check_prompt(self, prompt: Any) -> Prompt:
        if not isinstance(prompt, Prompt):
            try:
                ids = tuple(operator.index(t) for t in prompt)
            except TypeError:
                raise ValueError(f"prompts: {prompt!r:.60}; accepted: a Prompt or a sequence of token ids") from None
            prompt = Prompt(ids, self.task.decode(ids))
        if len(prompt.ids) > self.max_prompt_length:
            raise ValueError(
                f"prompts: a prompt of {len(prompt.ids)} tokens; at most {self.max_prompt_length} fit the observation"
            )
        if any(not 0 <= t < self.vocab_size for t in prompt.ids):
            raise ValueError(f"prompts: a token id outside [0, {self.vocab_size - 1}]")
        return prompt


class DistillEnv(gym.Env[NDArray[np.int64], Any]):
    """The one-row view of `DistillVectorEnv`, whose docstring is the manual of both.

    Arguments are the same but for `num_envs` and `autoreset_mode`; `info` holds the row's values without masks, and
    `options` of `reset` are the same (lists and arrays of one element).
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012 (as in gymnasium.Env)

    def __init__(self, **kwargs: Any) -> None:
        self.batch = DistillVectorEnv(num_envs=1, autoreset_mode=AutoresetMode.DISABLED, **kwargs)
        self.render_mode = self.batch.render_mode
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        super().reset(seed=seed)
        observation, info = self.batch.reset(seed=seed, options=options)
        return observation[0], _first_row(info)

    def step(self, action: Any) -> tuple[NDArray[np.int64], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.batch.step(np.asarray(action)[None])
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), _first_row(info)

    def lookahead(self, tokens: Tensor) -> Tensor:
        """The teacher along a draft: int64 [K] -> [K + 1, V]; the state does not change."""
        return self.batch.lookahead(tokens[None])[0]

    def render(self) -> str | None:
        return self.batch.text(0) if self.render_mode == "ansi" else None


def colour_answer(task: Task, prompt: Prompt, tokens: Sequence[int], rewritten: Sequence[bool]) -> str:
    """Prompt (dim) and answer with ANSI colours; runs of tokens that the teacher wrote are red."""
    parts = [f"\x1b[2m{prompt.text}\x1b[0m"]
    start = 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or rewritten[i] != rewritten[start]:
            piece = task.decode(tokens[start:i])
            parts.append(f"\x1b[31m{piece}\x1b[0m" if rewritten[start] else piece)
            start = i
    return "".join(parts)


def _first_row(info: dict[str, Any]) -> dict[str, Any]:
    """Values of a batch of one, without masks; numbers as Python's."""
    row = {key: value[0] for key, value in info.items() if not key.startswith("_")}
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}


_NOTHING = torch.zeros(1, 0, dtype=torch.long)  # a draft of no tokens
_PIECE = 2**23  # log-probabilities that are copied at a time, so that a batch's are not in memory twice


def _as_array(prompts: Sequence[Prompt]) -> NDArray[Any]:
    array = np.empty(len(prompts), object)
    array[:] = prompts
    return array


def _flatten(prompts: Sequence[Prompt]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The ids of all prompts in a row, and where each begins and how long it is."""
    lengths = np.array([len(p.ids) for p in prompts], np.int64)
    ids = np.fromiter((t for p in prompts for t in p.ids), np.int64, int(lengths.sum()))
    return ids, lengths.cumsum() - lengths, lengths


def _check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: {value!r}; accepted: {', '.join(accepted)}")
