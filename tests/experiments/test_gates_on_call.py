"""The teacher on call: gates by name, thresholds by budget, areas under curves, prices; the commands that use them."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.collector import collect
from agents.rollout import Rollout, RolloutCost
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import Gate
from distill_env.models.hand_over import HandOverHead
from distill_env.randomness import episode_keys
from distill_env.tasks.base import Prompt
from experiments import decode as decode_module
from experiments.answering.areas import area, value_at, work_at
from experiments.answering.assisted import decode, own_divergence
from experiments.answering.gates import named_gate, read_alone
from experiments.answering.prices import Prices, Usage
from experiments.running.build import make_env, make_student
from experiments.running.flags import parse
from tests.experiments.test_decode import HORIZON, STUDENT, TEACHER, V, folder_of
from tests.helpers.tables import Ragged


def ragged(rows: int) -> DistillVectorEnv:
    return DistillVectorEnv(
        rows, Ragged(V, HORIZON), TEACHER, chunk=16, autoreset_mode="Disabled", reveal_teacher=False
    )


def test_names_of_gates() -> None:
    assert named_gate("divergence") == Gate()
    assert named_gate("student_entropy/first") == Gate("student_entropy", step_reduction="first")
    assert named_gate("divergence@margin") == Gate(screen="margin")
    for name in ("no_score", "divergence/often", "margin@divergence", "divergence@no_score"):
        with pytest.raises(ValueError, match=r"^(score|screen): ") as error:
            named_gate(name)
        assert "\n" not in str(error.value)


def test_the_area_under_a_curve_by_hand() -> None:
    """0.5 at share 0, 0.9 at 0.1, 1.0 at 1, between straight lines: 0.7 on the first half of the way to 0.2."""
    points = [(1.0, 1.0, 10), (0.0, 0.5, 0), (0.1, 0.9, 20)]
    curve = [{"share": share, "accuracy": y, "scored": n, "tokens": 100} for share, y, n in points]
    assert value_at(curve, "accuracy", 0.05) == pytest.approx(0.7)
    at_fifth = 0.9 + 0.1 / 9
    assert value_at(curve, "accuracy", 0.2) == pytest.approx(at_fifth)
    assert area(curve, "accuracy", 0.2) == pytest.approx((0.7 + (0.9 + at_fifth) / 2) / 2)
    assert work_at(curve, "scored", 0.1) == pytest.approx(0.2)


def test_a_price_by_hand() -> None:
    prices = Prices(processed=2, cached=0.5, written=10, call=3, student=1)
    usage = Usage(written=4, processed=20, reprocessed=50, scored=9, calls=5, student=100)
    assert usage.price(prices) == 40 + 40 + 15 + 15 + 100
    assert usage.price(prices, prefix_cache=False) == 40 + 100 + 15 + 100


def test_what_the_student_processed() -> None:
    """Its prompts, all tokens, and what it drafted in vain; nothing where the teacher wrote alone."""
    tokens = torch.tensor([[1, 2, -1], [1, 2, 3]])
    nothing = torch.zeros(2, 3, dtype=torch.float64)
    rollout = Rollout(
        prompts=[Prompt((1, 2), ""), Prompt((1,), "")], tokens=tokens, rewritten=tokens == 3, rewards=nothing,
        token_log_prob=nothing, score=nothing, grades=nothing[:, 0], teacher=None, support=None,
        cost=RolloutCost(drafted=7, accepted=4, teacher_tokens=1),
    )  # fmt: skip
    assert Usage.of(rollout).student == 3 + 5 + 3
    rollout.cost = RolloutCost(teacher_tokens=5)
    assert Usage.of(rollout).student == 0


def test_gates_read_what_the_student_writes_alone() -> None:
    """D_t and the scores at the positions of its completions, in any batch; and the sum of D_t, read once more."""
    env = ragged(4)
    prompts = [env.prompts[i % len(env.prompts)] for i in range(10)]
    gates = {name: named_gate(name) for name in ("divergence", "margin", "student_entropy/first")}
    reading = read_alone(env, STUDENT, prompts, gates, seed=3)
    keys = episode_keys(3, np.arange(10))
    for name in ("divergence", "margin"):
        expected = collect(ragged(10), STUDENT, prompts, keys, Gate(named_gate(name).score, 1e9), 1)
        torch.testing.assert_close(reading.scores[name], expected.score[expected.mask])
    torch.testing.assert_close(reading.divergence, reading.scores["divergence"])
    assert reading.auroc("divergence", 0.5) == 1.0
    assert 0 < reading.auroc("margin", 0.5) < 1
    margin, tau = reading.scores["margin"], reading.threshold("margin", 0.3)
    assert float((margin > tau).double().mean()) <= 0.3 <= float((margin >= tau).double().mean()) + 0.02
    gated = decode(ragged(4), STUDENT, prompts, 0.4, gate=Gate(), draft_length=4)
    again = own_divergence(STUDENT, TEACHER.fork(), gated.rollout)
    assert again == pytest.approx(gated.divergence * float(gated.rollout.mask.sum()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of Sums that has learned nothing, with and without a hand-over head that has learned nothing."""
    out = tmp_path_factory.mktemp("on_call")
    short = ("--max-new-tokens", "6", "--student-width", "8", "--student-layers", "1", "--eval-prompts", "12")
    made = {}
    for name in ("with", "without"):
        flags = (*short, "--name", name)
        config = parse(["--agent", "gated", *flags])
        student = make_student(config, make_env(config, "test", 1, purpose="decode"))
        if name == "with":
            student.hand_over = HandOverHead(8, student.vocab_size, 16)  # type: ignore[attr-defined]
        made[name] = folder_of(out, "gated", 0, *flags, student=student)
    return made


