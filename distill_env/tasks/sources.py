"""Where data come from: files, folders of files, and data sets of the Hugging Face hub, as rows by split."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_env.models.hub import require
from distill_env.tasks.base import SPLITS, Split

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
SPLIT_NAMES: dict[str, Split] = {s: s for s in SPLITS} | {
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its columns
HubTable = Mapping[Split, tuple[str, str | None, str]]  # hub id, configuration, the hub's name of the split
ACCEPTED = f"a file ({', '.join(SUFFIXES)}), a folder with train, validation or test in the names of such, or a hub id"


def read_rows(path: str | Path, hub: HubTable | None = None) -> dict[Split, list[Row]]:
    """The rows of each split that there is.

    Args:
        path: a file, a folder, or a hub id `owner/name` or `owner/name:configuration`; empty for the `hub` table. A
            single file counts as train, unless its name begins with test.
        hub: which data set of the hub holds which split.

    Raises:
        ValueError: in one line with the file and the line, for what cannot be found or read, or holds no rows.
    """
    path = str(path)
    if not path:
        if not hub:
            raise ValueError(f"task_path: none is given; accepted: {ACCEPTED}")
        return {split: _read_hub(*where) for split, where in hub.items()}
    if _is_hub_id(path):
        return _read_hub_splits(*path.partition(":")[::2])
    return {split: [r for file in files for r in read_file(file)] for split, files in find_files(path).items()}


def find_files(path: str | Path) -> dict[Split, list[Path]]:
    """The files of each split: see `read_rows`.

    Raises:
        ValueError: for a path that is not there, or a folder in which no file is named after a split.
    """
    path = Path(path)
    if path.is_file():
        named = _split_of_name(path)
        return {"test" if named == "test" else "train": [path]}
    if not path.is_dir():
        raise ValueError(f"task_path: {str(path)!r} is not there; accepted: {ACCEPTED}")
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    found: dict[Split, list[Path]] = {}
    for file in files:
        split = _split_of_name(file)
        if split is not None:
            found.setdefault(split, []).append(file)
    if not found and len(files) == 1:
        return find_files(files[0])
    if not found:
        names = ", ".join(p.name for p in files) or "nothing readable"
        raise ValueError(f"task_path: {str(path)!r} holds {names}; name one of them; accepted: {ACCEPTED}")
    return found


def _split_of_name(path: Path) -> Split | None:
    return SPLIT_NAMES.get(re.split(r"[-_.]", path.stem.lower())[0])


def read_file(path: Path) -> list[Row]:
    """The rows of a file; the lines of a text file are rows with one column, `prompt`.

    Raises:
        ValueError: see `read_rows`.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"task_path: {str(path)!r} has an unknown format; accepted: {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        text = read_text(path)
        if path.suffix == ".txt":
            rows = [(f"{path}, line {i}", {"prompt": s}) for i, s in enumerate(text.split("\n"), 1) if s.strip()]
        elif path.suffix == ".csv":
            try:
                # strict: a quotation mark that is not closed would swallow the rest
                reader = csv.DictReader(text.splitlines(True), strict=True)
                rows = [(f"{path}, row {i}", row) for i, row in enumerate(reader, 1)]
            except csv.Error as error:
                raise ValueError(f"task_path: {str(path)!r} is not valid CSV: {error}") from None
        else:
            rows = _read_json(path, text)
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"task_path: {where}: {type(row).__name__}; accepted: an object with columns")
        if None in row:  # where CSV puts what has no column
            raise ValueError(f"task_path: {where}: has more fields than the header; accepted: texts with , in quotes")
    if not rows:
        raise ValueError(f"task_path: {str(path)!r} holds no rows")
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ValueError if it is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"task_path: {str(path)!r} is not UTF-8 at byte {error.start}; accepted: UTF-8") from None
    if "\0" in text:  # UTF-16 without its mark, for one
        raise ValueError(f"task_path: {str(path)!r} has a NUL at character {text.index(chr(0))}; accepted: UTF-8")
    return text


def columns_of(row: Mapping[str, Any]) -> str:
    """For messages: the columns, and of what kind they are if not text."""
    kinds = (f"{key}" if isinstance(value, str) else f"{key} ({type(value).__name__})" for key, value in row.items())
    return ", ".join(kinds) or "none"


def _read_json(path: Path, text: str) -> list[Row]:
    rows = []
    lines = [(path, text)] if path.suffix == ".json" else ((f"{path}, line {i}", s) for i, s in _lines(text))
    for where, line in lines:
        try:
            read = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            what = str(error) if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise ValueError(f"task_path: {where}: not valid JSON: {what}") from None
        if _SURROGATE.search(line):  # maybe half of a pair, which no text may hold
            try:
                json.dumps(read, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(f"task_path: {where}: half of a surrogate pair; accepted: whole characters") from None
        rows.append((str(where), read))
    if path.suffix == ".json":
        _, whole = rows[0]
        if not isinstance(whole, list):
            raise ValueError(f"task_path: {path}: {type(whole).__name__}; accepted: a list of objects")
        rows = [(f"{path}, row {i}", row) for i, row in enumerate(whole, 1)]
    return rows


def _lines(text: str) -> list[tuple[int, str]]:
    # not splitlines: a line separator of Unicode may stand within JSON
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_parquet(path: Path) -> list[Row]:
    require("pyarrow", f"task_path: {str(path)!r}", "tasks")
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"task_path: {str(path)!r} is not valid Parquet: {str(error).splitlines()[0]}") from None
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]


def _is_hub_id(path: str) -> bool:
    file = Path(path).exists() or Path(path).suffix in SUFFIXES
    return not file and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", path) is not None


def _load(name: str, configuration: str | None, split: str | None) -> Any:
    require("datasets", f"task_path: {name!r} is not a file, and a data set of the hub", "tasks")
    import datasets

    try:
        return datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # what it raises differs with the hub's mood and with releases
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"task_path: {name!r} cannot be had from the hub: {reason}; accepted: {ACCEPTED}") from None


def _read_hub(name: str, configuration: str | None, split: str) -> list[Row]:
    rows = _load(name, configuration, split)
    return [(f"{name} {split}, row {i}", row) for i, row in enumerate(rows, 1)]


def _read_hub_splits(name: str, configuration: str) -> dict[Split, list[Row]]:
    loaded = _load(name, configuration or None, None)
    splits = {SPLIT_NAMES[s]: s for s in loaded if s in SPLIT_NAMES}
    if not splits:
        raise ValueError(f"task_path: {name!r} has the splits {', '.join(loaded)}; accepted: {', '.join(SPLIT_NAMES)}")
    return {ours: [(f"{name} {s}, row {i}", row) for i, row in enumerate(loaded[s], 1)] for ours, s in splits.items()}
