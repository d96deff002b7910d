"""An accelerator for machines without one: a PyTorch device whose tensors compute on the CPU.

Like CUDA's, its tensors refuse to mix with tensors of the CPU, so a run that passes has no misplaced tensor on the
paths that it took. It counts the bytes that cross to the host and back, and where the host waits: for a number or a
tensor of the device, for the size of a result (`nonzero`, a mask as an index), or for an upload that is not marked
`non_blocking`. It is for correctness and for counting, never for timing.

    with stand_in_device() as traffic:
        model = move(model)
        ...
    traffic.down, traffic.up, traffic.waits, traffic.blocking_uploads

Not covered: pinned memory, streams, the device's own random numbers, fused optimisers.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.helpers.paths import REPOSITORY

NAME = "standin"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
module: Any = getattr(torch, NAME)
module.get_rng_state = lambda device=None: torch.get_rng_state()
module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
module.get_amp_supported_dtype = lambda: [torch.bfloat16]
aten = torch.ops.aten
SIZED_BY_VALUES = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.equal.default)


OURS = tuple(str(REPOSITORY / room) for room in ("distill_env", "agents", "experiments"))
MASKS = (torch.bool, torch.uint8)


@dataclass
class Traffic:
    """Bytes to the host and to the device, and how often the host waited, by line of the project."""

    down: int = 0
    up: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    blocking_uploads: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        self.down = self.up = 0
        self.waits.clear()
        self.blocking_uploads.clear()

    def moved(self, to_device: bool, tensor: Tensor, non_blocking: bool = False) -> None:
        """A tensor crossed; whoever does not say `non_blocking` waits."""
        size = tensor.numel() * tensor.element_size()
        if to_device:
            self.up += size
            self.blocking_uploads.update([line()] * (not non_blocking))
        else:
            self.down += size
            self.waits.update([line()] * (not non_blocking))

    def waited(self) -> None:
        self.waits[line()] += 1


def line() -> str:
    """The innermost line of the project that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    return "elsewhere" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


traffic = Traffic()


class DeviceTensor(Tensor):
    """A tensor of the device, over one of the CPU."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), strides=host.stride(), dtype=host.dtype, device=DEVICE, requires_grad=host.requires_grad
        )
        tensor.host = host.detach()
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, dict(kwargs or {}))


def is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def to_host(x: Any) -> Any:
    return x.host if isinstance(x, DeviceTensor) else x


def to_device(x: Any) -> Any:
    return DeviceTensor(x) if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) else x


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on tensors of the device, or of both sides where CUDA allows it."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, DeviceTensor)]
    here = [x for x in tensors if not isinstance(x, DeviceTensor) and x.dim() > 0]
    if func is aten._to_copy.default:
        target, non_blocking = kwargs.pop("device", None), bool(kwargs.pop("non_blocking", False))
        moves_there = bool(there) if target is None else is_there(target)
        result = func(to_host(args[0]), **kwargs)
        if moves_there != bool(there):
            traffic.moved(moves_there, result, non_blocking)
        return DeviceTensor(result) if moves_there else result
    if func is aten.copy_.default:
        if isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor):
            traffic.moved(isinstance(args[0], DeviceTensor), args[1], any(args[2:]))
        to_host(args[0]).copy_(to_host(args[1]))
        return args[0]
    if there and func is aten._local_scalar_dense.default:
        traffic.down += args[0].element_size()
        traffic.waited()
        return func(there[0].host)
    by_mask = "index" in str(func) and any(x.dtype in MASKS for x in tensors[1:])
    if there and (by_mask or func in SIZED_BY_VALUES):
        traffic.waited()
    if there and here:
        if "index" not in str(func) or not isinstance(args[0], DeviceTensor):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        for index in here:  # CUDA moves indices of the host by itself
            traffic.moved(True, index)
    new_there = bool(there) or is_there(kwargs.get("device"))
    if is_there(kwargs.get("device")):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(to_host, args), **tree_map(to_host, kwargs))
    if there and func._schema.name.endswith("_") and isinstance(args[0], DeviceTensor):
        return args[0]
    return tree_map(to_device, result) if new_there else result


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, dict(kwargs or {}))


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return DeviceTensor(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return to_host(grad)


class _Functions(TorchFunctionMode):
    """Calls that would initialise a real device before they are dispatched: factories, and `to` from the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.untyped_storage:  # which safetensors compares, to find tied weights
            return func(to_host(args[0]))
        if func is Tensor.to and not isinstance(args[0], DeviceTensor):
            others = [*args[1:], kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")]
            others += [y for x in others if isinstance(x, Tensor) for y in (x.device, x.dtype)]
            dtypes = [x for x in others if isinstance(x, torch.dtype)]
            if any(is_there(x) for x in others if isinstance(x, str | torch.device)):
                x = args[0].to(dtypes[-1]) if dtypes else args[0]
                traffic.moved(True, x, bool(kwargs.get("non_blocking")))
                return _Upload.apply(x)
        if is_there(kwargs.get("device")) and not any(isinstance(a, Tensor) for a in args):
            x = func(*args, **{**kwargs, "device": "cpu"})
            if func in (torch.tensor, torch.as_tensor):
                x = x.clone()
                traffic.moved(True, x)
            return to_device(x)
        return func(*args, **kwargs)


@contextmanager
def stand_in_device() -> Iterator[Traffic]:
    """Inside, the device exists, and its traffic is counted from 0."""
    traffic.clear()
    with _Dispatch(), _Functions():
        yield traffic


def move(module: torch.nn.Module, seen: dict[int, torch.nn.Parameter] | None = None) -> Any:
    """`module.to(DEVICE)`; tied parameters stay tied."""
    seen = {} if seen is None else seen
    for name, parameter in module._parameters.items():
        if parameter is not None:
            if id(parameter) not in seen:
                seen[id(parameter)] = torch.nn.Parameter(DeviceTensor(parameter.detach()), parameter.requires_grad)
            module._parameters[name] = seen[id(parameter)]
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else DeviceTensor(buffer.detach())
    for child in module.children():
        move(child, seen)
    return module
