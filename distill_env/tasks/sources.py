"""Data as rows by split, from files, folders, data sets of the Hugging Face hub, and objects in memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distill_env.models.hub import reason_of, require
from distill_env.tasks.base import SPLITS, Place, Split
from distill_env.tasks.report import DataReport

SPLIT_NAMES: dict[str, Split] = {
    **{s: s for s in SPLITS},
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("testing",), "test"),
}
# what `datasets` writes beside the data
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
METADATA = {SAVED, SAVED_SPLITS, "dataset_info.json", "dataset_infos.json"}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
Row = tuple[Place, dict[str, Any]]
Values = list[tuple[Place, Any]]  # rows before it is known whether they have columns
Data = str | Path | Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]
"""A path or hub id, rows (a list of dicts, a `datasets.Dataset`), or rows by split (a `datasets.DatasetDict`)."""
HubTable = Mapping[Split, tuple[str, str | None, str]]  # hub id, configuration, the hub's name of the split


def read_rows(path: Data, hub: HubTable | None = None, report: DataReport | None = None) -> dict[Split, list[Row]]:
    """The rows of each split in the data.

    Args:
        path: a file; a folder: see `find_files`; a hub id `owner/name` or `owner/name:configuration`; empty for the
            `hub` table; or the rows themselves: see `Data`. A single file is the train split, unless its name begins
            with test.
        hub: the data set of each split on the hub.
        report: to which rows that cannot be read, and files that are not, are added.

    Raises:
        ValueError: in one line with the file and the line, if the data cannot be found or read, or have no rows; and
            for a row that cannot be read, if there is no report.
    """
    if not isinstance(path, str | Path):
        if not isinstance(path, Iterable):
            raise ValueError(f"path: {type(path).__name__}; expected rows, or {ACCEPTED}")
        return _by_split("the data", path if isinstance(path, Mapping) else {"train": path}, report)
    path = str(path)
    if not path:
        if not hub:
            raise ValueError(f"path: empty; expected {ACCEPTED}")
        loaded = {s: _numbered(f"{name} {part}", _load(name, config, part)) for s, (name, config, part) in hub.items()}
        return {split: _checked(values, report) for split, values in loaded.items()}
    if _is_hub_id(path):
        name, _, configuration = path.partition(":")
        return _by_split(name, _load(name, configuration or None, None), report)
    splits = find_files(path, report)
    files = [file for part in splits.values() for file in part]
    if len(files) == 1 and kind_of(files[0]) == ".json" and (parts := _splits_in_json(files[0])):
        return _by_split(path, parts, report)
    return {split: [r for file in part for r in read_file(file, report)] for split, part in splits.items()}


def find_files(path: str | Path, report: DataReport | None = None) -> dict[Split, list[Path]]:
    """The files of each split.

    A folder has files whose names begin with a split, or folders of such names; one file, or parts of one that differ
    in numbers alone; a folder with all of this; or it is what `save_to_disk` of `datasets` writes.

    Raises:
        ValueError: for a path that does not exist, or a folder in which no file is named after a split.
    """
    path = Path(path)
    if path.is_file():
        return {"test" if _split_of_name(path.name) == "test" else "train": [path]}
    if not path.is_dir():
        raise ValueError(f"path: {str(path)!r} does not exist; expected {ACCEPTED}")
    if (path / SAVED).is_file():
        return {_saved_split(path): _saved_files(path)}
    entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    files = [p for p in entries if p.is_file() and kind_of(p) in KINDS and p.name not in METADATA]
    folders = [p for p in entries if p.is_dir()]
    splits: dict[Split, list[Path]] = {}
    for entry in files or folders:
        if (split := _split_of_name(entry.name)) is not None:
            splits.setdefault(split, []).extend([entry] if entry in files else _files_in(entry))
        elif report is not None:
            report.files.append(entry.name)
    if splits:
        return splits
    if report is not None:
        report.files.clear()
    if len(files) == 1:
        return find_files(files[0])
    if files and len({re.sub(r"\d+", "", p.name) for p in files}) == 1:  # parts of one
        return {"train": files}
    if not files and len(folders) == 1:
        return find_files(folders[0], report)
    names = ", ".join(p.name for p in files or folders) or "no data"
    raise ValueError(f"path: {str(path)!r} has {names}; expected one of them, or {ACCEPTED}")


def kind_of(path: Path) -> str:
    """The suffix of a file, without a last `.gz`."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _split_of_name(name: str) -> Split | None:
    return SPLIT_NAMES.get(re.split(r"[-_.]", name.lower())[0])


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder that is one split."""
    if (folder / SAVED).is_file():
        return _saved_files(folder)
    files = sorted(p for p in folder.iterdir() if p.is_file() and kind_of(p) in KINDS and p.name not in METADATA)
    if not files:
        raise ValueError(f"path: {str(folder)!r} has no data; expected {ACCEPTED}")
    return files


def _saved_files(folder: Path) -> list[Path]:
    """The files of a data set that was saved by `datasets`."""
    files = _saved_state(folder).get("_data_files")
    if not isinstance(files, list) or not all(isinstance(f, dict) and "filename" in f for f in files):
        raise ValueError(f"path: {str(folder / SAVED)!r} names no data files; expected what save_to_disk writes")
    return [folder / str(f["filename"]) for f in files]


def _saved_split(folder: Path) -> Split:
    return _split_of_name(str(_saved_state(folder).get("_split"))) or "train"


def _saved_state(folder: Path) -> dict[str, Any]:
    state = _parse_json(folder / SAVED, read_text(folder / SAVED))
    return state if isinstance(state, dict) else {}


def read_file(path: Path, report: DataReport | None = None) -> list[Row]:
    """The rows of a file; a line of a text file is a row with one column, `prompt`.

    Raises:
        ValueError: see `read_rows`.
    """
    if kind_of(path) not in KINDS:
        raise ValueError(f"path: {str(path)!r} has an unknown format; expected {', '.join(KINDS)}, or one with .gz")
    values = _READERS[kind_of(path)](path)
    if not values:
        raise ValueError(f"path: {str(path)!r} has no rows; expected at least one")
    return _checked(values, report)


def _checked(values: Values, report: DataReport | None) -> list[Row]:
    """The rows that are objects with columns."""
    rows: list[Row] = []
    if report is not None:
        report.rows += len(values)
    for place, value in values:
        if isinstance(value, ValueError):
            reason = str(value)
        elif not isinstance(value, Mapping):
            reason = f"{type(value).__name__}; expected an object with columns"
        elif None in value:  # the key of CSV fields without a column
            reason = "more fields than the header; expected quotes around text with commas"
        else:
            rows.append((place, value if isinstance(value, dict) else dict(value)))
            continue
        if report is None:
            raise ValueError(f"path: {place}: {reason}")
        report.bad.append((place, reason))
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, which may be compressed by gzip. Raises ValueError for another encoding."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"path: {str(path)!r}: byte {error.start} is not UTF-8; expected UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"path: {str(path)!r} cannot be read ({reason_of(error)}); expected a whole file") from None
    if "\0" in text:  # UTF-16 without its mark, for example
        raise ValueError(f"path: {str(path)!r}: character {text.index(chr(0))} is NUL; expected UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_filled(value: Any) -> bool:
    """Whether a value says something: it is not missing, NaN, blank or an empty list."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value != [] and not (isinstance(value, float) and value != value)


