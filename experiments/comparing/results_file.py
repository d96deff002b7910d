"""`results.csv` of a comparison: a row a finished run, with its settings and all its metrics."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from agents.atomic_io import write_text

Row = dict[str, Any]
TEXTS = {"study", "env", "warm", "label", "run"}
ENDPOINT = "correct_chains"
ENDPOINTS = (ENDPOINT, "forward_kl")  # the primary one is the first that was measured: of ungraded tasks the second


def primary_endpoint(rows: Sequence[Row]) -> str:
    """The primary endpoint of the runs of a task."""
    return next((key for key in ENDPOINTS if any(row.get(key) is not None for row in rows)), ENDPOINT)


def write_results(rows: Sequence[Row], path: Path) -> None:
    """Add rows to the file; a row replaces one of the same run and study."""
    merged = {(row["study"], row["run"]): row for row in [*read_results(path), *rows]}
    write_csv(merged.values(), path)


def write_csv(rows: Collection[Row], path: Path) -> None:
    """Write rows that need not have the same columns. A reader sees the old file or the new one."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_results(path: Path) -> list[Row]:
    """The rows of the file, none if it does not exist; empty cells are left out.

    Raises:
        ValueError: in one line, if the file is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return [
                {k: v if k in TEXTS else int(v) if k == "seed" else float(v) for k, v in row.items() if v}
                for row in csv.DictReader(file, strict=True)
            ]
    except (ValueError, TypeError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"runs: {str(path)!r} is damaged ({reason}); expected results.csv, which compare.py rewrites when deleted"
        ) from None
