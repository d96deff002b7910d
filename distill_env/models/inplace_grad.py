"""The embedding and the head of a language model, with gradients that are added in place.

Autograd makes a tensor of a weight's whole size for every use of it, then adds it to `weight.grad`. A vocabulary's
weight is most of a small model, and it is used once for every chunk of states and every group of rows: these tensors
would take more memory and time than the rest of the update. So once a weight has a gradient, more is added in place.
`backward` works as usual; `torch.autograd.grad` for such a weight works only while its `grad` is None.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_supported(module: nn.Module) -> bool:
    """Whether a module is a plain linear map without bias, or a plain embedding: no subclass, adapter, shard, hook or
    other option."""
    weight = getattr(module, "weight", None)
    if type(weight) is not nn.Parameter:
        return False
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return False
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    if type(module) is nn.Linear:
        return module.bias is None
    return type(module) is nn.Embedding and not (module.max_norm or module.scale_grad_by_freq or module.sparse)


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """`module(x)` of a supported module, [..., d] -> [..., V]."""
    return _Linear.apply(x, module.weight)


def embedding(module: nn.Embedding, ids: Tensor) -> Tensor:
    """`module(ids)` of a supported module, int64 [...] -> [..., d]."""
    return _Embedding.apply(ids, module.weight, module.padding_idx)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x = grad @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None
        grad, x = grad.flatten(0, -2).T, x.flatten(0, -2)
        if weight.grad is None:
            return to_x, grad @ x
        weight.grad.addmm_(grad, x)
        return to_x, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding = padding
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        ids, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None
        ids, grad = ids.flatten(), grad.flatten(0, -2)
        if ctx.padding is not None:
            grad = grad.masked_fill((ids == ctx.padding)[:, None], 0.0)
        if weight.grad is None:
            return None, torch.zeros_like(weight).index_add_(0, ids, grad), None
        weight.grad.index_add_(0, ids, grad)
        return None, None, None
