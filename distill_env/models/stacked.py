"""Several small language models of one shape as one model, whose every operation serves all of them.

At a few thousand weights, the calls from Python to the tensor library take the time of a pass. Here one call computes a
layer of all members: their weights are stacked, and the rows of a batch are split evenly between them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_env.models.causal_lm import CausalLM

ROOM = 8  # slots that a cache has beyond those in use, so that growing is rare
FEWER = 0.8  # share of the rows at and below which the others are dropped from the cache
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, queries, keys, values, each [n, K, heads, d_head]


class StackedLM:
    """S models as one `TokenModel`. Of N rows the first N / S belong to the first model, and so on.

    The weights are shared with the models: a step of an optimiser on the weights of one model changes its part of the
    stack. To train them, each model's own `head` reads its part of `features`; after the backward pass
    `distribute_gradients` adds the stack's gradients to those of the models.

    Args:
        models: of equal shape, `can_be_stacked`.

    Raises:
        ValueError: for models that cannot be stacked.
    """

    def __init__(self, models: Sequence[CausalLM]) -> None:
        if not can_be_stacked(models):
            raise ValueError(
                f"models: {', '.join(type(m).__name__ for m in models)}; expected small language models of one shape, "
                "on the CPU and without an adapter"
            )
        self.models = list(models)
        config = models[0].config
        self.vocab_size, self.eos_token_id, self.max_length = (
            models[0].vocab_size,
            models[0].eos_token_id,
            models[0].max_length,
        )
        self.absent_ids = models[0].absent_ids
        self.heads, self.layers, self.epsilon = (
            config.num_attention_heads,
            config.num_hidden_layers,
            config.rms_norm_eps,
        )
        self.rotates = [_rotates(config, i) for i in range(self.layers)]
        self.frequencies = models[0].model.base_model.rotary_emb.inv_freq  # [d_head / 2]
        self.padding = models[0].model.get_input_embeddings().padding_idx
        self.weights: dict[str, nn.Parameter] = {}
        for name, first in models[0].model.named_parameters():
            parts = [m.model.get_parameter(name) for m in models]
            stacked = torch.stack([p.detach() for p in parts])
            self.weights[name] = nn.Parameter(stacked, requires_grad=first.requires_grad)
            for part, layer in zip(parts, stacked, strict=True):
                part.data = layer
        self._clear(0)

    @property
    def device(self) -> torch.device:
        return self.models[0].device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.models[0].model.dtype
        return dtype

    def fork(self) -> StackedLM:
        """Another batch, still empty, over the same weights."""
        twin = copy.copy(self)
        twin._clear(0)
        return twin

    def distribute_gradients(self) -> None:
        """Add each model's part of the stack's gradients to its own, and empty those of the stack."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                for model, gradient in zip(self.models, weight.grad, strict=True):
                    own = model.model.get_parameter(name)
                    own.grad = gradient if own.grad is None else own.grad + gradient
                weight.grad = None

    def start_none(self, n: int) -> None:
        """Make a new batch of n rows, none of which is started, and keep a place for each."""
        self._clear(n)
        self._grid, self._placed = torch.arange(n).view(len(self.models), n // len(self.models)), True

    def _clear(self, n: int) -> None:
        self._n = n
        self._placed = False
        self._prompts = torch.zeros(n, dtype=torch.long)  # tokens of each prompt, [N]
        self._lengths = torch.zeros(n + 1, dtype=torch.long)  # tokens of each row; the last is of rows that fill up
        self._held = torch.zeros(n, dtype=torch.bool)  # rows that may be extended
        self._grid = torch.zeros(len(self.models), 0, dtype=torch.long)  # the row in each place of the cache, [S, P]
        self._cache: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer, [S P, slots, width]

    def _arrange(self) -> None:
        """Make a place for each row that is held, as many for each model, and move the cache there."""
        held = self._held.view(len(self.models), -1)
        order = held.int().argsort(dim=1, descending=True, stable=True)[:, : int(held.sum(1).max())]
        rows = order + torch.arange(len(self.models))[:, None] * held.shape[1]
        place = torch.zeros(self._n + 1, dtype=torch.long)
        place[self._grid.flatten()] = torch.arange(self._grid.numel())
        self._grid = torch.where(held.gather(1, order), rows, self._n)
        if self._cache and self._grid.numel():
            source = place[self._grid.flatten()]
            slots = int(self._lengths.max()) + ROOM
            self._cache = [(k[source, :slots], v[source, :slots]) for k, v in self._cache]
        else:
            self._cache = []

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Tensor:
        """See `TokenModel.start`. Raises ValueError for a number of rows that cannot be split evenly."""
        if rows is None:
            if len(prompts) % len(self.models):
                raise ValueError(f"prompts: {len(prompts)}; expected a multiple of {len(self.models)} models")
            self._clear(len(prompts))
        padded, lengths = self.models[0]._pad(prompts)
        index = torch.arange(len(prompts)) if rows is None else torch.as_tensor(rows, dtype=torch.long)
        tokens = torch.full((self._n, padded.shape[1]), -1)
        tokens[index] = padded
        self._lengths[index] = 0
        if not bool(self._held[index].all()):
            self._held[index] = True
            if not self._placed:
                self._arrange()
        logits = self._extend(tokens)
        self._prompts[index] = lengths
        return self._log_probs(logits[index, lengths - 1])

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """See `TokenModel.extend`. Raises ValueError for a row that has been given up."""
        if bool((tokens[~self._held] >= 0).any()):
            raise ValueError("tokens: of a row that is not started; expected -1 only")
        return self._log_probs(self._extend(tokens))

    def rewind(self, lengths: Sequence[int] | Tensor) -> None:
        """See `TokenModel.rewind`."""
        keep = torch.as_tensor(lengths, dtype=torch.long)
        self._held &= keep >= 0
        self._lengths[:-1] = torch.where(self._held, torch.minimum(self._lengths[:-1], self._prompts + keep), 0)
        most = int(self._held.view(len(self.models), -1).sum(1).max())
        if most <= FEWER * self._grid.shape[1] and not self._placed:
            self._arrange()

    def _extend(self, tokens: Tensor) -> Tensor:
        """Append tokens [N, K], padded on the right with -1. Returns logits [N, K, V], without meaning at padding."""
        counts = (tokens >= 0).sum(1)
        longest = int(counts.max()) if self._n else 0
        logits = torch.zeros(self._n + 1, tokens.shape[1], self.vocab_size, dtype=self.dtype)
        if longest == 0:
            return logits[:-1]
        block = F.pad(tokens[:, :longest], (0, 0, 0, 1), value=-1)  # [N + 1, K]
        places = torch.arange(self._grid.numel()).view_as(self._grid)
        busy = block[self._grid, 0] >= 0  # [S, P]
        most = int(busy.sum(1).max())
        if 2 * most <= busy.shape[1]:  # else gathering their keys and values costs more
            places = places.gather(1, busy.int().argsort(dim=1, descending=True, stable=True)[:, :most])
        rows = self._grid.flatten()[places]  # [S, n]
        # what a row without new tokens writes beyond its end is overwritten before it is read
        ids, slots = block[rows].clamp(min=0), self._lengths[rows.flatten(), None] + torch.arange(longest)
        width = int(slots.max()) + 1
        mask = (torch.arange(width) <= slots[..., None])[:, None]  # [S n, 1, K, width]
        attend = self._cached_attention(places.flatten(), slots, width, mask)
        states = self._states(ids, slots, attend)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        logits[rows.flatten(), :longest] = _linear(states, head).view(-1, longest, self.vocab_size)
        self._lengths[:-1] += counts
        return logits[:-1]

    def _cached_attention(self, places: Tensor, slots: Tensor, width: int, mask: Tensor) -> Attend:
        """Attention of the rows in these places [n] of the cache, which writes slots [n, K] and reads `width` slots."""
        n_places, everyone = self._grid.numel(), len(places) == self._grid.numel()

        def attend(layer: int, query: Tensor, *new: Tensor) -> Tensor:
            if layer == len(self._cache):
                empty = new[0].new_zeros(n_places, 0, new[0][0, 0].numel())
                self._cache.append((empty, empty))
            capacity = self._cache[layer][0].shape[1]
            if capacity < width:
                room = (0, 0, 0, width + ROOM - capacity)
                self._cache[layer] = F.pad(self._cache[layer][0], room), F.pad(self._cache[layer][1], room)
                capacity = width + ROOM
            past = []
            for buffer, x in zip(self._cache[layer], new, strict=True):
                index = (places[:, None] * capacity + slots).flatten()
                buffer.view(n_places * capacity, -1).index_copy_(0, index, x.reshape(len(index), -1))
                past.append((buffer if everyone else buffer[places])[:, :width].unflatten(-1, x.shape[2:]))
            return _attention(query, *past, attn_mask=mask)

        return attend

    def _states(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The hidden states under the heads, [S, n K, d], of ids [S, n, K] at positions [S n, K]."""
        s, n, k = ids.shape
        weights = self.weights
        table = weights["model.embed_tokens.weight"]  # [S, V, d]
        first = torch.arange(s)[:, None] * table.shape[1]
        x = F.embedding(ids.flatten(1) + first, table.flatten(0, 1))  # [S, n K, d]
        if self.padding is not None and x.requires_grad:  # as an `nn.Embedding` does
            x = torch.where((ids == self.padding).flatten(1)[..., None], x.detach(), x)
        angles = positions[..., None, None].to(self.frequencies.dtype) * self.frequencies  # [S n, K, 1, d_head / 2]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            y = self._norm(x, layer + "input_layernorm.weight")
            query, key, value = (
                _linear(y, weights[f"{layer}self_attn.{name}_proj.weight"]).view(s * n, k, self.heads, -1)
                for name in "qkv"
            )
            if self.rotates[i]:
                query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            y = attend(i, query, key, value).reshape(s, n * k, -1)
            x = x + _linear(y, weights[layer + "self_attn.o_proj.weight"])
            y = self._norm(x, layer + "post_attention_layernorm.weight")
            gate, up = (_linear(y, weights[f"{layer}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + _linear(F.silu(gate) * up, weights[layer + "mlp.down_proj.weight"])
        return self._norm(x, "model.norm.weight")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """Root mean square normalisation, [S, m, d], in float32 as in Transformers."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weights[name][:, None] * y.to(x.dtype)

    def features(self, prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [m, d], each for the head of its row's model; arguments as for `TrainableModel.features`."""
        padded, lengths = self.models[0]._pad(prompts)
        row, step = mask.nonzero(as_tuple=True)  # [m]
        needed = torch.zeros_like(lengths).scatter_reduce(0, row, step, "amax")  # tokens that are read
        ids = F.pad(padded, (0, tokens.shape[1]), value=-1)  # [N, P + T]
        ids.scatter_(1, lengths[:, None] + torch.arange(tokens.shape[1]), tokens)
        ids = ids[:, : int((lengths + needed).max())].clamp(min=0)
        positions = torch.arange(ids.shape[1]).expand_as(ids)

        def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return _attention(query, key, value, is_causal=True)

        states = self._states(ids.view(len(self.models), -1, ids.shape[1]), positions, attend)
        return states.view(*ids.shape, -1)[row, lengths[row] - 1 + step]

    def _log_probs(self, logits: Tensor) -> Tensor:
        if self.absent_ids:
            logits = logits.index_fill(-1, torch.tensor(self.absent_ids), -torch.inf)
        return F.log_softmax(logits, -1)


def can_be_stacked(models: Sequence[Any]) -> bool:
    """Whether these are models of the small tasks' architectures, of one shape, with all their weights on the CPU."""
    return (
        all(isinstance(m, CausalLM) for m in models) and len({_shape(m) for m in models}) == 1 and _is_plain(models[0])
    )


def _shape(model: CausalLM) -> tuple[Any, ...]:
    names = tuple((name, tuple(p.shape), p.requires_grad) for name, p in model.model.named_parameters())
    config = model.config
    read = (config.model_type, config.rms_norm_eps, str(config.rope_parameters), model.model.dtype, model.device)
    rotates = tuple(_rotates(config, i) for i in range(config.num_hidden_layers))
    return (names, read, rotates, model.vocab_size, model.eos_token_id, model.absent_ids)


def _is_plain(model: CausalLM) -> bool:
    config = model.config
    return (
        config.model_type in ("llama", "smollm3")
        and type(model.model).__name__ in ("LlamaForCausalLM", "SmolLM3ForCausalLM")
        and config.hidden_act == "silu"
        and not (config.attention_bias or config.mlp_bias)
        and not getattr(config, "use_sliding_window", False)
        and config.num_key_value_heads == config.num_attention_heads
        and config.rope_parameters["rope_type"] == "default"
        and model.vocab_size == config.vocab_size
        and model.device.type == "cpu"
        and model.model.dtype in (torch.float32, torch.float64)
    )


def _rotates(config: Any, layer: int) -> bool:
    """Whether a layer has rotary positions."""
    return bool(getattr(config, "no_rope_layers", None) is None or config.no_rope_layers[layer])


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """[S, m, i] and [S, o, i] -> [S, m, o]."""
    return F.linear(x[0], weight[0])[None] if len(weight) == 1 else torch.bmm(x, weight.mT)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, [n, K, heads, d_head]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _attention(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """[n, K, heads, d_head] and twice [n, slots, heads, d_head] -> [n, K, heads, d_head]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)
