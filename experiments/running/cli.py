"""What the command lines share: how flags are read, and how a mistake becomes one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape

from agents.distributed import is_main_process

C = TypeVar("C")


def read_flags(config: type[C], args: Sequence[str] | None = None, description: str | None = None) -> C:
    """The command line, `sys.argv` if None, as a configuration.

    Raises:
        ValueError: in one line that names the flag, the value and what is accepted.
    """
    with errors_in_one_line():
        return tyro.cli(config, args=args, description=description)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """The parser draws a box around what is wrong; the sentence in it becomes a ValueError."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield
        except SystemExit as stop:
            if not stop.code:
                raise
            text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]+|-{4,}", " ", said.getvalue())
            text = text.split("For full helptext")[0]
            raise ValueError(
                re.sub(
                    r"^(Value error|Parsing error|Invalid choice|Unrecognized options(?= Unrec)) "
                    r"|Error parsing [.\w]+: ",
                    "",
                    " ".join(text.split()),
                )
            ) from None


def exit_code(work: Callable[[], Any]) -> int:
    """0 after `work`; or 1 and one line on stderr for a mistake of the user's, and for what the machine cannot do."""
    try:
        work()
    except (ValueError, FloatingPointError, OSError) as error:
        text = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):  # torch has no error of its own for it
            raise
        text = f"out of memory ({error}); take a smaller model, or lower batch_size, rows, draft_limit, max_new_tokens"
    else:
        return 0
    line = " ".join(text.split("\n"))
    Console(stderr=True, quiet=not is_main_process()).print(
        f"[red]error[/] {escape(line)}", soft_wrap=True, highlight=False
    )
    return 1


def command(main: Callable[[C], Any], config: type[C], description: str | None = None) -> int:
    """Read the flags, do the work, and return the exit code."""
    return exit_code(lambda: main(read_flags(config, description=description)))
