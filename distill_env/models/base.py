"""Token models: the interface of teachers and students."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distill_env.ragged import PAD

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from distill_env.tasks.base import Prompt


class ServerLostError(OSError):
    """A model's server has not responded for as long as the run was willing to wait."""


class TokenModel(Protocol):
    """A batch of token sequences under one model, teacher or student.

    A model holds N rows. Each row is a prompt and the tokens generated after it. All methods return log-probabilities
    in nats, normalised over the `vocab_size` ids, in float32 (float64 for a float64 model), without gradient. They
    stay on the model's device. Token ids come from the host, and only they and numbers per token return there.

    A model may take tokens of its device as well: `extend(tokens, counts)` appends the first `counts[i]` tokens of row
    i, whatever follows them, and `counts` [N] is known on the host. Then the host need not wait for the tokens.
    """

    vocab_size: int  # V
    eos_token_id: int

    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        """Start rows with new prompts. `rows=None` makes a new batch of `len(prompts)` rows; otherwise only these rows
        of the batch start again, and the others do not change.

        Returns:
            log p of the first token after each of `prompts`, [len(prompts), V].
        """

    def extend(self, tokens: Tensor) -> Tensor:
        """Append tokens to the rows: int64 [N, K], padded on the right with -1; a row of -1 only does not change.

        Returns:
            log p of the token after each appended one, [N, K, V]; values at padding have no meaning.
        """

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        """Cut row i to its first `lengths[i]` generated tokens. -1 gives the row up: it costs nothing from then on, and
        has to be started before it is extended."""


def start_teacher(teacher: TokenModel, prompts: Sequence[Prompt], rows: Sequence[int] | None = None) -> Tensor:
    """`teacher.start` with what the teacher reads of these prompts; each by the one that it names, if there are
    several."""
    ids = [p.ids_for_teacher for p in prompts]
    names = ([p.teacher for p in prompts],) if hasattr(teacher, "teachers") else ()
    return teacher.start(ids, rows, *names)


def extend(model: TokenModel, tokens: Tensor, counts: NDArray[np.int64]) -> Tensor:
    """`model.extend` by the first `counts[i]` of row i's tokens, [N, K] on any device."""
    import torch

    if "counts" in inspect.signature(model.extend).parameters:
        return model.extend(tokens, counts)  # type: ignore[call-arg]
    exists = torch.arange(tokens.shape[1]) < torch.from_numpy(counts)[:, None]
    return model.extend(torch.where(exists, tokens.cpu(), PAD))


def ids_of(model: Any) -> dict[str, Any]:
    """The ids of a model, as the arguments of `CausalLM` that give another one the same."""
    absent = list(getattr(model, "absent_ids", ()))
    return {"vocab_size": model.vocab_size, "eos_token_id": model.eos_token_id, "absent_ids": absent}


class TrainableModel(TokenModel, Protocol):
    """A token model that can be trained. Its forward pass has two parts, so that a large vocabulary can be processed in
    chunks of positions: `features` once, `head` for each chunk."""

    def features(self, prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor) -> Tensor:
        """The input of `head` for the states in which the tokens of `mask` are chosen.

        Args:
            prompts: n prompts.
            tokens: int64 [n, T], the completions, padded on the right with -1.
            mask: bool [n, T]; m of them are True, none at padding.

        Returns:
            [m, ...] in row-major order of the mask; state t follows the prompt and the tokens before t.
        """

    def head(self, features: Tensor) -> Tensor:
        """log p at these states, differentiable, [m, ...] -> [m, V]."""

    def fork(self) -> TrainableModel:
        """The same weights with a batch of its own, still empty."""

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights (safetensors) and configuration into a folder from which the model can be loaded."""