def test_a_budget_says_what_to_expect(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folders["with"]), "--score", "predicted_divergence", "--budget", "0.3", "--prompts", "2"]
    assert decode_module.main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    share = re.search(r"budget 0.3: tau [\d.e-]+, at which the teacher writes ([\d.]+)% of the tokens", out)
    assert share is not None
    assert 20 <= float(share[1]) <= 40
    assert "expect accuracy" in out
    assert "positions that it scored" in out


def test_curves_of_several_gates(folders: dict[str, Path], tmp_path: Path) -> None:
    """A row a gate and threshold with all that it costs; both ends are shared; the reading has a row a gate."""
    scores = ["divergence", "student_entropy", "predicted_divergence", "divergence@predicted_divergence", "random"]
    arguments = [str(folders["with"]), "--prompts", "6", "--budget", "0.1", "0.4", "--curve", str(tmp_path)]
    assert decode_module.main([*arguments, "--score", *scores]) == 0
    with (tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["label"] for r in rows} == set(scores)
    for row in rows:
        tokens, written = int(row["tokens"]), int(row["teacher_tokens"])
        assert written / tokens == pytest.approx(float(row["share"]))
        assert int(row["scored"]) >= written
        assert int(row["processed"]) <= int(row["reprocessed"])
        if row["score"] in ("student_entropy", "predicted_divergence", "random") and 0 < float(row["tau"]) < math.inf:
            assert int(row["calls"]) == int(row["scored"]) == written
        if row["tau"] == "inf":
            assert (int(row["calls"]), int(row["processed"]), written) == (0, 0, 0)
    with (tmp_path / "reading.csv").open(newline="") as file:
        readings = list(csv.DictReader(file))
    assert {r["score"] for r in readings if r["auroc"]} == set(scores)
    assert sum(int(r["positions"]) for r in readings if r["positions"]) > 0
    assert len((tmp_path / "curve.md").read_text().splitlines()) == 2 + len(scores)
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_invalid_flags_are_one_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, name in (
        (["--score", "predicted_divergence"], "score"),
        (["--score", "divergence@predicted_divergence"], "score"),
        (["--score", "no_score"], "score"),
        (["--score", "margin", "divergence"], "score"),
        (["--score", "margin", "margin", "--curve", str(tmp_path / "curve")], "score"),
        (["--budget", "1.5"], "budget"),
        (["--budget", "0.1", "--tau", "1"], "budget"),
        (["--score", "divergence@margin", "--budget", "0.9"], "budget"),
        (["--screen-share", "0"], "screen_share"),
        (["--price-written", "-1"], "price_written"),
    ):
        assert decode_module.main([str(folders["without"]), "--prompts", "2", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {name}: ")
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
