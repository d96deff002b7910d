"""Several teachers: a row is read by the one that its prompt names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_env.models.base import extend
from distill_env.ragged import PAD
from distill_env.transfer import upload

EVERYTHING = 2**40  # tokens, more than any row has


class RoutedModel:
    """A `TokenModel` made of several over the same ids. Each reads its own rows only.

    Every model has a place for every row. Places of rows that belong to others are given up, so that they cost one
    token when a batch is made, and nothing afterwards.

    Args:
        teachers: by name; their rows belong to this model alone.

    Attributes:
        teachers: the same.
        max_length: the least context of all.
        top_k: the least number of ids that a served one returns; 0 if all distributions are whole.

    Raises:
        ValueError: for models with other ids.
    """

    def __init__(self, teachers: Mapping[str, Any]) -> None:
        self.teachers = dict(teachers)
        ids = {name: (model.vocab_size, model.eos_token_id) for name, model in self.teachers.items()}
        if len(set(ids.values())) > 1:
            raise ValueError(f"teacher: numbers of ids and end tokens {ids}; expected the same for all")
        self.vocab_size, self.eos_token_id = next(iter(ids.values()))
        every = self.teachers.values()
        self.absent_ids = next((model.absent_ids for model in every if hasattr(model, "absent_ids")), ())
        self.device = next((model.device for model in every if hasattr(model, "device")), torch.device("cpu"))
        self.max_length = min((n for m in every if (n := getattr(m, "max_length", None))), default=None)
        self.top_k = min((k for m in every if (k := getattr(m, "top_k", 0))), default=0)
        self._dtype = reduce(torch.promote_types, (p.dtype for p in self.parameters()), torch.float32)
        self._clear(0)

    def _clear(self, n: int) -> None:
        self._names = np.full(n, "", object)  # the model of each row; "" for none
        self._made: set[str] = set()  # models with a batch of so many rows

    def fork(self) -> RoutedModel:
        """The same weights with batches of their own, still empty."""
        twin = copy.copy(self)
        twin.teachers = {name: model.fork() for name, model in self.teachers.items()}
        twin._clear(0)
        return twin

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those of all models."""
        return (parameter for model in self.teachers.values() for parameter in model.parameters())

    def start(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None, names: Sequence[str] = ()
    ) -> Tensor:
        """See `TokenModel.start`.

        Args:
            prompts, rows: as there.
            names: of the model that reads each prompt.

        Raises:
            ValueError: for a name without a model, or other than one name for each prompt.
        """
        if len(names) != len(prompts) or not {*names} <= self.teachers.keys():
            known = ", ".join(self.teachers)
            raise ValueError(f"teacher: {', '.join(map(repr, names)) or 'no names'}; expected {known} for each prompt")
        places = np.arange(len(prompts)) if rows is None else np.asarray(rows, np.int64)
        if rows is None and len(prompts) != len(self._names):
            self._clear(len(prompts))
        before = self._names.copy()
        self._names[places] = names
        for name in self._made:
            if ((before == name) & (self._names != name)).any():  # a row that is another's now
                stay = (before == name) & (self._names == name)
                self.teachers[name].rewind(torch.from_numpy(np.where(stay, EVERYTHING, PAD)))
        parts = {}
        for name in self.teachers:
            chosen = np.flatnonzero([n == name for n in names])
            if len(chosen):
                parts[name] = chosen, self._start(name, [prompts[i] for i in chosen.tolist()], places[chosen])
        return self._together((len(prompts),), parts)

    def _start(self, name: str, prompts: Sequence[Sequence[int]], rows: Any) -> Tensor:
        model = self.teachers[name]
        if name in self._made:
            return model.start(prompts, rows.tolist())
        everything: list[Sequence[int]] = [(self.eos_token_id,)] * len(self._names)
        for row, prompt in zip(rows, prompts, strict=True):
            everything[row] = prompt
        self._made.add(name)
        log_probs = model.start(everything)
        model.rewind(torch.from_numpy(np.where(np.isin(np.arange(len(everything)), rows), 0, PAD)))
        return log_probs[upload(rows, log_probs.device)]

    def extend(self, tokens: Tensor, counts: NDArray[np.int64] | None = None) -> Tensor:
        """See `TokenModel.extend`."""
        counts = (tokens.cpu() >= 0).sum(1).numpy() if counts is None else counts
        parts = {}
        for name in self._made:
            own = np.where(self._names == name, counts, 0)
            rows = np.flatnonzero(own)
            if len(rows):
                after = extend(self.teachers[name], tokens, own)
                parts[name] = rows, after[upload(rows, after.device)]
        return self._together(tuple(tokens.shape), parts)

    def reserve(self, tokens: int) -> None:
        """Expect rows of up to so many tokens."""
        for model in self.teachers.values():
            if hasattr(model, "reserve"):
                model.reserve(tokens)

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        """See `TokenModel.rewind`."""
        keep = torch.as_tensor(lengths).cpu().numpy()
        for name in self._made:
            self.teachers[name].rewind(torch.from_numpy(np.where(self._names == name, keep, PAD)))
        self._names[keep < 0] = ""

    def _together(self, shape: tuple[int, ...], parts: Mapping[str, tuple[Any, Tensor]]) -> Tensor:
        """What the models returned for some rows each, in one tensor [*shape, V]."""
        out = torch.zeros(*shape, self.vocab_size, dtype=self._dtype, device=self.device)
        for rows, part in parts.values():
            out[upload(rows, self.device)] = upload(part, self.device).to(self._dtype)
        return out
