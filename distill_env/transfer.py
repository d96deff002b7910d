"""What crosses between the host and the models' device.

Numbers for the device go up without a wait. The host waits only in `fetch`, which brings any number of tensors in one
copy. On a CPU both cost nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def device_of(model: Any) -> torch.device:
    """Where a model returns its log-probabilities; the CPU unless it says otherwise."""
    return torch.device(getattr(model, "device", "cpu"))


def on_host(device: torch.device) -> bool:
    """Whether the host reads tensors of this device without a wait."""
    return device.type == "cpu"


def upload(values: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, in the order of what the device computes; the host does not wait.

    A tensor that lies there already is returned as it is, and one of another device is copied.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and on_host(tensor.device):
        tensor = tensor.pin_memory()  # the copy of pageable memory would wait
    return tensor.to(device, non_blocking=True)


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host for copies from a device, which need not wait; see `settle`."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def settle(device: torch.device) -> None:
    """Wait until copies from a device have arrived."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def fetch(*tensors: Tensor) -> list[Tensor]:
    """The same tensors on the host, with one wait for all those of a device."""
    groups = defaultdict(list)
    for i, tensor in enumerate(tensors):
        if not on_host(tensor.device):
            groups[tensor.device].append(i)
    fetched = list(tensors)
    for places in groups.values():
        parts = [tensors[i].detach().contiguous().flatten().view(torch.uint8) for i in places]
        block = torch.cat(parts).cpu()
        for i, part in zip(places, block.split([len(part) for part in parts]), strict=True):
            # a part begins anywhere in the block, other dtypes only at multiples of their size
            fetched[i] = part.clone().view(tensors[i].dtype).view(tensors[i].shape)
    return fetched


class Mark:
    """A point in what a device computes. The difference of two is in seconds; after a later `fetch` nobody waits for
    it."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
        self._clock = time.perf_counter()

    def __sub__(self, earlier: Mark) -> float:
        if self._event is not None and earlier._event is not None:
            self._event.synchronize()
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._clock - earlier._clock
