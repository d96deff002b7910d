"""The process in which math-verify reads completions. `grade.Verifier` starts it, limits its time and kills it.

Requests and replies are JSON lines: `{"reference": TeX, "answer": TeX}` -> `{"same": true, false, or null}`, null if
the memory ran out. The file runs as a script, so that it imports neither this package nor torch.

SymPy's own parser evaluates text as Python. Here only LaTeX is read, by a grammar (latex2sympy2_extended). That grammar
still passes the text of each number to SymPy's parser, which `read_number` replaces. Should any path still lead to
`eval`, the interpreter refuses it: see `guard`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from typing import Any

STARTING = ("os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "subprocess.")
CHANGING = ("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")
REFUSED = (*STARTING, *CHANGING, "os.truncate", "ctypes.", "ftplib.", "pty.", "shutil.", "socket.", "urllib.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard() -> None:
    """From now on this process compiles no text, writes no file, starts no process and opens no connection.

    An audit hook, which cannot be removed, raises PermissionError. It is a second protection, not a sandbox for Python
    code, since none is ever run.
    """
    sys.dont_write_bytecode = True

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "compile":  # late imports compile files, `eval` and `exec` do not
            refused = not str(arguments[1]).endswith(".py")
        elif event == "open":
            refused = bool((arguments[2] or 0) & WRITING)
        else:
            refused = event.startswith(REFUSED)
        if refused:
            raise PermissionError(event)

    sys.addaudithook(refuse)


def limit(mebibytes: int) -> None:
    """Limit the address space, and forbid core dumps and bytes in files. No effect on systems without such limits."""
    with contextlib.suppress(ImportError):
        import resource

        for kind, most in (
            (resource.RLIMIT_AS, mebibytes << 20),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, 0),
        ):
            with contextlib.suppress(ValueError, OSError):  # a stricter limit exists already
                resource.setrlimit(kind, (most, most))


def read_number(text: str, *_: Any, **__: Any) -> Any:
    """SymPy's `parse_expr` for a number, without `eval`. Raises ValueError for anything else."""
    from sympy import Float, Integer

    if re.fullmatch(r"\d+", text, re.ASCII):
        return Integer(int(text))
    if re.fullmatch(r"\d*\.\d+|\d+\.", text, re.ASCII):
        return Float(text)
    raise ValueError("not a number")


def prepare() -> None:
    """Import what `same` needs, and let SymPy generate and cache the code of its polynomial arithmetic before `guard`
    forbids it; that code depends on the number of variables only."""
    from math_verify import grader
    from sympy.parsing import sympy_parser
    from sympy.polys.monomials import MonomialOps

    repair(grader)
    same("x^2 - 1", "(x - 1)(x + 1)")
    same("y = 2x", "2x - y = 0")
    for variables in range(1, 9):
        for operation in ("mul", "pow", "mulpow", "ldiv", "div", "lcm", "gcd"):
            getattr(MonomialOps(variables), operation)()
    sympy_parser.parse_expr = read_number


def repair(grader: Any) -> None:
    """Replace three comparisons of math-verify that are wrong in both directions.

    Numbers are rounded to six places, and what is small is cut off: 3^-80 was 3^-79. Roots are compared for negative
    variables, too: sqrt(1/n) was not 1/sqrt(n). Equations without a solution were all equal.
    """
    from sympy import Abs, Float, MatrixBase, N, Symbol, simplify, solve

    symbolic, solutions = grader.sympy_symbolic_eq, grader.sympy_solve_and_compare

    def same_number(a: Any, b: Any, *_: Any) -> bool:
        a, b = (x.doit() if hasattr(x, "doit") else x for x in (a, b))
        if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
            return a.shape == b.shape and all(map(same_number, a, b))
        difference = a - b
        if difference.free_symbols:
            return False
        if difference.has(Float):  # six digits of it
            size = abs(N(b))
            return bool(abs(N(difference)) <= max(1e-6 * min(1, size), 1e-8 * size))
        if difference.is_Rational:
            return bool(difference == 0)
        return bool(abs(N(difference, 20, maxn=400)) < abs(N(b, 20)) * 10**-50)

    def same_formula(a: Any, b: Any) -> bool:
        if symbolic(a, b):
            return True
        difference = a - b
        if isinstance(difference, MatrixBase) or difference.has(Abs):
            return False
        positive = {s: Symbol(s.name, positive=True) for s in difference.free_symbols}
        return bool(positive) and bool(simplify(difference.subs(positive)) == 0)

    def same_solutions(a: Any, b: Any, *how: Any) -> bool:
        return all(solve(x, x.free_symbols) for x in (a, b)) and bool(solutions(a, b, *how))

    grader.sympy_numeric_eq = same_number
    grader.sympy_symbolic_eq = same_formula
    grader.sympy_solve_and_compare = same_solutions


def same(reference: str, answer: str) -> bool | None:
    """Whether math-verify finds two LaTeX expressions equal; what it cannot read equals nothing."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import I

    # its units are names of variables, too: 5t was 5
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True)
    how = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal)]

    def read(text: str) -> Any:
        text = re.sub(r"(?<![A-Za-z\\])i(?![A-Za-z])", " i ", text)  # else 5i is a real variable
        (value,) = parse(rf"\boxed{{{text}}}", how, fallback_mode="no_fallback", parsing_timeout=0, raise_on_error=True)
        imaginary = [s for s in value.free_symbols if s.name == "i"]
        return value.subs(dict.fromkeys(imaginary, I)) if imaginary else value

    if reference == answer:
        return True
    try:
        a, b = read(reference), read(answer)
        return bool(verify(a, b, timeout_seconds=0, raise_on_error=True, allow_set_relation_comp=True))
    except MemoryError:
        return None
    except Exception:
        return False


def main(seconds: float, mebibytes: int) -> None:
    """Reply until the input ends; more than `seconds` of processor time for one request end the process."""
    replies, sys.stdout = sys.stdout, sys.stderr
    prepare()
    limit(mebibytes)
    guard()
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(signal, "setitimer"):  # by the kernel, so that it also ends a loop in C
            signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = same(request["reference"], request["answer"])
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"same": reply}), file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
