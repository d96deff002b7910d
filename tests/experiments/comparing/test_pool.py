"""Items of work in other processes: one that fails fails alone, and one whose worker dies is tried again.

The workers import this module, which is light.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from experiments.comparing.pool import for_each


def work(item: str, folder: Path) -> None:
    """Leave a file `<item>`, one letter longer with each try."""
    with (folder / item).open("a") as file:
        file.write("x")
    if item == "fails":
        raise ValueError("as told")
    if item == "dies" or (item == "dies once" and len((folder / item).read_text()) == 1):
        os._exit(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_fails_or_dies_stops_no_other(workers: int, tmp_path: Path) -> None:
    items = ["a", "fails", "dies", "b", "c"]
    errors: dict[str, str | None] = {}
    counts: list[int] = []

    def report(item: str, done: int, error: str | None) -> None:
        counts.append(done)
        errors[item] = error

    for_each(partial(work, folder=tmp_path), items, workers, "local", report)
    assert counts == [1, 2, 3, 4, 5]
    assert {item for item in items if errors[item]} == {"fails", "dies"}
    assert errors["fails"] == "ValueError: as told"
    tries = {item: len((tmp_path / item).read_text()) for item in items}
    assert tries["dies"] == 2
    assert workers == 2 or tries == dict.fromkeys(items, 1) | {"dies": 2}  # a death ends what runs beside it, too


def test_an_item_whose_worker_dies_once_is_done_the_second_time(tmp_path: Path) -> None:
    errors: list[str | None] = []
    for_each(partial(work, folder=tmp_path), ["dies once"], 1, "local", lambda *told: errors.append(told[2]))
    assert errors == [None]
    assert (tmp_path / "dies once").read_text() == "xx"


def test_each_item_has_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    for_each(partial(note, folder=tmp_path), ["a", "b", "c"], 2, "local", lambda *_: None)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "1")


@pytest.mark.parametrize("reuse", [False, True])
def test_whether_an_item_has_a_process_of_its_own(reuse: bool, tmp_path: Path) -> None:
    for_each(partial(note_process, folder=tmp_path), ["a", "b", "c"], 1, "local", lambda *_: None, reuse)
    assert len({path.read_text() for path in tmp_path.iterdir()}) == (1 if reuse else 3)


def test_a_process_that_died_is_not_used_again(tmp_path: Path) -> None:
    errors: dict[str, str | None] = {}

    def report(item: str, _: int, error: str | None) -> None:
        errors[item] = error

    for_each(partial(work, folder=tmp_path), ["a", "dies", "fails", "b"], 1, "local", report, reuse=True)
    assert {item for item, error in errors.items() if error} == {"dies", "fails"}
    assert len((tmp_path / "b").read_text()) == 1


def note_process(item: str, folder: Path) -> None:
    (folder / item).write_text(str(os.getpid()))


def note(item: str, folder: Path) -> None:
    (folder / item).write_text(os.environ["OMP_NUM_THREADS"])
