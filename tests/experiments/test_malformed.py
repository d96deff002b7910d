"""Malformed input of every kind ends with one line that names the argument and an exit code, and loses nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from agents.checkpoint import checkpoints
from distill_env.models.tabular import markov
from experiments import ablate, compare, evaluate, report
from experiments import run as run_module
from experiments.running.config_file import default_config
from experiments.running.section import flag_names
from tests.helpers.damage import (
    CONFIG,
    TOKENIZER,
    Damage,
    W,
    cut,
    each,
    edit,
    is_one_line_with,
    lose,
    one,
    row,
    weights,
    write,
    write_language_model,
)
from tests.helpers.paths import REPOSITORY

SMALL = "--env categorical --iterations 4 --checkpoint-every 2 --batch-size 4 --draft-length 2 --eval-samples 2"
SMALL += " --validate-every 4 --track none"


@dataclasses.dataclass(frozen=True)
class World:
    """What is good, to be damaged in copies."""

    lm: Path  # a language model
    other: Path  # the same with another tokenizer
    run: Path  # a finished run of four iterations, checkpoints 2 and 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("good")
    assert run_module.main([*SMALL.split(), "--out", str(root / "runs"), "--name", "run"]) == 0
    lm, other = write_language_model(root / "lm"), write_language_model(root / "other", eos_token="<end>")
    return World(lm, other, root / "runs/run")


Act = Callable[[World, Path], Any]  # given an empty folder; returns an exit code, or raises


class Check:
    """That what a case does ends with one line that names the argument, the file or the place."""

    def __init__(self, world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.world, self.folder, self.capsys = world, folder, capsys

    def __call__(self, act: Act, *names: str) -> None:
        """The line is the message of an error, or what a command prints before an exit code other than 0. For a flag
        that is unknown or cannot be parsed it is the flag parser's message, which is in a box."""
        self.capsys.readouterr()
        try:
            code = act(self.world, self.folder)
        except SystemExit as stop:
            line = " ".join(self.capsys.readouterr().err.split()) if stop.code == 2 else ""
        except (ValueError, OSError, FloatingPointError) as error:
            line = str(error)
        else:
            assert code, f"accepted: {self.capsys.readouterr().out[-500:]}"
            line = self.capsys.readouterr().err.strip()
            line = " ".join(line.split()) if "see above" in line else line
        is_one_line_with(line, *names)


