"""Files and folders on disk that are the old state or the new one at any moment, and who may write them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk: a rename alone outlives a kill, not a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file aside, then rename: a reader finds the old text or the new one.

    Raises:
        OSError: if writing fails; what was there stays.
    """
    aside = path.with_name(path.name + ".new")
    try:
        with aside.open("w", newline="") as file:
            file.write(text)
        sync(aside)
        os.replace(aside, path)
    except OSError as error:
        raise _not_written(path, error) from None


def write_shared_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then rename it. Several processes may write the same one: the last stays.

    Raises:
        OSError: if writing fails; what was there stays.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        write(aside)
        sync(aside)
        os.replace(aside, path)
    except SafetensorError as error:  # what its writer makes of an OSError
        aside.unlink(missing_ok=True)
        raise OSError(f"{str(path)!r} could not be written ({error})") from None
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


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
        for entry in (*new.rglob("*"), new):
            sync(entry)
    except (OSError, SafetensorError) as error:  # which is what its writer makes of an OSError
        shutil.rmtree(new, ignore_errors=True)
        raise _not_written(path, error) from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():  # otherwise the old one may be the only one
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(new, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


class NotWrittenError(OSError):
    """In one line, what could not be written and why."""


def _not_written(path: Path, error: Exception) -> OSError:
    if isinstance(error, NotWrittenError):
        return error  # told already, further down
    return NotWrittenError(f"{str(path)!r} could not be written ({error}); what was saved before stands")


def existing_folder(path: str | Path) -> Path:
    """`path`, or `<path>.old` if an interruption fell between the two renames."""
    path = Path(path)
    old = path.with_name(path.name + ".old")
    if not path.exists() and old.exists():
        return old
    if not path.is_dir():
        raise ValueError(f"checkpoint: {str(path)!r} is not a folder")
    return path


def remove_folder(path: Path) -> None:
    """Delete a folder so that nobody takes what is left of it for a whole one."""
    unfinished = path.with_name(path.name + ".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    os.replace(path, unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file. It is the system's, so that a process that dies, however it dies, holds it no more.

    Args:
        path: the file, made if need be.
        wait: until another process lets go of it.

    Raises:
        BlockingIOError: if another process holds it and `wait` is not set.
    """
    with path.open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows has none
            pass
        else:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
