"""Models on a device: the tests of `helpers/on_stand_in_device.py`, in a process of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.paths import HELPERS, REPOSITORY


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_the_stand_in_device(marked: str) -> None:
    options = ["-q", "-m", marked, "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, str(HELPERS / "on_stand_in_device.py")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
