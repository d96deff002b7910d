"""Assisted decoding: the ends of the curve, the marks, the picture, and that drafting changes nothing."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.assisted import assisted_gate
from agents.rollout import Rollout, completions_of
from distill_env.divergence import reverse_kl
from distill_env.env import DistillVectorEnv
from distill_env.gate_settings import Gate
from distill_env.models.base import TrainableModel
from distill_env.models.load import load_model
from distill_env.models.tabular import TabularModel, markov
from distill_env.models.toy import TEACHERS
from distill_env.randomness import Purpose, episode_keys, inverse_cdf, uniform
from distill_env.rendering import END
from distill_env.tasks.base import Prompt
from experiments import decode as decode_module
from experiments.answering.assisted import AssistedCompletions, completion_lines, decode
from experiments.answering.curve import short_labels
from experiments.answering.gate_picture import clearest, draw_gate
from experiments.running.build import make_env, make_student
from experiments.running.config_file import to_dict
from experiments.running.evaluating import EVALUATION_SEED
from experiments.running.flags import parse
from tests.helpers.tables import Ragged, gated_law, perturbed

V, HORIZON, N = 5, 9, 21
TEACHER = markov(V, order=2, seed=4, sharpness=1.5)
STUDENT = perturbed(TEACHER, 1.0)


def complete(tau: float, draft_length: int = 4, rows: int = 7, **kwargs: Any) -> AssistedCompletions:
    env = DistillVectorEnv(
        rows, Ragged(V, HORIZON), TEACHER, chunk=16, autoreset_mode="Disabled", reveal_teacher=False, **kwargs
    )
    prompts = [env.prompts[i % len(env.prompts)] for i in range(N)]
    return decode(env, STUDENT, prompts, tau, draft_length=draft_length)


def alone(model: TabularModel, prompts: list[Prompt], purpose: Purpose) -> list[list[int]]:
    """The completions of one model, token by token."""
    keys, written = episode_keys(EVALUATION_SEED, np.arange(len(prompts))), []
    for key, prompt in zip(keys, prompts, strict=True):
        completion: list[int] = []
        while len(completion) < HORIZON and model.eos_token_id not in completion:
            log_probs = model.start([[*prompt.ids, *completion]])
            completion.append(int(inverse_cdf(log_probs, uniform(key, len(completion), purpose))[0]))
        written.append(completion)
    return written


def tokens_of(rollout: Rollout) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask, strict=True)]


def test_the_ends_are_the_student_and_the_teacher_alone() -> None:
    student, teacher = complete(math.inf), complete(0.0)
    assert tokens_of(student.rollout) == alone(STUDENT, student.rollout.prompts, Purpose.STUDENT)
    assert tokens_of(teacher.rollout) == alone(TEACHER, teacher.rollout.prompts, Purpose.TEACHER)
    assert (student.teacher_share, teacher.teacher_share) == (0, 1)
    assert student.divergence > teacher.divergence == 0


@pytest.mark.parametrize("tau", [0.0, 0.3, math.inf])
@pytest.mark.parametrize("rewrite", ["sample", "argmax", "nucleus"])
def test_neither_drafts_nor_batches_change_the_completions(tau: float, rewrite: str) -> None:
    one = complete(tau, 1, rows=1, rewrite=rewrite)
    for length, rows in ((3, 7), (16, 5)):
        other = complete(tau, length, rows, rewrite=rewrite)
        assert other.rollout.tokens.equal(one.rollout.tokens)
        assert other.rollout.rewritten.equal(one.rollout.rewritten)


def test_the_divergence_is_that_of_the_law_of_the_completions() -> None:
    """KL(behaviour || teacher) per completion, from the law of all completions, is the mean of the sum of D_t."""
    tau, horizon = 0.3, 3
    law: dict[tuple[int, ...], float] = {}
    for (tokens, _), p in gated_law(STUDENT, TEACHER, Gate(tau=tau), horizon).items():
        law[tokens] = law.get(tokens, 0.0) + p
    table = TEACHER.log_table().detach()

    def log_p(tokens: tuple[int, ...]) -> float:
        return sum(float(table[TEACHER.walk(tokens[:t]), token]) for t, token in enumerate(tokens))

    exact = sum(p * (math.log(p) - log_p(tokens)) for tokens, p in law.items() if p > 0)
    env = DistillVectorEnv(500, Ragged(V, horizon), TEACHER, chunk=4, autoreset_mode="Disabled", reveal_teacher=False)
    decoded = decode(env, STUDENT, [Prompt((), "")], tau, samples=4000, draft_length=3)
    per_completion = torch.nan_to_num(decoded.rollout.score * ~decoded.rollout.rewritten).sum(1)
    error = float(per_completion.std()) / math.sqrt(len(per_completion))
    assert float(per_completion.mean()) == pytest.approx(exact, abs=4 * error)
    assert decoded.divergence == pytest.approx(float(per_completion.sum()) / float(decoded.rollout.mask.sum()))


def test_the_teacher_writes_hard_positions_only() -> None:
    tau = 0.3
    decoded = complete(tau)
    for prompt, tokens, flags in zip(
        decoded.rollout.prompts, tokens_of(decoded.rollout), decoded.rollout.rewritten, strict=True
    ):
        for t in range(len(tokens)):
            history = [[*prompt.ids, *tokens[:t]]]
            d = float(reverse_kl(STUDENT.start(history), TEACHER.start(history)))
            assert bool(flags[t]) == (d >= tau)


def test_a_negative_tau_is_refused() -> None:
    with pytest.raises(ValueError, match="tau"):
        assisted_gate(-1)


def test_labels_are_the_parts_that_differ() -> None:
    names = ["sums-weak-gated-s0", "sums-weak-rkl-s0", "sums-weak-gated-s1"]
    assert short_labels(names, [0, 0, 1]) == ["gated", "rkl", "gated"]
    assert short_labels(["gated-sums-s0", "rkl-sums-s3"], [0, 3]) == ["gated", "rkl"]
    assert short_labels(["gated-sums-s0"], [0]) == ["gated-sums"]
    assert short_labels(["a", "a-b"], [0, 0]) == ["a", "a-b"]


def folder_of(out: Path, agent: str, seed: int, *flags: str, student: TrainableModel) -> Path:
    """A run's folder with all that decoding reads of it."""
    config = parse(["--agent", agent, "--seed", str(seed), "--out", str(out), *flags])
    folder = out / config.name
    student.save_pretrained(folder / "student")
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Students of Sums that have learned nothing: two methods, and a second seed of one."""
    out = tmp_path_factory.mktemp("decode")
    short = ("--max-new-tokens", "6", "--student-width", "8", "--student-layers", "1", "--draft-limit", "4")
    folders = []
    for agent, seed in (("gated", 0), ("gated", 1), ("rkl", 0)):
        config = parse(["--agent", agent, "--seed", str(seed), *short])
        student = make_student(config, make_env(config, "test", 1, purpose="decode"))
        folders.append(folder_of(out, agent, seed, *short, student=student))
    return folders


def test_the_share_is_that_of_the_marks(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A token of Sums is a character, so the marked tokens can be counted."""
    assert decode_module.main([str(runs[0]), "--tau", "1", "0", "inf", "--prompts", "3", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    shares = []
    for part in out.split("\ntau ")[1:]:
        lines = re.findall(r"= (.*)   (\d+) of (\d+) tokens by the teacher", part)
        assert len(lines) == 6
        for completion, teacher, total in lines:
            marked = sum(map(len, re.findall("⟦(.*?)⟧", completion)))
            assert (marked, len(re.sub("[⟦⟧]", "", completion))) == (int(teacher), int(total))
        counts = np.array([[int(t), int(n)] for _, t, n in lines]).sum(0)
        shares.append(f"{counts[0] / counts[1]:.1%}")
    assert shares[1:] == ["100.0%", "0.0%"]
    (line,) = [x for x in out.split("95 % intervals")[1].splitlines() if "tokens by the teacher" in x]
    assert re.findall(r"[\d.]+%", line) == shares


def test_the_teachers_tokens_are_red(runs: list[Path]) -> None:
    decoded, env = complete(0.3), DistillVectorEnv(1, Ragged(V, HORIZON), TEACHER)
    red = [
        len(line.plain[span.start : span.end].strip("⟦⟧"))
        for line in completion_lines(env.task, decoded)
        for span in line.spans
        if span.style == "red"
    ]
    assert sum(red) == int(decoded.rollout.rewritten.sum())


def test_the_curve_has_both_ends_and_a_row_a_run_and_tau(runs: list[Path], tmp_path: Path) -> None:
    arguments = [*map(str, runs), "--tau", "0.5", "2", "--prompts", "4", "--curve", str(tmp_path)]
    assert decode_module.main(arguments) == 0
    with (tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4
    assert {r["label"] for r in rows} == {"gated", "rkl"}
    for row in rows:
        assert int(row["teacher_tokens"]) / int(row["tokens"]) == pytest.approx(float(row["share"]))
        assert float(row["correct_chains_low"]) <= float(row["correct_chains"]) <= float(row["correct_chains_high"])
        assert float(row["share"]) == {"inf": 0.0, "0.0": 1.0}.get(row["tau"], float(row["share"]))
    table = (tmp_path / "curve.md").read_text()
    assert table.splitlines()[0] == "| tau, nats | gated | rkl |"
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| inf: the student alone", "| 2", "| 0.5", "| 0: the teacher alone",
    ]  # fmt: skip
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_invalid_flags_are_one_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve, picture = ("--curve", str(tmp_path / "curve")), ("--picture", str(tmp_path / "gate.png"))
    for arguments, name in (
        ([str(tmp_path)], "run"),
        ([*map(str, runs)], "runs"),
        ([str(runs[0]), "--prompt", "1+1="], "prompt"),
        ([str(runs[0]), "--tau", "-1"], "tau"),
        ([str(runs[0]), "--prompts", "0"], "prompts"),
        ([str(runs[0]), "--prompt", "1+1=", *curve], "curve"),
        ([str(runs[0]), "--tau", "0", *picture], "tau"),
    ):
        assert decode_module.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {name}: ")
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_picture_is_of_the_completion_that_shows_both_writers(tmp_path: Path) -> None:
    """Of all, none has more positions of the rarer writer, the student's counted where D_t is above tau / 10."""
    tau, decoded = 0.3, complete(0.3)

    def of_both(scores: list[float], rewritten: list[bool]) -> int:
        own = [d for d, by_teacher in zip(scores, rewritten, strict=True) if not by_teacher]
        return min(sum(rewritten), sum(d > tau / 10 for d in own))

    best = clearest(decoded)
    assert (
        of_both(best.scores, best.rewritten)
        == max(of_both(p.scores, p.rewritten) for p in completions_of(decoded.rollout))
        > 0
    )
    draw_gate(Ragged(V, HORIZON), decoded, tmp_path / "new" / "gate.png")
    assert (tmp_path / "new" / "gate.png").stat().st_size > 5000


def test_runs_of_two_tasks_make_no_curve(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = folder_of(tmp_path, "rkl", 0, "--env", "categorical", student=markov())
    assert decode_module.main([str(runs[0]), str(table), "--curve", str(tmp_path / "curve")]) == 1
    assert "error: runs: " in capsys.readouterr().err
    assert not (tmp_path / "curve").exists()


def test_a_prompt_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer than any of the task's own; the sums teacher is the language model."""
    path = str(TEACHERS["sums"])
    flags = ("--env", "lm", "--teacher", path, "--student", path, "--max-new-tokens", "12")
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1="}\n')
    folder = folder_of(
        tmp_path, "gated", 0, *flags, "--task-path", str(tmp_path / "data.jsonl"), student=load_model(path)
    )
    assert decode_module.main([str(folder), "--tau", "0.5", "--prompt", "2+3+4=", "--draft-length", "3"]) == 0
    completion = re.search(r"2\+3\+4= (.+)   0 of 9 tokens by the teacher", capsys.readouterr().out)
    assert completion is not None
    assert completion[1].replace(" ", "").endswith("9" + END)  # this tokenizer decodes with spaces
