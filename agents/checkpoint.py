"""Checkpoints of a run, one folder an iteration: tensors as safetensors, all else as JSON, no pickles."""

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

from agents.atomic_io import remove_folder, write_folder
from agents.distributed import shard_like

# the errors that damaged files cause; a missing package or too little memory is no damage
DAMAGE = (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError)


def save_checkpoint(root: Path, iteration: int, save: Callable[[Path], None], keep: int) -> None:
    """Write `root/<iteration>/` with an agent and the state of the global random generators; delete old checkpoints.

    A checkpoint that exists is never written again, so that a kill at any moment leaves the newest one complete.

    Args:
        root: the folder of the checkpoints.
        iteration: iterations done.
        save: an agent's `save`.
        keep: how many checkpoints remain, the newest ones.

    Raises:
        OSError: if writing fails. Existing checkpoints stay.
    """

    def write(folder: Path) -> None:
        save(folder / "agent")
        save_state(folder, "random", *random_state())

    path = root / f"{iteration:06d}"
    if not path.exists():
        write_folder(path, write)
    delete_old_checkpoints(root, keep)


def delete_old_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest checkpoints, and folders that a killed process left half-written or half-deleted."""
    for path in checkpoints(root)[keep:]:
        remove_folder(path)
    for path in (*root.glob("*.new"), *root.glob("*.deleted")):
        shutil.rmtree(path, ignore_errors=True)


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted((p for p in root.glob("*") if p.name.isdecimal()), key=lambda p: int(p.name), reverse=True)


def load_checkpoint(root: Path, load: Callable[[Path], Any]) -> tuple[Any, Path, dict[Path, str]]:
    """Load the newest checkpoint that is not damaged, and restore the global random generators.

    Args:
        root: the folder of the checkpoints.
        load: an agent's `load`.

    Returns:
        The agent, the checkpoint's folder, and the damaged newer checkpoints with their errors.

    Raises:
        ValueError: in one line, if there is no checkpoint, or all are damaged.
    """
    damaged: dict[Path, ValueError] = {}
    for path in checkpoints(root):
        try:
            with damage_as_value_error(path):
                agent = load(path / "agent")
                restore_random_state(*load_state(path, "random"))
        except ValueError as error:
            damaged[path] = error
            continue
        return agent, path, {bad: str(error).partition("; ")[0] for bad, error in damaged.items()}
    if not damaged:
        raise ValueError(f"checkpoint: {str(root)!r} holds none")
    raise next(iter(damaged.values()))


def rename_damaged(path: Path) -> None:
    """Rename a damaged checkpoint to `<path>.damaged`, so that it is ignored but not lost."""
    damaged = path.with_name(path.name + ".damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    os.replace(path, damaged)


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The states of the global random generators of torch, its GPUs, NumPy and Python, for `save_state`."""
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
    """Restore what `random_state` returned."""
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    kind, *rest = state["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, gauss = state["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))


@contextmanager
def damage_as_value_error(path: Path) -> Iterator[None]:
    """Turn any error that damaged files cause inside the block into a ValueError of one line.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    try:
        yield
    except DAMAGE as error:
        if str(error).startswith("checkpoint: "):
            raise  # from a block inside this one
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"checkpoint: {str(path)!r} is damaged ({reason}); expected the files as they were saved"
        ) from None


def save_state(path: Path, name: str, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write `name.safetensors` and `name.json`."""
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path / f"{name}.safetensors")
    (path / f"{name}.json").write_text(json.dumps(state, indent=1))


def load_state(path: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_state` wrote.

    Raises:
        ValueError: in one line, if `path` is no folder, a file is missing or damaged, or a tensor is not finite.
    """
    if not path.is_dir():
        raise ValueError(f"checkpoint: {str(path)!r} is not a folder; expected one that `save` wrote")
    with damage_as_value_error(path):
        tensors = load_file(path / f"{name}.safetensors")
        for key, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{key} of {name}.safetensors has non-finite values")
        return tensors, json.loads((path / f"{name}.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """An optimiser's state as a flat dict of tensors `<parameter>.<key>`, and its parameter groups."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{key}": torch.as_tensor(v) for i, entry in state["state"].items() for key, v in entry.items()}
    return tensors, state["param_groups"]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    """Restore what `optimizer_tensors` returned.

    Raises:
        ValueError, LookupError: if it is not the state of an optimiser of these parameters.
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(f"{name} of the optimiser has shape {list(value.shape)}, not {list(parameter.shape)}")
        state.setdefault(int(index), {})[key] = shard_like(value, parameter) if value.dim() else value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
