"""How commands begin and end."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest

from distill_env.checks import Range
from experiments.running.cli import command
from tests.helpers.paths import REPOSITORY


@dataclass(frozen=True)
class Config:
    """A command of one flag."""

    share: Annotated[float, Range(least=0, below=1)] = 0.5
    """Of something."""


def test_the_range_of_a_flag_is_checked_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[float] = []
    main = command(lambda config: done.append(config.share), Config, None)
    assert [main(["--share", value]) for value in ("0", "0.9", "1", "-0.1", "nan")] == [0, 0, 1, 1, 1]
    assert done == [0, 0.9]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["share"] * 3


@pytest.mark.parametrize("line", ["run.py --help", "run.py --help-all", "side_by_side.py --help"])
def test_a_reader_that_goes_away_ends_a_command_quietly(line: str) -> None:
    script, flag = line.split()
    program = [sys.executable, str(REPOSITORY / "experiments" / script), flag]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate()
    assert errors == b""
    assert process.returncode == 1
