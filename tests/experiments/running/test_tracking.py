"""What a run logs survives a kill at any byte, and reaches whoever should be told."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.running.run_folder import read_metrics
from experiments.running.tracking import Tracker


def log(folder: Path, first: int, last: int, track: str = "none") -> None:
    tracker = Tracker(folder, first - 1, track, {"seed": 0})  # type: ignore[arg-type]
    for i in range(first, last + 1):
        extra = {"validation/accuracy": i / 10} if i % 2 == 0 else {}
        tracker.log(i, {"train/loss": 1 / i, **extra})
    tracker.close()


def test_cut_at_any_byte_of_its_last_line_the_rest_is_read(tmp_path: Path) -> None:
    """And a tracker that goes on from there leaves what one leaves that was not interrupted."""
    log(tmp_path, 1, 4)
    path = tmp_path / "metrics.csv"
    whole, rows = path.read_bytes(), read_metrics(tmp_path)
    last_line = whole[:-2].rfind(b"\n") + 1
    for end in range(last_line, len(whole)):
        path.write_bytes(whole[:end])
        assert read_metrics(tmp_path) == rows[:3]
        log(tmp_path, 4, 4)
        assert path.read_bytes() == whole


def test_what_was_logged_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    """From the table as from TensorBoard, also where the checkpoint is that before the first iteration."""
    for first in (4, 1):
        log(tmp_path, 1, 6, "tensorboard")
        # Event files are read by name: the second of their making, then a count of the process, 10 before 9. A run is
        # resumed seconds later; here both may lie in one.
        (events,) = tmp_path.glob("events*")
        events.rename(tmp_path / "events.out.tfevents.0000000001.first")
        log(tmp_path, first, 5, "tensorboard")
        assert [row["iteration"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
        scalars = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
        steps = [event.step for event in scalars]
        assert sorted(set(steps)) == [1, 2, 3, 4, 5]
        for path in tmp_path.glob("events*"):
            path.unlink()


STAND_IN = """
import json, pathlib
def note(*what):
    with open(pathlib.Path(__file__).with_suffix(".log"), "a") as file:
        file.write(json.dumps(what, default=str) + "\\n")
def init(**options): note("init", options)
def log(metrics, step): note("log", metrics, step)
def finish(): note("finish")
"""


@pytest.mark.parametrize("track", ["wandb", "trackio"])
def test_a_service_is_told_every_iteration_and_a_resumed_run_stays_one(
    track: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for the package, which writes down what it is called with."""
    (tmp_path / "packages").mkdir()
    (tmp_path / f"packages/{track}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, track, raising=False)
    importlib.invalidate_caches()
    folder = tmp_path / "a run"
    folder.mkdir()
    log(folder, 1, 2, track)
    log(folder, 3, 3, track)
    del sys.modules[track]
    calls = [json.loads(line) for line in (tmp_path / f"packages/{track}.log").read_text().splitlines()]
    assert [call[0] for call in calls] == ["init", "log", "log", "finish", "init", "log", "finish"]
    assert [call[2] for call in calls if call[0] == "log"] == [1, 2, 3]
    assert calls[2][1] == {"train/loss": 0.5, "validation/accuracy": 0.2}
    first, second = (call[1] for call in calls if call[0] == "init")
    assert (first["name"], first["resume"], second["resume"]) == ("a run", "never", "allow")
    assert first.get("id") == second.get("id")
    assert ("id" in first) == (track == "wandb")
    log(folder, 1, 1, track)  # begun anew, it is another run
    begun = [json.loads(line) for line in (tmp_path / f"packages/{track}.log").read_text().splitlines()][-3][1]
    assert track == "trackio" or begun["id"] != first["id"]


def test_a_service_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio.py").write_text("def init(**_): raise RuntimeError('no login\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"^track: trackio did not start \(no login\); .*another --track$"):
        log(tmp_path, 1, 1, "trackio")
    del sys.modules["trackio"]
