"""The cache on disk: the same run at no cost, a miss if anything differs, and damaged files are written again."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.atomic_io import write_file
from agents.config import DistillConfig, OptimizerConfig
from agents.distill import DistillAgent
from agents.methods import METHODS, Method, variant
from agents.teacher_cache import TeacherCache, fingerprint
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.tabular import TabularModel, markov
from distill_env.models.toy import small_teacher
from distill_env.randomness import episode_keys
from tests.agents.test_distill import Blind
from tests.helpers.tables import NO_PROMPT, perturbed

TEACHER = markov(5, seed=1)
COSTS = ("cost/teacher_passes", "cost/teacher_positions", "cost/teacher_tokens")


def make_env(teacher: TabularModel = TEACHER, rows: int = 4, horizon: int = 6, **kwargs: Any) -> DistillVectorEnv:
    task = {"vocab_size": 5, "max_new_tokens": horizon}
    return DistillVectorEnv(
        rows, "categorical", teacher, task_kwargs=task, chunk=4, autoreset_mode="Disabled", **kwargs
    )


def run(
    row: Method, cache: TeacherCache | None, iterations: int = 3, env: Any = None, **kwargs: Any
) -> tuple[DistillAgent, list[dict[str, float]]]:
    """A run from the same student, and what was measured."""
    config = DistillConfig(row, **{"batch_size": 8, "optimizer": OptimizerConfig(0.05), "seed": 3, **kwargs})
    agent, seen = DistillAgent(perturbed(TEACHER, 1.0), config, cache), []
    agent.learn(make_env() if env is None else env, iterations, lambda _, metrics: seen.append(metrics))
    return agent, seen


ROWS = {
    "fkl": METHODS["fkl"],
    "sft": METHODS["sft"],
    "nucleus": variant(METHODS["fkl"], top_p=0.8, top_k=3),
    "sampled": variant(METHODS["fkl"], estimator="sampled", gamma=0.5),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_warm_cache_gives_the_same_run_at_no_cost(row: Method, tmp_path: Path) -> None:
    """Weights and metrics bit by bit as without a cache; the second run reports the cost of the first as cached."""
    plain, expected = run(row, None)
    cold, paid = run(row, TeacherCache(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    env = make_env()
    warm, free = run(row, TeacherCache(tmp_path), env=env)
    assert env.teacher_usage.passes == 0
    for agent in (cold, warm):
        assert torch.equal(agent.student.table, plain.student.table)  # type: ignore[attr-defined]
    for a, b, c in zip(expected, paid, free, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith("time/")} == {
            k: v for k, v in b.items() if not k.startswith("time/")
        }
        for key in COSTS:
            assert a[key] > 0
            assert c[key] == 0
            assert c[key.replace("cost/", "cost/cached_")] == a[key]
        assert {k: v for k, v in a.items() if not k.startswith(("time/", "cost/"))} == {
            k: v for k, v in c.items() if not k.startswith(("time/", "cost/"))
        }


def test_losses_on_the_same_completions_share_them(tmp_path: Path) -> None:
    run(METHODS["sft"], TeacherCache(tmp_path))
    _, seen = run(METHODS["fkl"], TeacherCache(tmp_path))
    assert all(metrics["cost/teacher_tokens"] == 0 for metrics in seen)
    _, seen = run(METHODS["fkl"], TeacherCache(tmp_path), iterations=4, micro_batch=2)
    assert [metrics["cost/teacher_tokens"] > 0 for metrics in seen] == [False] * 3 + [True]


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the environment, of the run
    "teacher": ({"teacher": perturbed(TEACHER, 1e-6)}, {}),
    "horizon": ({"horizon": 7}, {}),
    "draw": ({"rewrite": "argmax"}, {}),
    "nucleus": ({"rewrite": "nucleus"}, {}),
    "span": ({"rewrite_span": "step"}, {}),
    "price": ({"rewrite_cost": 0.25}, {}),
    "seed": ({}, {"seed": 4}),
    "batch": ({}, {"batch_size": 4}),
    "truncation": ({}, {"row": variant(METHODS["fkl"], top_k=2)}),
}


@pytest.mark.parametrize(("env", "change"), OTHERS.values(), ids=OTHERS)
def test_nothing_is_reused_where_anything_differs(env: dict[str, Any], change: dict[str, Any], tmp_path: Path) -> None:
    run(METHODS["fkl"], TeacherCache(tmp_path))
    arguments = {"row": METHODS["fkl"], **change}
    other, seen = run(**arguments, cache=TeacherCache(tmp_path), env=make_env(**env))
    assert all(metrics["cost/teacher_tokens"] > 0 for metrics in seen)
    plain, _ = run(**arguments, cache=None, env=make_env(**env))
    assert torch.equal(other.student.table, plain.student.table)  # type: ignore[attr-defined]


def test_other_reference_completions_are_scored_again(tmp_path: Path) -> None:
    """The writer `data`: the teacher scores them once, and anew if one of them is another."""
    row = variant(METHODS["fkl"], teacher_writes="reference")
    cache, env, asked = TeacherCache(tmp_path), make_env(rows=2), []
    agent = DistillAgent(perturbed(TEACHER, 1.0), DistillConfig(row, batch_size=2), cache)
    for reference in ((0, 1, 4), (0, 1, 4), (0, 2, 4)):
        env.prompts = (dataclasses.replace(NO_PROMPT, ids=(1,), reference_completion=reference),)
        agent.iteration = 0
        agent.learn(env, 1, lambda _, metrics: asked.append(metrics))
    positions = [metrics["cost/teacher_positions"] for metrics in asked]
    assert positions[0] == positions[2] > 0 == positions[1]
    assert {metrics["rollout/reference_tokens"] for metrics in asked} == {6.0}  # from the cache, too


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "header": lambda data: b"\xff" * 20 + data[20:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_a_warning_and_is_written_again(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """One line for it, the same run, and a whole file afterwards."""
    plain, _ = run(METHODS["fkl"], TeacherCache(tmp_path))
    file = sorted(tmp_path.iterdir())[1]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    warnings: list[str] = []
    again, seen = run(METHODS["fkl"], TeacherCache(tmp_path, warnings.append))
    (line,) = warnings
    assert line.startswith(f"teacher_cache: {str(file)!r} is damaged (")
    assert "\n" not in line
    assert sum(metrics["cost/teacher_tokens"] > 0 for metrics in seen) == 1
    assert torch.equal(again.student.table, plain.student.table)  # type: ignore[attr-defined]
    run(METHODS["fkl"], TeacherCache(tmp_path, warnings.append))
    assert len(warnings) == 1
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["gated", "rkl", "gkd", "random_rewrite", "dagger"])
def test_a_method_whose_rollouts_depend_on_the_student_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^teacher_cache: "):
        run(METHODS[name], TeacherCache(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_wrappers_and_teachers_without_weights_are_refused(tmp_path: Path) -> None:
    """A wrapper may change rewards; a teacher without weights in memory cannot be told from others."""
    with pytest.raises(ValueError, match=r"^teacher_cache: .*Blind"):
        run(METHODS["fkl"], TeacherCache(tmp_path), env=Blind(make_env()))

    class Served:
        vocab_size, eos_token_id = 5, 4

    with pytest.raises(ValueError, match=r"^teacher_cache: .*Served"):
        fingerprint(Served())


def test_a_fingerprint_follows_weights_and_configuration_alone(tmp_path: Path) -> None:
    """Moved to another folder a model stays the same; one bit of a weight, the dtype, a setting or a cut change it."""
    torch.manual_seed(0)
    model = CausalLM(small_teacher("sums", 8, 1))
    for folder in ("a", "b"):
        model.save_pretrained(tmp_path / folder)
    prints = [fingerprint(CausalLM.load(tmp_path / "a"))]
    assert fingerprint(CausalLM.load(tmp_path / "b")) == prints[0]
    prints.append(fingerprint(CausalLM.load(tmp_path / "a", dtype="bfloat16")))
    prints.append(fingerprint(CausalLM.load(tmp_path / "a", vocab_size=12, eos_token_id=11)))
    other = CausalLM.load(tmp_path / "a")
    other.model.config.rms_norm_eps *= 2
    prints.append(fingerprint(other))
    other = CausalLM.load(tmp_path / "a")
    with torch.no_grad():
        weight = next(other.parameters()).view(torch.int32)
        weight[0, 0] ^= 1
    prints.append(fingerprint(other))
    assert len(set(prints)) == 5


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    def full(aside: Path) -> None:
        aside.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", full, shared=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^teacher_cache: "):
        TeacherCache(tmp_path / "file")


def test_draws_are_the_episodes_own(tmp_path: Path) -> None:
    """The keys of the draws are part of a file's name: the same prompts under other keys are another rollout."""
    cache, env = TeacherCache(tmp_path), make_env()
    agent = DistillAgent(perturbed(TEACHER, 1.0), DistillConfig(METHODS["fkl"], batch_size=4), cache)
    prompts = list(env.prompts[:1]) * 4
    for seed in (0, 1):
        keys = episode_keys(seed, np.arange(4))
        cache.rollout(env, agent.method, prompts, keys, lambda keys=keys: agent.write_completions(env, prompts, keys))
    assert len(list(tmp_path.iterdir())) == 2