def columns_of(row: Mapping[str, Any]) -> str:
    """The columns of a row for messages, with their types if they are not text."""
    kinds = ["" if isinstance(value, str) else f" ({type(value).__name__})" for value in row.values()]
    names = [f"{in_brief(key)}{kind}" for key, kind in zip(row, kinds, strict=True)]
    return ", ".join([*names[:20], *(["..."] if names[20:] else [])]) or "none"


def in_brief(text: object) -> str:
    """The beginning of a text on one line, for messages."""
    return " ".join(str(text).split())[:40]


def _numbered(source: object, rows: Iterable[Any]) -> Values:
    return [(Place(str(source), "row", i), row) for i, row in enumerate(rows, 1)]


def _lines(path: Path) -> list[tuple[Place, str]]:
    # not splitlines: JSON may have Unicode's line separators
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(Place(str(path), "line", i), line) for i, line in lines if line.strip()]


def _read_txt(path: Path) -> Values:
    return [(place, {"prompt": line}) for place, line in _lines(path)]


def _read_csv(path: Path) -> Values:
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    try:  # strict: a missing quotation mark would swallow the rest
        lines = io.StringIO(read_text(path))  # not splitlines: text may have Unicode's line separators
        return _numbered(path, csv.DictReader(lines, strict=True, delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"path: {str(path)!r} is not valid CSV: {error}") from None


def _read_json(path: Path) -> Values:
    """The rows of a JSON value, or of one value a line, whatever the file is called."""
    text = read_text(path)
    lines = kind_of(path) != ".json"
    if not lines or text.lstrip().startswith("["):
        try:
            return _numbered(path, _rows_of(path, _parse_json(path, text)))
        except ValueError:
            if not lines and not _begins_with_a_line(text):
                raise
    values: Values = []
    for place, line in _lines(path):
        try:
            values.append((place, _parse_json(place, line)))
        except ValueError as error:
            values.append((place, ValueError(str(error).removeprefix(f"path: {place}: "))))
    return values


def _begins_with_a_line(text: str) -> bool:
    """Whether the first line is a JSON object by itself, and not the only line."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _rows_of(path: Path, value: Any) -> list[Any]:
    """The rows in a JSON value: a list, the only list of objects in an object, or an object that is a row."""
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
        return [value] if len(lists) != 1 or {"role", "from"} & lists[0][0].keys() else lists[0]
    if not isinstance(value, list):
        raise ValueError(f"path: {path}: {type(value).__name__}; expected a list of objects")
    return value


def _splits_in_json(path: Path) -> dict[str, list[Any]]:
    """The lists of an object whose keys are all splits; empty for any other content."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return {}
    are_splits = isinstance(value, dict) and all(_split_of_name(k) and isinstance(v, list) for k, v in value.items())
    return value if are_splits and any(value.values()) else {}


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


def _read_parquet(path: Path) -> Values:
    require("pyarrow", f"path: {str(path)!r}", "tasks")
    from pyarrow.parquet import read_table

    return _rows_of_table(path, "Parquet", lambda: read_table(path))


def _read_arrow(path: Path) -> Values:
    """Arrow's streaming format, which `datasets` writes, or its file format."""
    require("pyarrow", f"path: {str(path)!r}", "tasks")
    from pyarrow import ipc

    content = path.read_bytes()
    reader = ipc.open_file if content.startswith(b"ARROW1") else ipc.open_stream
    return _rows_of_table(path, "Arrow", lambda: reader(content).read_all())


def _rows_of_table(path: Path, name: str, read: Callable[[], Any]) -> Values:
    try:
        table = read()
        table.validate(full=True)  # damaged offsets would be read
        return _numbered(path, table.to_pylist())
    except Exception as error:  # its type depends on the damage
        raise ValueError(f"path: {str(path)!r} is not valid {name}: {reason_of(error)}") from None


_READERS: dict[str, Callable[[Path], Values]] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), _read_json),
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_txt,
}
KINDS = tuple(_READERS)
ACCEPTED = f"a file ({', '.join(KINDS)}), a folder of files with a split in their names, or a hub id"


