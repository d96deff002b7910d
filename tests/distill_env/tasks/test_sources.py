"""Files and folders of every form hold the same rows, and a row that cannot be read has a place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_env.tasks.report import DataReport, places
from distill_env.tasks.sources import read_rows

ROWS = [{"prompt": f"say {i}, twice", "completion": f"{i}\u2028{i}"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TEXTS: dict[str, dict[str, str | bytes]] = {
    "lines": {"a.jsonl": LINES},
    "lines under .json": {"a.json": LINES},
    "another name of lines": {"a.ndjson": LINES},
    "BOM, CRLF and blank lines": {"a.json": "\ufeff" + LINES.replace("\n", "\r\n\r\n") + " \r\n"},
    "no last newline": {"a.jsonl": LINES.rstrip()},
    "list": {"a.json": json.dumps(ROWS)},
    "list over several lines": {"a.json": json.dumps(ROWS, indent=2)},
    "list under .jsonl": {"a.jsonl": json.dumps(ROWS, indent=2)},
    "list in an object": {"a.json": json.dumps({"type": "text2text", "instances": ROWS})},
    "split in an object": {"a.json": json.dumps({"train": ROWS})},
    "compressed": {"a.jsonl.gz": gzip.compress(LINES.encode())},
    "compressed list": {"a.json.gz": gzip.compress(json.dumps(ROWS).encode())},
    "quoted": {"a.csv": "prompt,completion\n" + "".join(f'"{r["prompt"]}",{r["completion"]}\n' for r in ROWS)},
    "tabs": {"a.tsv": "prompt\tcompletion\n" + "".join(f"{r['prompt']}\t{r['completion']}\n" for r in ROWS)},
    "a folder of one file": {"only/a.jsonl": LINES, "only/README.md": "x"},
    "parts": {f"parts/part-{i}.jsonl": json.dumps(row) + "\n" for i, row in enumerate(ROWS)},
    "a file named after the split": {"named/train.jsonl": LINES, "named/dataset_info.json": "{}"},
    "as the hub has it": {"hub/data/train-00000-of-00001.jsonl": LINES, "hub/README.md": "x"},
    "a folder a split": {"folders/train/a.jsonl": LINES},
}


def rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: [row for _, row in part] for split, part in read_rows(path).items()}


@pytest.mark.parametrize("name", TEXTS)
def test_the_same_rows(name: str, tmp_path: Path) -> None:
    files = TEXTS[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    first = next(iter(files))
    path = tmp_path / (first.split("/")[0])
    assert rows(path) == {"train": ROWS}


def saved_by_datasets(folder: Path) -> list[tuple[Path, dict[str, int]]]:
    datasets = pytest.importorskip("datasets", reason="needs datasets, extra tasks")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(folder / "single")
    datasets.DatasetDict(train=whole, test_sft=whole.select([0])).save_to_disk(folder / "several")
    return [(folder / "single", {"train": 3}), (folder / "several", {"train": 3, "test": 1})]


def saved_by_pyarrow(folder: Path) -> list[tuple[Path, dict[str, int]]]:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, extra tasks")
    from pyarrow.parquet import write_table

    table = pyarrow.Table.from_pylist(ROWS)
    write_table(table, folder / "a.parquet")
    for name, opened in (("a.arrow", pyarrow.ipc.new_file), ("b.arrow", pyarrow.ipc.new_stream)):
        with opened(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    return [(folder / name, {"train": 3}) for name in ("a.parquet", "a.arrow", "b.arrow")]


@pytest.mark.parametrize("write", [saved_by_datasets, saved_by_pyarrow])
def test_tables_of_arrow(write: Callable[[Path], list[tuple[Path, dict[str, int]]]], tmp_path: Path) -> None:
    for path, sizes in write(tmp_path):
        found = rows(path)
        assert {split: len(part) for split, part in found.items()} == sizes
        assert found["train"] == ROWS


def test_a_row_that_cannot_be_read_is_reported_with_its_line(tmp_path: Path) -> None:
    """Without a report it is an error. A last line that is cut off is such a row."""
    path = tmp_path / "a.json"
    path.write_text('{"prompt": "x"}\nnull\n\n{"prompt": "y"}\n{"prompt": "\\ud800"}\n{"prom')
    report = DataReport()
    assert [(str(place), row) for place, row in read_rows(path, report=report)["train"]] == [
        (f"{path}, line 1", {"prompt": "x"}),
        (f"{path}, line 4", {"prompt": "y"}),
    ]
    assert report.rows == 5
    assert [place.number for place, _ in report.bad] == [2, 5, 6]
    assert places(place for place, _ in report.bad) == f"{path}, line 2, line 5, line 6"
    with pytest.raises(ValueError, match="line 2"):
        read_rows(path)


def test_files_without_a_split_are_reported(tmp_path: Path) -> None:
    for name in ("train", "eval", "notes"):
        (tmp_path / f"{name}.jsonl").write_text(LINES)
    report = DataReport()
    assert set(read_rows(tmp_path, report=report)) == {"train", "validation"}
    assert report.files == ["notes.jsonl"]


def test_a_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    (tmp_path / "a.arrow").write_bytes(b"x" * 20)
    (tmp_path / "state.json").write_text("[]")
    for path in (tmp_path / "a.jsonl.gz", tmp_path / "a.arrow", tmp_path):
        with pytest.raises(ValueError, match=rf"path: '{path}") as error:
            read_rows(path)
        assert "\n" not in str(error.value)
