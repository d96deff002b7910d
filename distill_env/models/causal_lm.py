"""Any decoder-only Transformers language model as a token model, batched, with a key/value cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from distill_env.models import inplace_grad
from distill_env.models.batching import length_groups
from distill_env.models.pretrained import (
    is_adapted,
    no_progress_bars,
    read_pretrained,
    save_adapter,
    save_merged,
    whole_state,
)


class _SlotCache(Cache):
    """Keys and values in slots: the token at position p of a row always lies in slot p.

    A token that is taken back needs no clearing: no query looks past its own slot, and its successor overwrites it.
    So rows of any lengths share one rectangle, there are never holes to drop, and rewinding is free. `aim` says where
    the next forward pass writes; its attention mask has to be slot-wise, [n, 1, K, width].
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.buffers: dict[int, list[Tensor]] = {}  # of each layer keys and values, [B, heads, capacity, d]

    def aim(self, n_rows: int, rows: Tensor, slots: Tensor, width: int) -> None:
        """The next pass computes `rows` [n] of the `n_rows` held, writes `slots` [n, K] and reads the first `width`."""
        self.n_rows, self.rows, self.slots, self.width = n_rows, rows, slots, width

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        states = (key_states, value_states)  # each [n, heads, K, d]
        if layer_idx not in self.buffers:
            self.buffers[layer_idx] = [x.new_zeros(self.n_rows, x.shape[1], 0, x.shape[3]) for x in states]
        buffers = self.buffers[layer_idx]
        rows, slots = self.rows.to(key_states.device), self.slots.to(key_states.device)  # layers may lie anywhere
        for i, x in enumerate(states):
            missing = self.width - buffers[i].shape[2]
            if missing > 0:
                # By half, so that growing is rare; by zeros, since a masked NaN would still spoil a row.
                buffers[i] = F.pad(buffers[i], (0, 0, 0, missing + self.width // 2))
            buffers[i].transpose(1, 2)[rows[:, None], slots] = x.transpose(1, 2)
        if self.slots.shape[1] == self.width:  # nothing lies before these tokens
            return states
        if len(self.rows) == self.n_rows:
            return tuple(buffer[:, :, : self.width] for buffer in buffers)
        return tuple(buffer[rows, :, : self.width] for buffer in buffers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width - self.slots.shape[1]

    def select(self, source: Tensor, width: int) -> None:
        """Row i becomes a copy of row `source[i]`, in new memory for `width` slots."""
        for buffers in self.buffers.values():
            buffers[:] = [buffer[:, :, :width][source.to(buffer.device)] for buffer in buffers]


_NUMBERS = 2**23  # log-probabilities that are computed at a time
_FEW = 64  # states, up to which BLAS on a CPU multiplies faster with the large matrix on the left


class CausalLM:
    """A `TrainableModel` over a Transformers model; one object holds one batch of rows.

    The module runs in evaluation mode, also under gradient: what is trained is exactly what has been rolled out, hence
    no dropout. On construction the cache is compared with the model's own forward pass on two short rows, so that an
    architecture that it cannot serve is refused rather than computed wrongly.

    Args:
        model: any decoder-only causal language model with attention "sdpa" or "eager".
        vocab_size: only the first so many ids exist; logits are cut before the softmax (models of a family differ in
            their number of padded rows). By default all rows of the model's head.
        eos_token_id: the token that ends an answer. By default the one that the model's configuration names.

    Raises:
        ValueError: for an argument out of range, or a model that is not supported.
    """

    def __init__(
        self, model: PreTrainedModel, *, vocab_size: int | None = None, eos_token_id: int | None = None
    ) -> None:
        name = type(model).__name__
        if not isinstance(model, PreTrainedModel) or model.base_model is model or model.get_output_embeddings() is None:
            raise ValueError(f"model: {name} is not a Transformers causal language model")
        config: Any = model.config.get_text_config(decoder=True)
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"model: its attention is {config._attn_implementation!r}; accepted: 'sdpa', 'eager'")
        self.model: Any = model.eval()
        self._decoder, self._head, self._config = self.model.base_model, self.model.get_output_embeddings(), config
        n_ids = self._head.weight.shape[0]
        self.vocab_size: int = n_ids if vocab_size is None else vocab_size
        if not 1 <= self.vocab_size <= n_ids:
            raise ValueError(f"vocab_size: {vocab_size} is not from 1 to {n_ids}, the rows of the model's head")
        eos = config.eos_token_id if eos_token_id is None else eos_token_id
        eos = eos[0] if isinstance(eos, list) and len(eos) == 1 else eos
        if not isinstance(eos, int) or not 0 <= eos < self.vocab_size:
            raise ValueError(f"eos_token_id: {eos} is not one id from 0 to {self.vocab_size - 1}; pass such a one")
        self.eos_token_id: int = eos
        self._context: int | None = getattr(config, "max_position_embeddings", None)
        self.max_length = self._context  # tokens that a row may hold, prompt and answer; None if there is no limit
        if "local" in getattr(config, "attention_layers", ()):
            raise ValueError(f"model: {name} windows its attention by its own means, which cannot be served")
        for layer in DynamicCache(config=config).layers:
            if type(layer) is DynamicSlidingWindowLayer:  # up to its window it attends to everything
                self.max_length = min(self.max_length or layer.sliding_window, layer.sliding_window)
            elif type(layer) is not DynamicLayer:
                raise ValueError(f"model: {name} remembers in a {type(layer).__name__}, not in keys and values alone")
        # What a pass costs whatever it computes, in positions: it reads all weights (the GPU's number is a guess), and
        # of a small model its calls take the time.
        positions = 64 if self.model.device.type == "cpu" else 512
        self.pass_overhead = max(positions, 2**30 // sum(p.numel() for p in self.model.parameters()))
        # Transformers 5.24 renamed the argument.
        takes = inspect.signature(self._decoder.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"
        self._embedding = self.model.get_input_embeddings() if "inputs_embeds" in takes else None
        self._clear(0)
        self._check()

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        vocab_size: int | None = None,
        eos_token_id: int | None = None,
        **options: Any,
    ) -> CausalLM:
        """Load from a folder that `save_pretrained` wrote or by an id of the Hugging Face hub; `options` are those of
        `pretrained.read_pretrained`: dtype, device, ... Raises ValueError and OSError as it does, and ValueError for a
        model that is not supported."""
        model = read_pretrained(name_or_path, **options)
        try:
            return cls(model, vocab_size=vocab_size, eos_token_id=eos_token_id)
        except ValueError as error:
            raise ValueError(f"{error} (in {str(name_or_path)!r})") from error

    def fork(self) -> CausalLM:
        """Another batch, still empty, over the same weights."""
        twin = copy.copy(self)
        twin._clear(0)
        return twin

    def _clear(self, n: int) -> None:
        self._n = n
        self._rows = torch.arange(0)  # logical number of each physical row, [B], ascending
        self._prompts = torch.zeros(n, dtype=torch.long)  # tokens of each prompt, [N]
        self._lengths = torch.zeros(n, dtype=torch.long)  # tokens of each row, prompt included, [N]
        self._cache = _SlotCache()

    def _select(self, rows: Tensor) -> None:
        """Hold these logical rows and no others; those that were not held are written before they are read."""
        if len(rows) == 0 or len(self._rows) == 0:
            self._cache = _SlotCache()
        elif not torch.equal(rows, self._rows):
            source = torch.searchsorted(self._rows, rows).clamp(max=len(self._rows) - 1)
            width = int(self._lengths[rows].max())
            self._cache.select(source, width)
        self._rows = rows

    def _forward(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Append tokens to physical rows: [n], [n, K] -> hidden states [n, K, d]; -1 pads on the right."""
        device, n_new = self.model.device, tokens.shape[1]
        logical = self._rows[rows]
        slots = self._lengths[logical, None] + torch.arange(n_new)  # [n, K]; padding writes beyond the row's end
        width = int(slots.max()) + 1
        mask = (torch.arange(width) <= slots[:, :, None])[:, None].to(device)  # [n, 1, K, width]
        if self._config._attn_implementation == "eager":  # adds its mask, whereas sdpa reads a boolean one
            dtype = self.model.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)
        # Only padding can lie beyond the context; a learned position embedding has no row for it.
        positions = slots if self._context is None else slots.clamp(max=self._context - 1)
        self._cache.aim(len(self._rows), rows, slots, width)
        hidden = self._run(
            input_ids=tokens.clamp(min=0).to(device),
            attention_mask=mask,
            position_ids=positions.to(device),
            use_cache=True,
            **{self._cache_name: self._cache},
        )
        self._lengths[logical] += (tokens >= 0).sum(1)
        return hidden

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        """See `TokenModel.start`.

        Raises:
            ValueError: for a prompt that is empty, too long or not of the model's ids, or for rows that are not
                distinct rows of the batch, one for each prompt.
        """
        if rows is not None and (
            len(rows) != len(prompts) or len(set(rows)) != len(rows) or any(not 0 <= row < self._n for row in rows)
        ):
            raise ValueError(f"rows: {list(rows)} are not {len(prompts)} distinct rows of a batch of {self._n}")
        padded, lengths = self._pad(prompts)
        logical = torch.arange(len(prompts)) if rows is None else torch.as_tensor(rows, dtype=torch.long)
        self._fits(logical, lengths, torch.zeros_like(lengths))
        if rows is None:
            self._clear(len(prompts))
        if len(logical) == 0:
            return self._empty(0)
        self._lengths[logical] = 0
        self._prompts[logical] = lengths
        self._select(torch.cat([self._rows, logical]).unique())
        physical = torch.searchsorted(self._rows, logical)
        last = []
        groups = [group[physical[group].argsort()] for group in self._groups(lengths)]
        for group in groups:
            hidden = self._forward(physical[group], padded[group, : int(lengths[group].max())])
            last.append(hidden[torch.arange(len(group)), lengths[group] - 1])
        return self.head(torch.cat(last)[torch.cat(groups).argsort()]).cpu()

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """See `TokenModel.extend`.

        Raises:
            ValueError: for tokens of another shape, not padded on the right, for a row that has been given up, or for
                one that would exceed `max_length`.
        """
        tokens = torch.as_tensor(tokens).cpu()
        if tokens.dim() != 2 or len(tokens) != self._n or tokens.is_floating_point():
            raise ValueError(f"tokens: must be integers [{self._n}, K], not {tokens.dtype} {list(tokens.shape)}")
        present = tokens >= 0  # [N, K]
        if (present[:, 1:] & ~present[:, :-1]).any():
            raise ValueError("tokens: -1 may only stand on the right of a row's tokens")
        counts = present.sum(1)
        missing = counts > 0
        missing[self._rows] = False
        if missing.any():
            raise ValueError(f"tokens: row {int(missing.nonzero()[0])} is not started; start it before extending it")
        self._fits(torch.arange(self._n), self._prompts, self._lengths - self._prompts + counts)
        longest = int(counts.max()) if self._n else 0
        if longest == 0:
            return self._empty(*tokens.shape)
        busy = (counts[self._rows] > 0).nonzero()[:, 0]  # physical rows
        if 2 * len(busy) > len(self._rows):  # gathering their keys and values would cost more than it saves
            busy = torch.arange(len(self._rows))
        logical = self._rows[busy]
        hidden = self._forward(busy, tokens[logical, :longest])
        if len(logical) == self._n and present.all() and tokens.numel() * self.vocab_size <= _NUMBERS:
            return self.head(hidden).cpu()
        out = self._empty(tokens.numel())
        states = hidden[present[logical, :longest].to(hidden.device)]  # [m, d]
        places = present.flatten().nonzero()[:, 0]
        size = max(64, _NUMBERS // self.vocab_size // 64 * 64)  # BLAS likes round numbers
        for part, place in zip(states.split(size), places.split(size), strict=True):
            out.index_copy_(0, place, self.head(part).cpu())
        return out.view(*tokens.shape, -1)

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        """See `TokenModel.rewind`. Raises ValueError unless there is a length of at least -1 for every row."""
        keep = torch.as_tensor(lengths, dtype=torch.long).cpu()
        if keep.shape != (self._n,) or (keep < -1).any():
            raise ValueError(f"lengths: must be {self._n} numbers, each at least -1, not {keep.tolist()}")
        self._lengths = torch.minimum(self._lengths, self._prompts + keep)
        given_up = keep < 0
        self._lengths[given_up] = self._prompts[given_up] = 0
        held = self._rows[~given_up[self._rows]]
        if len(held) < len(self._rows):
            self._select(held)

    def features(self, prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor) -> Tensor:
        """See `TrainableModel.features`: hidden states [m, d] from one padded forward pass.

        Raises:
            ValueError: for shapes that do not match, a mask that is set on padding, or a row beyond `max_length`.
        """
        padded, lengths = self._pad(prompts)
        tokens, mask = tokens.cpu(), mask.cpu()
        if tokens.dim() != 2 or tokens.shape != mask.shape or len(tokens) != len(prompts):
            raise ValueError(
                f"tokens, mask: must be [{len(prompts)}, T] both, not {list(tokens.shape)}, {list(mask.shape)}"
            )
        if (mask & (tokens < 0)).any():
            raise ValueError("mask: is set on padding")
        row, step = mask.nonzero(as_tuple=True)  # [m]
        needed = torch.zeros_like(lengths).scatter_reduce(0, row, step, "amax")  # answer tokens that are read
        self._fits(torch.arange(len(prompts)), lengths, needed)
        ids = F.pad(padded, (0, tokens.shape[1]), value=-1)  # [n, P + T]
        ids.scatter_(1, lengths[:, None] + torch.arange(tokens.shape[1]), tokens)
        parts, states = [], []
        for group in self._groups(lengths + needed):
            block = ids[group, : int((lengths + needed)[group].max())].clamp(min=0).to(self.model.device)
            # Padding on the right is never seen, so the mask may be all ones, which keeps the fast causal kernel.
            inputs = {"input_ids": block}
            if self._embedding is not None and inplace_grad.is_supported(self._embedding):
                inputs = {"inputs_embeds": inplace_grad.embedding(self._embedding, block)}
            hidden = self._run(**inputs, attention_mask=torch.ones_like(block), use_cache=False)
            states.append(torch.isin(row, group).nonzero()[:, 0])  # [.], ascending like the group's rows
            index, column = torch.searchsorted(group, row[states[-1]]), (lengths[row] - 1 + step)[states[-1]]
            parts.append(hidden[index.to(hidden.device), column.to(hidden.device)])
        return torch.cat(parts)[torch.cat(states).argsort().to(parts[0].device)]

    def head(self, features: Tensor) -> Tensor:
        """log p over the vocabulary, [..., d] -> [..., V], float32 (float64 for a float64 model)."""
        logits = self._logits(features)[..., : self.vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # What Cohere, Granite and Gemma do to the logits, in their own forward passes; other habits `_check` refuses.
        if getattr(self._config, "logit_scale", None) is not None:
            logits = logits * self._config.logit_scale
        if self._config.model_type.startswith("granite"):
            logits = logits / self._config.logits_scaling
        cap = getattr(self._config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return F.log_softmax(logits, -1).to(self.model.device)  # the head may lie on another one

    def _logits(self, features: Tensor) -> Tensor:
        """What the head computes, [..., d] -> [..., rows of the head]. Its product is the largest by far."""
        head, states = self._head, features.flatten(0, -2)
        if inplace_grad.is_supported(head):
            if torch.is_grad_enabled():
                return inplace_grad.linear(head, features)
            on_cpu = states.device.type == head.weight.device.type == "cpu"
            if len(states) <= _FEW and on_cpu and states.dtype in (torch.float32, torch.float64):
                return (head.weight @ states.T).T.unflatten(0, features.shape[:-1])  # half the time of the usual order
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
        """Write a folder that `load` reads, exactly: the whole model, or of an adapted one the adapter and where its
        base is. Its vocabulary is not cut."""
        if is_adapted(self.model):
            save_adapter(self.model, path)
        else:
            with no_progress_bars():
                self.model.save_pretrained(str(path), state_dict=self.state_dict())

    def export(self, path: str | Path) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` reads without more; an adapter is merged."""
        if is_adapted(self.model):
            save_merged(self.model, path)
        else:
            self.save_pretrained(path)

    def _run(self, **inputs: Any) -> Tensor:
        """Hidden states of the model below its head."""
        if self.model.training:  # whoever holds the module may have switched it
            self.model.eval()
        hidden: Tensor = self._decoder(**inputs)[0]
        return hidden

    def _empty(self, *shape: int) -> Tensor:
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        return torch.zeros(*shape, self.vocab_size, dtype=dtype)

    def _groups(self, lengths: Tensor) -> list[Tensor]:
        """Rows of like lengths, to be computed together: ascending row numbers in each group, the longest rows first,
        since what a cache holds for them the others need not grow again."""
        return [torch.tensor(group) for group in length_groups(lengths.tolist(), self.pass_overhead)[::-1]]

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts [n, P], padded on the right with -1, and their lengths [n]."""
        n_ids = self._head.weight.shape[0]
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompts: prompt {i} is empty; the first token is predicted by a prompt's last one")
            if not 0 <= min(prompt) <= max(prompt) < n_ids:
                raise ValueError(f"prompts: prompt {i} has an id that is not from 0 to {n_ids - 1}")
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
        padded = torch.full((len(prompts), max(map(len, prompts), default=0)), -1)
        padded[torch.arange(padded.shape[1]) < lengths[:, None]] = torch.tensor(
            [token for prompt in prompts for token in prompt], dtype=torch.long
        )
        return padded, lengths

    def _fits(self, rows: Tensor, prompts: Tensor, tokens: Tensor) -> None:
        """Raise unless the prompts and answers of these rows, by their lengths, fit into the context; all [n]."""
        over = prompts + tokens > (self.max_length or torch.iinfo(torch.long).max)
        if over.any():
            i = int(over.nonzero()[0])
            raise ValueError(
                f"row {int(rows[i])} does not fit: {int(prompts[i])} prompt tokens + {int(tokens[i])} answer tokens "
                f"exceed the context of {self.max_length} tokens"
            )

    @torch.no_grad()
    def _check(self) -> None:
        """Raise unless the two-part, cached forward pass gives the model's own distribution on two ragged rows; and
        find out whether the model computes the same from embeddings as from ids."""
        a, b, c = (i % self.vocab_size for i in (1, 2, 3))
        problem = f"model: {type(self.model).__name__} is not supported"
        prompts, answers = [[a], [c, a]], torch.tensor([[b, -1], [b, a]])
        try:
            full = [self.model(input_ids=torch.tensor([x], device=self.model.device)) for x in ([a, b], [c, a, b, a])]
            expected = torch.stack([x.logits[0, -1, : self.vocab_size] for x in full]).double().softmax(-1)
            self.start(prompts)
            after = self.extend(answers)[[0, 1], [0, 1]]
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{problem}: its forward pass fails ({error})") from error
        if not bool(expected.isfinite().all()):
            raise ValueError(f"model: the probabilities of {type(self.model).__name__} are not numbers")
        self._clear(0)

        def distance(log_probs: Tensor) -> float:
            return float((log_probs.double().exp() - expected).abs().sum(-1).max()) / 2

        exact = {} if getattr(self.model, "is_quantized", False) else {torch.float64: 1e-6, torch.float32: 1e-3}
        limit = exact.get(self.model.dtype, 0.2)
        if distance(after) > limit:
            raise ValueError(
                f"{problem}: with a cache its distribution is off by {distance(after):.2g} (total variation)"
            )
        if self._embedding is not None:
            tokens = F.pad(answers.clamp(min=0), (0, 1))  # the states after the answers, whatever follows there
            states = torch.tensor([[False, True, False], [False, False, True]])
            try:
                same = distance(self.head(self.features(prompts, tokens, states))) <= limit
            except (TypeError, ValueError, RuntimeError, IndexError):
                same = False
            if not same:  # it scales what it looks up, or looks up more than one table
                self._embedding = None
