"""Tabular token models: a finite automaton with a categorical distribution in every state, known exactly.

Following `next_state` from state 0 along a prompt and its tokens gives their state. If the student has a coarser
automaton than the teacher, several of the teacher's contexts share a state of the student.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class TabularModel(nn.Module):
    """A categorical distribution per state, as a trainable table of logits.

    Args:
        next_state: int64 [C, V], the state after state c and token v; every prompt begins in state 0.
        logits: [C, V].
        eos_token_id: the id that ends a completion.
    """

    next_state: Tensor
    contents = "logits"  # name of the table on disk

    def __init__(self, next_state: Tensor, logits: Tensor, eos_token_id: int) -> None:
        super().__init__()
        self.register_buffer("next_state", next_state.long())
        self.table = nn.Parameter(logits.clone())
        self.vocab_size = next_state.shape[1]
        self.eos_token_id = eos_token_id
        self._prompt_states: dict[tuple[int, ...], int] = {}
        self._clear()

    @property
    def device(self) -> torch.device:
        """Where log-probabilities are returned."""
        return self.table.device

    def log_table(self) -> Tensor:
        """log p of every token in every state, [C, V]."""
        return self.table.log_softmax(-1)

    def walk(self, prompt: Sequence[int]) -> int:
        """The state after a prompt."""
        prompt = tuple(prompt)
        if prompt not in self._prompt_states:
            state = 0
            for token in prompt:
                state = int(self.next_state[state, token])
            self._prompt_states[prompt] = state
        return self._prompt_states[prompt]

    def _walk_all(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        try:
            states = [self._prompt_states[p] for p in prompts]  # type: ignore[index]
        except (KeyError, TypeError):  # a prompt that is new, or not a tuple
            states = [self.walk(p) for p in prompts]
        return torch.from_numpy(np.array(states, np.int64))

    def fork(self) -> TabularModel:
        """The same weights with a batch of its own, still empty."""
        other = object.__new__(type(self))
        other.__dict__ = dict(self.__dict__)
        other._clear()
        return other

    def _clear(self) -> None:
        self._states = torch.zeros(0, 1, dtype=torch.long)  # [N, T + 1], the state after each generated token
        self._lengths = torch.zeros(0, dtype=torch.long)

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        states = self._walk_all(prompts)
        if rows is None:
            self._states = states[:, None]
            self._lengths = torch.zeros(len(prompts), dtype=torch.long)
        else:
            index = torch.from_numpy(np.asarray(rows))
            self._states[index, 0] = states
            self._lengths[index] = 0
        return F.embedding(states, self.log_table())

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        n, k = tokens.shape
        needed = int(self._lengths.max()) + k + 1
        if needed > self._states.shape[1]:
            grow = self._states.new_zeros(n, max(needed, 2 * self._states.shape[1]) - self._states.shape[1])
            self._states = torch.cat([self._states, grow], 1)
        lengths, next_state = self._lengths, self.next_state.flatten()
        state = self._states.gather(1, lengths.clamp(min=0)[:, None])[:, 0]
        visited = []
        for column in tokens.unbind(1):
            valid = column >= 0
            state = torch.where(valid, next_state.take(state * self.vocab_size + column.clamp(min=0)), state)
            lengths = lengths + valid
            self._states.scatter_(1, lengths.clamp(min=0)[:, None], state[:, None])
            visited.append(state)
        self._lengths = lengths
        return F.embedding(torch.stack(visited, 1), self.log_table())

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        self._lengths = torch.minimum(self._lengths, torch.as_tensor(lengths))

    def features(self, prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor) -> Tensor:
        state = self._walk_all(prompts)
        states = []
        for column in tokens.unbind(1):
            states.append(state)
            state = torch.where(column >= 0, self.next_state[state, column.clamp(min=0)], state)
        return torch.stack(states, 1)[mask]

    def head(self, features: Tensor) -> Tensor:
        return self.log_table()[features]

    def save_pretrained(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        tensors = {"next_state": self.next_state, self.contents: self.table.detach()}
        save_file(tensors | {"eos_token_id": torch.tensor(self.eos_token_id)}, Path(path) / "table.safetensors")

    @classmethod
    def load(cls, path: str | Path) -> TabularModel:
        """Read a folder that `save_pretrained` wrote, of either kind of table.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        try:
            tensors = load_file(Path(path) / "table.safetensors")
            kind = OneModeModel if OneModeModel.contents in tensors else TabularModel
            model = kind.__new__(kind)
            TabularModel.__init__(model, tensors["next_state"], tensors[kind.contents], int(tensors["eos_token_id"]))
            states, ids = model.next_state.shape
            if not 0 <= int(model.next_state.min()) <= int(model.next_state.max()) < states:
                raise ValueError(f"a next state is outside 0 to {states - 1}")
            if model.log_table().shape != (states, ids) or not 0 <= model.eos_token_id < ids:
                raise ValueError(f"its tensors are not of one table of {states} states and {ids} tokens")
            if bool(model.log_table().isnan().any()):
                raise ValueError("its probabilities are NaN")
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"path: {str(path)!r} has no readable table ({reason}); expected table.safetensors"
            ) from None
        return model


