"""Token models: the one interface behind which teachers and students stand, and the names they are loaded by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ServerLostError(OSError):
    """A served model's server has not answered for as long as the run was willing to wait."""


class TokenModel(Protocol):
    """A batch of token sequences under one model: three verbs, for teacher and student alike.

    A model holds N rows. Each row is a prompt and the tokens generated after it. All answers are log-probabilities in
    nats, normalised over the `vocab_size` ids, in float32 (or float64 for a float64 model), without gradient. They come
    on the CPU, wherever the model computes: gates, environment and ledger work there.
    """

    vocab_size: int  # V
    eos_token_id: int

    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        """Begin rows anew. `rows=None` makes a new batch of `len(prompts)` rows; otherwise only the named rows of the
        present batch begin anew, the others are untouched.

        Returns:
            log p of the first token after each of `prompts`, [len(prompts), V].
        """

    def extend(self, tokens: Tensor) -> Tensor:
        """Append tokens to the rows: int64 [N, K], ragged on the right with -1; a row of -1 alone is untouched.

        Returns:
            log p of the token that follows each appended one, [N, K, V]. Places of padding hold no meaning.
        """

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        """Row i keeps its first `lengths[i]` generated tokens, at most those it has. -1 gives the row up: it costs
        nothing from then on and has to be started before it is extended."""


class TrainableModel(TokenModel, Protocol):
    """A token model that can be trained. A forward pass comes in two parts, so that a large vocabulary can be
    processed in chunks of positions: `features` once, `head` chunk by chunk."""

    def features(self, prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor) -> Tensor:
        """What `head` needs to know of the states at which the tokens of `mask` are chosen.

        Args:
            prompts: n prompts.
            tokens: int64 [n, T], the answers, padded on the right with -1.
            mask: bool [n, T]; m of them are set, all on tokens that are not padding.

        Returns:
            [m, ...] in row-major order of the mask; state t has seen the prompt and the tokens before t.
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
