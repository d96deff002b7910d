"""Files and folders that are written aside, then renamed: a process that is killed leaves no half-written one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


class NotWrittenError(OSError):
    """A file or a folder could not be written; in one line."""


def write_text(path: Path, text: str) -> None:
    """Write a text file, as `write_file` does."""
    write_file(path, lambda aside: aside.write_text(text, newline=""))


def write_file(path: Path, write: Callable[[Path], object], *, shared: bool = False) -> None:
    """Write a file. A reader finds the old one or the new one, at any moment.

    Args:
        path: the file.
        write: called with the path of a file beside it, which it creates.
        shared: whether other processes may write the same file; the last one to finish wins.

    Raises:
        NotWrittenError: if writing fails. The old file stays as it was.
    """

    def write_and_rename(aside: Path) -> None:
        write(aside)
        _flush(aside)
        os.replace(aside, path)

    suffix = f".{os.getpid()}.new" if shared else ".new"
    _write_aside(path.with_name(path.name + suffix), path, write_and_rename)


def write_folder(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a folder beside `path`, then rename it. A folder that is at `path` is deleted once the new one is complete.

    Args:
        path: the folder.
        write: called with the path of an empty folder, which it fills.

    Raises:
        NotWrittenError: if writing fails, for example because the disk is full. The old folder stays as it was.
    """
    path = Path(path)
    new = path.with_name(path.name + ".new")

    def fill(aside: Path) -> None:
        aside.mkdir(parents=True)
        write(aside)
        for entry in (*aside.rglob("*"), aside):
            _flush(entry)

    shutil.rmtree(new, ignore_errors=True)
    _write_aside(new, path, fill)
    if path.exists():
        remove_folder(path)
    os.replace(new, path)
    _flush(path.parent)


def remove_folder(path: Path) -> None:
    """Rename a folder to `<path>.deleted` and delete it, so that no half-deleted folder is at `path`."""
    deleted = path.with_name(path.name + ".deleted")
    shutil.rmtree(deleted, ignore_errors=True)
    os.replace(path, deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def _write_aside(aside: Path, path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(aside)`; if it fails, delete what it wrote and name `path` in the error."""
    try:
        write(aside)
    except BaseException as error:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        # safetensors raises an error of its own for an OSError
        if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, NotWrittenError):
            raise NotWrittenError(f"{str(path)!r} could not be written ({error}); nothing was changed") from None
        raise


def _flush(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk: a rename alone survives a kill, not a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