@pytest.fixture
def check(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    return Check(world, tmp_path, capsys)


def kind_of(hint: Any) -> Any:
    """int, float or the choices of a field; None for others."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if isinstance(hint, types.UnionType):
        hint = next(k for k in get_args(hint) if k is not types.NoneType)
    return hint if hint in (int, float) else None


FREE_BELOW = {"task_reward", "log_prob_floor"}  # may be negative
MAY_BE_INFINITE = {"rewrite_cost", "tau", "alpha", "score_clip", "loss_clip", "max_grad_norm"}


def flags() -> Iterator[tuple[str, str, str]]:
    """An agent that has the flag, the flag, and a value out of range, for every number and every choice."""
    configs: list[Any] = [
        default_config(agent, "categorical") for agent in ("tests.helpers.plugin_agent:Frequencies", "ppo", "gated")
    ]
    agents = [(config, config.agent) for config in configs]
    seen: set[tuple[type, str]] = set()
    while agents:
        config, agent = agents.pop()
        hints = get_type_hints(type(config))
        for field in dataclasses.fields(config):
            name, kind = flag_names(type(config))[field.name], kind_of(hints[field.name])
            if dataclasses.is_dataclass(value := getattr(config, field.name)):
                agents.append((value, agent))
            if (type(config), name) in seen:
                continue
            seen.add((type(config), name))
            if isinstance(kind, tuple):
                yield agent, name, f"{kind[0]}{kind[0][-1]}"  # a near miss
            elif kind is int:
                yield agent, name, "-1"
            elif kind is float:
                yield from ((agent, name, value) for value in ("nan", "-inf"))
                yield from ((agent, name, value) for value in ["inf"] * (name not in MAY_BE_INFINITE))
                yield from ((agent, name, value) for value in ["-0.5"] * (name not in FREE_BELOW))


@pytest.mark.parametrize(("agent", "name", "value"), list(flags()))
def test_a_flag_out_of_range(agent: str, name: str, value: str, check: Check) -> None:
    """Every numeric flag and every choice of every agent; nothing is left behind."""
    out = check.folder / "runs"
    arguments = ["--agent", agent, "--env", "categorical", f"--{name.replace('_', '-')}={value}", "--out", str(out)]
    check(lambda *_: run_module.main(arguments), name)
    assert not out.exists()


# values of one flag that no agent accepts
VALUES = {
    "iterations": "0 1.5",
    "max-new-tokens": "0 100000000000000 many",
    "max-prompt-tokens": "0",
    "draft-limit": "0 1000000000000000",
    "batch-size": "0 1000000000000000",
    "eval-prompts": "0",
    "eval-samples": "0",
    "validate-every": "0",
    "checkpoint-every": "0",
    "keep-checkpoints": "0",
    "threads": "1000000",
    "seed": "9223372036854775808",
    "student-width": "18",
    "student-layers": "0",
    "student-dtype": "bfloat16",  # of a table
    "warm-start": "1.5",
    "rewrite-top-p": "0 1.1",
    "log-prob-floor": "0 5",
    "learning-rate": "0",
    "tau": "much",
    "alpha": "0",
    "smoothing": "1",
    "score-clip": "0",
    "beta": "0",
    "skew": "1",
    "top-p": "0",
    "budget": "1",
    "task-reward": "1",  # with gamma 0
    "agent": "gatedd Gated : no_such_module:Agent json:NoSuchClass json:JSONDecoder",
    "name": f"../elsewhere /tmp/elsewhere a/b .. . {'x' * 300}",
    "push-to-hub": "student a/b/c",
    "tua": "0.3",
}
# command lines by the argument that the line names
PAIR = "--env lm --teacher LM --student LM"
FLAGS = {
    "agent": ["--agent ''"],
    "tau": ["--tau"],
    "gated": ["gated"],
    "env": ["--env sum"],
    "nothing": ["--resume --name nothing"],
    "n_epochs": ["--agent ppo --n-epochs 0"],
    "gamma": ["--agent ppo --gamma 1.01"],
    "rows": ["--rows 65 --batch-size 64"],
    "budget": ["--budget 0.1 --teacher-writes never", "--budget 0.1 --tau inf"],
    "step_reduction": ["--cumulative --step-reduction mean"],
    "weighting": ["--weighting soft --hand-over-rest"],
    "top_k": ["--score rank --top-k 3"],
    "loss": ["--loss todi --top-p 0.9"],
    "teacher_writes": ["--loss negative"],
    "forward_kl_anneal": ["--loss reverse --forward-kl-anneal 10"],
    "estimator": ["--agent gate_only --estimator sampled"],
    "importance": [
        "--agent rkl --importance-weights", "--agent minillm --top-k 3", "--agent minillm --teacher-rate-anneal 5"
    ],
    "teacher_cache": [
        "--teacher-cache cache", "--agent ppo --teacher-cache cache", "--agent fkl --teacher-cache DATA"
    ],
    "student_dtype": ["--agent ppo --student-dtype bfloat16"],
    "teacher": ["--env lm --student x"],
    "student": ["--env lm --teacher x"],
    "/nowhere": ["--student /nowhere", "--env lm --teacher /nowhere --student /nowhere"],
    "tokenizer": ["--env lm --teacher LM --student OTHER --task-path DATA"],
    "task": [f"{PAIR} --task gsm9k"],
    "task_path": [PAIR],
    "few_shot": [f"{PAIR} --task-path DATA --few-shot 5", f"{PAIR} --task text --few-shot 2"],
    "chat": [f"{PAIR} --task-path DATA --chat yes"],
    "step_pattern": [f"{PAIR} --task-path DATA --step-pattern ["],
    "max_prompt_tokens": [f"{PAIR} --task-path DATA --max-prompt-tokens 2", f"{PAIR} --task-path LONG"],
    "max_new_tokens": [f"{PAIR} --task-path DATA --max-new-tokens 60"],
}  # fmt: skip
for flag, values in VALUES.items():
    FLAGS.setdefault(flag, []).extend(f"--{flag}={value}" for value in values.split())


@each(FLAGS)
def test_a_command_line_that_is_wrong(case: str, name: str, check: Check) -> None:
    """And nothing is left behind."""
    data, long, out = (check.folder / file for file in ("data.jsonl", "long.txt", "runs"))
    data.write_text("".join(row(prompt=f"say {i}", output="x") for i in range(3)))
    long.write_text("x" * 300)
    paths = {"LM": check.world.lm, "OTHER": check.world.other, "DATA": data, "LONG": long}
    arguments = [str(paths.get(word, word)) for word in shlex.split(case)]
    if "--env" not in arguments and "--resume" not in arguments:
        arguments = ["--env", "categorical", *arguments]
    check(lambda *_: run_module.main([*arguments, "--out", str(out)]), name)
    assert not out.exists()


def damaged(damage: Damage, *roles: str) -> Act:
    """The command line with a damaged teacher, student, or both."""

    def act(world: World, folder: Path) -> int:
        shutil.copytree(world.lm, folder / "bad")
        damage(folder / "bad")
        (folder / "data.txt").write_text("one\ntwo\n")
        paths = {role: folder / "bad" if role in roles else world.lm for role in ("teacher", "student")}
        arguments = [x for flag, path in paths.items() for x in (f"--{flag}", str(path))]
        arguments += [
            "--task-path",
            str(folder / "data.txt"),
            "--out",
            str(folder / "runs"),
            "--track",
            "none",
            "--max-new-tokens",
            "8",
        ]
        code = run_module.main(["--env", "lm", *arguments])
        assert not (folder / "runs").exists()
        return code

    return act


def drop_end(folder: Path) -> None:
    """A tokenizer without an end-of-sequence token."""
    edit("tokenizer_config.json", eos_token=None)(folder)
    fields = json.loads((folder / TOKENIZER).read_text())
    (folder / TOKENIZER).write_text(json.dumps(fields | {"added_tokens": []}))


NAN = weights(W, one("model.embed_tokens.weight", math.nan))
PAIRS: dict[str, list[Act]] = {
    "bad": [
        damaged(NAN, "teacher"),
        damaged(NAN, "student"),
        damaged(cut(W), "teacher"),
        damaged(lose(CONFIG), "student"),
        damaged(cut(TOKENIZER), "student"),
    ],
    "tokenizer": [
        damaged(cut(TOKENIZER), "teacher"),
        damaged(write(TOKENIZER, b"null"), "teacher"),
        damaged(lambda f: (lose(TOKENIZER)(f), lose("tokenizer_config.json")(f)), "teacher"),
    ],
    "eos_token": [damaged(drop_end, "teacher", "student")],
}


@each(PAIRS)
def test_a_pair_that_does_not_go(case: Act, name: str, check: Check) -> None:
    check(case, name)


def in_all(damage: Damage) -> Damage:
    """The same damage in all checkpoints."""
    return lambda folder: [damage(path) for path in checkpoints(folder / "checkpoints")]


def exchange(first: str, second: str) -> Damage:
    def damage(folder: Path) -> None:
        a, b = (folder / first).read_bytes(), (folder / second).read_bytes()
        (folder / first).write_bytes(b)
        (folder / second).write_bytes(a)

    return damage


def append(file: str, text: str) -> Damage:
    return lambda folder: (folder / file).write_text((folder / file).read_text() + text)


def resume(*flags: str) -> Callable[[Path], int]:
    return lambda run: run_module.main(
        ["--resume", "--out", str(run.parent), "--name", run.name, "--iterations", "6", *flags]
    )


def again(*flags: str) -> Callable[[Path], int]:
    return lambda run: evaluate.main([str(run), *flags])


def unharmed(_: Path) -> None:
    """No damage."""


def begin_anew(run: Path) -> int:
    return run_module.main([*SMALL.split(), "--out", str(run.parent), "--name", run.name])


def into_itself(run: Path) -> int:
    return evaluate.main([str(run), "--eval-prompts", "1", "--out", str(run)])


def on_full_disk(run: Path) -> int:
    """A limit on the size of files stands in for it: the configuration is written, a checkpoint is not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        return resume()(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


OPTIMIZER, STATE, TABLE = "agent/optimizer.safetensors", "agent/optimizer.json", "agent/student/table.safetensors"
BROKEN: dict[str, Callable[[str], Damage]] = {
    "cut": cut,
    "empty": lambda file: write(file, b""),
    "lost": lose,
    "of bytes": lambda file: write(file, b"\xff\xfe\0"),
}

Work = Callable[[Path], int]
FILES = (OPTIMIZER, STATE, TABLE, "random.safetensors", "random.json")
NEXT = [(in_all(damage(file)), resume()) for file in FILES for damage in BROKEN.values()]
DISK: dict[str, list[tuple[Damage, Work]]] = {
    "checkpoint": [
        *NEXT,
        (in_all(exchange(OPTIMIZER, TABLE)), resume()),
        (in_all(weights(OPTIMIZER, lambda t: next(v for v in t.values() if v.dim()).fill_(math.nan))), resume()),
        (in_all(weights(TABLE, lambda t: t["logits"].fill_(math.nan))), resume()),
        (in_all(lambda checkpoint: markov(4).save_pretrained(checkpoint / "agent/student")), again()),
        (in_all(write(STATE, b"[]")), resume()),
        (in_all(write("random.json", b'{"numpy": ["MT"]}')), resume()),
        (in_all(weights("random.safetensors", lambda t: t.update(torch=torch.zeros(3, dtype=torch.uint8)))), resume()),
        (lambda run: shutil.rmtree(run / "checkpoints"), again()),
        (in_all(cut(OPTIMIZER)), again()),
    ],
    "0.exp_avg": [(in_all(weights(OPTIMIZER, lambda t: t.update({"0.exp_avg": torch.ones(2, 2)}))), resume())],
    "iteration": [(in_all(edit(STATE, iteration=None)), resume())],
    "four": [(in_all(edit(STATE, iteration="four")), resume())],
    CONFIG: [
        *((damage(CONFIG), resume()) for damage in BROKEN.values()),
        (write(CONFIG, b"null"), again()),
        (lose(CONFIG), again()),
        (edit(CONFIG, agent_options=3), resume()),
        (unharmed, lambda run: evaluate.main([str(run / CONFIG)])),
    ],
    "gatedd": [(edit(CONFIG, agent="gatedd"), resume())],
    "agent": [(edit(CONFIG, agent=None), resume())],
    "iterations": [(edit(CONFIG, training={"iterations": value}), again()) for value in ("six", math.nan)],
    "colour": [(edit(CONFIG, colour="red"), resume())],
    "hardd": [(edit(CONFIG, agent_options={"method": {"teacher_writes": "hardd"}}), resume())],
    "tau": [
        (edit(CONFIG, agent_options={"method": {"gate": {"tau": math.nan}}}), again()),
        (unharmed, resume("--tau", "3")),
    ],
    "evaluation.json": [
        *((damage("evaluation.json"), resume()) for damage in BROKEN.values()),
        (write("evaluation.json", b"[]"), resume()),
    ],
    "before": [(edit("evaluation.json", before=value), resume()) for value in (None, 3)],
    "metrics.csv": [
        (write("metrics.csv", b"\xff\xfe\0\n"), resume()),
        (write("metrics.csv", b"a,b\n1,2\n"), resume()),
        (append("metrics.csv", "five,x\n"), resume()),
        (append("metrics.csv", "5" + ",1" * 99 + "\n"), resume()),
    ],
    "env": [(unharmed, resume("--env", "sums"))],
    "resume": [(unharmed, begin_anew)],
    "eval_prompts": [(unharmed, again("--eval-prompts", "0"))],
    "eval_samples": [(unharmed, again("--eval-samples", "-3"))],
    "corpus": [(unharmed, again("--corpus", "x.txt"))],
    "corpus_tokens": [(unharmed, again("--corpus", "x.txt", "--corpus-tokens", "-5"))],
    "run'": [(unharmed, into_itself)],
    "--samples": [(unharmed, again("--samples", "3"))],
    "File too large": [(unharmed, on_full_disk)],
}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that say when, not what."""
    skip = ("alarms.log", ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skip}


@each(DISK)
def test_a_run_that_is_damaged(case: tuple[Damage, Work], name: str, check: Check) -> None:
    """What was good stays as it was, where it was."""
    damage, work = case
    folder = check.folder / "run"
    shutil.copytree(check.world.run, folder)
    damage(folder)
    before = contents(folder)
    check(lambda *_: work(folder), name)
    after = contents(folder)
    assert set(before) <= set(after)
    # a run that is resumed writes down its new number of iterations first, and logs those that it makes
    resumed = work is on_full_disk or after.get(CONFIG) != before.get(CONFIG)
    assert {k for k in before if after[k] != before[k]} <= ({CONFIG, "metrics.csv"} if resumed else set())


def file_in_place(folder: Path) -> Path:
    path = folder / "file"
    path.write_text("mine")
    return path


def into(out: str) -> Act:
    return lambda *_: run_module.main([*SMALL.split(), "--out", out])


def occupied(command: Callable[[list[str]], int], *flags: str) -> Act:
    """A file where the folder should be; it stays."""

    def act(_: World, folder: Path) -> int:
        path = file_in_place(folder)
        code = command([*flags, "--out", str(path)])
        assert path.read_text() == "mine"
        return code

    return act


def comparison(*flags: str, damage: tuple[str, str] | None = None) -> Act:
    """compare.py over a folder, in which a file is damaged; nothing is run."""

    def act(world: World, folder: Path) -> int:
        if damage is not None:
            path = folder / "runs" / damage[0]
            path.parent.mkdir(parents=True)
            path.write_text(damage[1])
        return compare.main(["--envs", "categorical", "--warm", "none", "--out", str(folder / "runs"), *flags])

    return act


def reported(results: str | None, *flags: str) -> Act:
    def act(_: World, folder: Path) -> int:
        if results is not None:
            (folder / "results.csv").write_bytes(results.encode("latin-1"))
        return report.main(["--runs", str(folder), "--out", str(folder / "out"), "--no-viewer", *flags])

    return act


HEADER = "study,env,warm,label,seed,run,correct_chains,seconds\n"
GOOD = HEADER + "main,sums,weak,gated,0,a,0.5,3\nmain,sums,weak,rkl,0,b,0.6,3\n"
JOB = "categorical-none-gated-s0"
COMMANDS: dict[str, list[Act]] = {
    "out": [into("/dev/null"), into("/proc/runs"), occupied(run_module.main, *SMALL.split())],
    "file'": [
        occupied(compare.main, "--envs", "categorical", "--warm", "none"),
        lambda world, folder: reported(GOOD, "--out", str(file_in_place(folder)))(world, folder),
    ],
    "gatedd": [comparison("--agents", "gated", "gatedd")],
    "agents": [comparison("--agents", *names) for names in (["=gated"], [""], ["gated", "gated"])],
    "'a'": [comparison("--agents", "a=gated", "a=rkl")],
    "seed": [comparison("--agents", "gated", "--seeds", *seeds) for seeds in (["1", "1"], ["-1"], ["one"])],
    "tau": [comparison("--agents", "loose=gated --tau x")],
    "warm": [comparison("--warm", "strongg")],
    "env": [comparison("--envs", "sum")],
    "jobs": [comparison("--jobs", "0")],
    "study": [comparison("--study", "a/b")],
    "fan_out": [comparison("--fan-out", "slurm")],
    "iterations": [comparison("--agents", "gated", "--", "--iterations", "0")],
    CONFIG: [comparison("--agents", "gated", damage=(f"{JOB}/config.json", "{"))],
    "run": [comparison("--agents", "gated", damage=(f"{JOB}/evaluation.json", "{"))],
    "studies": [lambda _, folder: ablate.main(["--studies", "tauu", "--out", str(folder / "x")])],
    "gama": [lambda _, folder: ablate.main(["--studies", "tau", "--out", str(folder / "x"), "--", "--gama", "1"])],
    "runs": [reported(text) for text in (None, "", HEADER)],
    "results.csv": [
        comparison("--agents", "gated", damage=("results.csv", GOOD + "a,b,c,d,e\n")),
        *(reported(text) for text in ("a,b\n1,2\n", "\xff\xfe")),
        *(
            reported(f"{GOOD}main,sums,weak,{rest}")
            for rest in ('"ga', "x,1,c,much,3\n", "x,one,c,1,3\n", "x,1,c,1,3,4\n")
        ),
    ],
    "answers": [reported(GOOD, "--answers", "-1")],
}


@each(COMMANDS)
def test_a_command_that_cannot_be_done(case: Act, name: str, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is run."""
    monkeypatch.setattr("experiments.comparing.grid.for_each", lambda *_: pytest.fail("something was run"))
    check(case, name)


PROCESSES = {
    "run.py --tau nan": "tau",
    "evaluate.py /nowhere": "run",
    "compare.py --agents gated --warm warm --out /nowhere/runs": "warm",
}


@pytest.mark.parametrize("line", PROCESSES)
def test_a_process_ends_with_one_line_and_a_code(line: str) -> None:
    script, *arguments = line.split()
    command = [sys.executable, str(REPOSITORY / "experiments" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert PROCESSES[line] in done.stderr
