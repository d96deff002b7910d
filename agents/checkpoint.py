"""What a checkpoint holds, and which ones stay: tensors as safetensors, the rest as JSON, never pickles."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agents.atomic_io import existing_folder, remove_folder, write_folder
from agents.distributed import shard_like


def save_checkpoint(root: Path, iteration: int, save: Callable[[Path], None], keep: int) -> None:
    """Write `root/<iteration>/`: what an agent's `save` writes, and the state of the global random generators.

    At any moment the newest checkpoint that was there is there, whole, or a newer one is; of older ones the last `keep`
    stay.

    Raises:
        OSError: if writing fails; the checkpoints that were there stay.
    """

    def write(folder: Path) -> None:
        save(folder / "agent")
        save_state(folder, "random", *random_state())

    write_folder(root / f"{iteration:06d}", write)
    tidy(root, keep)


def tidy(root: Path, keep: int) -> None:
    """Delete all but the last checkpoints, and what is left of those that were being written or deleted at a kill."""
    for path in checkpoints(root)[keep:]:
        remove_folder(path)
    for unfinished in root.glob("*.new"):
        shutil.rmtree(unfinished, ignore_errors=True)


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    names = {path.name.removesuffix(".old") for path in root.glob("*")}
    return [existing_folder(root / name) for name in sorted(filter(str.isdecimal, names), key=int, reverse=True)]


def load_checkpoint(root: Path, load: Callable[[Path], Any]) -> tuple[Any, Path, dict[Path, str]]:
    """The newest checkpoint that can be read; the global generators go on from it.

    Args:
        root: the folder of the checkpoints.
        load: an agent's.

    Returns:
        The agent, the checkpoint's folder, and what is wrong with newer ones.

    Raises:
        ValueError: in one line, if there is none that can be read.
    """
    damaged: dict[Path, ValueError] = {}
    for path in checkpoints(root):
        try:
            with reading(path):
                agent = load(path / "agent")
                restore_random_state(*load_state(path, "random"))
        except ValueError as error:
            damaged[path] = error
            continue
        return agent, path, {bad: str(error).partition("; ")[0] for bad, error in damaged.items()}
    if not damaged:
        raise ValueError(f"checkpoint: {str(root)!r} holds none")
    raise next(iter(damaged.values()))


def set_aside(path: Path) -> None:
    """A damaged checkpoint stays for whoever wants to look at it, but counts no more."""
    aside = path.with_name(path.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The states of the global generators of torch, its GPUs, numpy and Python, as `save_state` takes them."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, np.int64)),
        "python": torch.tensor(words),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"numpy": [kind, *rest], "python": [version, gauss]}


def restore_random_state(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Let the global generators go on from there."""
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    kind, *rest = state["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, gauss = state["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with the contents of a checkpoint is told in one line.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    try:
        yield
    except (
        OSError,
        SafetensorError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
        ArithmeticError,
        AttributeError,
    ) as error:
        if str(error).startswith("checkpoint: "):
            raise  # told already, further down
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"checkpoint: {str(path)!r} is damaged ({reason}); restore it, or start again under another --name"
        ) from None


def save_state(path: Path, name: str, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write `name.safetensors` and `name.json`."""
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path / f"{name}.safetensors")
    (path / f"{name}.json").write_text(json.dumps(state, indent=1))


def load_state(path: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_state` wrote.

    Raises:
        ValueError: in one line, if a file is missing or damaged.
    """
    with reading(path):
        tensors = load_file(path / f"{name}.safetensors")
        bad = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
        if bad:
            raise ValueError(f"{bad[0]} of {name}.safetensors holds what is no number")
        return tensors, json.loads((path / f"{name}.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """An optimiser's state as flat tensors `<parameter>.<key>` and its parameter groups."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{key}": torch.as_tensor(v) for i, entry in state["state"].items() for key, v in entry.items()}
    return tensors, state["param_groups"]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    """Raises ValueError or LookupError if that is not the state of this optimiser."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(f"the optimiser's {name} is {list(value.shape)}")
        state.setdefault(int(index), {})[key] = shard_like(value, parameter) if value.dim() else value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
