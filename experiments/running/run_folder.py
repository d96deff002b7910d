"""The files of a run's folder: `metrics.csv` and JSON."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.atomic_io import write_text


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of `metrics.csv`, without empty cells and without an incomplete last line.

    Raises:
        ValueError: if the file is damaged.
    """
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            text = file.read()
        lines = text[: text.rfind("\n") + 1].splitlines()
        rows = list(csv.DictReader(lines, strict=True))
        return [
            {"iteration": int(row["iteration"])} | {k: float(v) for k, v in row.items() if v and k != "iteration"}
            for row in rows
        ]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise damaged(path, error) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file. A reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=1))


def read_json(path: Path, needed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An object that `write_json` wrote.

    Args:
        path: of the file.
        needed: keys that it must have, with the types of their values.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise TypeError(f"{type(value).__name__}, not an object")
        for key, kind in (needed or {}).items():
            if not isinstance(value.get(key), kind):
                raise TypeError(f"{key} is {type(value.get(key)).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged(path, error) from None
    return value


def damaged(path: Path, error: Exception) -> ValueError:
    """The error for a file of a run that cannot be read."""
    reason = f"{type(error).__name__}: {error}".split("\n")[0]
    return ValueError(f"run: {str(path)!r} is damaged ({reason}); restore it, or start another run with another --name")


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which strict JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
