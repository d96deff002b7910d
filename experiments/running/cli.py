"""What all commands share: how flags are read, and how an error becomes one line and an exit code."""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from distill_env.checks import check_fields
from experiments.running.help import docstrings

C = TypeVar("C")
CONVENTIONS = (tyro.conf.HelptextFromCommentsOff,)  # docstrings are the help; to look for comments takes half the time


def read_flags(config: type[C], args: Sequence[str] | None = None, description: str | None = None) -> C:
    """The command line, `sys.argv` if None, as a configuration.

    A flag that tyro refuses exits with code 2 and its message; a value that the configuration refuses is a ValueError.
    """
    if not isinstance(config, type):  # a union of subcommands
        return tyro.cli(config, args=args, description=description, config=CONVENTIONS)
    plain: Any = _unchecked_class(config)  # type: ignore[arg-type]
    return checked(tyro.cli(plain, args=args, description=description, config=CONVENTIONS))


def override(default: C, args: Sequence[str], description: str | None = None) -> C:
    """The same with the values of a nested configuration as the defaults, and flags without prefixes."""
    plain = unchecked(default)
    markers = (tyro.conf.OmitArgPrefixes, *CONVENTIONS)
    return checked(tyro.cli(type(plain), args=args, default=plain, description=description, config=markers))


@cache
def _unchecked_class(config: type, nested: tuple[tuple[str, type], ...] = ()) -> Any:
    names = {"__post_init__": lambda _: None, "__doc__": _docstring(config)}
    replaced = [(name, kind, field(default=None)) for name, kind in nested]
    return make_dataclass(config.__name__, replaced, bases=(config,), frozen=True, namespace=names)


def _docstring(config: type) -> str:
    """That of a configuration and of its fields: tyro would keep the line breaks of those under the fields."""
    texts = [docstrings(kind) for kind in reversed(config.__mro__) if is_dataclass(kind)]
    lines = [f"    {name}: {text}" for fields in texts for name, text in fields.items()]
    return "\n".join([inspect.cleandoc(config.__doc__ or ""), "", "Attributes:", *lines])


def unchecked(config: Any) -> Any:
    """A nested dataclass of subclasses that do not check their values."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    values = {name: unchecked(value) if is_dataclass(value) else value for name, value in values.items()}
    nested = tuple((name, type(value)) for name, value in values.items() if is_dataclass(value))
    return _unchecked_class(type(config), nested)(**values)  # type: ignore[arg-type]


def checked(plain: Any) -> Any:
    """The reverse. Raises ValueError for a value that a configuration refuses."""
    values = {f.name: getattr(plain, f.name) for f in fields(plain)}
    config = type(plain).__mro__[1](**{k: checked(v) if is_dataclass(v) else v for k, v in values.items()})
    check_fields(config)
    return config


def exit_code(work: Callable[[], Any]) -> int:
    """0 after `work`; 1 and one line on stderr for an error that a user can correct.

    Modules in the current folder can be imported, after all others: agents and scores of the user's own.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        try:
            work()
        finally:
            sys.stdout.flush()  # a reader that is gone is noticed here, not at the exit
        return 0
    except KeyboardInterrupt as stop:
        return getattr(stop, "exit_code", 130)
    except BrokenPipeError:  # of `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
        return 1
    except (ValueError, FloatingPointError, OSError) as error:
        text = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):  # torch has no error of its own for it
            raise
        text = f"out of memory ({error}); take a smaller model, or lower batch_size, rows, draft_limit, max_new_tokens"
    line = " ".join(text.split("\n"))
    # of the processes of a run, the main one speaks
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    console.print(f"[red]error:[/] {escape(line)}", soft_wrap=True, highlight=False)
    return 1


def command(work: Callable[[C], Any], config: type[C], description: str | None) -> Callable[..., int]:
    """The `main` of a command, which reads its flags, does the work and returns the exit code."""

    def main(args: Sequence[str] | None = None) -> int:
        return exit_code(lambda: work(read_flags(config, args, description)))

    return main


def print_warning(console: Console, text: str) -> None:
    """Print a warning as one line."""
    console.print(f"[bold yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A bar with the time left."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress("{task.description}", *columns, console=console)
