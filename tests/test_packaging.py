"""The wheel holds one package, and a checkout works beside foreign packages that have the names of its folders."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import REPOSITORY

ROOMS = ("distill_env", "agents", "experiments")
EXAMPLE = """\
import sys

sys.path.insert(0, {checkout!r})
from agents.distill import DistillAgent, DistillConfig

from distill_env.env import DistillVectorEnv
from distill_env.models.tabular import uniform

env = DistillVectorEnv(8, "categorical", chunk=4, autoreset_mode="Disabled")
losses = []
agent = DistillAgent(uniform(env.vocab_size), DistillConfig(batch_size=8))
agent.learn(env, 2, lambda iteration, metrics: losses.append(metrics["train/loss"]))
print("losses:", len(losses))
"""
START = """\
import importlib.abc, site, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {extras}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
site.addsitedir({site!r})
"""
# Where the name on the package index is not the name of the import. Transformers imports gguf and bitsandbytes, and
# PyTorch imports tensorboard, when these parts of them are used.
IMPORTED_AS = {
    "accelerate": ("accelerate", "gguf_file", "BitsAndBytesConfig"),
    "bitsandbytes": ("BitsAndBytesConfig",),
    "gguf": ("gguf_file",),
    "math-verify": ("math_verify",),
    "pyyaml": ("yaml",),
    "stable-baselines3": ("stable_baselines3",),
    "tensorboard": ("torch.utils.tensorboard",),
    "trackio": ("'trackio'",),  # experiments/running/tracking.py imports the tracker that --track names
    "wandb": ("'wandb'",),
}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in another folder, with one thread."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of the wheel, built by the backend that is installed, so without network."""
    folder = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_has_one_package(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"distill_env"}


def test_the_wheel_has_every_file_of_the_package(wheel: list[str]) -> None:
    tracked = subprocess.run(["git", "ls-files", "distill_env"], cwd=REPOSITORY, capture_output=True, text=True).stdout
    if not tracked:
        pytest.skip("needs a git checkout")
    assert set(tracked.split()) == {name for name in wheel if ".dist-info/" not in name}
    for file in ("py.typed", "data/sums_teacher/model.safetensors", "data/coins_teacher/tokenizer.json"):
        assert f"distill_env/{file}" in wheel


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose site-packages begin with packages of others named as our folders, and have no extra's."""
    tmp_path = tmp_path_factory.mktemp("foreign")
    site = tmp_path / "site-packages"
    (site / "agents").mkdir(parents=True)
    for file in ("agents/__init__.py", "evaluate.py", "experiments.py", "tests.py"):
        (site / file).write_text("FOREIGN = True\n")
    (site / "foreign.pth").write_text(f"import sys; sys.path.insert(0, {str(site)!r})\n")
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup/sitecustomize.py").write_text(START.format(site=str(site), extras=sorted(only_in_extras())))
    variables = {"PYTHONPATH": str(tmp_path / "startup")}
    check = "import agents, evaluate, experiments; print(agents.FOREIGN, evaluate.FOREIGN, experiments.FOREIGN)"
    assert run(sys.executable, "-c", check, cwd=tmp_path, **variables).stdout.split() == ["True"] * 3
    return variables


def test_runs_beside_foreign_packages_and_without_extras(foreign: dict[str, str], tmp_path: Path) -> None:
    """From another folder, too."""
    small = ["--iterations", "1", "--batch-size", "4", "--eval-samples", "2"]
    tiny = ["--env", "categorical", *small, "--out", "here", "--agent"]
    path = str(REPOSITORY / "experiments/run.py")
    code = (
        "import runpy, sys\n"
        "for agent in ('gated', 'ppo'):\n"
        f"    sys.argv = [{path!r}, *{tiny!r}, agent]\n"
        "    try:\n"
        f"        runpy.run_path({path!r}, run_name='__main__')\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code\n"
    )
    trained = run(sys.executable, "-c", code, cwd=tmp_path, **foreign)
    assert trained.returncode == 0, trained.stderr
    assert len(list((tmp_path / "here").glob("*/evaluation.json"))) == 2


@pytest.mark.parametrize("command", sorted(p.name for p in (REPOSITORY / "experiments").glob("[!_]*.py")))
def test_every_command_starts_beside_foreign_packages(command: str, foreign: dict[str, str], tmp_path: Path) -> None:
    helped = run(sys.executable, REPOSITORY / "experiments" / command, "--help", cwd=tmp_path, **foreign)
    assert helped.returncode == 0, helped.stderr
    assert "--" in helped.stdout


def test_a_script_of_ones_own_trains_from_another_folder(foreign: dict[str, str], tmp_path: Path) -> None:
    """By the two lines that docs/index.md gives."""
    script = tmp_path / "mine/train.py"
    script.parent.mkdir()
    script.write_text(EXAMPLE.format(checkout=str(REPOSITORY)))
    done = run(sys.executable, script, cwd=tmp_path, **foreign)
    assert done.stdout == "losses: 2\n", done.stderr


def declared() -> tuple[set[str], set[str]]:
    """Distributions that `pip install -e .` brings, and those of the extras but for the tools of docs and tests."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [
        r for name, group in project["optional-dependencies"].items() if name not in ("docs", "test") for r in group
    ]
    core, optional = (
        {re.split(r"[\[<>=!~ ]", r)[0].lower() for r in rows} for rows in (project["dependencies"], extras)
    )
    return core, optional


def only_in_extras() -> set[str]:
    """Packages that a plain install lacks, as they are imported."""
    core, optional = declared()
    return {name.replace("-", "_") for name in optional - core}


def imports_and_names() -> set[str]:
    """Modules that the rooms import, names from them, names of arguments, and quoted strings."""
    found: set[str] = set()
    for room in ROOMS:
        for path in (REPOSITORY / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or "", *(alias.name for alias in node.names)]
                elif isinstance(node, ast.arg | ast.keyword):
                    names = [node.arg or ""]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    names = [f"'{node.value}'"]
                else:
                    continue
                found |= {part for name in names for part in (name, name.split(".")[0])}
    return found


def test_every_declared_dependency_is_imported() -> None:
    imported = imports_and_names()
    names = set.union(*declared())
    assert sorted(name for name in names if not {*IMPORTED_AS.get(name, (name,))} & imported) == []
