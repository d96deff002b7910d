"""Data as rows by split, from files, folders of files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distill_env.models.hub import reason_of, require
from distill_env.tasks.base import SPLITS, Split

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
SPLIT_NAMES: dict[str, Split] = {s: s for s in SPLITS} | dict.fromkeys(("valid", "val", "dev"), "validation")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
Row = tuple[str, dict[str, Any]]  # its place, for messages, and its columns
Data = str | Path | Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]
"""A path or hub id, rows (a list of dicts, a `datasets.Dataset`), or rows by split (a `datasets.DatasetDict`)."""
HubTable = Mapping[Split, tuple[str, str | None, str]]  # hub id, configuration, the hub's name of the split
ACCEPTED = f"a file ({', '.join(SUFFIXES)}), a folder of files with a split in their names, or a hub id"


def read_rows(path: Data, hub: HubTable | None = None) -> dict[Split, list[Row]]:
    """The rows of each split in the data.

    Args:
        path: a file, a folder, or a hub id `owner/name` or `owner/name:configuration`; empty for the `hub` table. A
            single file is the train split, unless its name begins with test. Or the rows themselves: see `Data`.
        hub: the data set of each split on the hub.

    Raises:
        ValueError: in one line with the file and the line, if the data cannot be found or read, or have no rows.
    """
    if not isinstance(path, str | Path):
        return rows_in_memory(path)
    path = str(path)
    if not path:
        if not hub:
            raise ValueError(f"path: empty; expected {ACCEPTED}")
        return {split: _rows(f"{name} {s}", _load(name, config, s)) for split, (name, config, s) in hub.items()}
    if _is_hub_id(path):
        return _read_hub_splits(*path.partition(":")[::2])
    return {split: [r for file in files for r in read_file(file)] for split, files in find_files(path).items()}


def rows_in_memory(data: Any) -> dict[Split, list[Row]]:
    """Rows in memory by split; without names of splits they are the train split.

    Raises:
        ValueError: for what is no such data, an unknown split, a row that is no mapping, or a split without rows.
    """
    if not isinstance(data, Iterable):
        raise ValueError(f"path: {type(data).__name__}; expected rows, or {ACCEPTED}")
    named = data if isinstance(data, Mapping) else {"train": data}
    if unknown := [str(name) for name in named if name not in SPLIT_NAMES]:
        raise ValueError(f"path: the splits {', '.join(unknown)}; expected {', '.join(SPLIT_NAMES)}")
    splits = {SPLIT_NAMES[name]: _rows("the data" if named is not data else name, rows) for name, rows in named.items()}
    for where, row in (row for rows in splits.values() for row in rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"path: {where}: {type(row).__name__}; expected a dict with columns")
    if not splits or not all(splits.values()):
        raise ValueError("path: no rows; expected at least one")
    return {split: [(where, dict(row)) for where, row in rows] for split, rows in splits.items()}


def find_files(path: str | Path) -> dict[Split, list[Path]]:
    """The files of each split: see `read_rows`.

    Raises:
        ValueError: for a path that does not exist, or a folder in which no file is named after a split.
    """
    path = Path(path)
    if path.is_file():
        return {"test" if _split_of_name(path) == "test" else "train": [path]}
    if not path.is_dir():
        raise ValueError(f"path: {str(path)!r} does not exist; expected {ACCEPTED}")
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    splits: dict[Split, list[Path]] = {}
    for file in files:
        split = _split_of_name(file)
        if split is not None:
            splits.setdefault(split, []).append(file)
    if not splits and len(files) == 1:
        return find_files(files[0])
    if not splits:
        names = ", ".join(p.name for p in files) or "no data"
        raise ValueError(f"path: {str(path)!r} has {names}; expected one of the files, or {ACCEPTED}")
    return splits


def _split_of_name(path: Path) -> Split | None:
    return SPLIT_NAMES.get(re.split(r"[-_.]", path.stem.lower())[0])


def read_file(path: Path) -> list[Row]:
    """The rows of a file; a line of a text file is a row with one column, `prompt`.

    Raises:
        ValueError: see `read_rows`.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: {str(path)!r} has an unknown format; expected {', '.join(SUFFIXES)}")
    rows = _READERS[path.suffix](path)
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"path: {where}: {type(row).__name__}; expected an object with columns")
        if None in row:  # the key of CSV fields without a column
            raise ValueError(f"path: {where}: more fields than the header; expected quotes around text with commas")
    if not rows:
        raise ValueError(f"path: {str(path)!r} has no rows; expected at least one")
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ValueError for another encoding."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"path: {str(path)!r}: byte {error.start} is not UTF-8; expected UTF-8") from None
    if "\0" in text:  # UTF-16 without its mark, for example
        raise ValueError(f"path: {str(path)!r}: character {text.index(chr(0))} is NUL; expected UTF-8")
    return text