class OneModeModel(TabularModel):
    """A student with one mode: in every state a Gaussian over the token index, so two numbers per state.

    p(v | c) is proportional to exp(-(v - mean_c)^2 / (2 scale_c^2)); the end token has no mass.
    """

    contents = "mean_and_log_scale"

    def __init__(self, next_state: Tensor, mean: Tensor, scale: Tensor, eos_token_id: int) -> None:
        super().__init__(next_state, torch.zeros(0), eos_token_id)
        self.table = nn.Parameter(torch.stack([mean, scale.log()], -1))  # [C, 2]

    def log_table(self) -> Tensor:
        mean, log_scale = self.table.unbind(-1)
        index = torch.arange(self.vocab_size, dtype=mean.dtype)
        logits = -0.5 * ((index - mean[:, None]) / log_scale.exp()[:, None]) ** 2  # [C, V]
        return logits.masked_fill(index == self.eos_token_id, -torch.inf).log_softmax(-1)


def suffix_automaton(vocab_size: int, order: int) -> Tensor:
    """Next states [C, V] of the automaton whose state is the last `order` tokens: one state for order 0, V + 1 for
    order 1 (state 0: no token yet), V^2 + V + 1 for order 2, shorter histories first."""
    histories = [h for length in range(order + 1) for h in itertools.product(range(vocab_size), repeat=length)]
    index = {history: i for i, history in enumerate(histories)}
    followers = [[index[(*h, v)[-order:] if order else ()] for v in range(vocab_size)] for h in histories]
    return torch.tensor(followers)


def markov(vocab_size: int = 6, order: int = 1, seed: int = 0, sharpness: float = 2.0) -> TabularModel:
    """A random Markov model: normal logits times `sharpness`, in float64. The last id is the end token."""
    generator = torch.Generator().manual_seed(seed)
    next_state = suffix_automaton(vocab_size, order)
    logits = sharpness * torch.randn(next_state.shape, generator=generator, dtype=torch.float64)
    return TabularModel(next_state, logits, vocab_size - 1)


def uniform(vocab_size: int, order: int = 1) -> TabularModel:
    """A student with equal logits everywhere. With a lower order than the teacher's it is aliased."""
    next_state = suffix_automaton(vocab_size, order)
    return TabularModel(next_state, torch.zeros(next_state.shape, dtype=torch.float64), vocab_size - 1)


def two_modes(
    vocab_size: int = 41, modes: tuple[float, float] = (0.25, 0.75), weights: tuple[float, float] = (0.6, 0.4)
) -> TabularModel:
    """The teacher of the textbook picture: one state, a mixture of two Gaussians over the token index.

    Args:
        vocab_size: V; the last id, the end token, has no mass.
        modes: where the modes are, as shares of the axis.
        weights: their masses.
    """
    x = torch.arange(vocab_size - 1, dtype=torch.float64)
    density = torch.zeros(vocab_size, dtype=torch.float64)
    for mode, weight in zip(modes, weights, strict=True):
        bump = torch.exp(-0.5 * ((x - mode * (vocab_size - 2)) / (0.05 * vocab_size)) ** 2)
        density[:-1] += weight * bump / bump.sum()
    return TabularModel(suffix_automaton(vocab_size, 0), density.clamp(min=1e-12).log()[None], vocab_size - 1)


def one_mode(vocab_size: int = 41, mean: float = 0.5, scale: float = 0.2) -> OneModeModel:
    """The student of the textbook picture, its mean and scale as shares of the axis."""
    mean_t = torch.tensor([mean * (vocab_size - 2)], dtype=torch.float64)
    scale_t = torch.tensor([scale * vocab_size], dtype=torch.float64)
    return OneModeModel(suffix_automaton(vocab_size, 0), mean_t, scale_t, vocab_size - 1)
