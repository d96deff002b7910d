"""A folder on disk is the old one or the new one, whatever goes wrong while writing; damage is an error of one line."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.atomic_io import write_folder, write_text
from agents.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_state,
    optimizer_tensors,
    random_state,
    rename_damaged,
    restore_optimizer,
    restore_random_state,
    save_checkpoint,
    save_state,
)
from agents.config import DistillConfig, SB3Config
from agents.distill import DistillAgent
from agents.sb3 import SB3Agent
from distill_env.env import DistillVectorEnv
from distill_env.models.causal_lm import CausalLM
from distill_env.models.tabular import OneModeModel, TabularModel, markov, one_mode
from distill_env.models.toy import small_teacher
from tests.helpers.tables import perturbed


def writer(text: str, fail_after: int = 2) -> Callable[[Path], None]:
    """Writes two files, or finds the disk full after one or none."""

    def write(folder: Path) -> None:
        for i, name in enumerate(("a", "b")):
            if i == fail_after:
                (folder / name).write_text(text[:1])  # half a file
                raise OSError(errno.ENOSPC, "No space left on device")
            (folder / name).write_text(text)

    return write


def contents(path: Path) -> set[str]:
    return {(path / name).read_text() for name in ("a", "b")}


@pytest.mark.parametrize("fail_after", [0, 1])
def test_a_full_disk_leaves_the_old_state(tmp_path: Path, fail_after: int) -> None:
    """It is an error; the old folder stays whole, nothing half-written remains, and the next attempt succeeds."""
    path = tmp_path / "checkpoint"
    with pytest.raises(OSError, match="No space left"):
        write_folder(path, writer("zero", fail_after))
    assert list(tmp_path.iterdir()) == []
    write_folder(path, writer("old"))
    with pytest.raises(OSError, match="No space left"):
        write_folder(path, writer("new", fail_after))
    assert contents(path) == {"old"}
    assert list(tmp_path.iterdir()) == [path]
    write_folder(path, writer("new"))
    assert contents(path) == {"new"}
    assert list(tmp_path.iterdir()) == [path]


def test_the_remains_of_a_killed_writer_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    write_folder(path, writer("old"))
    (tmp_path / "checkpoint.new").mkdir()
    (tmp_path / "checkpoint.new" / "c").write_text("half")
    assert contents(path) == {"old"}
    write_folder(path, writer("new"))
    assert contents(path) == {"new"}
    assert not (path / "c").exists()


class Killed(BaseException):
    pass


class Faults:
    """The process dies at its k-th call to the system: that one and all that would follow raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, die_at: int) -> None:
        self.calls, self.die_at = 0, die_at
        for module, name in [(os, n) for n in ("mkdir", "open", "fsync", "replace", "unlink", "rmdir")] + [
            (io, "open")
        ]:
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            if self.calls >= self.die_at:
                raise Killed
            self.calls += 1
            return call(*args, **kwargs)

        return counting


def state_writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir()
        writer(text)(folder)

    return write


def read_both(folder: Path) -> str:
    a, b = ((folder / name).read_text() for name in ("a", "b"))
    assert a == b
    return a


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("iteration", [2, 4], ids=["one that exists", "a new one"])
def test_killed_at_any_call_a_checkpoint_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, iteration: int
) -> None:
    """The newest is the one from before or the new one, whole; the next attempt leaves the newest ones and no others.

    One that exists is not written again."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # many, and nothing here is about power cuts
    for die_at in itertools.count():
        root = tmp_path / str(die_at)
        for i in (0, 2):
            save_checkpoint(root, i, state_writer(f"old {i}"), keep)
        with monkeypatch.context() as patch:
            faults = Faults(patch, die_at)
            with contextlib.suppress(Killed):
                save_checkpoint(root, iteration, state_writer("new"), keep)
        read, path, damaged = load_checkpoint(root, read_both)
        assert read in ("old 2", "new")
        assert int(path.name) == (4 if read == "new" else 2)
        assert damaged == {}
        save_checkpoint(root, iteration, state_writer("new"), keep)
        save_checkpoint(root, 6, state_writer("newer"), keep)
        names = ["000006", f"{iteration:06d}"][:keep]
        assert [p.name for p in checkpoints(root)] == names
        assert {p.name for p in root.iterdir()} == set(names)
        assert load_checkpoint(root, read_both)[0] == "newer"
        if faults.calls < die_at:
            break
    assert read == ("new" if iteration == 4 else "old 2")
    assert iteration == 2 or die_at > 20


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_any_call_a_folder_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    """Between the deletion of the old folder and the renaming of the new one, the new one is whole beside it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    seen = set()
    for die_at in itertools.count():
        path = tmp_path / str(die_at) / "folder"
        path.parent.mkdir()
        if replaces:
            write_folder(path, writer("old"))
        with monkeypatch.context() as patch:
            faults = Faults(patch, die_at)
            with contextlib.suppress(Killed):
                write_folder(path, writer("new"))
        if path.exists():
            assert contents(path) in ({"old"}, {"new"})
            seen |= contents(path)
        elif replaces:
            assert contents(path.with_name("folder.new")) == {"new"}
        write_folder(path, writer("newer"))
        assert contents(path) == {"newer"}
        assert {p.name for p in path.parent.iterdir()} <= {"folder", "folder.deleted"}
        if faults.calls < die_at:
            break
    assert seen == ({"old", "new"} if replaces else {"new"})
    assert die_at > 5