def columns_of(row: Mapping[str, Any]) -> str:
    """The columns of a row for messages, with their types if they are not text."""
    kinds = (f"{key}" if isinstance(value, str) else f"{key} ({type(value).__name__})" for key, value in row.items())
    return ", ".join(kinds) or "none"


def _rows(where: object, rows: Iterable[Any]) -> list[Row]:
    return [(f"{where}, row {i}", row) for i, row in enumerate(rows, 1)]


def _lines(path: Path) -> list[tuple[str, str]]:
    # not splitlines: JSON may have Unicode's line separators
    return [(f"{path}, line {i}", s) for i, s in enumerate(read_text(path).split("\n"), 1) if s.strip()]


def _read_txt(path: Path) -> list[Row]:
    return [(where, {"prompt": line}) for where, line in _lines(path)]


def _read_csv(path: Path) -> list[Row]:
    try:  # strict: a missing quotation mark would swallow the rest
        return _rows(path, csv.DictReader(read_text(path).splitlines(True), strict=True))
    except csv.Error as error:
        raise ValueError(f"path: {str(path)!r} is not valid CSV: {error}") from None


def _read_jsonl(path: Path) -> list[Row]:
    return [(where, _parse_json(where, line)) for where, line in _lines(path)]


def _read_json(path: Path) -> list[Row]:
    rows = _parse_json(path, read_text(path))
    if not isinstance(rows, list):
        raise ValueError(f"path: {path}: {type(rows).__name__}; expected a list of objects")
    return _rows(path, rows)


def _parse_json(where: object, text: str) -> Any:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise ValueError(f"path: {where}: not valid JSON: {reason}") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"path: {where}: half of a surrogate pair; expected whole characters") from None
    return value


def _read_parquet(path: Path) -> list[Row]:
    require("pyarrow", f"path: {str(path)!r}", "tasks")
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        return _rows(path, read_table(path).to_pylist())
    except (ArrowException, OSError) as error:
        raise ValueError(f"path: {str(path)!r} is not valid Parquet: {str(error).splitlines()[0]}") from None


_READERS = dict(zip(SUFFIXES, (_read_jsonl, _read_json, _read_csv, _read_parquet, _read_txt), strict=True))


def _is_hub_id(path: str) -> bool:
    file = Path(path).exists() or Path(path).suffix in SUFFIXES
    return not file and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", path) is not None


def _load(name: str, configuration: str | None, split: str | None) -> Any:
    require("datasets", f"path: {name!r} is not a file, and a data set of the hub", "tasks")
    import datasets

    try:
        return datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # its type depends on the failure and on the release
        raise ValueError(f"path: {name!r} cannot be loaded ({reason_of(error)}); expected {ACCEPTED}") from None


def _read_hub_splits(name: str, configuration: str) -> dict[Split, list[Row]]:
    loaded = _load(name, configuration or None, None)
    splits = {SPLIT_NAMES[s]: _rows(f"{name} {s}", loaded[s]) for s in loaded if s in SPLIT_NAMES}
    if not splits:
        raise ValueError(f"path: {name!r} has the splits {', '.join(loaded)}; expected {', '.join(SPLIT_NAMES)}")
    return splits
