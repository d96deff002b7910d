"""Gradients that are added in place are those that autograd adds, for every module that is served; others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distill_env.models import inplace_grad

V, D = 11, 3


def gradient(weight: Tensor, losses: list[Callable[[], Tensor]]) -> Tensor:
    """The gradient in the weight after one backward pass for each loss."""
    weight.grad = None
    for loss in losses:
        loss().backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_tied_weight_has_the_gradient_of_all_its_uses(padding: int | None, passes: int) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D, padding_idx=padding, dtype=torch.float64)
    head = nn.Linear(D, V, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    ids = torch.randint(0, V, (passes, 2, 9))
    ids[:, :, :3] = 4  # repeated, and perhaps padding
    assert inplace_grad.is_supported(embedding)
    assert inplace_grad.is_supported(head)
    ours = [
        lambda i=i: inplace_grad.linear(head, inplace_grad.embedding(embedding, i)).log_softmax(-1)[..., 2].sum()
        for i in ids
    ]
    plain = [lambda i=i: head(embedding(i)).log_softmax(-1)[..., 2].sum() for i in ids]
    torch.testing.assert_close(gradient(head.weight, ours), gradient(head.weight, plain), rtol=0, atol=1e-12)


def test_the_input_has_its_gradient_whether_or_not_the_weight_has_one() -> None:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=False, dtype=torch.float64)
    for _ in range(2):
        x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
        inplace_grad.linear(head, x).exp().sum().backward()
        (expected,) = torch.autograd.grad(head(x).exp().sum(), x)
        torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)


def test_a_frozen_weight_has_none() -> None:
    head = nn.Linear(D, V, bias=False).requires_grad_(False)
    x = torch.randn(4, D, requires_grad=True)
    inplace_grad.linear(head, x).sum().backward()
    assert head.weight.grad is None
    assert x.grad is not None


def test_nothing_of_the_weights_size_is_made_once_it_has_a_gradient() -> None:
    """A hook is shown what autograd is about to add: the first gradient, and then nothing."""
    torch.manual_seed(0)
    head, embedding = nn.Linear(D, V, bias=False), nn.Embedding(V, D)
    x, ids = torch.randn(4, D), torch.tensor([1])
    for weight, use in (
        (head.weight, lambda: inplace_grad.linear(head, x)),
        (embedding.weight, lambda: inplace_grad.embedding(embedding, ids)),
    ):
        shown: list[bool] = []
        weight.register_hook(lambda grad, shown=shown: shown.append(grad is not None))
        for _ in range(3):
            use().sum().backward()
        assert shown == [True, False, False]


def hooked() -> nn.Module:
    module = nn.Linear(D, V, bias=False)
    module.register_forward_hook(lambda *_: None)
    return module


def hooked_weight() -> nn.Module:
    module = nn.Embedding(V, D)
    module.weight.register_hook(lambda grad: grad)
    return module


def other_forward() -> nn.Module:
    module = nn.Embedding(V, D)
    module.forward = lambda ids: ids  # type: ignore[method-assign,assignment]
    return module


class Scaled(nn.Embedding):
    pass


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(D, V),
        nn.Embedding(V, D, max_norm=1.0),
        nn.Embedding(V, D, sparse=True),
        nn.Embedding(V, D, scale_grad_by_freq=True),
        Scaled(V, D),
        nn.Identity(),
        hooked(),
        hooked_weight(),
        other_forward(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_do_more_are_not_served(module: nn.Module) -> None:
    assert not inplace_grad.is_supported(module)
