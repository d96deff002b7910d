"""The process in which math-verify reads what a model wrote. `grading.Verifier` starts it, times it and kills it.

Requests and replies are JSON lines: `{"reference": TeX, "answer": TeX}` -> `{"same": true, false, or null}`, null if
the memory ran out. It is run as a file, so that it imports neither this package nor torch.

SymPy's own parser evaluates text as Python. Here only LaTeX is read, by a grammar (latex2sympy2_extended). That still
hands the text of each number to SymPy's parser, so `read_number` takes its place; and should any path lead to `eval`
after all, the interpreter refuses: see `guard`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from typing import Any

REFUSED = (
    "os.exec",
    "os.fork",
    "os.kill",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "ctypes.",
    "ftplib.",
    "pty.",
    "shutil.",
    "socket.",
    "subprocess.",
    "urllib.",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard() -> None:
    """From here on this process compiles no text, writes no file, starts no process and opens no connection.

    An audit hook, which cannot be taken off again. What it refuses raises PermissionError. It is a second lock, not a
    sandbox for Python code: none gets to run.
    """
    sys.dont_write_bytecode = True

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "compile":  # modules that are imported late come from files, `eval` and `exec` do not
            refused = not str(arguments[1]).endswith(".py")
        elif event == "open":
            refused = bool((arguments[2] or 0) & WRITING)
        else:
            refused = event.startswith(REFUSED)
        if refused:
            raise PermissionError(event)

    sys.addaudithook(refuse)


def limit(mebibytes: int) -> None:
    """Cap the address space; no core dumps, no bytes into files. Nothing on systems without such limits."""
    with contextlib.suppress(ImportError):
        import resource

        for kind, most in (
            (resource.RLIMIT_AS, mebibytes << 20),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, 0),
        ):
            with contextlib.suppress(ValueError, OSError):  # a stricter limit is there already
                resource.setrlimit(kind, (most, most))


def read_number(text: str, *_: Any, **__: Any) -> Any:
    """What SymPy's `parse_expr` makes of a number, without `eval`. Raises ValueError for anything else."""
    from sympy import Float, Integer

    if re.fullmatch(r"\d+", text, re.ASCII):
        return Integer(int(text))
    if re.fullmatch(r"\d*\.\d+|\d+\.", text, re.ASCII):
        return Float(text)
    raise ValueError("not a number")


def prepare() -> None:
    """Load what `same` needs, and let SymPy generate the arithmetic of its polynomials while it still may: code of its
    own, which depends on the number of variables alone and which it keeps."""
    from sympy.parsing import sympy_parser
    from sympy.polys.monomials import MonomialOps

    same("x^2 - 1", "(x - 1)(x + 1)")
    for variables in range(1, 9):
        for operation in ("mul", "pow", "mulpow", "ldiv", "div", "lcm", "gcd"):
            getattr(MonomialOps(variables), operation)()
    sympy_parser.parse_expr = read_number


def same(reference: str, answer: str) -> bool | None:
    """Whether math-verify holds two LaTeX expressions for equal; what it cannot read equals nothing."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> Any:
        how = [LatexExtractionConfig(boxed_match_priority=0)]
        return parse(rf"\boxed{{{text}}}", how, fallback_mode="no_fallback", parsing_timeout=0, raise_on_error=True)

    try:
        return bool(verify(read(reference), read(answer), timeout_seconds=0, raise_on_error=True))
    except MemoryError:
        return None
    except Exception:
        return False


def main(seconds: float, mebibytes: int) -> None:
    """Answer until the input ends; more than `seconds` of processor time for one request end the process."""
    replies, sys.stdout = sys.stdout, sys.stderr
    prepare()
    limit(mebibytes)
    guard()
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(signal, "setitimer"):  # by the kernel, so that no loop in C outlasts it
            signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = same(request["reference"], request["answer"])
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"same": reply}), file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