def test_killed_at_any_call_a_file_is_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    for die_at in itertools.count():
        write_text(path, "old")
        with monkeypatch.context() as patch:
            faults = Faults(patch, die_at)
            with contextlib.suppress(Killed):
                write_text(path, "new")
        assert path.read_text() in ("old", "new")
        if faults.calls < die_at:
            break
    assert path.read_text() == "new"
    assert die_at > 3


def test_a_damaged_checkpoint_is_skipped_and_renamed(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        save_checkpoint(tmp_path, i, state_writer(str(i)), 3)
    (tmp_path / "000003/random.json").write_text("{")
    (tmp_path / "000002/agent/b").unlink()
    read, path, damaged = load_checkpoint(tmp_path, read_both)
    assert (read, path.name) == ("1", "000001")
    assert [p.name for p in damaged] == ["000003", "000002"]
    assert all(reason.startswith("checkpoint: ") and "\n" not in reason for reason in damaged.values())
    for bad in damaged:
        rename_damaged(bad)
    assert load_checkpoint(tmp_path, read_both)[2] == {}
    save_checkpoint(tmp_path, 2, state_writer("again"), 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["000002", "000001"]
    with pytest.raises(ValueError, match=r"^checkpoint: "):
        load_checkpoint(tmp_path / "nothing", read_both)


def test_the_global_generators_resume_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return (*torch.randn(3).tolist(), *np.random.normal(size=3), random.gauss(0, 1))  # noqa: NPY002

    draw()  # numpy and Python draw Gaussians in pairs: the second of one is part of the state
    save_state(tmp_path, "random", *random_state())
    drawn = draw()
    assert draw() != drawn
    restore_random_state(*load_state(tmp_path, "random"))
    assert draw() == drawn


def test_a_path_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        with pytest.raises(ValueError, match=rf"^checkpoint: .*/{name}' is not a folder"):
            DistillAgent.load(tmp_path / name)


def trained(path: Path | None = None) -> tuple[DistillAgent, DistillVectorEnv]:
    """An agent after three iterations, saved if there is a path."""
    teacher = markov(5, seed=1)
    env = DistillVectorEnv(4, "categorical", teacher, task_kwargs={"vocab_size": 5}, chunk=4, autoreset_mode="Disabled")
    agent = DistillAgent(perturbed(teacher, 1.0), DistillConfig(batch_size=8)).learn(env, 3)
    if path is not None:
        agent.save(path)
    return agent, env


class FullDisk(TabularModel):
    """A student that finds the disk full after half of its weights."""

    def save_pretrained(self, path: str | Path) -> None:
        super().save_pretrained(path)
        file = Path(path) / "table.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_agent_survives_a_full_disk(tmp_path: Path) -> None:
    """The last good checkpoint loads, and training goes on."""
    agent, env = trained(tmp_path / "checkpoint")
    saved = agent.student.log_table().detach()
    agent.learn(env, 1)
    agent.student.__class__ = FullDisk
    with pytest.raises(OSError, match="No space left"):
        agent.save(tmp_path / "checkpoint")
    loaded = DistillAgent.load(tmp_path / "checkpoint")
    assert loaded.student.log_table().equal(saved)
    assert loaded.iteration == 3
    agent.learn(env, 1)


def test_the_systems_own_refusal_to_write_is_an_os_error(tmp_path: Path) -> None:
    """A file-size limit of the process stands in for the full disk: every writer below ours meets the real error."""
    agent, env = trained(tmp_path / "checkpoint")
    agent.learn(env, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint' could not be written .*File too large"):
            agent.save(tmp_path / "checkpoint")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert DistillAgent.load(tmp_path / "checkpoint").iteration == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    agent.save(tmp_path / "checkpoint")
    assert DistillAgent.load(tmp_path / "checkpoint").iteration == 4


FILES = ["optimizer.safetensors", "optimizer.json", "student/table.safetensors"]
DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "bytes": lambda data: b"\xff\xfe\x00" + data[3:],
    "missing": lambda data: None,
    "another file": lambda data: b"{}",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_one_clear_line(
    tmp_path: Path, file: str, damage: Callable[[bytes], bytes | None]
) -> None:
    """Whichever file was cut, emptied, overwritten or lost, the error is a ValueError of one line with the path."""
    trained(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / file
    data = damage(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^checkpoint: .* is damaged") as error:
        DistillAgent.load(tmp_path / "checkpoint")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "checkpoint") in str(error.value)


def test_state_survives_the_disk(tmp_path: Path) -> None:
    """Tensors bit for bit, in every dtype and also if not contiguous, with gradients left out; JSON as it was."""
    tensors = {
        "double": torch.randn(3, 4, dtype=torch.float64).T,
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(3),
        "parameter": torch.randn(2, requires_grad=True),
    }
    save_state(tmp_path, "x", tensors, {"n": [1, None, 0.1], "inf": float("inf")})
    loaded, state = load_state(tmp_path, "x")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].equal(value)
        assert loaded[name].dtype == value.dtype
    assert state == {"n": [1, None, 0.1], "inf": float("inf")}


def test_an_optimizer_survives_the_disk(tmp_path: Path) -> None:
    """Restored over JSON and safetensors, its next step is the one that it would have taken, bit by bit."""
    ends = []
    for restored in (False, True):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
        for step in range(6):
            if restored and step == 3:
                tensors, groups = optimizer_tensors(optimizer)
                save_state(tmp_path, "o", tensors, {"groups": groups})
                tensors, state = load_state(tmp_path, "o")
                optimizer = torch.optim.AdamW(parameters, lr=1.0)
                restore_optimizer(optimizer, tensors, state["groups"])
            optimizer.zero_grad()
            sum((p.sin() ** 2).sum() for p in parameters).backward()  # type: ignore[union-attr]
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert ends[0].equal(ends[1])


@pytest.mark.parametrize("model", [markov(4), one_mode(11, 0.3, 0.17)], ids=["table", "one mode"])
def test_a_table_survives_the_disk(tmp_path: Path, model: TabularModel) -> None:
    """The same kind with the same parameters, bit for bit."""
    with torch.no_grad():
        model.table += 0.1  # an offset that the distributions of a table do not show, but an optimiser does
    model.save_pretrained(tmp_path)
    loaded = TabularModel.load(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.table.equal(model.table)
    assert loaded.log_table().equal(model.log_table())
    assert loaded.next_state.equal(model.next_state)
    assert loaded.eos_token_id == model.eos_token_id
    assert isinstance(loaded, OneModeModel) == (model.vocab_size == 11)


@pytest.mark.parametrize("kind", ["distill", "sb3"])
def test_a_student_cut_to_the_shared_ids_comes_back_cut(kind: str, tmp_path: Path) -> None:
    """Its folder holds all rows of the head; which of them exist, and which one ends, are the agent's to remember."""
    torch.manual_seed(0)
    student = CausalLM(small_teacher("sums", 8, 1), vocab_size=12, eos_token_id=11, absent_ids=(2, 5))
    agent = DistillAgent(student, DistillConfig()) if kind == "distill" else SB3Agent(student, SB3Config())
    agent.save(tmp_path / "checkpoint")
    back = type(agent).load(tmp_path / "checkpoint").student
    assert (back.vocab_size, back.eos_token_id, back.absent_ids) == (12, 11, (2, 5))
    assert torch.equal(back.start([(3, 4)]), student.fork().start([(3, 4)]))


def test_a_damaged_student_of_ppo_is_one_line_too(tmp_path: Path) -> None:
    agent = SB3Agent(CausalLM(small_teacher("sums", 8, 1), eos_token_id=13), SB3Config())
    agent.save(tmp_path / "checkpoint")
    (tmp_path / "checkpoint/student/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^checkpoint: .* is damaged") as error:
        SB3Agent.load(tmp_path / "checkpoint")
    assert "\n" not in str(error.value)