def _is_hub_id(path: str) -> bool:
    file = Path(path).exists() or Path(path).suffix in (*KINDS, ".gz")
    return not file and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", path) is not None


def _load(name: str, configuration: str | None, split: str | None) -> Any:
    require("datasets", f"path: {name!r} is not a file, and a data set of the hub", "tasks")
    import datasets

    try:
        return datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # its type depends on the failure and on the release
        raise ValueError(f"path: {name!r} cannot be loaded ({reason_of(error)}); expected {ACCEPTED}") from None


def _by_split(name: str, parts: Mapping[str, Any], report: DataReport | None) -> dict[Split, list[Row]]:
    """Rows in memory, by the split that each name begins with."""
    splits: dict[Split, Values] = {}
    for part, rows in parts.items():
        split = _split_of_name(str(part))
        if split is not None:
            source = name if len(parts) == 1 else f"{name} {part}"
            splits[split] = splits.get(split, []) + _numbered(source, rows)
        elif report is not None:
            report.files.append(str(part))
    if not splits:
        raise ValueError(f"path: the splits {', '.join(map(str, parts))}; expected {', '.join(SPLIT_NAMES)}")
    if not all(splits.values()):
        raise ValueError(f"path: {name} without rows; expected at least one in each split")
    return {split: _checked(values, report) for split, values in splits.items()}
