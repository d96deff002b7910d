"""Every alarm rings for metrics that call for it, and for none that do not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.metrics import repeated_share
from experiments.running.alarms import AlarmLog, alarms

HORIZON = 24
HEALTHY = {
    "train/loss": 0.5,
    "train/grad_norm": 1.0,
    "train/entropy": 0.4,
    "rollout/length": 9.0,
    "rollout/loops": 0.02,
    "rollout/hard_share": 0.3,
    "rollout/rewritten_share": 0.3,
}


def history(iterations: int = 60, **changes: Any) -> list[dict[str, float]]:
    """Healthy iterations; a change is a value, or a pair that is run through from the first to the last iteration."""
    rows = []
    for i in range(iterations):
        row = dict(HEALTHY)
        for key, value in changes.items():
            start, end = value if isinstance(value, tuple) else (value, value)
            name = next(k for k in HEALTHY if k.endswith("/" + key))
            row[name] = start + (end - start) * i / max(iterations - 1, 1)
        rows.append(row)
    return rows


RINGS = {
    "a loss of nan": (history(grad_norm=math.nan), "not finite"),
    "an infinite loss in the first iteration": (history(1, loss=math.inf), "not finite"),
    "answers that grow to the horizon": (history(length=(9.0, 24.5)), "exploding length"),
    "answers that begin to loop": (history(loops=(0.0, 0.6)), "repetition"),
    "entropy a tenth of what it was": (history(entropy=(2.0, 0.0)), "entropy collapse"),
    "entropy of nothing from the start": (history(entropy=0.005), "entropy collapse"),
    "all steps hard": (history(20, hard_share=1.0, rewritten_share=0.0), "teacher rejects everything"),
    "all steps rewritten": (history(20, hard_share=0.5, rewritten_share=0.99), "teacher rejects everything"),
}
SILENT = {
    "nothing yet": [],
    "a healthy run": history(),
    "all hard, but not for long": history(19, hard_share=1.0, rewritten_share=1.0),
    "all hard, but for one iteration": [*history(30, hard_share=1.0), *history(1), *history(18, hard_share=1.0)],
    "answers as long as the horizon from the start": history(length=24.0),
    "answers that grow, but not to the horizon": history(length=(4.0, 12.0)),
    "loops from the start, as of a teacher that loops": history(loops=0.7),
    "loops that are unlearned": history(loops=(0.9, 0.0)),
    "entropy that falls to a quarter": history(entropy=(1.6, 0.4)),
    "one odd batch": [*history(59), {**HEALTHY, "rollout/length": 24.0, "train/entropy": 0.0, "rollout/loops": 1.0}],
    "an agent that reports nothing": [{"rollout/tokens": 5.0}] * 60,
}


@pytest.mark.parametrize("case", RINGS)
def test_it_rings(case: str) -> None:
    """One alarm of the right kind, with advice, fatal only where nothing good can follow."""
    rows, kind = RINGS[case]
    (alarm,) = alarms(rows, HORIZON)
    assert alarm.kind == kind
    assert "--" in alarm.advice
    assert alarm.fatal == (kind == "not finite")


@pytest.mark.parametrize("case", SILENT)
def test_it_is_silent(case: str) -> None:
    assert alarms(SILENT[case], HORIZON) == []


def test_where_the_teacher_writes_by_choice_it_rejects_nothing() -> None:
    assert alarms(history(hard_share=1.0, rewritten_share=1.0), HORIZON, gated=False) == []


@pytest.mark.parametrize("own_metrics", [True, False])
def test_a_student_that_loses_most_of_what_it_could_is_ruined(own_metrics: bool) -> None:
    """Whoever trains it; as long as the latest validation says so, and not by chance."""
    settings: dict[str, Any] = {"before": {"correct_chains": 0.4}, "validated": 100, "own_metrics": own_metrics}
    rows = history(5)
    rows[1] |= {"validation/correct_chains": 0.1}
    (alarm,) = alarms(rows, HORIZON, **settings)
    assert (alarm.kind, alarm.fatal) == ("student ruined", False)
    for healthy in ({"validation/correct_chains": 0.3}, {"validation/accuracy": 0.0}):
        assert alarms([*rows[:1], {**HEALTHY, **healthy}], HORIZON, **settings) == []
    few = {"before": {"correct_chains": 0.25}, "validated": 8}
    assert alarms([{**HEALTHY, "validation/correct_chains": 0.0}], HORIZON, **few) == []  # chance


def test_metrics_of_others_may_mean_something_else() -> None:
    for rows, kind in RINGS.values():
        assert kind
        assert alarms(rows, HORIZON, own_metrics=False) == []


def test_an_alarm_is_told_once_until_it_clears(tmp_path: Path) -> None:
    """Two episodes of refusal: two lines; a log that goes on from the middle of the first is the same in the end."""
    episode = history(30, hard_share=1.0)
    rows = [*episode, *history(5), *episode]
    whole = AlarmLog(tmp_path / "whole", [], HORIZON)
    told = [n for n in range(1, len(rows) + 1) if whole.update(n, rows[:n])]
    assert told == [20, 55]
    assert [line.split(":")[0] for line in whole.lines] == ["iteration 20", "iteration 55"]
    assert (tmp_path / "whole").read_text().splitlines() == whole.lines

    for until in (10, 25, 60):
        parts = AlarmLog(tmp_path / "parts", [], HORIZON)
        for n in range(1, until + 1):
            parts.update(n, rows[:n])
        resumed_at = until - 7
        parts = AlarmLog(tmp_path / "parts", rows[:resumed_at], HORIZON)
        for n in range(resumed_at + 1, len(rows) + 1):
            parts.update(n, rows[:n])
        assert (tmp_path / "parts").read_text() == (tmp_path / "whole").read_text()
        (tmp_path / "parts").unlink()


def test_the_share_of_repeated_4_grams_is_that_of_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (50, 40), generator=generator)
    lengths = torch.randint(0, 41, (50,), generator=generator)
    tokens[torch.arange(40) >= lengths[:, None]] = -1
    expected = []
    for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        grams = [tuple(row[i : i + 4]) for i in range(length - 3)]
        expected.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    assert max(expected) > 0.3
    torch.testing.assert_close(repeated_share(tokens), torch.tensor(expected))
    assert repeated_share(tokens[:, :3]).equal(torch.zeros(50))
    assert repeated_share(150_000 + torch.arange(40)[None]).item() == 0
