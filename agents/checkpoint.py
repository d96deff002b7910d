"""Folders that are either the old state or the new one: tensors as safetensors, the rest as JSON, never pickles."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def write_folder(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `path`, then put it in its place. If writing fails, what was there stays.

    The folder that was there is kept as `<path>.old` until the new one stands, and `existing_folder` falls back on it.

    Raises:
        OSError: if writing fails, for one because the disk is full.
    """
    path = Path(path)
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        write(new)
    except SafetensorError as error:  # what its writer makes of an OSError
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"{str(path)!r} could not be written ({error}); what was saved before stands") from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():  # otherwise the old one may be the only one
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def existing_folder(path: str | Path) -> Path:
    """`path`, or `<path>.old` if an interruption fell between the two renames."""
    path = Path(path)
    old = path.with_name(path.name + ".old")
    if not path.exists() and old.exists():
        return old
    if not path.is_dir():
        raise ValueError(f"checkpoint: {str(path)!r} is not a folder")
    return path


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with the contents of a checkpoint is told in one line.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
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
        return load_file(path / f"{name}.safetensors"), json.loads((path / f"{name}.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """An optimiser's state as flat tensors `<parameter>.<key>` and its parameter groups."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{key}": torch.as_tensor(v) for i, entry in state["state"].items() for key, v in entry.items()}
    return tensors, state["param_groups"]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
