"""Any decoder-only Transformers language model as a token model, batched, with a key/value cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from distill_env.models import inplace_grad
from distill_env.models.adapters import is_adapted, save_adapter, save_merged
from distill_env.models.batching import length_groups
from distill_env.models.compatibility import (
    Limit,
    check_forward_passes,
    decoder_config,
    least,
    length_limit,
    sliding_windows,
    windows_are_exact,
)
from distill_env.models.hand_over import HandOverHead
from distill_env.models.hub import no_progress_bars
from distill_env.models.kv_cache import SlotCache
from distill_env.models.pretrained import read_pretrained, whole_state
from distill_env.transfer import upload

CHUNK_NUMBERS = 2**23  # log-probabilities that are computed at a time
SMALL_BATCH = 64  # states, up to which BLAS on a CPU multiplies faster with the large matrix on the left


class CausalLM:
    """A `TrainableModel` over a Transformers model; one object holds one batch of rows.

    The module always runs in evaluation mode, also with gradients: without dropout, the student that is trained is the
    one that wrote. The constructor compares the cached forward pass with the model's own, and refuses an architecture
    for which they differ: see `compatibility`.

    Args:
        model: a decoder-only causal language model with attention "sdpa" or "eager".
        vocab_size: the number of ids that exist; logits of higher ids are cut before the softmax (models of a family
            differ in their number of padded rows). By default all rows of the model's head.
        eos_token_id: the token that ends a completion. By default the one in the model's configuration.
        absent_ids: ids below `vocab_size` that do not exist, as of a tokenizer with holes; their probability is 0.

    Attributes:
        max_length: the most tokens of a prompt and its completion; None if there is no limit. It is less than the
            model's context where longer rows would change the distributions of shorter ones, as with longrope.
        limit: the same with its reason.
        config: of the model's decoder.
        pass_overhead: the cost of a forward pass of any size, in token positions.
        cache_argument: the name under which the decoder takes its cache (renamed in Transformers 5.24).
        hand_over: the head that predicts the divergence from the teacher; None if there is none. Forks share it.

    Raises:
        ValueError: for an argument out of range, or a model that is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | None = None,
        absent_ids: Sequence[int] = (),
    ) -> None:
        self.config = decoder_config(model)
        self.model: Any = model.eval()
        self._decoder, self._head = self.model.base_model, self.model.get_output_embeddings()
        n_ids = self._head.weight.shape[0]
        self.vocab_size: int = n_ids if vocab_size is None else vocab_size
        if not 1 <= self.vocab_size <= n_ids:
            raise ValueError(f"vocab_size: {vocab_size}; expected 1 to {n_ids}, the number of rows of the model's head")
        eos = self.config.eos_token_id if eos_token_id is None else eos_token_id
        eos = eos[0] if isinstance(eos, list) and len(eos) == 1 else eos
        if not isinstance(eos, int) or not 0 <= eos < self.vocab_size:
            raise ValueError(f"eos_token_id: {eos}; expected one id from 0 to {self.vocab_size - 1}")
        self.eos_token_id: int = eos
        self.absent_ids = tuple(absent_ids)
        if not {*self.absent_ids} <= {*range(self.vocab_size)} - {eos}:
            raise ValueError(
                f"absent_ids: {self.absent_ids!r:.60}; expected ids below {self.vocab_size}, not the end token {eos}"
            )
        self.hand_over: HandOverHead | None = None
        self._read: tuple[Tensor, Tensor] | None = None  # with it, the last hidden states and log-probabilities
        self.limit = length_limit(self.config)
        every = sliding_windows(model, self.config)
        windows = {window for window in every if window is not None}
        self._kinds = ["full_attention"] if None in every else []  # of attention, by Transformers' names
        self._kinds += ["sliding_attention"] if windows else []
        # A pass reads all weights (the GPU's number is a guess); a small model's function calls take the time.
        positions = 64 if self.model.device.type == "cpu" else 512
        self.pass_overhead = max(positions, 2**30 // sum(p.numel() for p in self.model.parameters()))
        decoder_arguments = inspect.signature(self._decoder.forward).parameters
        self.cache_argument = "cache" if "cache" in decoder_arguments else "past_key_values"
        self._embedding = self.model.get_input_embeddings() if "inputs_embeds" in decoder_arguments else None
        self._reserved = 0
        self._clear(0)
        if windows and not windows_are_exact(self, windows):
            # up to the window all layers attend to everything
            self._kinds = ["full_attention"]
            self.limit = least([self.limit, Limit(min(windows), "the model's attention window")])
        if not check_forward_passes(self):
            self._embedding = None
        self._clear(0)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | None = None,
        absent_ids: Sequence[int] = (),
        **options: Any,
    ) -> CausalLM:
        """Load a folder that `save_pretrained` wrote or an id of the Hugging Face hub.

        Args:
            name_or_path: folder or hub id.
            vocab_size, eos_token_id, absent_ids: as in the constructor.
            options: dtype, device and the other arguments of `pretrained.read_pretrained`.

        Raises:
            ValueError: for an argument out of range, or a model that is not supported.
            OSError: if no model can be loaded.
        """
        model = read_pretrained(name_or_path, **options)
        try:
            loaded = cls(model, vocab_size=vocab_size, eos_token_id=eos_token_id, absent_ids=absent_ids)
        except ValueError as error:
            raise ValueError(f"{error} (in {str(name_or_path)!r})") from error
        head = HandOverHead.load(name_or_path, loaded.width, loaded.vocab_size)
        loaded.hand_over = None if head is None else head.to(loaded.device)
        return loaded

    @property
    def device(self) -> torch.device:
        """Where log-probabilities are returned."""
        device: torch.device = self.model.device
        return device

    @property
    def width(self) -> int:
        """d, the width of the hidden state that `head` reads."""
        return int(self._head.weight.shape[1])

    @property
    def predicted(self) -> Tensor | None:
        """D_t in nats as the hand-over head predicts it after the last `start` [n] or `extend` [N, K]; None without a
        head."""
        return None if self.hand_over is None or self._read is None else self.hand_over.divergence(*self._read)

    def _head_after(self, states: Tensor) -> Tensor:
        """`head`, and what the hand-over head would read."""
        log_probs = self.head(states)
        self._read = None if self.hand_over is None else (states, log_probs)
        return log_probs

    @property
    def max_length(self) -> int | None:
        return self.limit.tokens

    def fork(self) -> CausalLM:
        """Another batch, still empty, over the same weights."""
        twin = copy.copy(self)
        twin._clear(0)
        return twin

    def _clear(self, n: int) -> None:
        self._n = n
        self._rows = self._held = torch.arange(0)  # logical number of each physical row, [B], ascending; rows in use
        self._prompts = torch.zeros(n, dtype=torch.long)  # tokens of each prompt, [N]
        self._lengths = torch.zeros(n, dtype=torch.long)  # tokens of each row, prompt included, [N]
        self._cache = SlotCache(self._reserved)

    def reserve(self, tokens: int) -> None:
        """Expect rows of up to so many tokens, prompt and completion: from the next batch on, their cache is made once
        and does not grow."""
        self._reserved = tokens

    def _hold(self, rows: Tensor) -> None:
        """Hold these logical rows and no others. Memory follows when a row is started or extended, so that rows that
        are given up and started again stay where they are; at once if none is left."""
        self._held = rows
        if len(rows) == 0:
            self._select(rows)

    def _select(self, rows: Tensor) -> None:
        """Keep memory for these logical rows and no others; new ones are written before they are read."""
        if len(rows) == 0 or len(self._rows) == 0:
            self._cache = SlotCache(self._reserved)
        elif not torch.equal(rows, self._rows):
            source = torch.searchsorted(self._rows, rows).clamp(max=len(self._rows) - 1)
            width = int(self._lengths[rows].max())
            self._cache.select(source, width)
        self._rows = rows

    def _forward(self, rows: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        """Append the first `counts` [n] of some tokens to physical rows: [n], [n, K] -> hidden states [n, K, d]."""
        device, n_new = self.device, tokens.shape[1]
        logical = self._rows[rows]
        slots = self._lengths[logical, None] + torch.arange(n_new)  # [n, K]; padding writes beyond the row's end
        width = int(slots.max()) + 1
        slots = upload(slots, device)
        # Only padding can lie beyond the limit; a learned position embedding has no row for it.
        positions = slots if self.max_length is None else slots.clamp(max=self.max_length - 1)
        self._cache.set_write_slots(len(self._rows), rows, slots, width)
        hidden = self.hidden_states(
            input_ids=upload(tokens, device).clamp(min=0),
            attention_mask=self.attention_mask(slots, width),
            position_ids=positions,
            use_cache=True,
            **{self.cache_argument: self._cache},
        )
        self._lengths[logical] += counts
        return hidden

    def attention_mask(self, slots: Tensor, width: int) -> Any:
        """What queries in these slots [n, K] attend to among the first `width` slots, [n, 1, K, width]; a mask for each
        kind of attention, by its name, if the model has several."""
        slots, keys = slots[:, None, :, None], torch.arange(width, device=slots.device)
        masks = {"full_attention": keys <= slots}
        if "sliding_attention" in self._kinds:
            masks["sliding_attention"] = masks["full_attention"] & (keys > slots - self.config.sliding_window)
        masks = {kind: self._as_attention_reads(masks[kind].to(self.device)) for kind in self._kinds}
        return masks if len(masks) > 1 else masks[self._kinds[0]]

    def _as_attention_reads(self, mask: Tensor) -> Tensor:
        if self.config._attn_implementation != "eager":  # adds its mask, whereas sdpa reads a boolean one
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        """See `TokenModel.start`. A prompt that is there several times is read once.

        Raises:
            ValueError: for a prompt that is empty, too long or not of the model's ids, or for rows that are not
                distinct rows of the batch, one for each prompt.
        """
        if rows is not None and (
            len(rows) != len(prompts) or len(set(rows)) != len(rows) or any(not 0 <= row < self._n for row in rows)
        ):
            raise ValueError(f"rows: {list(rows)}; expected {len(prompts)} distinct rows of a batch of {self._n}")
        padded, lengths = self._pad(prompts)
        logical = torch.arange(len(prompts)) if rows is None else torch.as_tensor(rows, dtype=torch.long)
        self._fits(logical, lengths, torch.zeros_like(lengths))
        if rows is None:
            self._clear(len(prompts))
        if len(logical) == 0:
            return self._empty(0)
        self._lengths[logical] = 0
        self._prompts[logical] = lengths
        self._hold(torch.cat([self._held, logical]).unique())
        self._select(self._held)
        physical = torch.searchsorted(self._rows, logical)
        read, same = _distinct(prompts)
        last = []
        groups = [read[group] for group in self.groups_of_like_length(lengths[read])]
        groups = [group[physical[group].argsort()] for group in groups]
        for group in groups:
            hidden = self._forward(physical[group], padded[group, : int(lengths[group].max())], lengths[group])
            each = torch.arange(len(group), device=hidden.device)
            last.append(hidden[each, upload(lengths[group] - 1, hidden.device)])
        if len(read) < len(prompts):
            self._cache.copy_rows(physical[read[same]], physical, int(lengths.max()))
            self._lengths[logical] = lengths
        return self._head_after(torch.cat(last)[upload(torch.cat(groups).argsort()[same], last[0].device)])

    @torch.no_grad()
    def extend(self, tokens: Tensor, counts: NDArray[np.int64] | None = None) -> Tensor:
        """See `TokenModel.extend`.

        Args:
            tokens: int64 [N, K], padded on the right with -1.
            counts: how many of each row's tokens count, [N]; then `tokens` may lie on the model's device, and what
                follows them has no meaning.

        Raises:
            ValueError: for tokens of another shape, not padded on the right, for a row that has been given up, or for
                one that would exceed `max_length`.
        """
        tokens = torch.as_tensor(tokens)
        if tokens.dim() != 2 or len(tokens) != self._n or tokens.is_floating_point():
            raise ValueError(f"tokens: {tokens.dtype} {list(tokens.shape)}; expected integers [{self._n}, K]")
        present = self._present(tokens, counts)  # [N, K]
        n_new = present.sum(1)
        missing = n_new > 0
        missing[self._held] = False
        if missing.any():
            raise ValueError(f"tokens: row {int(missing.nonzero()[0])} is not started; expected -1 only")
        self._fits(torch.arange(self._n), self._prompts, self._lengths - self._prompts + n_new)
        longest = int(n_new.max()) if self._n else 0
        if longest == 0:
            return self._empty(*tokens.shape)
        self._select(self._held)
        busy = (n_new[self._rows] > 0).nonzero()[:, 0]  # physical rows
        if 2 * len(busy) > len(self._rows):  # gathering their keys and values would cost more
            busy = torch.arange(len(self._rows))
        logical = self._rows[busy]
        block = tokens[:, :longest]
        if len(logical) < self._n:
            block = block.index_select(0, upload(logical, block.device))
        hidden = self._forward(busy, block, n_new[logical])
        if len(logical) == self._n and present.all() and tokens.numel() * self.vocab_size <= CHUNK_NUMBERS:
            return self._head_after(hidden)
        out = self._empty(tokens.numel())
        row, column = present[logical, :longest].nonzero(as_tuple=True)  # of the host, so that a GPU need not wait
        states = hidden[upload(row, hidden.device), upload(column, hidden.device)]  # [m, d]
        places = upload(present.flatten().nonzero()[:, 0], out.device)
        size = max(64, CHUNK_NUMBERS // self.vocab_size // 64 * 64)  # round numbers are faster
        for part, place in zip(states.split(size), places.split(size), strict=True):
            out.index_copy_(0, place, self.head(part))
        out = out.view(*tokens.shape, -1)
        if self.hand_over is not None:
            read = states.new_zeros(tokens.numel(), self.width).index_copy(0, places, states)
            self._read = read.view(*tokens.shape, -1), out
        return out

    @staticmethod
    def _present(tokens: Tensor, counts: NDArray[np.int64] | None) -> Tensor:
        """Which tokens count, bool [N, K] on the host."""
        if counts is not None:
            return torch.arange(tokens.shape[1]) < torch.from_numpy(counts)[:, None]
        present = tokens.cpu() >= 0
        if (present[:, 1:] & ~present[:, :-1]).any():
            raise ValueError("tokens: -1 before a token; expected -1 only on the right of a row's tokens")
        return present

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        """See `TokenModel.rewind`. Raises ValueError unless there is a length of at least -1 for every row."""
        keep = torch.as_tensor(lengths, dtype=torch.long).cpu()
        if keep.shape != (self._n,) or (keep < -1).any():
            raise ValueError(f"lengths: {keep.tolist()}; expected {self._n} numbers, each at least -1")
        self._lengths = torch.minimum(self._lengths, self._prompts + keep)
        given_up = keep < 0
        self._lengths[given_up] = self._prompts[given_up] = 0
        self._hold(self._held[~given_up[self._held]])

    def features(self, prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor) -> Tensor:
        """See `TrainableModel.features`: hidden states [m, d] from one padded forward pass.

        Raises:
            ValueError: for shapes that do not match, a mask that is set on padding, or a row beyond `max_length`.
        """
        padded, lengths = self._pad(prompts)
        tokens, mask = tokens.cpu(), mask.cpu()
        if tokens.dim() != 2 or tokens.shape != mask.shape or len(tokens) != len(prompts):
            raise ValueError(
                f"tokens, mask: {list(tokens.shape)}, {list(mask.shape)}; expected [{len(prompts)}, T] both"
            )
        if (mask & (tokens < 0)).any():
            raise ValueError("mask: set on padding; expected it on tokens only")
        row, step = mask.nonzero(as_tuple=True)  # [m]
        needed = torch.zeros_like(lengths).scatter_reduce(0, row, step, "amax")  # tokens that are read
        self._fits(torch.arange(len(prompts)), lengths, needed)
        ids = F.pad(padded, (0, tokens.shape[1]), value=-1)  # [n, P + T]
        ids.scatter_(1, lengths[:, None] + torch.arange(tokens.shape[1]), tokens)
        parts, states = [], []
        for group in self.groups_of_like_length(lengths + needed):
            block = upload(ids[group, : int((lengths + needed)[group].max())].clamp(min=0), self.device)
            # No token attends to padding on its right, so the mask may be all ones, which keeps the fast causal kernel.
            inputs = {"input_ids": block}
            if self._embedding is not None and inplace_grad.is_supported(self._embedding):
                inputs = {"inputs_embeds": inplace_grad.embedding(self._embedding, block)}
            hidden = self.hidden_states(**inputs, attention_mask=torch.ones_like(block), use_cache=False)
            states.append(torch.isin(row, group).nonzero()[:, 0])  # [.], ascending like the group's rows
            index, column = torch.searchsorted(group, row[states[-1]]), (lengths[row] - 1 + step)[states[-1]]
            parts.append(hidden[upload(index, hidden.device), upload(column, hidden.device)])
        return torch.cat(parts)[upload(torch.cat(states).argsort(), parts[0].device)]

    def head(self, features: Tensor) -> Tensor:
        """log p over the vocabulary, [..., d] -> [..., V], float32 (float64 for a float64 model)."""
        logits = self.logits(features)[..., : self.vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Cohere, Granite and Gemma change the logits in their own forward passes; others are refused.
        if getattr(self.config, "logit_scale", None) is not None:
            logits = logits * self.config.logit_scale
        if self.config.model_type.startswith("granite"):
            logits = logits / self.config.logits_scaling
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        if self.absent_ids:
            logits = logits.index_fill(-1, upload(torch.tensor(self.absent_ids), logits.device), -torch.inf)
        return F.log_softmax(logits, -1).to(self.device)  # the head may be on another one

    def logits(self, features: Tensor) -> Tensor:
        """The output of the model's head, [..., d] -> [..., rows of the head], in the faster of two orders."""
        head, states = self._head, features.flatten(0, -2)
        if inplace_grad.is_supported(head):
            if torch.is_grad_enabled():
                return inplace_grad.linear(head, features)
            on_cpu = states.device.type == head.weight.device.type == "cpu"
            if len(states) <= SMALL_BATCH and on_cpu and states.dtype in (torch.float32, torch.float64):
                return (head.weight @ states.T).T.unflatten(0, features.shape[:-1])  # takes half the time
        logits: Tensor = head(features)
        return logits

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The trainable parameters, shared ones once."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def state_dict(self) -> dict[str, Any]:
        return whole_state(self.model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        return self.model.load_state_dict(state_dict)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that `load` reads exactly: the model with all rows of its head, or its adapter and the name of
        its base model."""
        if is_adapted(self.model):
            save_adapter(self.model, path)
        else:
            with no_progress_bars():
                self.model.save_pretrained(str(path), state_dict=self.state_dict())
        self._save_hand_over(path)

    def export(self, path: str | Path) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` reads; an adapter is merged. Completions of it end
        with the end token of this model."""
        generation = self.model.generation_config
        ends = None if generation is None else generation.eos_token_id
        if generation is not None and self.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
            generation.eos_token_id = self.eos_token_id
        if is_adapted(self.model):
            save_merged(self.model, path)
            self._save_hand_over(path)
        else:
            self.save_pretrained(path)

    def _save_hand_over(self, path: str | Path) -> None:
        if self.hand_over is not None:
            self.hand_over.save(path)

    def hidden_states(self, **inputs: Any) -> Tensor:
        """The hidden states under the model's head."""
        if self.model.training:  # another user of the module may have changed its mode
            self.model.eval()
        hidden: Tensor = self._decoder(**inputs)[0]
        return hidden

    def _empty(self, *shape: int) -> Tensor:
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        return torch.zeros(*shape, self.vocab_size, dtype=dtype, device=self.device)

    def groups_of_like_length(self, lengths: Tensor) -> list[Tensor]:
        """Rows that share a forward pass: ascending row numbers in each group, the group of the longest rows first, so
        that the cache grows once."""
        return [torch.tensor(group) for group in length_groups(lengths.tolist(), self.pass_overhead)[::-1]]

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts [n, P], padded on the right with -1, and their lengths [n]."""
        n_ids = self._head.weight.shape[0]
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompts: prompt {i} is empty; expected at least one token")
            if not 0 <= min(prompt) <= max(prompt) < n_ids:
                raise ValueError(f"prompts: prompt {i} has an unknown id; expected ids from 0 to {n_ids - 1}")
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
        padded = torch.full((len(prompts), max(map(len, prompts), default=0)), -1)
        padded[torch.arange(padded.shape[1]) < lengths[:, None]] = torch.tensor(
            [token for prompt in prompts for token in prompt], dtype=torch.long
        )
        return padded, lengths

    def _fits(self, rows: Tensor, prompts: Tensor, tokens: Tensor) -> None:
        """Raise ValueError unless these rows fit into the context; numbers of tokens and rows, all [n]."""
        over = prompts + tokens > (self.max_length or torch.iinfo(torch.long).max)
        if over.any():
            i = int(over.nonzero()[0])
            raise ValueError(
                f"tokens: row {int(rows[i])} needs {int(prompts[i])} prompt tokens + {int(tokens[i])} new tokens; "
                f"expected at most {self.max_length} together{self.limit.because}"
            )


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The numbers of the distinct prompts [m], ascending, and for each prompt its place among them [n]."""
    places: dict[tuple[int, ...], int] = {}
    same = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    read = [same.index(place) for place in range(len(places))]
    return torch.tensor(read), torch.tensor(same)
